"""A study: an experiment varied in some keys, every cell with every seed; a table, a picture, and
what they say.

    python -m study.run --experiment quick --study curve

Each cell is an ordinary experiment, `runs/EXPERIMENT.STUDY.CELL.ROWS.seedN`, that `make` brings up
to date; one that is done is not started again. What the study makes lies in
`runs/EXPERIMENT/study-NAME/`, first after one seed, then after each further one.
"""

import shutil
from itertools import combinations, pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, ValidationError, model_validator
from yaml import YAMLError

from letterhead.config.experiment import Experiment, explain, load_experiment
from letterhead.config.section import Count, Section
from letterhead.files import LetterheadError, atomic_open, read_json, sha256_file, write_json
from letterhead.pipeline import (
    COMPARE,
    METHODS,
    PLACES,
    SHARED,
    STAGES,
    ZERO_SHOT,
    ZERO_SHOT_CALIBRATED,
    ZERO_SHOT_LETTERS,
    always,
    outputs,
)
from letterhead.rows.sources import local_sha256
from letterhead.runs import contenders, results
from letterhead.runs.stage import StageRun, run
from letterhead.runs.terminal import progress
from letterhead.stats import decision, metrics, verdict
from letterhead.stats.figures import caption_of, plt, save
from study.cells import make, seed_keys, settings

FOLDER = Path("experiments/studies")
# What a study compares unless it says: the trained methods of every experiment, on equal rows
TRAINED = [
    method.name for method in METHODS.values() if method.rows == SHARED and method.when is always
]
# Sections and keys that decide nothing of a cell's results
NO_MATTER = {
    **dict.fromkeys(("bench", "serve", "title", "distill", COMPARE.name, "leave_out"), True),
    **{section: {"license"} for section in ("data", "decoder", "encoder")},
}
UNTRAINED = (ZERO_SHOT_LETTERS, ZERO_SHOT_CALIBRATED)


class Study(Section):
    """A validated study. `rows` are sizes of nested training sets (null: all rows), drawn anew for
    each seed; `cells` vary any keys, and the first of them is what the others are held against;
    both together vary both.

    A cell's own `methods` take the place of the study's. `first` are targets that the experiment
    itself is brought up to before its cells; `{name}` in a value is the experiment's name. Few rows
    are trained on in no fewer optimizer steps than `steps_as_on` rows, or else those that the
    experiment trains on.
    """

    title: str
    rows: list[Count | None] = []
    cells: dict[Annotated[str, Field(pattern=r"^\w[\w-]*$")], dict[str, Any]] = {}
    keys: dict[str, Any] = {}
    first: list[str] = []
    steps_as_on: Count | None = None
    seeds: list[int] = Field(default=[1, 2, 3], min_length=1)
    methods: list[str] = TRAINED

    @model_validator(mode="after")
    def _known(self) -> "Study":
        if not self.rows and not self.cells:
            raise ValueError("name rows, or cells, or both")
        if unknown := {method for cell in self.all_cells for method in self.methods_of(cell)} - set(
            METHODS
        ):
            raise ValueError(
                f"methods: {', '.join(sorted(unknown))} unknown; choose of {', '.join(METHODS)}"
            )
        return self

    @property
    def all_cells(self) -> list[str]:
        """The cells' names; one without a name where rows alone are varied."""
        return list(self.cells) or [""]

    def methods_of(self, cell: str) -> list[str]:
        """The methods of a cell."""
        return self.cells.get(cell, {}).get("methods", self.methods)

    def keys_of(self, cell: str) -> dict[str, Any]:
        """What a cell varies."""
        return {key: value for key, value in self.cells.get(cell, {}).items() if key != "methods"}

    def arm(self, cell: str, method: str) -> str:
        """What a reader calls a method in a cell."""
        title = METHODS[method].title
        if not cell:
            return title
        return (
            cell
            if all(len(self.methods_of(name)) == 1 for name in self.cells)
            else f"{cell}: {title}"
        )


def known_studies() -> str:
    """The names of the studies that there are."""
    return ", ".join(sorted(path.stem for path in FOLDER.glob("*.yaml")))


