"""Write runs/EXPERIMENT/report/: report.html, which opens from disk and asks the network for
nothing, REPORT.md, pictures.

python -m report.build --experiment quick
"""

import base64
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import yaml

from letterhead.config.experiment import Experiment
from letterhead.config.models import source_name
from letterhead.files import atomic_open, escape_markdown, read_json, read_jsonl, sha256_file
from letterhead.models import checkpoints
from letterhead.pipeline import (
    BERT,
    METHODS,
    REPORT,
    SFT,
    SHORT_TITLES,
    Stage,
    compared_methods,
    left_out,
    record_of,
    source_of,
    stages_of,
)
from letterhead.plan.evidence import evidence
from letterhead.rows.card import order_lines
from letterhead.runs import results
from letterhead.runs.stage import StageRun, run
from letterhead.stats import decision, metrics, phrases, verdict
from letterhead.stats.figures import caption_of
from report import article, pictures

HERE = Path(__file__).parent
SHOWN_ROWS = 15
SHOWN_CHARACTERS = 400
WHAT_A_PICTURE_SHOWS = {
    "frontier": "What decides, on test rows, against the price of a row (logarithmic). Numbers are "
    "those of the table; a bar is the loss against the highest with its bounds, or a cascade's "
    "price; the ring marks what the first sentence names. Dotted: the same cascades at other "
    "shares of rows for their dear half, which were no candidates",
    "ranking": "Macro F1 on the test rows with 95 % intervals: the trained methods, and, on "
    "an axis of its own, zero-shot",
    "f1": "Macro F1 on test and validation rows against training step",
    "losses": "Cross-entropy against training step, logarithmic: training, and on test rows "
    "(for SFT the option's own)",
    "confusion": "Confusion matrices: rows are the true classes, columns the predicted ones",
    "reliability": "How often a prediction is right against how sure the method was; points as "
    "large as their share of rows",
    "service": "Requests per second of closed loops; latency of open loops against the rate "
    "(broken off where it misses "
    "the objective, the dashed line)",
}
ALONG_THE_TRAINING = {"f1", "losses"}
DECODES = {
    "generate": "whole answer",
    "one_token": "one token",
    "forward": "letters in one forward",
    "head": "classifier",
}
ENGINES = {
    "sklearn": "scikit-learn",
    "st": "sentence-transformers",
    "hf": "HF",
    "onnx": "ONNX Runtime",
    "onnx_int8": "ONNX Runtime, int8",
    "two": "both halves",
    "vllm": "vLLM",
}


def shown(experiment: Experiment) -> dict[str, Any]:
    """What the report shows besides the decision, and what it is made with."""
    return {
        "records": {
            stage.name: record_of(stage.name, experiment) for stage in shown_stages(experiment)
        },
        "sources": {
            path.name: sha256_file(path)
            for path in (*sorted(HERE.iterdir()), source_of("letterhead.plan.evidence"))
            if path.is_file()
        },
        "config": experiment.model_dump(mode="json"),
        "bench": results.read_bench(experiment),
    }


def shown_stages(experiment: Experiment) -> list[Stage]:
    """The stages that the report is of."""
    return [stage for stage in stages_of(experiment) if stage is not REPORT]


def main(experiment: Experiment) -> None:
    stage = StageRun(experiment, REPORT)
    bench = results.read_bench(experiment)
    absent = set() if bench else {"service"}
    if not any(method.has_steps for method in compared_methods(experiment)):
        absent |= ALONG_THE_TRAINING
    drawn = {name: what for name, what in WHAT_A_PICTURE_SHOWS.items() if name not in absent}
    paths = {name: stage.folder / f"{name}.png" for name in drawn}
    page, text = stage.folder / "report.html", stage.folder / "REPORT.md"
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        decided = read_json(experiment.results_folder / "decision.json")
        comparison = (
            read_json(experiment.results_folder / "comparison.json")
            | decided
            | {"best": decided["ship"]}
        )
        for name in WHAT_A_PICTURE_SHOWS:
            (stage.folder / f"{name}.png").unlink(missing_ok=True)
        draw(experiment, comparison, paths)
        if bench:
            in_service = {served(row): row for row in bench["rows"]}
            pictures.draw_service(
                paths["service"], caption_of(experiment), in_service, bench["objective_ms"]
            )
        context = gather(experiment, comparison) | {
            "bench": bench,
            "pictures": drawn,
            "served": served,
            "headline": verdict.headline,
            "figure": figure,
            "article_rps": article.RPS,
        }
        images = {
            name: base64.b64encode(path.read_bytes()).decode() for name, path in paths.items()
        }
        for path, template, more in (
            (page, "report.html.jinja", {"images": images}),
            (text, "report.md.jinja", {}),
        ):
            with atomic_open(path) as file:
                file.write(environment().get_template(template).render(context | more))
        stage.finish([page, text, *paths.values()], f"{page} and REPORT.md beside it")


