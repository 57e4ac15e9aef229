"""Write an experiment for a data set: which columns, which labels, letters or names, how many rows
and epochs, and why.

    python -m prep.new --data reviews.csv

What it writes, experiments/reviews.yaml, is a beginning to be edited. It never overwrites.
"""

import argparse
import codecs
import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import charset_normalizer
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from letterhead.config.data import Data, same_spelling
from letterhead.config.evaluation import LETTERS
from letterhead.config.experiment import HAN, KANA, Experiment, load_experiment
from letterhead.config.models import E5, Head
from letterhead.files import LetterheadError, atomic_open, read_json
from letterhead.models import tfidf
from letterhead.models.prompt import WORD, keep_words
from letterhead.pipeline import (
    BERT,
    BERT_ALL,
    LINEAR_HEAD,
    SETFIT,
    SFT,
    SFT_OPTIONS,
    ZERO_SHOT_CALIBRATED,
    ZERO_SHOT_LETTERS,
    ZERO_SHOT_THINKING,
)
from letterhead.plan.evidence import contenders, margin_finder
from letterhead.plan.time import stage_bytes, stage_seconds
from letterhead.rows import tables
from letterhead.rows.sources import (
    RawRow,
    column_names,
    every_column,
    lacks,
    local_files,
    open_source,
    plain_file,
)
from letterhead.runs import results
from letterhead.runs.stage import minutes, telling
from letterhead.stats.decision import rows_for_margin
from letterhead.stats.metrics import plain_f1
from prep import data

LABEL_NAMES = (
    *(
        "label",
        "class",
        "category",
        "target",
        "topic",
        "sentiment",
        "intent",
        "rating",
        "overall",
        "stars",
        "y",
        "tag",
        "type",
        "output",
    ),
    *("标签", "类别", "分类", "情感", "主题", "类型"),
)
TEXT_NAMES = (
    "text",
    "body",
    "content",
    "review",
    "message",
    "sentence",
    "comment",
    "description",
    "summary",
    "article",
    "query",
    "input",
    *("正文", "内容", "文本", "评论", "文章", "句子", "描述", "摘要"),
)
TITLE_NAMES = ("title", "headline", "subject", "heading", "标题", "题目")
# More classes than this are not told apart by a few hundred rows a class, and are hardly meant as
# classes.
MOST_CLASSES = 250
SAMPLE = 100_000  # rows of a file, at most, by which it is judged
RARE = 10  # a class with fewer rows can't be in train, validation and test
FEWEST = 4  # rows a class to train on
CODE = re.compile(
    r"[-+]?[A-Za-z]?\d+(\.\d+)?"
)  # 1, -1, 2.0, C03: a number for a class, not its name
IMBALANCED = 3
MOST_METHODS = 13  # that may be shipped, cascades among them
MARGINS = (0.01, 0.02, 0.03, 0.05, 0.1, 0.2)
SHOWN = 20
NAME_IN_WORDS = 8  # nobody calls a column so
SEVERAL = re.compile(r"[|;,]\s*")
# Optimizer steps at least, of the LLM while MOST_EPOCHS allow them. With fewer SmolLM2 has not
# left the plateau of guessing on every seed (docs/findings.md), nor learnt fourteen classes.
STEPS_A_CLASS, ENCODER_STEPS = 20, 200
# Three epochs of BERT were too few for twenty newsgroups and enough for the demo
# (docs/findings.md).
PATIENCE, MOST_ENCODER_STEPS = 3, 6000
BERT_SHARE = 1 / 3  # of the report's time, at most
# What is left out where time is short, in this order: SFT, since the loss on the options learns the
# same in fewer steps; SetFit, which is for few rows; then the LLM, which takes longest.
UNTRAINED = (ZERO_SHOT_LETTERS, ZERO_SHOT_CALIBRATED, ZERO_SHOT_THINKING)
LEFT_OUT_FIRST = (
    (SFT,),
    (SETFIT,),
    UNTRAINED,
    (SFT_OPTIONS,),
    (LINEAR_HEAD,),
    (BERT,),
    (BERT_ALL,),
)
WORTH = 0.05  # of the report's time is what a contender takes that is left out
HEAD_BATCH, HEAD_EPOCHS, MOST_EPOCHS = 16, 2, 20
MAX_WORDS = 64
FEW_ROWS, ROWS_A_CLASS, BATCH = 400, 10, 4  # for the LLM
# Names of more tokens than this are not listed in the prompt: SFT reads them again for each row.
LISTED_TOKENS, CHARACTERS_A_TOKEN = 128, 3
KINDS = f"a file ({', '.join(tables.KINDS)})"
UTF_8, GUESSED_BYTES = ["utf-8"], 1 << 18
DOS = re.compile(r"cp(4|7|8)\d\d$|mac_|hp_|kz|ptcp|johab|big5|gb|euc|shift|cp9\d\d")
WINDOWS_SIGNS = (
    0x80,
    0x85,
    *range(0x91, 0x98),
    0x99,
)  # Windows-1252: €, …, quotes, bullet, dashes, ™
# GiB of a GPU from which an adapter of a larger LLM is within its memory (docs/gpu.md), and the LLM
LARGER = ((20, "Qwen/Qwen3-4B"), (10, "Qwen/Qwen3-1.7B"))
LARGER_CONFIG = "llamafactory_configs/qwen3_4b_lora_sft.yaml"
ENGLISH = {
    "why": "SmolLM2-135M and MiniLM, the smallest; decoder.model and encoder.model name "
    "larger ones",
    "rate": 2e-4,
    "steps": 200,
    "optimizer": {"adam_beta2": 0.95, "warmup_ratio": 0.2},
    "overrides": {"warmup_steps": 0.2},
    "encoder_rate": 2e-4,
    "config": "llamafactory_configs/smollm2_135m_full_sft.yaml",
    "decoder": {"license": "apache-2.0"},
    "encoder": {"license": "apache-2.0"},
    "prompt": {},
    "listed": {
        "template": "Please read the text and determine its category. The categories are:\n"
        "{options}\n\nText:\n{text}\n\nCategory:/no_think"
    },
    "unlisted": {
        "template": "Please read the text and determine its category.\n\nText:\n{text}\n\n"
        "Category:/no_think"
    },
}
MULTILINGUAL = {
    "rate": 2e-5,
    "steps": 100,
    "optimizer": {},
    "overrides": {},
    "encoder_rate": 2e-4,
    "config": "llamafactory_configs/qwen2.5_0.5b_full_sft.yaml",
    "decoder": {"model": "experiments/models/qwen2.5_coder_0.5b.yaml", "license": "apache-2.0"},
    "encoder": {"model": E5, "license": "mit", "prefix": "query: "},
}
CHINESE = MULTILINGUAL | {
    "why": "Qwen2.5-Coder-0.5B and multilingual-e5-small, which read Chinese",
    "prompt": {
        "answer_prefix": "",
        "template": "请从选项中选出下面文字的类别。\n\n文字：\n{text}\n\n"
        "问题：它属于哪一类？\n{options}\n\n答案：",
    },
    "listed": {
        "answer_prefix": "",
        "template": "请说出文字的类别。类别有：\n{options}\n\n文字：\n{text}\n\n类别：",
    },
    "unlisted": {
        "answer_prefix": "",
        "template": "请说出下面文字的类别。\n\n文字：\n{text}\n\n类别：",
    },
}
OTHER = MULTILINGUAL | {
    "why": "Qwen2.5-Coder-0.5B and multilingual-e5-small, which read many languages, since few "
    "words of the texts are English",
    "prompt": {
        "answer_prefix": "",
        "template": "Please read the text and determine its category from the options below.\n\n"
        "Text:\n{text}\n\nQuestion: What is the most appropriate category for this text?\n"
        "{options}\n\nAnswer:",
    },
    "listed": {
        "answer_prefix": "",
        "template": ENGLISH["listed"]["template"].removesuffix("/no_think"),
    },
    "unlisted": {
        "answer_prefix": "",
        "template": ENGLISH["unlisted"]["template"].removesuffix("/no_think"),
    },
}
# In English a larger share of the words are among its most frequent ones, and a smaller one of the
# letters are none of ASCII's.
FREQUENT_WORDS, OTHER_LETTERS = 0.12, 0.003
MARKS = "".join(mark for mark in map(chr, range(128)) if not mark.isalnum()) + "“”‘’…–—"


