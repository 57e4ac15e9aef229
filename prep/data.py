"""Fetch models and rows; write train/validation/test.jsonl, the Alpaca file that LLaMA-Factory reads, and a data card.

    python -m prep.data --experiment quick

Two passes. The first reads the source row by row into a pool on disk and keeps, in arrays, each row's label and a hash
of its text (about 20 bytes a row). From these the splits are drawn. The second copies the pool's lines to their files.
"""

import hashlib
import json
import os
import random
from array import array
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import jsonlines
import numpy as np
from tqdm import tqdm

from letterhead.experiment import Experiment
from letterhead.prompt import PromptEncoder, keep_words, load_prompt_encoder
from letterhead.records import LetterheadError, atomic_open, write_json
from letterhead.stage import OFFLINE, Stage, run
from prep.fetch import fetch_model
from prep.sources import RawRow, open_source

SPLITS = ("train", "validation", "test")
UNUSED = -1
# What LLaMA-Factory's YAML decides about the rows.
SFT_KEYS = ("template", "cutoff_len", "enable_thinking", "dataset")
# Enough rows for percentiles of the token lengths; tokenising a million would take longer than all the rest.
LENGTH_SAMPLE = 5000


def main(experiment: Experiment) -> None:
    data, folder = experiment.data, experiment.data_folder
    encoder_model = experiment.encoder.model
    fetch_model(experiment.decoder.model, experiment.decoder.folder)
    fetch_model(encoder_model, experiment.encoder.folder)
    if not data.source.startswith("hf:"):
        os.environ.update(OFFLINE)
    source = open_source(data)
    inputs = {
        "data": data.model_dump(mode="json"),
        "prompt": experiment.prompt.model_dump(),
        "seed": experiment.seed,
        "train_rows": experiment.decoder.train_rows,
        "sft": {key: experiment.sft_arguments().get(key) for key in SFT_KEYS},
        "models": [experiment.decoder.model, encoder_model],
        "sources": source.sha256,
    }
    stage = Stage(experiment, "data", inputs)
    if stage.is_current():
        print(f"data is up to date: {folder}")
        return
    pool_path = folder / ".pool.jsonl"
    with ExitStack() as stack:
        stack.callback(pool_path.unlink, missing_ok=True)
        pool, card = read_pool(source.splits, experiment, pool_path)
        chosen = draw_splits(pool, experiment, card)
        decoder_rows = draw_decoder_rows(pool, chosen, experiment)
        encoder = load_prompt_encoder(experiment)
        write_rows(pool_path, chosen, decoder_rows, experiment, encoder, card)
    card |= {"experiment": experiment.name, "title": experiment.title, "labels": experiment.labels, "sources": source.sha256}
    card["token_lengths"] = token_lengths(experiment, encoder)
    write_json(folder / "data_card.json", card)
    write_json(folder / "dataset_info.json", dataset_info(experiment))
    names = [f"{split}.jsonl" for split in SPLITS] + ["sft_train.jsonl", "dataset_info.json", "data_card.json"]
    record = stage.finish([folder / name for name in names], rows=card["rows"]["read"], device="cpu")
    print(f"{summary(card)}\n{folder}: {', '.join(names)} ({record['seconds']} s)")


class Pool:
    """What is kept in memory of the rows read: three arrays, one entry a row."""

    def __init__(self):
        self.label, self.source_split, self.text_hash = array("h"), array("b"), array("Q")

    def arrays(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Label index, index of the source's split in SPLITS, 64-bit hash of the text; each of shape (rows,)."""
        return np.frombuffer(self.label, "h"), np.frombuffer(self.source_split, "b"), np.frombuffer(self.text_hash, "Q")


def read_pool(splits, experiment: Experiment, path: Path) -> tuple[Pool, dict]:
    """Read every row of the source, checked, to a file of lines as they will stand in the splits.

    Raises
    ------
    LetterheadError : an empty text or a label outside the list; names file, row and mend
    """
    data, labels, pool = experiment.data, experiment.labels, Pool()
    index = {name: number for number, name in enumerate(labels)}
    dropped, shortened, read = Counter(), 0, Counter()
    with atomic_open(path) as file:
        for split, rows in splits.items():
            for row in tqdm(rows, desc=f"reading {split}", unit=" rows"):
                read[split] += 1
                label = label_name(row, data.labels)
                if label is None:
                    dropped["label mapped to null"] += 1
                    continue
                if not isinstance(row.text, str) or not row.text.strip():
                    raise LetterheadError(f"{row.place}: the text is empty; delete the row or fill in data.columns.text")
                text = keep_words(row.text, data.max_words).strip()
                shortened += len(text) < len(row.text.strip())
                pool.label.append(index[label])
                pool.source_split.append(SPLITS.index(split))
                pool.text_hash.append(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()))
                file.write(json.dumps({"id": row.id, "label": label, "text": text}, ensure_ascii=False) + "\n")
    rows = {"read": sum(read.values()), "read_by_split": dict(read)}
    return pool, {"rows": rows, "dropped": dropped, "cut_to_max_words": shortened}