def served(row: dict) -> str:
    """What a reader calls a row of the bench."""
    titles = SHORT_TITLES | {name: method.short for name, method in METHODS.items()}
    return f"{titles[row['method']]}, {ENGINES[row['engine']]}, {DECODES[row['decode']]}"


def environment() -> jinja2.Environment:
    """Templates; whatever stands in the data is escaped, in HTML by Jinja, in Markdown by the
    filter `md`."""
    templates = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=jinja2.select_autoescape(enabled_extensions=("html.jinja",), default=False),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters |= {
        "figure": figure,
        "signed": verdict.signed,
        "duration": duration,
        "human": verdict.human,
        "times": verdict.as_times,
        "milliseconds": verdict.as_milliseconds,
        "metric_title": phrases.metric_title,
        "short": short,
        "md": escape_markdown,
    }
    return templates


def figure(value: float | None, digits: int = 3) -> str:
    """A number with so many decimals, 0 without a sign; None is a dash."""
    return "–" if value is None else f"{round(value, digits) + 0.0:.{digits}f}"


def duration(seconds: float | None) -> str:
    """Seconds in words."""
    if seconds is None:
        return "–"
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.2f} h"


def short(text: str) -> str:
    """A text's beginning, white space collapsed."""
    flat = " ".join(text.split())
    return flat if len(flat) <= SHOWN_CHARACTERS else flat[:SHOWN_CHARACTERS].rstrip() + " …"


def gather(experiment: Experiment, comparison: dict) -> dict:
    """All that the templates show."""
    ranked = sorted(comparison["methods"].items(), key=lambda item: -item[1]["f1_macro"])
    by_name, trained = (
        dict(ranked),
        [
            name
            for name, entry in ranked
            if METHODS[entry["method"]].is_trained
            and METHODS[entry["method"]].loader
            and not entry["halves"]
        ],
    )
    stages = {stage.name: record_of(stage.name, experiment) for stage in shown_stages(experiment)}
    trained_by = {METHODS[entry["method"]].trained_by for entry in by_name.values()} - {None}
    return {
        "experiment": experiment,
        "model_source": source_name(experiment.decoder.model),
        "n_test": max(entry["n"] for entry in by_name.values()),
        "apart": max(
            (
                abs(entry["f1_macro"] - entry["f1_macro_without_near_duplicates"])
                for _, entry in ranked
                if verdict.is_trained(entry)
                and entry["f1_macro_without_near_duplicates"] is not None
            ),
            default=None,
        ),
        "told_apart": [pair for pair in comparison["pairs"] if pair["f1_p_holm"] < decision.ALPHA],
        "ranked": ranked,
        "titles": {name: entry["title"] for name, entry in ranked},
        "comparison": comparison,
        "table": verdict.table(comparison, comparison["methods"]),
        "say": partial(phrases.phrase, comparison["language"]),
        "metric": phrases.metric_title(comparison["metric"], comparison["language"]).strip(),
        "article": article if article.is_the_articles(experiment) else None,
        "evidence": evidence(
            experiment,
            read_json(experiment.data_folder / "data_card.json"),
            round(decision.ALPHA / comparison["alpha"]) + 1,
        ),
        "left_out": ", ".join(method.title for method in left_out(experiment)),
        "overfit": overfitting(experiment),
        "searched": [
            sentence
            for entry in by_name.values()
            for record in [stages.get(METHODS[entry["method"]].trained_by)]
            if (sentence := searched(experiment, entry, record))
        ],
        "trained": trained,
        **hard_rows(experiment, trained),
        "shown": SHOWN_ROWS,
        "card": (card := read_json(experiment.data_folder / "data_card.json")),
        "order": order_lines(card),
        "config": yaml.safe_dump(
            experiment.model_dump(mode="json"), allow_unicode=True, sort_keys=False
        ),
        "stages": stages,
        "trained_on": "; ".join(
            sorted({f"{stages[name]['device']} ({stages[name]['machine']})" for name in trained_by})
        ),
    }