@dataclass
class Column:
    """What is known of a column: its values' number, how many are distinct, their mean length, how
    many are in words."""

    name: str
    values: Counter = field(default_factory=Counter)
    n: int = 0
    empty: int = 0
    characters: int = 0
    in_words: int = 0
    strings: bool = True

    def add(self, value: Any) -> None:
        self.n += 1
        shown = "" if value is None else str(value).strip()
        self.empty += not shown
        self.characters += len(shown)
        self.in_words += bool(re.search(r"\s", shown) or HAN.search(shown))
        self.strings &= value is None or isinstance(value, str)
        self.values[shown] += 1

    @property
    def mean_length(self) -> float:
        return self.characters / max(1, self.n - self.empty)

    @property
    def could_be_label(self) -> bool:
        classes = len(self.values) - ("" in self.values)
        return 2 <= classes <= min(MOST_CLASSES, self.n // 4) and self.mean_length < 60

    @property
    def is_codes(self) -> bool:
        return all(CODE.fullmatch(value) for value in self.values if value)

    @property
    def could_be_text(self) -> bool:
        least = (
            5 if self.is_title or any(HAN.search(value) for value in list(self.values)[:20]) else 15
        )
        in_words = self.in_words > (self.n - self.empty) / 2
        return (
            self.strings
            and in_words
            and self.mean_length > least
            and len(self.values) > self.n / 10
        )

    @property
    def is_title(self) -> bool:
        return rank(self.name, TITLE_NAMES) < len(TITLE_NAMES)


def main(path: str, text: str = "", label: str = "", sheet: str = "", hours: float = 1) -> None:
    """Read a data set, write its experiment, and say what was chosen and why; then make its rows,
    and say how long it takes.

    Parameters
    ----------
    text, label : columns of the text (several with commas between) and of the label; where empty
        they are guessed
    sheet : of a workbook; where empty the first
    hours : that the report may take on this machine

    Raises
    ------
    LetterheadError : no such data, no column for a text or a label, or an experiment of that name
        is there
    """
    source = Path(path.rstrip("/").removesuffix(tables.PACKED))
    stem = source.parent.name if source.stem == "{split}" else source.stem.replace("{split}", "")
    name = re.sub(r"\W+", "_", stem).strip("_") or "mine"
    target = Path("experiments") / f"{name}.yaml"
    if target.exists():
        raise LetterheadError(
            f"{target}: is there already and is not overwritten; edit it, or delete it and run "
            f"make new again, or rename {source}"
        )
    reasons: list[str] = []
    keys: dict[str, Any] = {"encoding": (encoding := guess_encoding(path))}
    if encoding != UTF_8:
        reasons.append(
            f"encoding: not UTF-8 but {encoding[1]}, as it seems, by which it says "
            f"{strange_part(path, encoding[1])!r}; "
            "where that is wrong, name another in data.encoding"
        )
    keys |= choose_sheet(path, sheet, reasons)
    names = column_names(plain_file(path, **keys))
    if not names and (text or label):
        raise LetterheadError(f"{path}: a folder has no columns; leave TEXT and LABEL out")
    chosen = ("text", "label")
    if names:
        columns, rows = read_columns(plain_file(path, **keys))
        is_named = set(filter(None, [*text.split(","), label])) & set(names)
        if not is_named and row_above(path, columns, reasons):
            keys["header"] = False
            columns, rows = read_columns(plain_file(path, **keys))
        chosen = choose_columns(path, columns, rows, text, label, reasons)
    values = decide(name, path, keys, *chosen, reasons)
    write_experiment(target, values, path, reasons)
    print("\n".join(reasons), flush=True)
    experiment = load_experiment(name)
    data.main(experiment, with_evidence=False)
    for choose in (choose_balance, partial(choose_contenders, hours=hours), choose_margin):
        more, reason = choose(experiment)
        if not more:
            continue
        print(reason, flush=True)
        values, reasons = values | more, [*reasons, reason]
        write_experiment(target, values, path, reasons)
        before, experiment = experiment.balance, load_experiment(name)
        if experiment.balance != before:
            data.main(experiment, with_evidence=False)
    print(f"{target}: written; read it, then run: make report EXP={name}", flush=True)
    print(f"make report EXP={name}: {foretell(experiment)} on this machine")


def write_experiment(target: Path, values: dict[str, Any], path: str, reasons: list[str]) -> None:
    """Write an experiment, with the reasons as comments."""
    text = as_yaml(values, path)
    with atomic_open(target) as file:
        file.write("# Written by `make new`, which chose as follows. Edit what you know better.\n")
        # A label with a line break in it ends no comment.
        file.writelines(f"# - {' '.join(line.split())}\n" for line in reasons)
        file.write(text)


def choose_margin(experiment: Experiment) -> tuple[dict[str, Any], str]:
    """The key of a margin that the test rows can bear, and the reason."""
    card = read_json(experiment.data_folder / "data_card.json")
    rows, methods = card["rows"]["test"], contenders(experiment)
    find = margin_finder(experiment, card)
    least = find(rows, methods)
    margin = next((each for each in MARGINS if each >= 2 * least), MARGINS[-1])
    reason = (
        f"compare.margin: {margin:g}; {rows:,} test rows and {methods} methods can show none "
        f"below {least:.3f}, even for a method that answers as the best does. "
    )
    keys = {"compare": {"margin": margin}}
    if margin < least:
        return keys, (
            f"{reason}So the report will decide nothing, and its figures have wide intervals: "
            f"label more rows, for more than {rows_for_margin(margin, methods, find):,} test rows"
        )
    return keys, f"{reason}Set another before you look at a test row"


def choose_balance(experiment: Experiment) -> tuple[dict[str, Any], str]:
    """The key `balance` with which TF-IDF on the shared rows has the higher macro F1 on validation
    rows, and the reason; none where no class is rare, or no row is for validation."""
    rows = results.read_rows(experiment, "decoder_train")
    counts = Counter(row["label"] for row in rows)
    validation = results.read_rows(experiment, "validation")
    if (
        len(counts) < 2
        or max(counts.values()) <= IMBALANCED * min(counts.values())
        or not validation
    ):
        return {}, ""
    truth, reached = results.class_numbers(experiment, validation), {}
    for balance in ("none", "weights"):
        fitted = tfidf.fit(experiment.model_copy(update={"balance": balance}), rows)
        answers = fitted.score([row["text"] for row in validation]).probabilities.argmax(axis=1)
        reached[balance] = plain_f1(truth, answers[None], len(experiment.labels))
    better = "weights" if reached["weights"] > reached["none"] else "none"
    return {"balance": better}, (
        f"balance: {better}; the largest class has {max(counts.values())} of {len(rows):,} rows "
        f"and the smallest {min(counts.values())}, and TF-IDF's macro F1 on {len(truth):,} "
        f"validation rows is {reached['weights']:.3f} with weights for the rare classes, "
        f"{reached['none']:.3f} without"
    )


def choose_contenders(experiment: Experiment, hours: float) -> tuple[dict[str, Any], str]:
    """The keys with which the report takes no more than so many hours on this machine, and the
    reason; none where it takes no more, or where that is not known.

    BERT's epochs, of which there are many for rows that take long to learn, get a share of the
    time, but two at least. Then one contender after another is left out, until the rest fits.
    """
    card, most = read_json(experiment.data_folder / "data_card.json"), 3600 * hours
    seconds = stage_seconds(experiment, card)
    if (whole := sum(seconds.values())) <= most:
        return {}, ""
    keys, said, encoder, both = {}, [], experiment.encoder, (BERT, BERT_ALL)
    share = BERT_SHARE * most / sum(seconds.get(method.stage, 0.0) for method in both)
    epochs = max(HEAD_EPOCHS, int(share * encoder.head.num_train_epochs))
    is_cut = epochs < encoder.head.num_train_epochs
    if is_cut:
        head = encoder.head.model_copy(update={"num_train_epochs": epochs})
        encoder = encoder.model_copy(update={"head": head})
        experiment = experiment.model_copy(update={"encoder": encoder})
    names: list[str] = []
    left = sum(stage_seconds(experiment, card).values())
    for group in LEFT_OUT_FIRST:
        more = [method.name for method in group if method.is_in(experiment)]
        without = experiment.model_copy(update={"leave_out": [*names, *more]})
        then = sum(stage_seconds(without, card).values())
        if left > most and left - then >= WORTH * most:
            names, experiment, left = [*names, *more], without, then
    if is_cut and any(method.is_in(experiment) for method in both):
        keys["encoder"] = encoder.model_dump(exclude_unset=True)
        said.append(f"encoder.head.num_train_epochs is {epochs}")
    if names:
        keys["leave_out"] = names
        said.append(f"left out: {', '.join(names)}")
    still = "" if left <= most else f", still more than HOURS={hours:g}"
    return keys, (
        f"time: all contenders would take {minutes(whole)} on this machine; so "
        f"{'; '.join(said)}; that leaves {minutes(left)}{still}. For more, delete this file "
        f"and say HOURS={math.ceil(whole / 3600)}"
    )


def foretell(experiment: Experiment) -> str:
    """How long the report of prepared data will take, where that is known, and how much disk."""
    card = read_json(experiment.data_folder / "data_card.json")
    seconds = stage_seconds(experiment, card)
    folders = {"decoder": experiment.decoder.folder, "encoder": experiment.encoder.folder}
    peaks = stage_bytes(experiment, folders, card["shared"]["sft_rows"])
    takes = [minutes(sum(seconds.values()))] if seconds else []
    return ", ".join([*takes, f"{sum(peaks.values()) / 1e9:.1f} GB of disk at the most"])


def as_yaml(values: dict[str, Any], path: str) -> str:
    """The experiment as YAML, written by the library that reads it.

    Raises
    ------
    LetterheadError : a label or a column would be read back as something else
    """
    try:
        text = OmegaConf.to_yaml(OmegaConf.create(values))
        again = OmegaConf.to_container(OmegaConf.create(text))
    except OmegaConfBaseException as error:
        raise LetterheadError(
            f"{path}: a label or column can't be written to YAML ({error}); rename it"
        ) from None
    if again != values:
        raise LetterheadError(
            f"{path}: a label or column is read from YAML as something else; rename what "
            f"looks like ${{…}}"
        )
    return text


@dataclass
class Sample:
    """Rows of a source, at even distances where it has more than SAMPLE.

    Attributes
    ----------
    rows : one of every `every`
    total : how many rows the source has
    labels : how often each label stands in those of each split that have a text and a label, by
        (split, label)
    """

    rows: list[RawRow]
    every: int
    total: int
    labels: Counter


def read_rows(data_section: Data) -> Sample:
    """The rows of all splits."""
    found = Sample([], 1, 0, Counter())
    for row in chain.from_iterable(open_source(data_section).splits.values()):
        if is_whole(row):
            found.labels[split_of(row), str(row.label).strip()] += 1
        if found.total % found.every == 0:
            found.rows.append(row)
        if len(found.rows) > SAMPLE:
            found.rows, found.every = found.rows[::2], 2 * found.every
        found.total += 1
    return found


def split_of(row: RawRow) -> str:
    """The split of the source that a row stands in."""
    return row.id.partition(":")[0]


def is_whole(row: RawRow) -> bool:
    """Whether a row has a text and a label."""
    has_text = not row.fault and isinstance(row.text, str) and bool(row.text.strip())
    return has_text and row.label is not None and bool(str(row.label).strip())


def guess_encoding(path: str) -> list[str]:
    """The encodings of a source's files on this disk: UTF-8, and, where one is not, what
    charset-normalizer takes it for."""
    for file in local_files(path):
        if tables.kind(file) in (tables.PARQUET, *tables.SHEETS):
            continue
        head = tables.first_bytes(file, GUESSED_BYTES)
        try:
            codecs.getincrementaldecoder("utf-8")().decode(
                head
            )  # which forgives a character that is cut at the end
        except UnicodeDecodeError:
            found = charset_normalizer.from_bytes(head).best()
            # A few signs are too little for a guess by frequency, which takes them for a code page
            # of DOS.
            if is_windows_1252(head) and (found is None or DOS.match(found.encoding)):
                return [*UTF_8, "cp1252"]
            if found is None:
                raise LetterheadError(
                    f"{file}: its encoding can't be guessed; save it as UTF-8"
                ) from None
            chinese = found.encoding in ("gb2312", "gbk", "hz", "cp936")
            return [*UTF_8, "gb18030" if chinese else found.encoding]
    return UTF_8


def is_windows_1252(head: bytes) -> bool:
    """Whether what is not ASCII is what Windows writes in the west: curly quotes and dashes beside
    ASCII, and single letters with accents. (A few such bytes are too little for a guess by
    frequency, which takes them for a code page of DOS.)"""
    strange = [match.start() for match in re.finditer(rb"[\x80-\xff]", head)]
    beside_ascii = [
        at for at in strange if head[at - 1 : at] < b"\x80" and head[at + 1 : at + 2] < b"\x80"
    ]
    signs = [at for at in strange if head[at] in WINDOWS_SIGNS]
    letters = [at for at in strange if head[at] >= 0xC0]
    known = (
        len(signs)
        + len(letters)
        + sum(head[at] in (0xA0, 0xA3, 0xA7, 0xA9, 0xAE, 0xB0) for at in strange)
    )
    return bool(signs) and known == len(strange) and len(beside_ascii) >= 0.8 * len(strange)


def strange_part(path: str, encoding: str) -> str:
    """Some characters around the first one of a source that is not ASCII."""
    for file in local_files(path):
        text = tables.first_bytes(file, GUESSED_BYTES).decode(encoding, errors="replace")
        if found := re.search(r"[^\n]{0,12}[^\x00-\x7f][^\n]{0,12}", text):
            return found[0].strip()
    return ""


def choose_sheet(path: str, sheet: str, reasons: list[str]) -> dict[str, str]:
    """The key of `data` that names a sheet of a workbook; none where it has one alone, or is none.

    Raises
    ------
    LetterheadError : a sheet of something that has none
    """
    file = local_files(path)[0]
    if tables.kind(file) not in tables.SHEETS:
        if sheet:
            raise LetterheadError(f"SHEET={sheet}: {path} is no workbook; leave it out")
        return {}
    names = tables.sheet_names(file)
    chosen = sheet or names[0]
    if len(names) > 1:
        rest = ", ".join(repr(name) for name in names if name != chosen)
        reasons.append(f"sheet: {chosen!r}; it could be {rest}, too: SHEET=…")
    return {"sheet": chosen} if len(names) > 1 or sheet else {}


def read_columns(file: Data) -> tuple[list[Column], list[list[Any]]]:
    """What is known of the columns of a file, and the values of its rows.

    Raises
    ------
    LetterheadError : it has no rows
    """
    every = every_column(file)
    rows = [row.text for row in read_rows(every).rows if row.text and not row.fault]
    if not rows:
        raise LetterheadError(f"{file.source}: has no rows below its header")
    columns = [Column(name) for name in every.columns.parts]
    for row in rows:
        for column, value in zip(columns, row, strict=True):
            column.add(value)
    return columns, rows


def choose_columns(
    path: str,
    columns: list[Column],
    rows: list[list[Any]],
    text: str,
    label: str,
    reasons: list[str],
) -> tuple[str | list[str], str]:
    """The column, or columns, of the text and the label's, where they are not given; why goes to
    `reasons`.

    Raises
    ------
    LetterheadError : no column of that name, none that looks like a label, or like a text
    """
    names = [column.name for column in columns]
    text_columns = (
        [name.strip() for name in text.split(",")]
        if text and text not in names
        else [text]
        if text
        else []
    )
    for variable, names_given in (("TEXT", text_columns), ("LABEL", [label] if label else [])):
        if missing := [name for name in names_given if name not in names]:
            raise LetterheadError(
                f"{variable}={','.join(names_given)}: "
                f"{lacks(missing[0], names).rpartition('; set ')[0]}"
            )
    known = ", ".join(
        f"{column.name} ({len(column.values)} distinct, {column.mean_length:.0f} characters)"
        for column in columns
    )
    labels = [
        column for column in columns if column.could_be_label and column.name not in text_columns
    ]
    labels.sort(key=lambda column: (rank(column.name, LABEL_NAMES), len(column.values)))
    if not label and not labels:
        raise LetterheadError(
            f"{path}: no column looks like a label (few distinct short values) among "
            f"{known}; name one: LABEL=column"
        )
    chosen = next(column for column in columns if column.name == label) if label else labels[0]
    if label and len(chosen.values) > chosen.n / 2:
        raise LetterheadError(
            f"LABEL={label}: {len(chosen.values):,} different values in {chosen.n:,} rows "
            f"are no classes"
        )
    same = [
        column
        for column in columns
        if column is chosen or alike(rows, names, chosen.name, column.name)
    ]  # they would tell the label
    spelled = [column for column in same if column is not chosen and not column.is_codes]
    if label:
        reasons.append(f"label: column {label!r}, as you say")
    elif chosen.is_codes and spelled:
        reasons.append(
            f"label: column {spelled[0].name!r}, which names what {chosen.name!r} numbers"
        )
        chosen = spelled[0]
    else:
        reasons.append(
            f"label: column "
            f"{chosen.name!r}{others([column for column in labels if column not in same], 'LABEL')}"
        )
    if text_columns:
        reasons.append(f"text: {' and '.join(map(repr, text_columns))}, as you say")
        return text_columns if len(text_columns) > 1 else text_columns[0], chosen.name
    texts = [column for column in columns if column not in same and column.could_be_text]
    if not texts:
        raise LetterheadError(
            f"{path}: no column looks like a text among {known}; name one: TEXT=column"
        )
    texts.sort(key=lambda column: (rank(column.name, TEXT_NAMES), -column.mean_length))
    body, titles = texts[0], [column for column in texts[1:] if column.is_title][:1]
    rest = others([column for column in texts[1:] if column not in titles], "TEXT")
    if titles:
        reasons.append(
            f"text: columns {titles[0].name!r} and {body.name!r}, joined by a line break{rest}"
        )
        return [titles[0].name, body.name], chosen.name
    reasons.append(f"text: column {body.name!r}{rest}")
    return body.name, chosen.name


def row_above(path: str, columns: list[Column], reasons: list[str]) -> bool:
    """Whether the first line of a file is a row, and names no columns: it holds a label that stands
    in many rows, or, where no column could be the label's, a text."""
    has_line = (".csv", ".tsv", ".tab", *tables.SHEETS)
    if tables.kind(local_files(path)[0]) not in has_line:
        return False
    labels = [column for column in columns if column.could_be_label]
    for column in columns:
        rows = column.values[column.name.strip()]
        if column in labels and rows >= RARE:
            why = f"{column.name!r} stands in {rows:,} rows, too"
        elif not labels and len(column.name.split()) >= NAME_IN_WORDS:
            why = f"“{column.name[:60]}” is a text"
        else:
            continue
        reasons.append(
            f"header: false, since the first line looks like a row ({why}); the columns are called "
            f"{', '.join(str(number) for number in range(1, len(columns) + 1))}"
        )
        return True
    return False


def others(columns: list[Column], variable: str) -> str:
    """What else could have been chosen, in words."""
    return (
        f" (it could be {', '.join(repr(column.name) for column in columns)}, too: {variable}=…)"
        if columns
        else ""
    )


def rank(name: str, known: tuple[str, ...]) -> int:
    """The place of a column's name among known ones; `label_name`, `newsLabel` and 新闻类别 are
    labels too."""
    words = re.split(r"[\W_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower())
    return next(
        (
            i
            for i, known_name in enumerate(known)
            if known_name in words or (HAN.search(known_name) and known_name in name)
        ),
        len(known),
    )


def alike(rows: list[list[Any]], names: list[str], one: str, other: str) -> bool:
    """Whether two columns split the rows alike."""
    at = [names.index(column) for column in (one, other)]
    pairs = {tuple(str(row[i]) for i in at) for row in rows}
    return len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


@dataclass(frozen=True)
class Reading:
    """What a file holds.

    Attributes
    ----------
    rows : how many there are, of which `missing` lack a text or a label
    every : one of so many rows was looked at
    whole : those looked at that have a text and a label
    middle : the words of half of the texts are no more
    cut : the words of a text that are read, None for all
    chinese, english : whether the texts are
    merged : each label, as it is written → the spelling that stands for it
    conflicts : texts that stand with different labels, each with these
    distinct : of each other text the first row
    labels : how many different texts each label has; of a sample, how many rows of the file
    in_split : rows of the file, by (split, label)
    """

    rows: int
    every: int
    missing: int
    whole: list[RawRow]
    middle: int
    cut: int | None
    chinese: bool
    english: bool
    merged: dict[str, str]
    conflicts: dict[str, set[str]]
    distinct: list[RawRow]
    labels: Counter
    in_split: Counter

    def name_of(self, row: RawRow) -> str:
        """The label of a row, in the spelling that stands for it."""
        return self.merged[str(row.label).strip()]


def decide(
    name: str,
    path: str,
    keys: dict[str, Any],
    text: str | list[str],
    label: str,
    reasons: list[str],
) -> dict[str, Any]:
    """The experiment's values for the size and kind of its data; what was chosen, and why, goes to
    `reasons`.

    Parameters
    ----------
    keys : of the section `data`, that say how the file is read
    """
    columns: dict[str, Any] = {"text": text, "label": label}
    if isinstance(text, list):
        columns["empty_parts"] = True
    reading = read_file(plain_file(path, columns=columns, **keys))
    if reading.every > 1:
        reasons.append(
            f"looked at one of every {reading.every} of {reading.rows:,} rows; labels are counted "
            f"in all of them"
        )
    labels, kept = choose_labels(path, reading, reasons)
    values = {"source": path, "columns": columns, "labels": labels}
    values |= {key: value for key, value in keys.items() if value != UTF_8}
    values |= choose_left_out(reading, kept, reasons)
    values["rows"], train = choose_rows(path, reading, kept, reasons)
    options = "letters" if len(kept) <= len(LETTERS) else "names"
    models = CHINESE if reading.chinese else ENGLISH if reading.english else OTHER
    if options == "letters":
        prompt = models["prompt"]
        reasons.append("options: letters, since each label has one")
    else:
        # Of other letters than ASCII a token is hardly more than one.
        characters = "".join(kept)
        ascii_ones = sum(map(str.isascii, characters))
        tokens = len(kept) + ascii_ones // CHARACTERS_A_TOKEN + len(characters) - ascii_ones
        is_listed = tokens <= LISTED_TOKENS
        prompt = models["listed" if is_listed else "unlisted"]
        reasons.append(
            "options: names, since there are more labels than letters; the prompt "
            + (
                "lists them before the text, where they are read once for all texts"
                if is_listed
                else f"does not list them: some {tokens} tokens would be read again for each row "
                "that the LLM learns from. Untrained, it then knows them by no list"
            )
        )
    if reading.cut:
        values["max_words"] = reading.cut
        unit = "characters" if reading.chinese else "words"
        reasons.append(
            f"texts: the first {reading.cut} {unit} (half have more than {reading.middle}), "
            f"for time"
        )
    return {
        "title": f"{name}, {len(kept)} classes",
        "data": values,
        "prompt": {"options": options} | prompt,
        **choose_training(models, len(kept), train, reasons),
    }


def is_chinese(texts: Iterable[str]) -> bool:
    """Whether most of the texts hold Han characters, and few of them kana, which is Japanese."""
    found = [(bool(HAN.search(text)), bool(KANA.search(text))) for text in texts]
    has_han, has_kana = (sum(column) for column in zip(*found, strict=True)) if found else (0, 0)
    return has_han > len(found) / 2 and has_kana <= len(found) / 10


def is_english(texts: Iterable[str]) -> bool:
    """Whether texts may be in English: hardly a letter is none of ASCII's, or enough of their words
    are among its most frequent ones (scikit-learn's list).
    """
    words = Counter(word.strip(MARKS) for text in texts for word in WORD.findall(text.lower()))
    letters = sum(len(word) * n for word, n in words.items())
    others = sum(
        n for word, n in words.items() for mark in word if mark.isalpha() and not mark.isascii()
    )
    frequent = sum(words[word] for word in ENGLISH_STOP_WORDS)
    return others < OTHER_LETTERS * letters or frequent >= FREQUENT_WORDS * words.total()


def read_file(data: Data) -> Reading:
    """Read a file whose columns are known.

    Raises
    ------
    LetterheadError : a label is a list
    """
    sample = read_rows(data)
    whole = list(filter(is_whole, sample.rows))
    for row in whole:
        if isinstance(row.label, list | tuple | dict | set) or in_brackets(row):
            raise LetterheadError(
                f"{row.place}: the label {row.label!r} is a list (multi-label), "
                f"which Letterhead does not do; keep "
                "one label a row, or name another column: LABEL=column"
            )
    words = sorted(len(WORD.findall(row.text)) for row in whole) or [0]
    cut = MAX_WORDS if words[len(words) * 95 // 100] > MAX_WORDS else None
    counts = Counter()
    for (_, label), number in sample.labels.items():
        counts[label] += number
    merged = one_spelling(counts)
    conflicts = conflicting(whole, cut, merged)
    # Of each text the first row, but for texts of which no label is known
    first_rows = {keep_words(row.text, cut).strip(): row for row in reversed(whole)}
    distinct = [row for text, row in first_rows.items() if text not in conflicts]
    in_split, labels = Counter(), Counter()
    for (split, label), number in sample.labels.items():
        in_split[split, merged[label]] += number
        labels[merged[label]] += number
    if sample.every == 1:  # of more rows rare labels may be in none that was looked at
        labels = Counter(merged[str(row.label).strip()] for row in distinct)
    return Reading(
        rows=sample.total,
        every=sample.every,
        missing=sample.total - sample.labels.total(),
        whole=whole,
        middle=words[len(words) // 2],
        cut=cut,
        chinese=is_chinese(row.text for row in whole),
        english=is_english(row.text for row in whole),
        merged=merged,
        conflicts=conflicts,
        distinct=distinct,
        labels=labels,
        in_split=in_split,
    )


def choose_labels(
    path: str, reading: Reading, reasons: list[str]
) -> tuple[list[str] | dict[str, str | None], list[str]]:
    """The value of data.labels, and the names of the classes.

    Raises
    ------
    LetterheadError : fewer than two labels have enough rows
    """
    labels = reading.labels
    listed = ", ".join(f"{label} {n:,}" for label, n in labels.most_common(SHOWN))
    listed += " …" if len(labels) > SHOWN else ""
    kept = sorted(label for label, n in labels.items() if n >= RARE)
    if len(kept) < 2:
        raise LetterheadError(
            f"{path}: fewer than two labels have {RARE} rows or more "
            f"({listed or 'no row is whole'})"
        )
    reasons.append(f"labels: {len(labels)}, with different texts: {listed}")
    joined = [
        label
        for label in labels
        if len(parts := SEVERAL.split(label)) > 1 and set(parts) & set(labels)
    ]
    if joined:
        reasons.append(
            f"labels such as {joined[0]!r} look like several at once (multi-label), which "
            f"Letterhead does not do: each is a "
            "class of its own here; keep one label a row if they are not"
        )
    if all(CODE.fullmatch(label) for label in kept):
        reasons.append(
            "the labels are numbers: names would tell the LLM what they mean; write them "
            "in data.labels as a map: labels: "
            f"{{{kept[0]!r}: its name, {kept[1]!r}: its name …}}"
        )
    pairs = sorted(reading.merged.items())
    spellings = {one: name for one, name in pairs if name in kept and name != one}
    rare = [one for one, name in pairs if name not in kept]
    if spellings:
        spelled = ", ".join(f"{one!r} as {name!r}" for one, name in spellings.items())
        reasons.append(f"labels that differ in capitals or spaces alone are one class: {spelled}")
    if rare:
        reasons.append(
            f"left out (mapped to null), with fewer than {RARE} different texts: {', '.join(rare)}"
        )
    if rare or spellings:
        return {label: label for label in kept} | spellings | dict.fromkeys(rare), kept
    return kept, kept


def choose_left_out(reading: Reading, kept: list[str], reasons: list[str]) -> dict[str, str]:
    """The keys of `data` that say what becomes of broken rows and of texts with different
    labels."""
    values = {}
    if missing := reading.missing:
        values["bad_rows"] = "drop"
        reasons.append(
            f"{missing:,} of {reading.rows:,} rows lack a text or a label or are broken: left "
            f"out (bad_rows: drop)"
        )
    if reading.conflicts:
        values["conflicts"] = "drop"
        text, labels = next(iter(reading.conflicts.items()))
        reasons.append(
            f"{len(reading.conflicts):,} texts stand with different labels, for example "
            f"“{text[:40]}” as {' and '.join(sorted(labels))}: such rows leave train "
            f"(conflicts: drop)"
        )
    counts = [reading.labels[label] for label in kept]
    if max(counts) > IMBALANCED * min(counts):
        reasons.append(
            "the labels are imbalanced: macro F1 counts every class alike, accuracy does not"
        )
    return values


def choose_rows(
    path: str, reading: Reading, kept: list[str], reasons: list[str]
) -> tuple[dict[str, int | None], int]:
    """The value of data.rows, and how many rows are left to train on.

    Raises
    ------
    LetterheadError : too few for so many labels
    """
    in_split = Counter(split_of(row) for row in reading.distinct if reading.name_of(row) in kept)
    if reading.every > 1:
        in_split = Counter()
        for (split, label), number in reading.in_split.items():
            in_split[split] += number if label in kept else 0
    n, own = in_split["train"], set(in_split) - {"train"}
    # So many test rows that the smallest margin can be shown, where there are as many.
    most = rows_for_margin(MARGINS[0] / 2, MOST_METHODS)
    drawn = {"validation": min(300, n // 8), "test": min(most, n // 5)}
    rows = {
        split: number
        if split not in own
        else None
        if split == "test"
        else min(number, in_split[split])
        for split, number in drawn.items()
    }
    train = n - sum(number for split, number in drawn.items() if split not in own)
    if train < FEWEST * len(kept):
        raise LetterheadError(
            f"{path}: {n} different texts are too few for {len(kept)} labels; label more"
        )
    shares = [
        f"{number} of them for {split}" for split, number in drawn.items() if split not in own
    ]
    kept_splits = [f"the file's own {split} rows" for split in sorted(own)]
    reasons.append(
        f"rows: {n:,} different texts; {', '.join([*shares, *kept_splits])}; each label "
        f"in its proportion"
    )
    return rows, train


def choose_training(
    models: dict[str, Any], classes: int, train: int, reasons: list[str]
) -> dict[str, Any]:
    """The sections `decoder` and `encoder`."""
    shared = min(max(FEW_ROWS, ROWS_A_CLASS * classes), train)
    steps = max(models["steps"], STEPS_A_CLASS * min(classes, len(LETTERS)))
    epochs = min(MOST_EPOCHS, math.ceil(steps * BATCH / shared))
    most = MOST_ENCODER_STEPS // math.ceil(train / HEAD_BATCH)
    encoder_head = {
        "learning_rate": models["encoder_rate"],
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_ratio": 0.01,
        "num_train_epochs": min(MOST_EPOCHS, max(HEAD_EPOCHS, most)),
        "patience": PATIENCE,
        "least_steps": ENCODER_STEPS,
        "per_device_train_batch_size": HEAD_BATCH,
        "eval_steps": 0.05,
    }
    epochs_on_all = Head(**encoder_head).on(train).num_train_epochs
    reasons.append(f"models: {models['why']}")
    reasons.extend(larger_model(gpu_gib()))
    reasons.append(
        f"training: the LLM on {shared:,} rows, {'once' if epochs == 1 else f'{epochs} times'} "
        f"({epochs * math.ceil(shared / BATCH)} steps); the other methods on the same rows"
        + (f", and once more on all {train:,}" if train > shared else "")
    )
    reasons.append(
        f"BERT trains for at most {epochs_on_all:.3g} epochs, and ends after {PATIENCE} "
        f"evaluations without a lower log loss on validation rows; there are 20 evaluations at most"
    )
    head = {
        "learning_rate": models["rate"],
        "num_train_epochs": epochs,
        "per_device_train_batch_size": BATCH,
        "eval_steps": 0.5,
    }
    decoder = {
        **models["decoder"],
        "train_rows": shared,
        "sft": {
            "config": models["config"],
            "overrides": {
                "num_train_epochs": epochs,
                "per_device_train_batch_size": BATCH,
                **models["overrides"],
            },
        },
        "head": head,
    }
    decoder["sft_options"] = head | models["optimizer"]
    reasons.append("decoder.sft_options: the LLM once more, with the loss over the options alone")
    return {"decoder": decoder, "encoder": {**models["encoder"], "head": encoder_head}}


def gpu_gib() -> int:
    """The memory of the smallest visible GPU; 0 without one."""
    import torch

    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    sizes = [torch.cuda.get_device_properties(i).total_memory >> 30 for i in gpus]
    return min(sizes, default=0)


def larger_model(gib: int) -> list[str]:
    """Which larger LLM's adapter a GPU of so much memory can train, in a sentence; none for a small
    one.

    Examples
    --------
    >>> larger_model(8), larger_model(24)[0].partition(":")[0]
    ([], 'this GPU has 24 GiB')
    """
    for least, name in LARGER:
        if gib >= least:
            keys = {
                "decoder.model": f"hf:{name}",
                "decoder.sft.config": LARGER_CONFIG,
                "decoder.sft.overrides.model_name_or_path": f"model/{name.partition('/')[2]}",
                "decoder.head.lora": "{rank: 8}",
                "decoder.head.learning_rate": 1e-4,
            }
            listed = ", ".join(f"{key}: {value}" for key, value in keys.items())
            return [f"this GPU has {gib} GiB: an adapter of {name} fits, with {listed}"]
    return []


def in_brackets(row: RawRow) -> bool:
    """Whether a label is written as a list, as Python, numpy or JSON writes one."""
    label = str(row.label).strip()
    return bool(re.fullmatch(r"\[.*\]|\(.*,.*\)|\{.*\}", label, re.DOTALL))


def one_spelling(spellings: Counter) -> dict[str, str]:
    """Each label → the commonest of those that differ from it in capitals or spaces alone."""
    by_name: dict[str, str] = {}
    for label, _ in spellings.most_common():
        by_name.setdefault(same_spelling(label), label)
    return {label: by_name[same_spelling(label)] for label in spellings}


def conflicting(rows: list[RawRow], cut: int | None, merged: dict[str, str]) -> dict[str, set[str]]:
    """Texts that stand with different labels, each with these."""
    labels_of: dict[str, set[str]] = {}
    for row in rows:
        labels_of.setdefault(keep_words(row.text, cut).strip(), set()).add(
            merged[str(row.label).strip()]
        )
    return {text: labels for text, labels in labels_of.items() if len(labels) > 1}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help=f"{KINDS}, or a folder")
    parser.add_argument(
        "--text",
        default="",
        help="the column of the text, or several, with commas between; guessed",
    )
    parser.add_argument("--label", default="", help="the column of the label; guessed")
    parser.add_argument("--sheet", default="", help="of a workbook; the first")
    parser.add_argument("--hours", default="1", help="that the report may take here")
    arguments = parser.parse_args()
    with telling():
        if not arguments.data:
            raise LetterheadError(f"say DATA=, {KINDS}, or a folder")
        if not re.fullmatch(r"\d+(\.\d+)?", arguments.hours) or not float(arguments.hours):
            raise LetterheadError(f"HOURS={arguments.hours}: not a number; write HOURS=2 or 0.5")
        hours = float(arguments.hours)
        main(arguments.data, arguments.text, arguments.label, arguments.sheet, hours)
