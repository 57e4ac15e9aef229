"""Fetch models and rows; write train/validation/test.jsonl, the Alpaca file that LLaMA-Factory
reads, and a data card.

    python -m prep.data --experiment quick

Two passes. The first reads the source row by row into a pool on disk and keeps, in arrays, each
row's label and a hash of its text (about 20 bytes a row). From these the splits are drawn (the
search for near-duplicates takes a kilobyte a row). The second copies the pool's lines to their
files.
"""

import json
import os
from contextlib import ExitStack

import jsonlines
import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import atomic_open, exclusive, read_jsonl, write_json
from letterhead.models.checkpoints import require_language_model
from letterhead.models.prompt import (
    PromptEncoder,
    load_prompt_encoder,
    load_scoring_encoder,
)
from letterhead.pipeline import DATA
from letterhead.plan.evidence import evidence
from letterhead.rows.balance import repeats
from letterhead.rows.card import summary, token_lengths
from letterhead.rows.fetch import CACHE, fetch_model
from letterhead.rows.labels import first_label_number, numbered_names
from letterhead.rows.pool import SPLITS, UNUSED, read_pool
from letterhead.rows.sources import open_source
from letterhead.rows.splits import draw_decoder_rows, draw_splits
from letterhead.runs.stage import OFFLINE, StageRun, run
from letterhead.runs.terminal import progress, say

LEAST_LORA_RATE = 5e-5  # with less an adapter hardly moves

FILES = (
    *(f"{split}.jsonl" for split in (*SPLITS, "decoder_train", "sft_train", "sft_validation")),
    "dataset_info.json",
    "data_card.json",
)


def main(experiment: Experiment, with_evidence: bool = True) -> None:
    """Make the rows.

    Parameters
    ----------
    with_evidence : say which margin the test rows can show
    """
    data, folder = experiment.data, experiment.data_folder
    encoder_model = experiment.encoder.model
    with exclusive(CACHE / ".lock"):
        fetch_model(experiment.decoder.model, experiment.decoder.folder)
        fetch_model(encoder_model, experiment.encoder.folder)
    require_language_model(experiment.decoder.folder)
    if not data.source.startswith("hf:"):
        os.environ.update(OFFLINE)
    stage = StageRun(experiment, DATA)
    if stage.has_other_inputs() and experiment.results_folder.exists():
        print(
            f"{folder}: other settings or data than before, so what {experiment.run_folder} "
            f"holds will be made anew; "
            f'SET="name={experiment.name}2 …" keeps both'
        )
    if stage.is_current():
        stage.tell_current()
        check_examples(experiment)
        return
    stage.start()
    with exclusive(CACHE / ".lock"):
        source = open_source(data)
        first_number = first_label_number(open_source(data), data)
    if first_number is not None:
        say(f"labels: numbers from {first_number}: {numbered_names(data.labels, first_number)}")
    pool_path = folder / ".pool.jsonl"
    with ExitStack() as stack:
        stack.callback(pool_path.unlink, missing_ok=True)
        pool, card = read_pool(source.splits, experiment, pool_path, first_number)
        chosen = draw_splits(pool, experiment, card, pool_path)
        decoder_rows = draw_decoder_rows(pool, chosen, experiment)
        encoder = load_prompt_encoder(experiment)
        times, classes = np.zeros(len(chosen), int), pool.arrays()[0]
        for rows in (decoder_rows, np.flatnonzero(chosen == SPLITS.index("validation"))):
            times[rows] = sft_repeats(experiment, classes[rows])
        write_rows(pool_path, chosen, times, experiment, encoder, card)
    card |= {
        "experiment": experiment.name,
        "title": experiment.title,
        "labels": experiment.labels,
        "sources": source.sha256,
    }
    sections = {"data": data, "decoder": experiment.decoder, "encoder": experiment.encoder}
    card["licenses"] = {name: section.license for name, section in sections.items()}
    card["token_lengths"] = token_lengths(experiment, encoder)
    write_json(folder / "data_card.json", card)
    write_json(folder / "dataset_info.json", dataset_info(experiment))
    headline, *details = summary(card)
    if details:
        say("; ".join(details))
    stage.finish(
        [folder / name for name in FILES], headline, rows=card["rows"]["read"], device="cpu"
    )
    if with_evidence and card["rows"]["test"]:
        say(evidence(experiment, card))
    for key, rate in low_rates(experiment).items():
        say(
            f"{key} is {rate:g}, a rate of full tuning; an adapter wants some ten times that "
            f"({LEAST_LORA_RATE:g} or more)"
        )
    check_examples(experiment)