def history(experiment: Experiment, method: str, split: str) -> dict[int, results.Result]:
    """A method's results on a split, by step."""
    files = experiment.results_folder.glob(f"{method}@*.json")
    found = map(results.parse_result, files)
    return {
        result.step: result
        for result in sorted(filter(None, found), key=lambda found: found.step)
        if result.split == split
    }


def searched(experiment: Experiment, entry: dict, record: dict | None) -> str | None:
    """What the search of a method's learning rate took and brought, in words; None without one."""
    found = (record or {}).get("search")
    if not found:
        return None
    sentence = (
        f"{entry['title']}: {found['trials']} trials, {found['pruned']} of them given up early, in "
        f"{duration(found['seconds'])}. The learning rate {found['rate']:.2g} has a log loss of "
        f"{found['loss']:.3f} on validation rows"
        f"{' (nats a token of the answer)' if entry['method'] == SFT.name else ''}"
    )
    if experiment.balance != "none":
        sentence += ", each class with the same share"
    before = found["loss_before"]
    if before is None or before == found["loss"]:
        return sentence + "."
    return sentence + f"; the one that the experiment names, {before:.3f}."


def overfitting(experiment: Experiment) -> str:
    """Whether BERT overfits after two epochs, as the article says it does: test loss, and a paired
    test of F1, in words; none where BERT is left out."""
    if not BERT.is_in(experiment):
        return ""
    rows = read_json(experiment.data_folder / "data_card.json")["shared"]["rows"]
    planned = experiment.encoder.head.on(rows).num_train_epochs
    epochs = record_of(BERT.trained_by, experiment).get("epochs", planned)
    test = history(experiment, BERT.name, "test")
    lowest, last = min(test, key=lambda step: test[step].eval_loss), max(test)
    per_epoch = last / epochs
    after = min(test, key=lambda step: abs(step - 2 * per_epoch))
    if lowest == last == after:
        return (
            f"BERT's test loss is lowest, {test[last].eval_loss:.3f}, at the last step that was "
            f"evaluated, {last} (epoch {epochs:g}): it might have learnt more. Whether it overfits "
            "past two epochs, as the article says, was not put to the test."
        )
    words = (
        f"BERT's test loss is lowest, {test[lowest].eval_loss:.3f}, at step {lowest} "
        f"(epoch {lowest / per_epoch:.1f}), "
        f"and {test[last].eval_loss:.3f} at the end (step {last}, epoch {epochs:g})."
    )
    if after == last:
        return (
            words + " It was not evaluated past two epochs, so the article's claim is not put to "
            "the test."
        )
    truth, predicted = results.class_numbers(experiment, results.read_rows(experiment, "test")), []
    for step in (last, after):
        lines = results.read_predictions(experiment, f"{BERT.name}@{step}", "test")
        predicted.append(np.array([experiment.labels.index(line["prediction"]) for line in lines]))
    change = metrics.f1_loss(
        truth, *(answers[None] for answers in reversed(predicted)), len(experiment.labels)
    )
    low, high = change.interval(0.025)
    loss = test[last].eval_loss - test[after].eval_loss
    words += (
        f" From step {after} (epoch {after / per_epoch:.1f}) to the end the test loss "
        f"changes by {loss:+.3f} and macro F1 "
        f"by {verdict.signed(change.value, 4)} (95 % interval {verdict.signed(low, 4)} "
        f"to {verdict.signed(high, 4)}): "
    )
    if high < 0:
        return words + "it overfits after two epochs, as the article says."
    sure = "the model grows too sure, but " if loss > 0 else ""
    return (
        words
        + sure
        + (
            "its predictions get better."
            if low > 0
            else "no difference in its predictions can be shown."
        )
    )


