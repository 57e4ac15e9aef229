"""The data card: what the rows are, in figures and in words."""

import random
from datetime import UTC, datetime

import jsonlines
import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.models.prompt import (
    PromptEncoder,
)
from letterhead.models.scoring import OptionTree
from letterhead.rows.pool import SPLITS

# Enough rows for percentiles of the token lengths; tokenising a million would take longer than all
# the rest.
LENGTH_SAMPLE = 5000


def token_lengths(experiment: Experiment, encoder: PromptEncoder) -> dict:
    """Percentiles of the texts' lengths in tokens, under the decoder's and the encoder's tokenizer,
    on sampled rows; `prompt`, how many tokens frame a text; and `options`, how many more are run
    through the decoder to score all options of a row."""
    from transformers import AutoTokenizer

    rng, sample = random.Random(experiment.seed), []
    with jsonlines.open(experiment.data_folder / "train.jsonl") as rows:
        for seen, row in enumerate(rows):  # reservoir sampling (Vitter's algorithm R)
            if seen < LENGTH_SAMPLE:
                sample.append(row["text"])
            elif (at := rng.randrange(seen + 1)) < LENGTH_SAMPLE:
                sample[at] = row["text"]
    bert = AutoTokenizer.from_pretrained(experiment.encoder.folder, trust_remote_code=False)
    options = OptionTree(encoder.answers, with_end=experiment.prompt.options == "names").tokens
    result = {"rows_sampled": len(sample), "prompt": len(encoder.encode(""))}
    result["options"] = len(options)
    for name, tokenizer in (("decoder", encoder.tokenizer), ("encoder", bert)):
        lengths = [
            len(ids)
            for ids in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"]
        ]
        result[name] = {f"p{q}": int(np.percentile(lengths, q)) for q in (5, 50, 95, 99, 100)}
    return result


def as_moment(number: float, is_date: bool) -> str:
    """A moment of `data.time` as it was written.

    Examples
    --------
    >>> as_moment(20260131, False), as_moment(1769817600, True)
    ('20260131', '2026-01-31')
    """
    if not is_date:
        return f"{number:.15g}"
    found = datetime.fromtimestamp(number, UTC)
    return f"{found:%Y-%m-%d %H:%M}".removesuffix(" 00:00")


def order_lines(card: dict) -> list[str]:
    """What the card says of groups and times (`data.group`, `data.time`), a line each."""
    lines = []
    if groups := card.get("groups"):
        counts = ", ".join(f"{groups[split]} in {split}" for split in SPLITS)
        lines.append(f"groups by {groups['column']}: {counts}; none stands in two splits")
    if time := card.get("time"):
        spans = (
            f"{split} {' to '.join(as_moment(end, time['dates']) for end in time[split])}"
            for split in SPLITS
            if split in time
        )
        lines.append(f"split by {time['column']}: {', '.join(spans)}")
    return lines


def summary(card: dict) -> list[str]:
    """The data card in a few lines for the terminal."""
    rows, shared = card["rows"], card["shared"]
    lines = [
        f"rows: {rows['read']} read; {rows['train']} train, {rows['validation']} "
        f"validation, {rows['test']} test;"
        f" {shared['rows']} of train for the decoder"
    ]
    lines += order_lines(card)
    lines += [f"dropped: {n} ({reason})" for reason, n in card["dropped"].items() if n]
    lines += [f"duplicates in {split}: {n}" for split, n in card["duplicates"].items() if n]
    lines += (
        [f"texts that stand with different labels: {card['conflicts']['texts']}"]
        if card["conflicts"]["texts"]
        else []
    )
    lines += [
        f"{split} texts that stand in train too: {n}"
        for split, n in card["shared_with_train"].items()
        if n
    ]
    lines += [
        f"{split} texts nearly in train: {len(pairs)}"
        for split, pairs in card["near_duplicates"].items()
        if pairs
    ]
    lines += (
        [f"texts cut to fit cutoff_len: {shared['cut_to_cutoff_len']}"]
        if shared["cut_to_cutoff_len"]
        else []
    )
    return lines
