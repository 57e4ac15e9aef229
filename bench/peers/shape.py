"""What the published experiment's models take on this machine, before any weights are there: scoring against
lm-evaluation-harness, two optimizer steps of its YAML (made by `make sft EXP=shape`), requests per second.

    python -m bench.peers.shape --experiment shape

The weights are random, so accuracies mean nothing; time and memory depend on the shape alone.
"""

import os
from pathlib import Path

from bench.contenders import Row, measure_rows
from bench.peers.scoring import compare, draw_rows, summary
from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.runs.devices import device_name, machine, peak_memory, versions
from letterhead.runs.processes import call_in_a_process
from letterhead.runs.stage import OFFLINE, Stage, run, stage_outputs

ROWS = (
    Row("bert", "hf", "head"),
    Row("linear_head", "hf", "head"),
    Row("sft", "hf", "generate"),
    Row("sft", "hf", "forward"),
    Row("bert", "vllm", "head"),
    Row("sft_folded", "vllm", "head"),
    Row("sft", "vllm", "one_token"),
    Row("sft", "vllm", "generate"),
)
UNTRAINED = {"bert": "bert@0", "linear_head": "linear_head@0", "sft": "sft@0", "sft_folded": "sft@0"}


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    made = {name: stage_outputs(experiment, name) for name in ("data", "sft")}
    stage = Stage(experiment, "bench-shape", made | {"bench": experiment.bench.model_dump()})
    path, kept = experiment.results_folder / "bench_shape.json", stage.folder / "scoring.json"
    if not stage.is_current():
        scored = read_json(kept)
        if not scored or scored["inputs_sha256"] != stage.inputs_sha256:
            scored = call_in_a_process(scoring, experiment) | {"inputs_sha256": stage.inputs_sha256}
            write_json(kept, scored)
        rows, skipped = measure_rows(experiment, ROWS, UNTRAINED, stage.folder)
        record = {"scoring": scored, "sft": optimizer_steps(experiment), "rows": rows, "skipped": skipped}
        record |= {"device": device_name(), "machine": machine(), "versions": versions()}
        write_json(path, record)
        stage.finish([path])
    record = read_json(path)
    print(summary("scoring", record["scoring"]))
    sft = record["sft"]
    print(
        f"SFT: {sft['steps']} optimizer steps of {sft['rows_per_step']} rows in {sft['seconds']} s "
        f"({sft['seconds_with_saving']:.0f} s with saving), peak memory, the GPU's apart, {sft['peak_memory_mb']:,} MiB"
    )
    for row in record["rows"]:
        reached = ", ".join(f"{loop['rps']:.2f} ({n})" for n, loop in row["closed"].items())
        print(
            f"{row['method']}, {row['engine']}, {row['decode']}: requests/s (clients) {reached}; "
            f"p50 {row['p50_ms']:.0f} ms, {row['peak_memory_mb']:,} MiB"
        )
    print(path)


def scoring(experiment: Experiment) -> dict:
    """Rows a second of the scorer and of lm-evaluation-harness on the decoder, and the memory of both."""
    os.environ.update(OFFLINE)
    import torch

    from letterhead.models.scoring import load_decoder

    folder, runs = experiment.decoder.folder, experiment.bench.scoring_runs
    model = load_decoder(folder, experiment.decoder.dtype)
    rows = draw_rows(experiment, experiment.bench.scoring_rows, runs)
    figures = compare(model, experiment, rows, runs, "scoring")
    return figures | {"dtype": str(model.dtype), "threads": torch.get_num_threads(), **peak_memory()}


def optimizer_steps(experiment: Experiment) -> dict:
    """Seconds and memory of the steps that LLaMA-Factory made."""
    arguments, stage = experiment.sft_arguments(), read_json(experiment.sft_folder / "stage.json")
    return {
        "steps": stage["steps"],
        "rows_per_step": arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"],
        "tokens": stage["tokens"],
        "seconds": stage["training_seconds"],
        "seconds_with_saving": read_json(Path(arguments["output_dir"]) / "all_results.json")["train_runtime"],
        "peak_memory_mb": stage["peak_memory_mb"],
    }


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
