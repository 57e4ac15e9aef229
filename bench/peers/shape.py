"""What the published experiment's models take on this machine, before any weights are there:
scoring against lm-evaluation-harness, two optimizer steps of its YAML (made by `make sft
EXP=shape`), requests per second.

    python -m bench.peers.shape --experiment shape

The weights are random, so accuracies mean nothing; time and memory depend on the shape alone.
"""

from pathlib import Path

from bench.contenders import ONNX, Row, measure_rows
from bench.peers.scoring import compare, draw_rows, summary
from letterhead.config.experiment import Experiment
from letterhead.files import read_json, write_json
from letterhead.pipeline import (
    BERT,
    DATA,
    FOLDED,
    HEAD_ON_PROMPT,
    LINEAR_HEAD,
    SFT,
    SFT_TRAINING,
    outputs,
)
from letterhead.runs.devices import device_name, machine, peak_memory, versions
from letterhead.runs.processes import call_in_a_process
from letterhead.runs.stage import StageRun, run

# Untrained, and of the rows of the whole bench those that the article's table has or ours adds
ROWS = [
    Row(*row)
    for method in (BERT, LINEAR_HEAD, SFT)
    for row in method.bench
    if row != LINEAR_HEAD.bench[1]
]
ROWS = [row for row in ROWS if row.method != HEAD_ON_PROMPT and row.engine not in ONNX]
UNTRAINED = {row.method: f"{SFT.name if row.method == FOLDED else row.method}@0" for row in ROWS}


def main(experiment: Experiment) -> None:
    stage_files = {stage.name: outputs(stage, experiment) for stage in (DATA, SFT_TRAINING)}
    stage = StageRun(
        experiment, "bench-shape", stage_files | {"bench": experiment.bench.model_dump()}
    )
    path, kept = experiment.results_folder / "bench_shape.json", stage.folder / "scoring.json"
    if not stage.is_current():
        stage.start()
        scored = read_json(kept)
        if not scored or scored["inputs_sha256"] != stage.inputs_sha256:
            scored = call_in_a_process(scoring, experiment) | {"inputs_sha256": stage.inputs_sha256}
            write_json(kept, scored)
        rows, skipped = measure_rows(experiment, ROWS, UNTRAINED, stage.folder)
        record = {
            "scoring": scored,
            "optimizer_steps": optimizer_steps(experiment),
            "rows": rows,
            "skipped": skipped,
        }
        record |= {"device": device_name(), "machine": machine(), "versions": versions()}
        write_json(path, record)
        stage.finish([path])
    record = read_json(path)
    print(summary("scoring", record["scoring"]))
    sft = record["optimizer_steps"]
    print(
        f"SFT: {sft['steps']} optimizer steps of {sft['rows_per_step']} rows in {sft['seconds']} s "
        f"({sft['seconds_with_saving']:.0f} s with saving), peak memory, the GPU's "
        f"apart, {sft['peak_memory_mb']:,} MiB"
    )
    for row in record["rows"]:
        reached = ", ".join(f"{loop['rps']:.2f} ({n})" for n, loop in row["closed"].items())
        print(
            f"{row['method']}, {row['engine']}, {row['decode']}: requests/s (clients) {reached}; "
            f"p50 {row['p50_ms']:.0f} ms, {row['peak_memory_mb']:,} MiB"
        )
    print(path)


def scoring(experiment: Experiment) -> dict:
    """Rows a second of the scorer and of lm-evaluation-harness on the decoder, and the memory of
    both."""
    import torch

    from letterhead.models.scoring import load_decoder

    folder, runs = experiment.decoder.folder, experiment.bench.scoring_runs
    model = load_decoder(folder, experiment.decoder.dtype)
    rows = draw_rows(experiment, experiment.bench.scoring_rows, runs)
    figures = compare(model, experiment, rows, runs, "scoring")
    return figures | {
        "dtype": str(model.dtype),
        "threads": torch.get_num_threads(),
        **peak_memory(),
    }


def optimizer_steps(experiment: Experiment) -> dict:
    """Seconds and memory of the steps that LLaMA-Factory made."""
    arguments, stage = experiment.sft_arguments(), read_json(experiment.sft_folder / "stage.json")
    return {
        "steps": stage["steps"],
        "rows_per_step": arguments["per_device_train_batch_size"]
        * arguments["gradient_accumulation_steps"],
        "tokens": stage["tokens"],
        "seconds": stage["training_seconds"],
        "seconds_with_saving": read_json(Path(arguments["output_dir"]) / "all_results.json")[
            "train_runtime"
        ],
        "peak_memory_mb": stage["peak_memory_mb"],
    }


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