def low_rates(experiment: Experiment) -> dict[str, float]:
    """Key → learning rate of each adapter's training whose rate is so low that it hardly moves."""
    decoder, encoder = experiment.decoder, experiment.encoder
    rates = {"decoder.sft": (decoder.sft.lora, decoder.sft.arguments().get("learning_rate"))}
    heads = {"decoder.head": decoder.head, "decoder.sft_options": decoder.sft_options}
    heads |= {"encoder.head": encoder.head}
    rates |= {key: (head.lora, head.learning_rate) for key, head in heads.items() if head}
    return {
        f"{key}: its learning_rate": float(rate)
        for key, (lora, rate) in rates.items()
        if lora and rate is not None and float(rate) < LEAST_LORA_RATE
    }


def check_examples(experiment: Experiment) -> None:
    """Say, before anything is trained, whether the examples of `eval.examples` fit into a prompt,
    and what is cut.

    Raises
    ------
    LetterheadError : they do not fit
    """
    if not experiment.eval.examples:
        return
    encoder = load_scoring_encoder(experiment)
    texts = [row["text"] for row in read_jsonl(experiment.data_folder / "test.jsonl")]
    cut = sum(map(encoder.is_cut, texts))
    print(
        f"eval.examples: {encoder.examples_cut} of {experiment.eval.examples} examples "
        f"and {cut} of {len(texts)} test texts "
        f"are cut so that a prompt has at most {encoder.cutoff_len} tokens (cutoff_len)"
    )


def write_rows(
    pool_path, chosen, times, experiment: Experiment, encoder: PromptEncoder, card: dict
) -> None:
    """Copy the pool's lines to their splits, and the decoder's rows also in LLaMA-Factory's Alpaca
    form.

    Parameters
    ----------
    chosen : index in SPLITS, or UNUSED, shape (rows,)
    times : how often SFT reads a row in an epoch, or at an evaluation, shape (rows,); 0 for one
        that it does not read
    """
    answers = dict(zip(experiment.labels, map(encoder.answer_text, encoder.options), strict=True))
    rows = read = shortened = neutralised = 0
    with ExitStack() as stack:
        files = [
            stack.enter_context(atomic_open(experiment.data_folder / f"{split}.jsonl"))
            for split in SPLITS
        ]
        decoder = stack.enter_context(atomic_open(experiment.data_folder / "decoder_train.jsonl"))
        train, validation = (
            jsonlines.Writer(stack.enter_context(atomic_open(experiment.data_folder / name)))
            for name in ("sft_train.jsonl", "sft_validation.jsonl")
        )
        pool = stack.enter_context(open(pool_path, encoding="utf-8", newline="\n"))
        for number, line in enumerate(
            progress(pool, total=len(chosen), desc="writing", unit=" rows")
        ):
            if chosen[number] == UNUSED:
                continue
            files[chosen[number]].write(line)
            if not times[number]:
                continue
            row = json.loads(line)
            clean, fitted = encoder.neutralise(row["text"]), encoder.fit(row["text"])
            example = {
                "instruction": encoder.fill(fitted),
                "input": "",
                "output": answers[row["label"]],
            }
            several = [example] * int(times[number])
            if SPLITS[chosen[number]] == "validation":
                validation.write_all(several)
                continue
            decoder.write(line)
            rows += 1
            train.write_all(several)
            read += len(several)
            neutralised += clean != row["text"]
            shortened += len(fitted) < len(clean)
    card["shared"] = {
        "rows": rows,
        "sft_rows": read,
        "cut_to_cutoff_len": shortened,
        "control_strings_broken_up": neutralised,
    }


def sft_repeats(experiment: Experiment, classes: np.ndarray) -> np.ndarray:
    """How often SFT reads each of its rows, of training or of validation. LLaMA-Factory's loss
    takes no weights, so that these become rows, too.

    Parameters
    ----------
    classes : class numbers, shape (rows,)
    """
    if experiment.balance == "none" or not len(classes):
        return np.ones(len(classes), int)
    return repeats(classes, experiment.data.seed)


def dataset_info(experiment: Experiment) -> dict:
    """LLaMA-Factory's registry: the Alpaca file under the name that its YAML asks for, a teacher's
    thoughts beside it."""
    columns = {"prompt": "instruction", "query": "input", "response": "output"}
    files = dict.fromkeys(experiment.sft_arguments()["dataset"].split(","), "sft_train.jsonl")
    files["sft_validation"] = "sft_validation.jsonl"
    if experiment.distill:
        files["distilled"] = "distilled.jsonl"
    return {name: {"file_name": file, "columns": columns} for name, file in files.items()}


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
