"""Training throughput of BERT and of the linear head: rows grouped by length against plain, in
pairs, in one process.

python -m bench.peers.training --experiment ag_news_small
"""

from tempfile import TemporaryDirectory

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.config.models import Head
from letterhead.files import LetterheadError, write_json
from letterhead.pipeline import BERT, LINEAR_HEAD
from letterhead.runs import results
from letterhead.runs.devices import device_name, versions
from letterhead.runs.stage import run

WARM_UP_ROWS = 64


def main(experiment: Experiment) -> None:
    for key, section in (("encoder", experiment.encoder), ("decoder", experiment.decoder)):
        if section.head.lora:
            raise LetterheadError(f"{key}.head.lora: this measures whole models; set it to null")
    rows = results.read_rows(experiment, "train")
    drawn = np.random.default_rng(experiment.seed).permutation(len(rows))[
        : experiment.bench.training_rows
    ]
    rows = [rows[i] for i in drawn]
    record = {
        "rows": len(rows),
        "pairs": experiment.bench.training_runs,
        "device": device_name(),
        "versions": versions(),
    }
    for name, section in (
        (method.name, method.section(experiment)) for method in (BERT, LINEAR_HEAD)
    ):
        plain, grouped = [], []
        throughput(experiment, section, rows[:WARM_UP_ROWS], False)
        for pair in range(experiment.bench.training_runs):
            for group in (True, False) if pair % 2 else (False, True):
                rate = throughput(experiment, section, rows, group)
                (grouped if group else plain).append(rate)
                print(f"{name}, {'grouped' if group else 'plain'}: {rate:.2f} rows/s", flush=True)
        ratios = [g / p for g, p in zip(grouped, plain, strict=True)]
        record[name] = {
            "batch": section.head.per_device_train_batch_size
            * section.head.gradient_accumulation_steps,
            "plain_rows_per_second": float(np.median(plain)),
            "grouped_rows_per_second": float(np.median(grouped)),
            "ratios": ratios,
            "ratio": float(np.median(ratios)),
        }
        print(f"{name}: grouped by length / plain = {record[name]['ratio']:.2f}")
    write_json(experiment.results_folder / "bench_training.json", record)


def throughput(experiment: Experiment, section, rows: list[dict], group: bool) -> float:
    """Rows a second over one epoch of `rows`, from a fresh model."""
    from transformers import set_seed

    from letterhead.models import heads
    from letterhead.models.precision import precision
    from letterhead.models.prompt import TextEncoder

    head: Head = section.head.model_copy(update={"group_by_length": group, "num_train_epochs": 1})
    tokenizer = heads.load_tokenizer(section.folder)
    encoder = TextEncoder(tokenizer, head.max_length)
    train = heads.encoded(rows, results.class_numbers(experiment, rows), encoder, "encoding")
    set_seed(experiment.seed)
    with TemporaryDirectory() as folder:
        dtype = precision(experiment.decoder.dtype, section.folder)
        arguments = heads.training_arguments(head, folder, experiment.seed, None, dtype)
        arguments.eval_strategy = arguments.save_strategy = "no"
        arguments.report_to = []
        trainer = heads.HeadTrainer(
            heads.load_head(section.folder, experiment.labels), arguments, tokenizer, train
        )
        return trainer.train().metrics["train_samples_per_second"]


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