def load_study(name: str) -> Study:
    """Read and check a study.

    Raises
    ------
    LetterheadError : no such file, not YAML, or a key that does not fit; names the file and the
        mend
    """
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        raise LetterheadError(
            f"{path}: no such study; choose one of {known_studies()}, or write that file"
        )
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise LetterheadError(f"{path}: cannot be read as YAML: {error}") from None
    if not isinstance(values, dict):
        raise LetterheadError(f"{path}: not a mapping of keys; begin with title: and cells:")
    try:
        return Study.model_validate(values)
    except ValidationError as error:
        raise LetterheadError(f"{path}: {explain(error, Study)}") from None


def keys_for_rows(experiment: Experiment, rows: int, base: int) -> dict[str, Any]:
    """The keys that train every method on so many rows, in no fewer optimizer steps than the
    experiment makes on `base`."""
    times, decoder = max(1.0, base / rows), experiment.decoder
    keys = {
        "data.rows.train": rows,
        "decoder.train_rows": None,
        "decoder.sft.overrides.num_train_epochs": experiment.sft_arguments().get(
            "num_train_epochs", 3
        )
        * times,
        "decoder.head.num_train_epochs": decoder.head.num_train_epochs * times,
        "encoder.head.num_train_epochs": experiment.encoder.head.num_train_epochs * times,
    }
    if decoder.sft_options:
        keys["decoder.sft_options.num_train_epochs"] = decoder.sft_options.num_train_epochs * times
    return keys


def said_of(
    study: Study,
    study_name: str,
    experiment: Experiment,
    name: str,
    overrides: str,
    at: tuple[int | None, str, int],
    base: int,
) -> str:
    """SET of one cell: what the study says of all its cells, over it what the user says, over that
    what makes the cell.

    Parameters
    ----------
    name, overrides : of the experiment, as the user gave them
    at : training rows (or None), cell, seed
    base : on how many rows the experiment trains
    """
    rows, cell, seed = at
    under = {key: named(value, experiment.name) for key, value in study.keys.items()}
    keys = seed_keys(experiment, experiment)
    if rows:
        keys |= keys_for_rows(
            load_experiment(name, settings(overrides, {}, under)), rows, study.steps_as_on or base
        )
        keys["data.rows.train_seed"] = seed
    keys |= study.keys_of(cell)
    keys |= {
        "name": ".".join(
            [experiment.name, study_name, *filter(None, [cell, str(rows or "")]), f"seed{seed}"]
        ),
        "seed": seed,
    }
    return settings(overrides, keys, under)


def named(value: Any, name: str) -> Any:
    """A key's value with the experiment's name where `{name}` stands."""
    return value.replace("{name}", name) if isinstance(value, str) else value


# (training rows, cell) → its experiments, one a seed
Done = dict[tuple[int | None, str], list[Experiment]]


def main(experiment: Experiment, name: str, overrides: str, study_name: str) -> None:
    study = load_study(study_name)
    # It names its methods itself.
    overrides = settings(overrides, {"leave_out": []})
    experiment = experiment.model_copy(update={"leave_out": []})
    few = next(filter(None, study.rows), None)
    for cell in (
        study.all_cells
    ):  # a key that is wrong in the last of them is told before the first is made
        load_experiment(
            name,
            said_of(study, study_name, experiment, name, overrides, (few, cell, study.seeds[0]), 1),
        )
    make(name, overrides, [ZERO_SHOT.make_target, *study.first])
    there = read_json(experiment.data_folder / "data_card.json")
    all_rows = there["rows"]["train"]
    sizes = sorted({min(rows or all_rows, all_rows) for rows in study.rows}) or [None]
    done: Done = {(rows, cell): [] for rows in sizes for cell in study.all_cells}
    with progress(total=len(study.seeds) * len(done), desc=study_name, unit=" cell") as bar:
        for seed in study.seeds:
            any_made = False
            for (rows, cell), experiments in done.items():
                overrides_of_cell = said_of(
                    study,
                    study_name,
                    experiment,
                    name,
                    overrides,
                    (rows, cell, seed),
                    there["shared"]["rows"],
                )
                cell_experiment, to_do = run_cell(name, overrides_of_cell, study.methods_of(cell))
                experiments.append(cell_experiment)
                any_made |= to_do
                bar.update()
            if any_made or seed == study.seeds[-1]:
                publish(experiment, study_name, study, done)


