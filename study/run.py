"""A study: an experiment varied in some keys, every cell with every seed; a table, a picture, and what they say.

    python -m study.run --experiment quick --study curve

Each cell is an ordinary experiment, `runs/EXPERIMENT.STUDY.CELL.seedN`, that `make` brings up to date; one that is done is
not started again. What the study makes lies in `runs/EXPERIMENT/STUDY/`, first after one seed, then after each further one.
"""

import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from tqdm import tqdm
from yaml import YAMLError

from eval import compare
from letterhead import decision, metrics, results
from letterhead.experiment import Count, Experiment, Section, load_experiment
from letterhead.figures import plt, save
from letterhead.records import LetterheadError, atomic_open, read_json, write_json
from letterhead.stage import Stage, run, stage_outputs
from prep.sources import local_sha256
from sft.train import PLACES
from study.cells import make, seed_keys, settings

FOLDER = Path("experiments/studies")
# method → the target that trains and scores it
TARGETS = {"tfidf": "tfidf", "bert": "bert", "linear_head": "linear-head", "sft": "eval-ckpts"}
UNTRAINED = ("zero_shot_no_think", "zero_shot_calibrated")


class Study(Section):
    """A validated study. `rows` are sizes of nested training sets (null: all rows), drawn anew for each seed; `cells` vary
    any keys instead."""

    title: str
    rows: list[Count | None] = []
    cells: dict[str, dict[str, Any]] = {}
    keys: dict[str, Any] = {}
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1)
    methods: list[str] = list(TARGETS)

    @model_validator(mode="after")
    def _one_axis(self) -> "Study":
        if bool(self.rows) == bool(self.cells):
            raise ValueError("name rows or cells, one of the two")
        if unknown := set(self.methods) - set(TARGETS):
            raise ValueError(f"methods: {', '.join(sorted(unknown))} unknown; choose of {', '.join(TARGETS)}")
        return self


