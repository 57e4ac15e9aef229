"""What growing costs: time and peak memory against rows, options, and methods × checkpoints; nothing may be quadratic.

    python -m bench.growth --experiment quick --rows 1000000

Rows are drawn words, models tiny and random, predictions drawn: what is measured is what we add to a model's own work. Each
point is a process of its own. runs/EXPERIMENT/growth/ takes growth.json, GROWTH.md and growth.png.
"""

import csv
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

from eval.compare import METHODS, compared
from letterhead import results, tfidf
from letterhead.experiment import Experiment, load_experiment
from letterhead.figures import caption_of, plt, save
from letterhead.records import LetterheadError, atomic_open, device_name, machine, write_json
from letterhead.stage import OFFLINE, Stage, run, stage_outputs

SFT = Path("llamafactory_configs/smollm2_135m_full_sft.yaml")
LABELS = ["World", "Sports", "Business", "Science"]
WORDS = 12
FEW_TRAINED = 2000
CHECKPOINTS, CHECKED_ROWS = (1, 4, 16, 64), 1000
OPTIONS, SCORED_ROWS = (4, 10, 26, 52, 100), 12
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SKILL = 2.0  # of the drawn predictions
THINKING = {"no_think_accuracy_same_rows": 0.4, "times_one_forward": 20.0, "engine": "hf", "budget_tokens": 64}
POWERS = {"seconds": "seconds", "peak_mib": "peak memory, MiB"}
THINKING |= {"thought": 30, "begun": 32, "unfinished": 4, "unparsed": 2}


def main(experiment: Experiment, most: str) -> None:
    if not most.isdecimal() or int(most) < 1000:
        raise LetterheadError(f"ROWS={most}: write how many rows at most, 1000 or more")
    os.environ.update(OFFLINE)
    stage_outputs(experiment, "data")  # the tokenizers come from its models
    stage = Stage(experiment, "growth", None)
    place = stage.folder / "work"
    shutil.rmtree(place, ignore_errors=True)
    decoder, encoder = tiny_models(experiment, place)
    sizes = [10**power for power in range(3, int(math.log10(int(most))) + 1)]
    points: list[dict] = []
    total = 4 * len(sizes) + 2 * len(CHECKPOINTS) + len(OPTIONS)
    with tqdm(total=total, desc="growth", unit=" points") as bar:
        for rows in sizes:
            name = write_experiment(experiment.name, place, f"rows{rows}", rows, decoder, encoder)
            told = ["--experiment", name]
            points += [measured("data", rows, bar, "prep.data", *told)]
            draw_results(load_experiment(name), steps=[1])
            points += [measured("compare", rows, bar, "eval.compare", *told)]
            points += [measured("report", rows, bar, "report.build", *told)]
            labelled = [
                "--in",
                place / f"rows{rows}/test.csv",
                "--out",
                place / "labelled.csv",
                "--model",
                encoder.absolute(),
            ]
            points += [measured("predict", rows, bar, "serve.predict", *told, *labelled)]
        name = write_experiment(experiment.name, place, "checkpoints", CHECKED_ROWS, decoder, encoder)
        call("prep.data", "--experiment", name)
        for checkpoints in CHECKPOINTS:
            draw_results(checked := load_experiment(name), steps=list(range(1, checkpoints + 1)))
            n = len(list(checked.results_folder.glob("*@*.validation.json"))) + len(compared(checked))
            points += [measured("compare, results", n, bar, "eval.compare", "--experiment", name)]
            points += [measured("report, results", n, bar, "report.build", "--experiment", name)]
        for options in OPTIONS:
            points.append({"of": "scoring, options", "n": options, **score_rows(experiment, options)})
            bar.update()
    shutil.rmtree(place)
    for made in (*Path("runs").glob(f"{experiment.name}.growth.*"), *Path("data").glob(f"{experiment.name}.growth.*")):
        shutil.rmtree(made)
    record, table, picture = (stage.folder / of for of in ("growth.json", "GROWTH.md", "growth.png"))
    write_json(record, {"points": points, "device": device_name(), "machine": machine()})
    with atomic_open(table) as file:
        file.write(as_table(points))
    draw_picture(picture, caption_of(experiment), points)
    stage.finish([record, table, picture], rows=int(most))
    print(f"{table.read_text(encoding='utf-8')}\n{record}, {picture.name} beside it", flush=True)