def publish(experiment: Experiment, name: str, study: Study, done: Done) -> None:
    """Write table, picture and figures of the seeds that are done, unless they are there, and print
    the table."""
    records = [
        [read_json(cell.run_folder / "cell" / "stage.json") for cell in experiments]
        for experiments in done.values()
    ]
    inputs = {"cells": records, "margin": experiment.compare.margin, "study": study.model_dump()}
    stage = StageRun(experiment, f"study-{name}", inputs)
    table, picture, figures = (
        stage.folder / file for file in ("STUDY.md", "study.png", "study.json")
    )
    if not stage.is_current():
        stage.start()
        found = [
            gather(experiment, study, rows, done)
            for rows in dict.fromkeys(rows for rows, _ in done)
        ]
        untrained = {
            method.name: results.read_result(experiment, method.name, "test").f1_macro
            for method in UNTRAINED
        }
        lines = sentences(study, found, experiment.compare.margin)
        write_json(
            figures,
            {"title": study.title, "found": found, "untrained": untrained, "sentences": lines},
        )
        draw_picture = draw_against_rows if study.rows else draw_arms
        caption = caption_of(
            experiment,
            study.seeds[: seeds_done(found)],
            [one for experiments in done.values() for one in experiments],
        )
        draw_picture(picture, caption, study, found, untrained)
        with atomic_open(table) as file:
            file.write(markdown(study, found, untrained, lines))
        stage.finish([figures, table, picture])
    print(table.read_text(encoding="utf-8"))
    print(f"{table}, {picture.name} and {figures.name} beside it", flush=True)


def run_cell(name: str, overrides: str, methods: list[str]) -> tuple[Experiment, bool]:
    """Bring one cell up to date, unless it is known to be; returns its experiment, and whether
    there was something to do.

    What is kept of it are results and records: its weights are gigabytes, and are deleted (`make`
    for the cell trains them again).
    """
    cell = load_experiment(name, overrides)
    inputs = {
        "config": cell.model_dump(mode="json", exclude_unset=True, exclude=NO_MATTER),
        "arguments": {
            key: value for key, value in cell.sft_arguments().items() if key not in PLACES
        },
        "source": local_sha256(cell.data),
        "methods": methods,
    }
    # What another experiment made: how it was made decides nothing, what it is does.
    taken_over = [
        cell.data.rows.ranking,
        cell.distill and cell.distill.of and Path("data") / cell.distill.of / "distilled.jsonl",
    ]
    if learnt := [sha256_file(path) for path in taken_over if path and path.is_file()]:
        inputs["learnt"] = learnt
    stage = StageRun(cell, "cell", inputs)
    if to_do := not stage.is_current():
        stage.start()
        make(name, overrides, list(dict.fromkeys(METHODS[method].target for method in methods)))
        results_made = {
            path for method in methods for path in outputs(STAGES[METHODS[method].stage], cell)
        }
        stage.finish(
            [path for path in map(Path, sorted(results_made)) if path.parent == cell.results_folder]
        )
    for weights in cell.run_folder.glob("*/checkpoints"):
        shutil.rmtree(weights)
    return cell, to_do