def load_study(name: str) -> Study:
    """Read and check a study.

    Raises
    ------
    LetterheadError : no such file, not YAML, or a key that does not fit; names the file and the mend
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in FOLDER.glob("*.yaml")))
        raise LetterheadError(f"{path}: no such study; choose one of {known}, or write that file")
    try:
        return Study.model_validate(OmegaConf.to_container(OmegaConf.load(path)))
    except (OmegaConfBaseException, YAMLError, ValidationError) as error:
        raise LetterheadError(f"{path}: {error}") from None


def keys_for_rows(experiment: Experiment, rows: int, base: int) -> dict[str, Any]:
    """The keys that train every method on so many rows, in no fewer optimizer steps than the experiment makes on `base`."""
    times = max(1.0, base / rows)
    return {
        "data.rows.train": rows,
        "decoder.train_rows": None,
        "decoder.sft.overrides.num_train_epochs": experiment.sft_arguments().get("num_train_epochs", 3) * times,
        "decoder.head.num_train_epochs": experiment.decoder.head.num_train_epochs * times,
        "encoder.head.num_train_epochs": experiment.encoder.head.num_train_epochs * times,
    }


def main(experiment: Experiment, name: str, overrides: str, study_name: str) -> None:
    study = load_study(study_name)
    make(name, overrides, ["zero-shot"])
    there = read_json(experiment.data_folder / "data_card.json")
    cells = study.cells
    if study.rows:
        sizes = sorted({min(rows or there["rows"]["train"], there["rows"]["train"]) for rows in study.rows})
        cells = {str(rows): keys_for_rows(experiment, rows, there["sft"]["rows"]) for rows in sizes}
    done: dict[str, list[Experiment]] = {label: [] for label in cells}
    with tqdm(total=len(study.seeds) * len(cells), desc=study_name, unit=" cell") as bar:
        for seed in study.seeds:
            any_made = False
            for label, keys in cells.items():
                own = {"name": f"{experiment.name}.{study_name}.{label}.seed{seed}", "seed": seed}
                if study.rows:
                    own["data.rows.train_seed"] = seed
                cell, made = run_cell(name, settings(overrides, seed_keys(experiment) | study.keys | keys | own), study)
                done[label].append(cell)
                any_made |= made
                bar.update()
            if any_made or seed == study.seeds[-1]:
                publish(experiment, study_name, study, done)


def publish(experiment: Experiment, name: str, study: Study, done: dict[str, list[Experiment]]) -> None:
    """Write table, picture and figures of the seeds that are done, unless they are there, and print the table."""
    records = {label: [read_json(cell.run_folder / "cell" / "stage.json") for cell in of] for label, of in done.items()}
    inputs = {"cells": records, "margin": experiment.compare.margin, "title": study.title, "seeds": study.seeds}
    stage = Stage(experiment, name, inputs)
    table, picture, figures = (stage.folder / file for file in ("STUDY.md", "study.png", "study.json"))
    if not stage.is_current():
        found = {label: gather(experiment, of, study) for label, of in done.items()}
        untrained = {method: untrained_f1(experiment, method) for method in UNTRAINED}
        said = sentences(study, found, experiment.compare.margin)
        cells_found = [{"cell": label, **of} for label, of in found.items()]
        write_json(figures, {"title": study.title, "cells": cells_found, "untrained": untrained, "sentences": said})
        draw(picture, study, found, untrained)
        with atomic_open(table) as file:
            file.write(markdown(study, found, untrained, said))
        stage.finish([figures, table, picture])
    print(table.read_text(encoding="utf-8"))
    print(f"{table}, {picture.name} and {figures.name} beside it", flush=True)


def run_cell(name: str, overrides: str, study: Study) -> tuple[Experiment, bool]:
    """Bring one cell up to date, unless it is known to be; returns its experiment, and whether there was something to do.

    What is kept of it are results and records: its weights are gigabytes, and are deleted (`make` for the cell trains them
    again).
    """
    cell = load_experiment(name, overrides)
    inputs = {
        "config": cell.model_dump(mode="json", exclude={"bench", "serve", "compare", "title"}),
        "sft": {key: value for key, value in cell.sft_arguments().items() if key not in PLACES},
        "source": local_sha256(cell.data),
        "methods": study.methods,
    }
    stage = Stage(cell, "cell", inputs)
    if to_do := not stage.is_current():
        make(name, overrides, [TARGETS[method] for method in study.methods])
        made = {path for method in study.methods for path in stage_outputs(cell, TARGETS[method])}
        stage.finish([path for path in map(Path, sorted(made)) if path.parent == cell.results_folder])
        for weights in cell.run_folder.glob("*/checkpoints"):
            shutil.rmtree(weights)
    return cell, to_do


def gather(experiment: Experiment, cells: list[Experiment], study: Study) -> dict[str, Any]:
    """A cell's methods, each with the mean over seeds and its interval; the verdicts on these rows; and by how much each
    leads each other."""
    answers: dict[str, list[dict]] = {}
    entries: dict[str, list[dict]] = {}
    for method in study.methods:
        for cell in cells:
            chosen, entry = compare.choose(cell, method, stage_outputs(cell, TARGETS[method]))
            answers.setdefault(method, []).append(compare.read_answers(cell, chosen, entry["n"]))
            entries.setdefault(method, []).append(entry)
    truth, predicted = compare.aligned(experiment, answers)
    # As if all cost the same, so that each is judged.
    prices = dict.fromkeys(predicted, 1.0)
    verdicts: dict[str, str] = {}
    if len(predicted) > 1:
        decided = decision.decide(truth, predicted, prices, len(experiment.labels), experiment.compare.margin)
        verdicts = {method: of["verdict"] for method, of in decided["candidates"].items()}
    figures = {}
    for method, of in entries.items():
        interval = metrics.macro_f1(truth, predicted[method], len(experiment.labels)).interval(0.025)
        figures[method] = {
            "title": compare.METHODS[method][2],
            "f1_macro": float(np.mean([entry["f1_macro"] for entry in of])),
            "f1_macro_ci95": np.clip(interval, 0, 1).tolist(),
            "trainings": [{"f1_macro": entry["f1_macro"], "step": entry["step"]} for entry in of],
            "training_seconds": float(np.mean([entry["cost"]["training_seconds"] for entry in of])),
            "train_rows": of[0]["cost"]["train_rows"],
        }
    leads = []
    for a, b in combinations(predicted, 2):
        lead = metrics.f1_loss(truth, predicted[b], predicted[a], len(experiment.labels))
        leads.append({"a": a, "b": b, "f1_difference": lead.value, "ci95": list(lead.interval(0.025))})
    return {"methods": figures, "verdicts": verdicts, "leads": leads}


def seeds_done(found: dict[str, dict]) -> int:
    """How many trainings each cell has of each method."""
    return len(next(iter(next(iter(found.values()))["methods"].values()))["trainings"])


def untrained_f1(experiment: Experiment, method: str) -> float:
    """Macro F1 of the decoder without training."""
    return results.read_result(experiment, method, "test")["f1_macro"]


def sentences(study: Study, found: dict[str, dict], margin: float) -> list[str]:
    """What a reader looks for: which method is best where, from where on which one fits, and where two change places."""
    title = {method: of["title"] for method, of in next(iter(found.values()))["methods"].items()}
    unit = " rows" if study.rows else ""
    averaged = f"mean of {seeds_done(found)} seeds" if seeds_done(found) > 1 else "one seed"
    best: list[tuple[str, list[str]]] = []
    for label, cell in found.items():
        top = max(cell["methods"], key=lambda method: cell["methods"][method]["f1_macro"])
        if best and best[-1][0] == top:
            best[-1][1].append(label)
        else:
            best.append((top, [label]))
    spans = [f"{title[top]} at {of[0] if len(of) == 1 else f'{of[0]} to {of[-1]}'}{unit}" for top, of in best]
    said = [f"Highest macro F1 ({averaged}): {', '.join(spans)}."]
    if len(title) > 1:
        shown = []
        for method in title:
            if fits := [label for label, cell in found.items() if cell["verdicts"].get(method) == decision.FITS]:
                shown.append(f"{title[method]} at {', '.join(fits)}{unit}")
        shows = f"Shown to lose less than {margin:g} against every other: {'; '.join(shown)}."
        said.append(shows if shown else f"Nowhere is a method shown to lose less than {margin:g} against every other.")
    if study.rows:
        for number, (a, b) in enumerate(combinations(title, 2)):
            leads = {label: cell["leads"][number] for label, cell in found.items()}
            apart = [label for label, lead in leads.items() if lead["ci95"][0] > 0 or lead["ci95"][1] < 0]
            for (before, first), (after, second) in pairwise(leads.items()):
                if (first["f1_difference"] > 0) != (second["f1_difference"] > 0):
                    upper, lower = (a, b) if second["f1_difference"] > 0 else (b, a)
                    told = f"told apart at {', '.join(apart)} rows" if apart else "nowhere told apart"
                    said.append(f"{title[upper]} passes {title[lower]} between {before} and {after} rows ({told}).")
    return said


def draw(path: Path, study: Study, found: dict[str, dict], untrained: dict[str, float]) -> None:
    """Macro F1 of each method in each cell, with its 95 % interval and every training; dashed lines without training."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    at = [int(label) for label in found] if study.rows else list(range(len(found)))
    for number, method in enumerate(study.methods):
        cells = [cell["methods"][method] for cell in found.values()]
        low, high = zip(*(cell["f1_macro_ci95"] for cell in cells), strict=True)
        (line,) = axes.plot(at, [cell["f1_macro"] for cell in cells], marker="o", label=cells[0]["title"])
        axes.fill_between(at, low, high, alpha=0.13, color=line.get_color(), linewidth=0)
        for x, cell in zip(at, cells, strict=True):
            values = [training["f1_macro"] for training in cell["trainings"]]
            shifted = x * 1.02 ** (number - 1.5) if study.rows else x + 0.04 * (number - 1.5)
            axes.plot([shifted] * len(values), values, ".", markersize=4, color=line.get_color(), alpha=0.7)
    for method, style in zip(UNTRAINED, ("--", ":"), strict=True):
        axes.axhline(untrained[method], linestyle=style, color="grey", linewidth=1, label=compare.METHODS[method][2])
    if study.rows:
        axes.set_xscale("log")
        axes.minorticks_off()
    axes.set_xticks(at, list(found))
    axes.set(title=study.title, ylabel="macro F1 on test rows, 95 % interval", ylim=(0, 1.01))
    axes.set_xlabel("labelled training rows, logarithmic" if study.rows else "")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path)