def hard_rows(experiment: Experiment, names: list[str]) -> dict[str, dict]:
    """Test rows that every named method gets wrong, and rows where they disagree (the most evenly
    split first): how many there are, and the first of them. The files are read side by side, a row
    at a time."""
    found = {"wrong": {"n": 0, "rows": []}, "split": {"n": 0, "rows": []}}
    files = [read_jsonl(results.result_files(experiment, name, "test")[1]) for name in names]
    for number, lines in enumerate(zip(*files, strict=True)):
        right = sum(line["prediction"] == line["label"] for line in lines)
        kinds = [("wrong", number)] if not right else []
        if len({line["prediction"] for line in lines}) > 1:
            kinds.append(("split", abs(2 * right - len(names))))
        for kind, place in kinds:
            answers = {
                name: (line["prediction"], line["probabilities"][line["prediction"]])
                for name, line in zip(names, lines, strict=True)
            }
            kept = found[kind]
            kept["n"] += 1
            kept["rows"].append(
                (
                    place,
                    number,
                    {"id": lines[0]["id"], "label": lines[0]["label"], "answers": answers},
                )
            )
            if len(kept["rows"]) > 4 * SHOWN_ROWS:
                kept["rows"] = sorted(kept["rows"], key=itemgetter(0, 1))[:SHOWN_ROWS]
    for kept in found.values():
        kept["rows"] = [row for *_, row in sorted(kept["rows"], key=itemgetter(0, 1))[:SHOWN_ROWS]]
    shown = {row["id"] for kept in found.values() for row in kept["rows"]}
    text = {
        row["id"]: row["text"]
        for row in results.read_rows(experiment, "test")
        if row["id"] in shown
    }
    for row in (row for kept in found.values() for row in kept["rows"]):
        row["text"] = text[row["id"]]
    return found


def draw(experiment: Experiment, comparison: dict, paths: dict[str, Path]) -> None:
    """Draw all pictures."""
    has_han = pictures.use_fonts()
    caption = caption_of(experiment)
    methods = sorted(comparison["methods"].items(), key=lambda item: -item[1]["f1_macro"])
    entries = [entry for _, entry in methods]
    by_rows = sorted(
        entries, key=lambda entry: -entry["n"]
    )  # a sample of the test rows does not lead
    groups = [
        [entry for entry in by_rows if verdict.is_trained(entry) == trained]
        for trained in (True, False)
    ]
    pictures.draw_frontier(
        paths["frontier"],
        caption,
        verdict.table(comparison, comparison["methods"]),
        comparison["best"],
        comparison["curves"],
        comparison["margin"],
        comparison["price_unit"],
        comparison["metric"],
        comparison["language"] if has_han else phrases.ENGLISH,
    )
    pictures.draw_ranking(paths["ranking"], caption, groups)
    f1, losses = {}, {}
    for entry in (entry for entry in entries if METHODS[entry["method"]].has_steps):
        method, title = entry["method"], entry["title"]
        by_split = {split: history(experiment, method, split) for split in results.SPLITS}
        f1[title] = {
            split: (list(steps), [result.f1_macro for result in steps.values()])
            for split, steps in by_split.items()
            if steps
        }
        test = {step: result for step, result in by_split["test"].items() if step}
        log = [
            line
            for line in checkpoints.log_history(METHODS[method].checkpoints(experiment))
            if "loss" in line
        ]
        is_answer = METHODS[method] is SFT
        own = "the option's own (test)" if is_answer else "test"
        losses[title] = {
            "training" + (" (all answer tokens)" if is_answer else ""): (
                [line["step"] for line in log],
                [line["loss"] for line in log],
            ),
            own: (list(test), [result.eval_loss for result in test.values()]),
        }
    if f1:
        pictures.draw_curves(paths["f1"], caption, f1, "macro F1")
        pictures.draw_curves(paths["losses"], caption, losses, "cross-entropy, nats", log=True)
    pictures.draw_confusions(paths["confusion"], caption, entries, experiment.labels)
    sure = {}
    for name, entry in methods:
        if entry["ece"] is not None:
            lines = results.read_predictions(experiment, name, "test")
            confidence = np.array([max(line["probabilities"].values()) for line in lines])
            right = np.array([line["prediction"] == line["label"] for line in lines])
            sure[entry["title"]] = (confidence, right, entry["ece"], entry["ece_floor"])
    pictures.draw_reliability(paths["reliability"], caption, sure)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