def gather(experiment: Experiment, study: Study, rows: int | None, done: Done) -> dict[str, Any]:
    """What was found with so many training rows.

    Returns
    -------
    dict : `rows`; `arms`, for each method in each cell the mean over seeds, its interval and each
        training; `verdicts`, of each arm against all others; and `leads`, by how much each arm
        leads each other, with intervals that are corrected (Bonferroni) for their number
    """
    answers: dict[str, list[dict]] = {}
    entries: dict[str, list[dict]] = {}
    balances: dict[str, str] = {}
    for cell in study.all_cells:
        for method in study.methods_of(cell):
            arm = study.arm(cell, method)
            for one in done[rows, cell]:
                balances[arm] = one.balance
                chosen = contenders.choose(one, METHODS[method])
                answers.setdefault(arm, []).append(
                    contenders.read_answers(one, chosen.name, chosen.result.n)
                )
                entries.setdefault(arm, []).append(chosen.entry(one))
    numbers = {arm: found_entries[0]["n"] for arm, found_entries in entries.items()}
    if len(set(numbers.values())) > 1:
        raise LetterheadError(
            f"arms with unequal test rows ({numbers}) can't be compared; set "
            f"eval.thinking.rows=null"
        )
    truth, predicted = contenders.aligned(experiment, answers)
    classes, verdicts = len(experiment.labels), {}
    if len(predicted) > 1:
        prices = dict.fromkeys(predicted, 1.0)  # as if all cost the same, so that each is judged
        decided = decision.decide(truth, predicted, prices, classes, experiment.compare.margin)
        verdicts = {
            arm: found_entries["verdict"] for arm, found_entries in decided["candidates"].items()
        }
    arms = {}
    for arm, found_entries in entries.items():
        interval = metrics.macro_f1(truth, predicted[arm], classes).interval(0.025)
        arms[arm] = {
            "f1_macro": float(np.mean([entry["f1_macro"] for entry in found_entries])),
            "f1_macro_ci95": np.clip(interval, 0, 1).tolist(),
            "trainings": [
                {"f1_macro": entry["f1_macro"], "step": entry["step"]} for entry in found_entries
            ],
            "balance": balances[arm],
            "log_loss_validation": mean_or_none(
                [entry["log_loss_validation"] for entry in found_entries]
            ),
            "training_seconds": float(
                np.mean([entry["cost"]["training_seconds"] for entry in found_entries])
            ),
        }
    pairs, leads = list(combinations(predicted, 2)), {}
    for a, b in pairs:
        lead = metrics.f1_loss(truth, predicted[b], predicted[a], classes)
        leads[f"{a} over {b}"] = {
            "f1_difference": lead.value,
            "interval": list(lead.interval(0.025 / len(pairs))),
        }
    return {"rows": rows, "arms": arms, "verdicts": verdicts, "leads": leads}


def mean_or_none(values: list[float | None]) -> float | None:
    """The mean, or None where one is missing."""
    return None if None in values else float(np.mean(values))


def lead_of(point: dict, a: str, b: str) -> tuple[float, bool]:
    """By how much arm `a` leads `b`, and whether the two are told apart."""
    sign, lead = 1, point["leads"].get(f"{a} over {b}")
    if lead is None:
        sign, lead = -1, point["leads"][f"{b} over {a}"]
    low, high = lead["interval"]
    return sign * lead["f1_difference"], low > 0 or high < 0


def seeds_done(found: list[dict]) -> int:
    """How many trainings each arm has."""
    return len(next(iter(found[0]["arms"].values()))["trainings"])


def sentences(study: Study, found: list[dict], margin: float) -> list[str]:
    """What a reader looks for: what is best where, what is shown to fit, and where two change
    places."""
    averaged = f"mean of {seeds_done(found)} seeds" if seeds_done(found) > 1 else "one seed"
    arms = list(found[0]["arms"])
    if not study.rows:
        return [f"Highest macro F1 ({averaged}): {told_of_best(found[0])}"]
    best: list[tuple[str, list[int]]] = []
    for point in found:
        top = max(arms, key=lambda arm: point["arms"][arm]["f1_macro"])
        if best and best[-1][0] == top:
            best[-1][1].append(point["rows"])
        else:
            best.append((top, [point["rows"]]))
    spans = [
        f"{top} at {sizes[0] if len(sizes) == 1 else f'{sizes[0]} to {sizes[-1]}'} rows"
        for top, sizes in best
    ]
    lines = [f"Highest macro F1 ({averaged}): {', '.join(spans)}."]
    if len(arms) > 1:
        fits = {
            arm: [str(point["rows"]) for point in found if point["verdicts"][arm] == decision.FITS]
            for arm in arms
        }
        shown = [f"{arm} at {', '.join(at)} rows" for arm, at in fits.items() if at]
        shows = f"Shown to lose less than {margin:g} against every other: {'; '.join(shown)}."
        lines.append(
            shows
            if shown
            else f"Nowhere is one shown to lose less than {margin:g} against every other."
        )
    return lines + (told_of_cells(study, found) if study.cells else told_of_crossings(arms, found))