def tiny_models(experiment: Experiment, place: Path) -> tuple[Path, Path]:
    """A decoder, and an encoder with a head, of random weights, with the tokenizers of the experiment's models."""
    torch.manual_seed(0)
    decoder, encoder = place / "decoder", place / "encoder"
    tokenizer = AutoTokenizer.from_pretrained(experiment.decoder.folder)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SHAPE)).save_pretrained(decoder)
    tokenizer.save_pretrained(decoder)
    tokenizer = AutoTokenizer.from_pretrained(experiment.encoder.folder)
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {label: i for i, label in enumerate(LABELS)}}
    config = BertConfig(vocab_size=len(tokenizer), **SHAPE, **names)
    BertForSequenceClassification(config).save_pretrained(encoder)
    tokenizer.save_pretrained(encoder)
    return decoder, encoder


def write_experiment(of: str, place: Path, name: str, rows: int, decoder: Path, encoder: Path) -> str:
    """Rows of drawn words, so many to test and a few to train, and an experiment that reads them; returns its path."""
    folder, chance = place / name, np.random.default_rng(rows)
    folder.mkdir()
    words = np.array([f"w{i}" for i in range(5000)])
    for split, n in (("train", max(FEW_TRAINED, rows // 10)), ("test", rows)):
        with open(folder / f"{split}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["text", "label"])
            for at in range(0, n, 10_000):
                drawn = words[chance.integers(len(words), size=(min(10_000, n - at), WORDS))]
                writer.writerows(
                    (f"{at + i} {' '.join(row)}", LABELS[(at + i) % len(LABELS)]) for i, row in enumerate(drawn)
                )
    trained_by = place / "sft.yaml"
    trained_by.write_text(json.dumps(yaml.safe_load(SFT.read_text()) | {"model_name_or_path": str(decoder)}))
    values = {
        "title": f"growth, {rows} rows",
        "data": {"source": f"{folder}/{{split}}.csv", "labels": LABELS, "rows": {"validation": 300, "test": None}},
        "decoder": {"model": str(decoder), "train_rows": 100, "sft": {"config": str(trained_by)}},
        "encoder": {"model": str(encoder)},
        "name": f"{of}.growth.{name}",
    }
    path = folder / f"{name}.yaml"  # JSON is YAML
    path.write_text(json.dumps(values))
    return str(path)


def draw_results(experiment: Experiment, steps: list[int]) -> None:
    """Drawn predictions of all methods, with so many checkpoints of those that are trained, as their stages leave them."""
    chance = np.random.default_rng(0)
    files: dict[str, list[Path]] = {}
    facts = {"seconds": 1.0, "tokens": 9000, "parameters": 1000, "dtype": "float32", "model": "m", "inputs_sha256": "0"}
    for method in compared(experiment):
        stage, trained, _ = METHODS[method]
        numbered = bool(trained) and method not in tfidf.ROWS
        for split in ("test",) if method == "zero_shot_think" else results.SPLITS:
            rows = results.read_rows(experiment, split)
            truth = results.class_numbers(experiment, rows)
            for step in steps if numbered else [None]:
                name = f"{method}@{step}" if step else method
                files.setdefault(stage, []).extend(results.result_files(experiment, name, split))
                if files[stage][-1].exists():
                    continue
                score = chance.normal(size=(len(rows), len(LABELS)))
                score[np.arange(len(rows)), truth] += SKILL
                probabilities = np.exp(score) / np.exp(score).sum(1, keepdims=True)
                given: dict[str, Any] = {"probabilities": probabilities}
                if method == "zero_shot_think":
                    given = {"predicted": score.argmax(axis=1), "thinking": THINKING}
                results.write_result(experiment, name, split, rows, train_loss=0.5, **given, **facts)
    for stage, paths in files.items():
        Stage(experiment, stage, len(steps)).finish(paths, rows=100, scoring_seconds=1.0)
    Stage(experiment, "sft", 0).finish([], rows=100, resumed_from=0)


def call(module: str, *told: Any) -> tuple[float, float]:
    """Run a module in a process of its own; gives its seconds and its peak memory in MiB.

    Raises
    ------
    LetterheadError : it failed; quotes the end of what it said
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", module, *map(str, told)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise LetterheadError(f"{module} {' '.join(map(str, told))}: {said.strip().splitlines()[-1]}")
    return time.perf_counter() - begin, usage.ru_maxrss / 1024


def measured(of: str, n: int, bar: tqdm, module: str, *told: Any) -> dict:
    """One point: time and memory of a module."""
    seconds, megabytes = call(module, *told)
    bar.update()
    return {"of": of, "n": n, "seconds": seconds, "peak_mib": megabytes}


def score_rows(experiment: Experiment, options: int) -> dict:
    """Seconds to score some rows with so many names as options by the experiment's own decoder, and the tokens of a prompt,
    which lists them all."""
    from letterhead.prompt import load_prompt_encoder
    from letterhead.scoring import load_decoder, score_options

    names = [f"{chr(97 + i % 26)}{chr(97 + i // 26)} topic {i}" for i in range(options)]
    of_names = {"options": "names", "template": "{text}\n\n{options}\n\n"}
    overrides = experiment.decoder.sft.overrides | {"cutoff_len": 4096}
    sft = experiment.decoder.sft.model_copy(update={"overrides": overrides})
    sections = {"prompt": experiment.prompt.model_copy(update=of_names)}
    sections |= {"data": experiment.data.model_copy(update={"labels": names})}
    sections |= {"decoder": experiment.decoder.model_copy(update={"sft": sft})}
    asked = experiment.model_copy(update=sections)
    encoder, model = load_prompt_encoder(asked), load_decoder(experiment.decoder.folder, experiment.decoder.dtype)
    prompts = [encoder.encode(f"{i} of them " * WORDS) for i in range(SCORED_ROWS)]
    score_options(model, prompts[:2], encoder.answers, True, experiment.eval.batch_tokens)
    begin = time.perf_counter()
    score_options(model, prompts, encoder.answers, True, experiment.eval.batch_tokens)
    return {"seconds": time.perf_counter() - begin, "tokens": sum(map(len, prompts)) / len(prompts)}


def slope(points: list[dict], key: str) -> float | None:
    """The power of n with which a figure grows between the last two points: 1 is linear, 2 quadratic."""
    (a, b) = points[-2:]
    return math.log(b[key] / a[key]) / math.log(b["n"] / a["n"]) if key in a else None


def as_table(points: list[dict]) -> str:
    """The points in Markdown, with the power with which each line grows at its end."""
    lines = ["| what | n | seconds | peak memory (MiB) | grows as n to the power |", "| :--- | ---: | ---: | ---: | :--- |"]
    for of in dict.fromkeys(point["of"] for point in points):
        line = [point for point in points if point["of"] == of]
        for point in line:
            memory = f"{point['peak_mib']:,.0f}" if "peak_mib" in point else "–"
            powers = [f"{slope(line, key):.2f} ({name})" for key, name in POWERS.items() if key in point]
            told = ", ".join(powers) if point is line[-1] and len(line) > 1 else ""
            lines.append(f"| {of} | {point['n']:,} | {point['seconds']:.2f} | {memory} | {told} |")
    return "\n".join(lines) + "\n"


def draw_picture(path: Path, caption: str, points: list[dict]) -> None:
    """Seconds and memory against n, both logarithmic."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for panel, (key, name) in zip(panels, POWERS.items(), strict=True):
        for of in dict.fromkeys(point["of"] for point in points if key in point):
            line = [(point["n"], point[key]) for point in points if point["of"] == of]
            panel.plot(*zip(*line, strict=True), marker="o", markersize=4, label=of)
        panel.set(xscale="log", yscale="log", xlabel="rows, results or options", ylabel=name)
    panels[0].legend(fontsize=7)
    save(figure, path, caption)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"rows": "how many rows at most"})
