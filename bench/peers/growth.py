"""What growing costs: time and peak memory against rows, options, and methods × checkpoints;
nothing may be quadratic.

    python -m bench.peers.growth --experiment quick --rows 1000000

Rows are words drawn as languages use them (Zipf) and a line that all share, predictions are drawn,
models tiny and random: what is measured is what we add to a model's own work. The experiment's own
decoder scores the options, and its own encoder, with a random head, labels rows, held against that
model alone. Each point is a process of its own, and is kept at once. runs/EXPERIMENT/growth/ takes
growth.json, GROWTH.md and growth.png.
"""

import csv
import json
import math
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from letterhead.config.experiment import Experiment, load_experiment
from letterhead.files import LetterheadError, atomic_open, write_json
from letterhead.pipeline import (
    CASCADE,
    COMPARE,
    DATA,
    DECIDE,
    SFT,
    SFT_TRAINING,
    cascades_file,
    compared_methods,
    outputs,
)
from letterhead.runs import results
from letterhead.runs.devices import device_name, machine, peak_memory
from letterhead.runs.processes import call_in_a_process
from letterhead.runs.stage import StageRun, run
from letterhead.runs.terminal import progress
from letterhead.stats.figures import caption_of, plt, save

LABELS = ["World", "Sports", "Business", "Science"]
WORDS, ZIPF, SHARED = 12, 1.3, "sent from my telephone please excuse errors"
OWN_ROWS = 20_000  # for the experiment's own encoder
FEW_TRAINED = 2000
CHECKPOINTS, CHECKED_ROWS = (1, 4, 16, 64), 1000
OPTIONS, SCORED_ROWS = (4, 10, 26, 52, 100), 12
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
OWN, ALONE = "predict, own encoder", "own encoder alone"
OWN_POINTS = ((OWN, OWN_ROWS // 10), (OWN, OWN_ROWS), (ALONE, OWN_ROWS))
SKILL = 2.0  # of the drawn predictions
THINKING = {
    "no_think_accuracy_same_rows": 0.4,
    "times_one_forward": 20.0,
    "engine": "hf",
    "budget_tokens": 64,
}
THINKING |= {"thought": 30, "begun": 32, "unfinished": 4, "unparsed": 2}
POWERS = {"seconds": "seconds", "peak_mib": "peak memory, MiB"}
# Runs a module and tells its seconds and peak memory. What starts it is small: a process counts
# what its starter held.
SHIM = """
import json, resource, subprocess, sys, time
begin = time.perf_counter()
ended = subprocess.run([sys.executable, *sys.argv[1:]], capture_output=True, text=True)
seconds = time.perf_counter() - begin
kibibytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
said = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
figures = {"seconds": seconds, "peak_mib": kibibytes / 1024}
print(json.dumps({"code": ended.returncode, "said": said, **figures}))
"""


def main(experiment: Experiment, most: str) -> None:
    if not most.isdecimal() or int(most) < 1000:
        raise LetterheadError(f"ROWS={most}: write how many rows at most, 1000 or more")
    outputs(DATA, experiment)  # the tokenizers come from its models
    stage = StageRun(experiment, "growth", None)
    sizes = [10**power for power in range(3, len(str(int(most))))]
    record, table, picture = (
        stage.folder / file for file in ("growth.json", "GROWTH.md", "growth.png")
    )
    try:
        remove(
            experiment, stage.folder / "work"
        )  # of a run that broke off: nothing may be up to date
        points = measure(experiment, stage.folder / "work", sizes, record)
    finally:
        remove(experiment, stage.folder / "work")
    with atomic_open(table) as file:
        file.write(as_table(points))
    draw_picture(picture, caption_of(experiment), points)
    stage.finish([record, table, picture], rows=sizes[-1])
    print(f"{table.read_text(encoding='utf-8')}\n{record}, {picture.name} beside it", flush=True)


def remove(experiment: Experiment, place: Path) -> None:
    """Remove what the points made."""
    pattern = f"{experiment.name}.growth.*"
    for folder in (place, *Path("runs").glob(pattern), *Path("data").glob(pattern)):
        shutil.rmtree(folder, ignore_errors=True)


def measure(experiment: Experiment, place: Path, sizes: list[int], record: Path) -> list[dict]:
    """All points: what was measured, `n`, seconds, and peak memory in MiB; written to `record` one
    by one."""
    decoder, encoder = tiny_models(experiment, place)
    points: list[dict] = []
    with progress(
        total=4 * len(sizes) + 3 + 2 * len(CHECKPOINTS) + len(OPTIONS),
        desc="growth",
        unit=" points",
    ) as bar:

        def keep(what: str, n: int, measured: dict) -> None:
            points.append({"of": what, "n": n, **measured})
            write_json(record, {"points": points, "device": device_name(), "machine": machine()})
            bar.update()

        def add(what: str, n: int, *arguments: Any) -> None:
            keep(what, n, call(*arguments))

        for rows in sizes:
            name = write_experiment(experiment, place, f"rows{rows}", rows, decoder, encoder)
            arguments = ["--experiment", name]
            add("data", rows, "-m", "prep.data", *arguments)
            draw_results(load_experiment(name), steps=[1])
            add(COMPARE.name, rows, "-m", COMPARE.module, *arguments)
            call("-m", DECIDE.module, *arguments)
            add("report", rows, "-m", "report.build", *arguments)
            labelled = ["--in", place / f"rows{rows}/test.csv", "--out", place / "labelled.csv"]
            add(
                "predict",
                rows,
                "-m",
                "serve.predict",
                *arguments,
                *labelled,
                "--model",
                encoder.absolute(),
            )
        own = own_encoder(experiment, place)
        for rows in (OWN_ROWS // 10, OWN_ROWS):
            name = write_experiment(experiment, place, f"own{rows}", rows, decoder, encoder)
            call("-m", "prep.data", "--experiment", name)
            arguments = [
                "--in",
                place / f"own{rows}/test.csv",
                "--out",
                place / "labelled.csv",
                "--model",
                own.absolute(),
            ]
            add(OWN, rows, "-m", "serve.predict", "--experiment", name, *arguments)
        keep(
            ALONE, OWN_ROWS, call_in_a_process(model_alone, own, place / f"own{OWN_ROWS}/test.csv")
        )
        name = write_experiment(experiment, place, "checkpoints", CHECKED_ROWS, decoder, encoder)
        call("-m", "prep.data", "--experiment", name)
        for checkpoints in CHECKPOINTS:
            n = draw_results(load_experiment(name), steps=list(range(1, checkpoints + 1)))
            add("compare, results", n, "-m", COMPARE.module, "--experiment", name)
            call("-m", DECIDE.module, "--experiment", name)
            add("report, results", n, "-m", "report.build", "--experiment", name)
        for options in OPTIONS:
            keep("scoring, options", options, call_in_a_process(score_rows, experiment, options))
    return points


def tiny_models(experiment: Experiment, place: Path) -> tuple[Path, Path]:
    """A decoder, and an encoder with a head, of random weights, with the tokenizers of the
    experiment's models."""
    import torch
    from transformers import (
        AutoTokenizer,
        BertConfig,
        BertForSequenceClassification,
        LlamaConfig,
        LlamaForCausalLM,
    )

    torch.manual_seed(0)
    decoder, encoder = place / "decoder", place / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(experiment.decoder.folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    tokenizer = AutoTokenizer.from_pretrained(experiment.encoder.folder)
    names = {
        "id2label": dict(enumerate(LABELS)),
        "label2id": {label: i for i, label in enumerate(LABELS)},
    }
    config = BertConfig(vocab_size=len(tokenizer), **SHAPE, **names)
    BertForSequenceClassification(config).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    return decoder, encoder


def own_encoder(experiment: Experiment, place: Path) -> Path:
    """The experiment's encoder with a head of random weights, as `make export` would leave it."""
    import torch

    from letterhead.models import heads

    torch.manual_seed(0)
    heads.load_head(experiment.encoder.folder, LABELS).save_pretrained(place / "own")
    heads.load_tokenizer(experiment.encoder.folder).save_pretrained(place / "own")
    return place / "own"


def model_alone(folder: Path, rows: Path) -> dict:
    """Seconds and peak memory (MiB) of the bare model on the texts of a CSV file, tokenised
    before."""
    from letterhead.config.evaluation import Eval
    from letterhead.config.models import Head
    from letterhead.models import heads
    from letterhead.models.classifier import CHUNK
    from letterhead.models.cpu import pack
    from letterhead.models.precision import cast, precision
    from letterhead.models.prompt import TextEncoder

    model = pack(cast(heads.load_head(folder, LABELS), precision("auto", folder)).eval())
    tokenizer = heads.load_tokenizer(folder)
    with open(rows, encoding="utf-8", newline="") as file:
        ids = TextEncoder(tokenizer, Head().max_length).encode(
            [row["text"] for row in csv.DictReader(file)]
        )
    heads.classify(model, tokenizer, ids[:CHUNK], Eval().batch_tokens)
    begin = time.perf_counter()
    for at in range(0, len(ids), CHUNK):
        heads.classify(model, tokenizer, ids[at : at + CHUNK], Eval().batch_tokens)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_mib": float(peak_memory()["peak_memory_mb"]),
    }


def write_experiment(
    experiment: Experiment, place: Path, name: str, rows: int, decoder: Path, encoder: Path
) -> str:
    """Rows of drawn words, so many to test and a few to train, and an experiment that reads them;
    returns its path."""
    folder, chance = place / name, np.random.default_rng(rows)
    folder.mkdir()
    words = np.array([f"w{i}" for i in range(50_000)])
    for split, n in (("train", max(FEW_TRAINED, rows // 10)), ("test", rows)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for at in range(0, n, 10_000):
                drawn = words[chance.zipf(ZIPF, size=(min(10_000, n - at), WORDS)) % len(words)]
                writer.writerows(
                    (f"{at + i} {' '.join(row)} {SHARED}", LABELS[(at + i) % len(LABELS)])
                    for i, row in enumerate(drawn)
                )
    trained_by = place / "sft.yaml"
    trained_by.write_text(
        json.dumps(
            yaml.safe_load(experiment.decoder.sft.config.read_text())
            | {"model_name_or_path": str(decoder)}
        )
    )
    values = {
        "title": f"growth, {rows} rows",
        "data": {
            "source": f"{folder}/{{split}}.csv",
            "labels": LABELS,
            "rows": {"validation": 300, "test": None},
        },
        "decoder": {
            "model": str(decoder),
            "train_rows": 100,
            SFT.name: {"config": str(trained_by)},
        },
        "encoder": {"model": str(encoder)},
        "name": f"{experiment.name}.growth.{name}",
    }
    path = folder / f"{name}.yaml"  # JSON is YAML
    path.write_text(json.dumps(values))
    return str(path)


def draw_results(experiment: Experiment, steps: list[int]) -> int:
    """Drawn predictions of all methods, those that are trained with so many checkpoints, as their
    stages leave them; gives the number of methods × checkpoints."""
    chance, drawn = np.random.default_rng(0), set()
    files: dict[str, list[Path]] = {}
    facts = {
        "seconds": 1.0,
        "tokens": 9000,
        "parameters": 1000,
        "dtype": "float32",
        "model": "m",
        "inputs_sha256": "0",
    }
    for method in compared_methods(experiment):
        if method is CASCADE:  # none is chosen
            path = cascades_file(experiment)
            write_json(path, {})
            files[method.stage] = [path]
            continue
        for split in ("test",) if method.thinks else results.SPLITS:
            rows = results.read_rows(experiment, split)
            truth = results.class_numbers(experiment, rows)
            for step in steps if method.has_steps else [None]:
                name = f"{method.name}@{step}" if step else method.name
                drawn.add(name)
                files.setdefault(method.stage, []).extend(
                    results.result_files(experiment, name, split)
                )
                if files[method.stage][-1].exists():
                    continue
                score = chance.normal(size=(len(rows), len(LABELS)))
                score[np.arange(len(rows)), truth] += SKILL
                probabilities = np.exp(score) / np.exp(score).sum(1, keepdims=True)
                answers: dict[str, Any] = {"probabilities": probabilities}
                if method.thinks:
                    answers = {"predicted": score.argmax(axis=1), "thinking": THINKING}
                results.write_result(
                    experiment, name, split, rows, train_loss=0.5, **answers, **facts
                )
    for stage, paths in files.items():
        StageRun(experiment, stage, len(steps)).finish(paths, rows=100, scoring_seconds=1.0)
    StageRun(experiment, SFT_TRAINING.name, 0).finish([], rows=100, resumed_from=0)
    return len(drawn)


def call(*arguments: Any) -> dict[str, float]:
    """Run Python with these arguments in a process of its own; gives its seconds and its peak
    memory in MiB.

    Raises
    ------
    LetterheadError : it failed; quotes the last line that it said
    """
    command = [sys.executable, "-c", SHIM, *map(str, arguments)]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    if found["code"]:
        printed = "".join(found["said"]) or "nothing"
        raise LetterheadError(
            f"{' '.join(map(str, arguments))}: exit code {found['code']}, it said: {printed}"
        )
    return {key: found[key] for key in ("seconds", "peak_mib")}


def score_rows(experiment: Experiment, options: int) -> dict:
    """Seconds and peak memory (MiB, the model's own with it) to score some rows with so many names
    as options, which the prompt lists, by the experiment's own decoder."""
    from letterhead.models.prompt import load_prompt_encoder
    from letterhead.models.scoring import load_decoder, score_options

    names = [f"{chr(97 + i % 26)}{chr(97 + i // 26)} topic {i}" for i in range(options)]
    of_names = {"options": "names", "template": "{text}\n\n{options}\n\n"}
    overrides = experiment.decoder.sft.overrides | {"cutoff_len": 4096}
    sft = experiment.decoder.sft.model_copy(update={"overrides": overrides})
    sections = {"prompt": experiment.prompt.model_copy(update=of_names)}
    sections |= {"data": experiment.data.model_copy(update={"labels": names})}
    sections |= {"decoder": experiment.decoder.model_copy(update={SFT.name: sft})}
    asked = experiment.model_copy(update=sections)
    encoder, model = (
        load_prompt_encoder(asked),
        load_decoder(experiment.decoder.folder, experiment.decoder.dtype),
    )
    prompts = [encoder.encode(f"{i} of them " * WORDS) for i in range(SCORED_ROWS)]
    score_options(model, prompts[:2], encoder.answers, True, experiment.eval.batch_tokens)
    begin = time.perf_counter()
    score_options(model, prompts, encoder.answers, True, experiment.eval.batch_tokens)
    return {
        "seconds": time.perf_counter() - begin,
        "peak_mib": float(peak_memory()["peak_memory_mb"]),
    }


def slope(points: list[dict], key: str) -> float:
    """The power of n with which a figure grows between the last two points: 1 is linear, 2
    quadratic."""
    a, b = points[-2:]
    return math.log(b[key] / a[key]) / math.log(b["n"] / a["n"])


def as_table(points: list[dict]) -> str:
    """The points in Markdown, with the power with which each line grows at its end."""
    lines = [
        "| what | n | seconds | peak memory (MiB) | grows as n to the power |",
        "| :--- | ---: | ---: | ---: | :--- |",
    ]
    for what in dict.fromkeys(point["of"] for point in points):
        line = [point for point in points if point["of"] == what]
        for point in line:
            powers = ""
            if point is line[-1] and len(line) > 1:
                powers = ", ".join(
                    f"{slope(line, key):.2f} ({name})" for key, name in POWERS.items()
                )
            lines.append(
                f"| {what} | {point['n']:,} | {point['seconds']:.2f} | "
                f"{point['peak_mib']:,.0f} "
                f"| {powers} |"
            )
    few, many, alone = (
        next((p for p in points if (p["of"], p["n"]) == point), None) for point in OWN_POINTS
    )
    if alone:
        a_row = (many["seconds"] - few["seconds"]) / (many["n"] - few["n"])
        share = alone["seconds"] / alone["n"] / a_row
        lines += [
            "",
            f"Of the time that predict takes for a further row with the "
            f"experiment's "
            f"encoder, that model takes {share:.0%}.",
        ]
    return "\n".join(lines) + "\n"


def draw_picture(path: Path, caption: str, points: list[dict]) -> None:
    """Seconds and memory against n, both logarithmic."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for panel, (key, name) in zip(panels, POWERS.items(), strict=True):
        for what in dict.fromkeys(point["of"] for point in points):
            line = [(point["n"], point[key]) for point in points if point["of"] == what]
            panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=what)
        panel.set(xscale="log", yscale="log", xlabel="rows, results or options", ylabel=name)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save(figure, path, caption)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"rows": "how many rows at most"})