def told_of_best(point: dict) -> str:
    """The best arm, and which others are told apart from it."""
    top, *others = sorted(point["arms"], key=lambda arm: -point["arms"][arm]["f1_macro"])
    low, high = point["arms"][top]["f1_macro_ci95"]
    sentence = (
        f"{top}, {point['arms'][top]['f1_macro']:.3f} (95 % interval {low:.3f} to {high:.3f})."
    )
    behind: dict[bool, list[str]] = {True: [], False: []}
    for arm in others:
        behind[lead_of(point, top, arm)[1]].append(f"{arm} ({point['arms'][arm]['f1_macro']:.3f})")
    for apart, how in ((True, "Told apart from it"), (False, "Not told apart from it")):
        sentence += f" {how}: {', '.join(behind[apart])}." if behind[apart] else ""
    losses = {arm: entry["log_loss_validation"] for arm, entry in point["arms"].items()}
    balances = {entry["balance"] for entry in point["arms"].values()}
    if None not in losses.values() and len(balances) == 1:  # else they are of two kinds
        chosen = min(losses, key=losses.get)
        sentence += (
            f" Validation rows, which alone may choose, have the lowest log loss with {chosen}."
        )
    return sentence


def told_of_crossings(arms: list[str], found: list[dict]) -> list[str]:
    """Where the mean of one arm passes another's, and where the two are told apart."""
    lines = []
    for a, b in combinations(arms, 2):
        apart = [str(point["rows"]) for point in found if lead_of(point, a, b)[1]]
        how = f"told apart at {', '.join(apart)} rows" if apart else "nowhere told apart"
        for before, after in pairwise(found):
            first, second = (lead_of(point, a, b)[0] > 0 for point in (before, after))
            if first != second:
                upper, lower = (a, b) if second else (b, a)
                lines.append(
                    f"{upper} passes {lower} between {before['rows']} and {after['rows']} rows "
                    f"({how})."
                )
    return lines


def told_of_cells(study: Study, found: list[dict]) -> list[str]:
    """By how much each cell differs from the first, method by method."""
    reference, *others = study.all_cells
    lines = []
    for cell in others:
        for method in [
            name for name in study.methods_of(cell) if name in study.methods_of(reference)
        ]:
            differences = []
            for point in found:
                by, apart = lead_of(point, study.arm(cell, method), study.arm(reference, method))
                differences.append(
                    f"{verdict.signed(by)} at {point['rows']}{' (told apart)' if apart else ''}"
                )
            lines.append(
                f"{study.arm(cell, method)} against {reference}: {', '.join(differences)} rows."
            )
    return lines


def draw_against_rows(
    path: Path, caption: str, study: Study, found: list[dict], untrained: dict[str, float]
) -> None:
    """Macro F1 of each arm against the number of rows, with its interval and every training; dashed
    lines untrained."""
    figure, axes = plt.subplots(figsize=(8.5, 4.8), layout="constrained")
    at = [point["rows"] for point in found]
    for number, arm in enumerate(found[0]["arms"]):
        points = [point["arms"][arm] for point in found]
        low, high = zip(*(point["f1_macro_ci95"] for point in points), strict=True)
        (line,) = axes.plot(at, [point["f1_macro"] for point in points], marker="o", label=arm)
        axes.fill_between(at, low, high, alpha=0.13, color=line.get_color(), linewidth=0)
        for x, point in zip(at, points, strict=True):
            values = [training["f1_macro"] for training in point["trainings"]]
            shifted = x * 1.02 ** (number - len(found[0]["arms"]) / 2)
            if len(values) > 1:
                axes.plot(
                    [shifted] * len(values),
                    values,
                    ".",
                    markersize=4,
                    color=line.get_color(),
                    alpha=0.7,
                )
    for method, style in zip(UNTRAINED, ("--", ":"), strict=True):
        axes.axhline(
            untrained[method.name], linestyle=style, color="grey", linewidth=1, label=method.title
        )
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(at, map(str, at))
    axes.set(title=study.title, ylabel="macro F1 on test rows, 95 % interval", ylim=(0, 1.01))
    axes.set_xlabel("labelled training rows, logarithmic")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    save(figure, path, caption)