def label_name(row: RawRow, labels: list[str] | dict[str, str | None]) -> str | None:
    """The class of a row: through the map, by name, or by its number in the list; None drops the row.

    Raises
    ------
    LetterheadError : a label that the experiment does not name
    """
    value = str(row.label).strip() if row.label is not None else ""
    if value in labels:
        return labels[value] if isinstance(labels, dict) else value
    if isinstance(labels, list) and value.isdecimal() and int(value) < len(labels):
        return labels[int(value)]
    known = ", ".join(labels if isinstance(labels, dict) else (f"{i} or {name}" for i, name in enumerate(labels)))
    raise LetterheadError(f"{row.place}: label {value!r} is not in data.labels ({known}); add it, or map it to null")


def stratified(candidates: np.ndarray, label: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw n of the candidate row numbers, each label in its proportion (largest remainders first), sorted."""
    counts = np.bincount(label[candidates])
    share = counts * (n / len(candidates))
    take = np.floor(share).astype(int)
    for k in np.argsort(take - share, kind="stable")[: n - take.sum()]:
        take[k] += 1
    drawn = [rng.permutation(candidates[label[candidates] == k])[: take[k]] for k in range(len(counts))]
    return np.sort(np.concatenate(drawn))


def draw_splits(pool: Pool, experiment: Experiment, card: dict) -> np.ndarray:
    """Decide for every row of the pool which split it goes to, and count what is repeated.

    Returns
    -------
    array of int8, shape (rows,) : index in SPLITS, or UNUSED

    Raises
    ------
    LetterheadError : a split would be empty, or asks for more rows than there are
    """
    data, rng = experiment.data, np.random.default_rng(experiment.seed)
    label, source, text_hash = pool.arrays()
    rows = data.rows
    present = {split: bool((source == number).any()) for number, split in enumerate(SPLITS)}
    if not present["train"]:
        raise LetterheadError(f"{data.source}: holds no rows to train on")
    chosen = source.copy()
    # The first row of each text within its split, in the order of the source.
    key = text_hash ^ (source.astype("Q") * np.uint64(0x9E3779B97F4A7C15))
    first = np.zeros(len(key), bool)
    first[np.unique(key, return_index=True)[1]] = True
    card["duplicates"] = {s: int((~first & (source == n)).sum()) for n, s in enumerate(SPLITS) if present[s]}
    # A published test or validation split stays as published; only what others are drawn from is thinned.
    if data.duplicates == "drop":
        chosen[~first & (source == 0)] = UNUSED
        card["dropped"]["duplicate text"] = int((chosen == UNUSED).sum())
    train_hashes = text_hash[chosen == 0]
    card["shared_with_train"] = {}
    for number, split in enumerate(SPLITS[1:], 1):
        if present[split]:
            mine = source == number
            card["shared_with_train"][split] = int(np.isin(text_hash[mine], train_hashes).sum())
            if data.shared == "drop":
                chosen[(chosen == 0) & np.isin(text_hash, text_hash[mine])] = UNUSED
    if data.shared == "drop":
        card["dropped"]["text shared with test or validation"] = int(len(train_hashes) - (chosen == 0).sum())
    wanted = {"test": rows.test, "validation": rows.validation}
    for split in ("test", "validation"):
        number, n = SPLITS.index(split), wanted[split]
        if isinstance(n, float):
            n = round(n * (chosen == 0).sum()) if not present[split] else None
        pick_from = np.flatnonzero(chosen == (number if present[split] else 0))
        if n is None and not present[split]:
            raise LetterheadError(f"{data.source}: has no {split} split; set data.rows.{split} to draw one from train")
        if n is None:
            continue
        if n > len(pick_from) - (not present[split]):
            raise LetterheadError(f"data.rows.{split} asks for {n} rows, but there are {len(pick_from)} to draw from")
        drawn = stratified(pick_from, label, n, rng) if n else pick_from[:0]
        if present[split]:
            chosen[pick_from] = UNUSED
        chosen[drawn] = number
    train = np.flatnonzero(chosen == 0)
    if rows.train and rows.train < len(train):
        chosen[train] = UNUSED
        chosen[stratified(train, label, rows.train, rng)] = 0
    if not (chosen == 0).any():
        raise LetterheadError(f"{data.source}: no rows are left to train on; lower data.rows.test or data.rows.validation")
    card["rows"] |= {split: int((chosen == number).sum()) for number, split in enumerate(SPLITS)}
    counts = [np.bincount(label[chosen == n], minlength=len(experiment.labels)).tolist() for n in range(len(SPLITS))]
    card["label_counts"] = {s: dict(zip(experiment.labels, c, strict=True)) for s, c in zip(SPLITS, counts, strict=True)}
    return chosen


def draw_decoder_rows(pool: Pool, chosen: np.ndarray, experiment: Experiment) -> np.ndarray:
    """Which rows of train the decoder is trained on: booleans, shape (rows,)."""
    label = pool.arrays()[0]
    train = np.flatnonzero(chosen == 0)
    n = min(experiment.decoder.train_rows or len(train), len(train))
    mask = np.zeros(len(chosen), bool)
    mask[stratified(train, label, n, np.random.default_rng([experiment.seed, 1]))] = True
    return mask


def write_rows(pool_path, chosen, decoder_rows, experiment: Experiment, encoder: PromptEncoder, card: dict) -> None:
    """Copy the pool's lines to their splits, and write the decoder's rows in LLaMA-Factory's Alpaca form."""
    answers = dict(zip(experiment.labels, map(encoder.answer_text, encoder.options), strict=True))
    shortened = neutralised = 0
    with ExitStack() as stack:
        files = [stack.enter_context(atomic_open(experiment.data_folder / f"{split}.jsonl")) for split in SPLITS]
        alpaca = jsonlines.Writer(stack.enter_context(atomic_open(experiment.data_folder / "sft_train.jsonl")))
        pool = stack.enter_context(open(pool_path, encoding="utf-8", newline="\n"))
        for number, line in enumerate(tqdm(pool, total=len(chosen), desc="writing", unit=" rows")):
            if chosen[number] == UNUSED:
                continue
            files[chosen[number]].write(line)
            if decoder_rows[number]:
                row = json.loads(line)
                clean, fitted = encoder.neutralise(row["text"]), encoder.fit(row["text"])
                neutralised += clean != row["text"]
                shortened += len(fitted) < len(clean)
                alpaca.write({"instruction": encoder.instruction(row["text"]), "input": "", "output": answers[row["label"]]})
    card["sft"] = {"rows": int(decoder_rows.sum()), "cut_to_cutoff_len": shortened, "control_strings_broken_up": neutralised}


def token_lengths(experiment: Experiment, encoder: PromptEncoder) -> dict:
    """Percentiles of the texts' lengths in tokens, under the decoder's and the encoder's tokenizer, on sampled rows."""
    from transformers import AutoTokenizer

    rng, sample = random.Random(experiment.seed), []
    with jsonlines.open(experiment.data_folder / "train.jsonl") as rows:
        for seen, row in enumerate(rows):  # reservoir sampling (Vitter's algorithm R)
            if seen < LENGTH_SAMPLE:
                sample.append(row["text"])
            elif (at := rng.randrange(seen + 1)) < LENGTH_SAMPLE:
                sample[at] = row["text"]
    bert = AutoTokenizer.from_pretrained(experiment.encoder.folder, trust_remote_code=False)
    result = {"rows_sampled": len(sample)}
    for name, tokenizer in (("decoder", encoder.tokenizer), ("encoder", bert)):
        lengths = [len(ids) for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]]
        result[name] = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95, 99, 100)}
    return result


def dataset_info(experiment: Experiment) -> dict:
    """LLaMA-Factory's registry entry for the Alpaca file, under the name that its YAML asks for."""
    return {
        experiment.sft_arguments()["dataset"]: {
            "file_name": "sft_train.jsonl",
            "file_sha1": hashlib.sha1((experiment.data_folder / "sft_train.jsonl").read_bytes()).hexdigest(),
            "columns": {"prompt": "instruction", "query": "input", "response": "output"},
        }
    }


def summary(card: dict) -> str:
    """The data card in a few lines for the terminal."""
    rows, sft = card["rows"], card["sft"]
    lines = [
        f"rows: {rows['read']} read; {rows['train']} train, {rows['validation']} validation, {rows['test']} test;"
        f" {sft['rows']} of train for the decoder"
    ]
    lines += [f"dropped: {n} ({reason})" for reason, n in card["dropped"].items() if n]
    lines += [f"duplicates in {split}: {n}" for split, n in card["duplicates"].items() if n]
    lines += [f"{split} texts that stand in train too: {n}" for split, n in card["shared_with_train"].items() if n]
    lines += [f"texts cut to fit cutoff_len: {sft['cut_to_cutoff_len']}"] if sft["cut_to_cutoff_len"] else []
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