def markdown(study: Study, found: dict[str, dict], untrained: dict[str, float], said: list[str]) -> str:
    """The study as a page: sentences, the table of cells, the picture."""
    titles = [of["title"] for of in next(iter(found.values()))["methods"].values()]
    lines = [f"# {study.title}", "", *(f"- {line}" for line in said), "", "![Macro F1 in every cell](study.png)", ""]
    lines += [
        f"| {'training rows' if study.rows else 'cell'} | " + " | ".join(titles) + " |",
        "| ---: |" + " :---: |" * len(titles),
    ]
    for label, cell in found.items():
        figures = []
        for of in cell["methods"].values():
            low, high = of["f1_macro_ci95"]
            each = ", ".join(f"{training['f1_macro']:.3f}" for training in of["trainings"])
            figures.append(f"{of['f1_macro']:.3f} ({low:.3f} to {high:.3f}; {each})")
        lines.append(f"| {label} | " + " | ".join(figures) + " |")
    seeds, averaged = seeds_done(found), "One seed"
    if seeds > 1:
        drawn = "; each seed draws its training rows, the same for all methods" if study.rows else ""
        averaged = f"Mean over seeds (95 % interval of test rows and trainings; each training{drawn})"
    if seeds < len(study.seeds):
        averaged = f"**So far {seeds} of {len(study.seeds)} seeds.** {averaged}"
    zero = "; ".join(f"{compare.METHODS[method][2]} {value:.3f}" for method, value in untrained.items())
    lines += [
        "",
        f"{averaged}. Validation rows, which choose the step and TF-IDF's C, are labelled rows too and come on top. "
        f"Without training: {zero}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"study": "a name in experiments/studies/"}, with_arguments=True)