def draw_arms(
    path: Path, caption: str, study: Study, found: list[dict], untrained: dict[str, float]
) -> None:
    """Macro F1 of each arm, with its interval and every training; dashed lines untrained, or, where
    they would squeeze the arms, in words."""
    arms = found[0]["arms"]
    figure, axes = plt.subplots(figsize=(8.5, 1.4 + 0.45 * len(arms)), layout="constrained")
    for y, entry in enumerate(arms.values()):
        axes.plot(entry["f1_macro_ci95"], [y, y], color="tab:blue", linewidth=2)
        axes.plot(
            [training["f1_macro"] for training in entry["trainings"]],
            [y] * len(entry["trainings"]),
            ".",
            color="grey",
        )
        axes.plot(entry["f1_macro"], y, "o", color="tab:blue")
    low, high = axes.get_xlim()
    label = "macro F1 on test rows, 95 % interval; each training a dot"
    for method, style in zip(UNTRAINED, ("--", ":"), strict=True):
        title, value = method.title, untrained[method.name]
        if any(method.name in study.methods_of(cell) for cell in study.all_cells):
            continue  # an arm of its own
        if 2 * low - high < value < 2 * high - low:
            axes.axvline(value, linestyle=style, color="grey", linewidth=1, label=title)
            axes.legend(fontsize=8, loc="best")
        else:
            label += f"\n{title}: {value:.3f}, not drawn"
    axes.set_yticks(range(len(arms)), arms)
    axes.invert_yaxis()
    axes.set_xlabel(label)
    figure.suptitle(study.title)  # over the arms' names, too, which may be long
    axes.grid(alpha=0.3, axis="x")
    save(figure, path, caption)


def markdown(
    study: Study, found: list[dict], untrained: dict[str, float], lines_said: list[str]
) -> str:
    """The study as a page: sentences, the picture, the table."""

    def shown(entry: dict) -> str:
        low, high = entry["f1_macro_ci95"]
        each = ", ".join(f"{training['f1_macro']:.3f}" for training in entry["trainings"])
        return f"{entry['f1_macro']:.3f} ({low:.3f} to {high:.3f}; {each})"

    lines = [
        f"# {study.title}",
        "",
        *(f"- {line}" for line in lines_said),
        "",
        "![Macro F1 of every arm](study.png)",
        "",
    ]
    arms = list(found[0]["arms"])
    if study.rows:
        lines += [
            "| training rows | " + " | ".join(arms) + " |",
            "| ---: |" + " :---: |" * len(arms),
        ]
        lines += [
            f"| {point['rows']} | " + " | ".join(shown(point["arms"][arm]) for arm in arms) + " |"
            for point in found
        ]
    else:
        lines += ["| | macro F1 | training, s |", "| :--- | :---: | ---: |"]
        lines += [
            f"| {arm} | {shown(entry)} | {entry['training_seconds']:.0f} |"
            for arm, entry in found[0]["arms"].items()
        ]
    seeds, averaged = seeds_done(found), "One seed"
    if seeds > 1:
        drawn = (
            "; each seed draws its training rows, the same for all methods" if study.rows else ""
        )
        averaged = (
            f"Mean over seeds (95 % interval of test rows and trainings; each training{drawn})"
        )
    if seeds < len(study.seeds):
        averaged = f"**So far {seeds} of {len(study.seeds)} seeds.** {averaged}"
    zero = "; ".join(f"{METHODS[method].title} {value:.3f}" for method, value in untrained.items())
    lines += [
        "",
        f"{averaged}. Told apart: the difference's interval, corrected for the number "
        f"of pairs, leaves out 0. Validation "
        f"rows, which choose the step and TF-IDF's C, are labelled rows too and come on "
        f"top. Without training: {zero}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        options={"study": f"{FOLDER}: {known_studies()}"},
        with_arguments=True,
    )
