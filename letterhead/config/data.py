"""The section `data`: where rows come from, what their labels are called, and what is done to
them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from letterhead.config.section import Count, Section


class Columns(Section):
    """The names of the columns (or JSON keys) that hold a row's text and label."""

    text: str | Annotated[list[str], Field(min_length=1)] = Field(
        "text",
        description=(
            "The column of the text. A list joins several columns by line breaks. A "
            "template such as"
            ' "{title}: {body}" says how.'
        ),
    )
    label: str = Field("label", description="The column of the label.")
    empty_parts: bool = Field(
        False, description="Whether a part of the text may be empty. A list then leaves it out."
    )

    @property
    def parts(self) -> list[str]:
        """The columns that the text is put together from."""
        if isinstance(self.text, list):
            return self.text
        return list(dict.fromkeys(re.findall(r"{([^{}]+)}", self.text))) or [self.text]

    def join(self, parts: Sequence[Any]) -> Any:
        """A row's text from the values of `parts`; that of a single column is handed on as it is.

        Raises
        ------
        ValueError : a part is empty, or not a string; names its column
        """
        if self.text == self.parts[0]:
            return parts[0]
        texts = []
        for name, part in zip(self.parts, parts, strict=True):
            if part is not None and not isinstance(part, str):
                raise ValueError(
                    f"column {name!r} is of type {type(part).__name__}; write it as a string"
                )
            texts.append((part or "").strip())
            if not texts[-1] and not self.empty_parts:
                raise ValueError(
                    f"column {name!r} is empty; fill it in, delete the row, or set "
                    f"data.columns.empty_parts: true"
                )
        if isinstance(self.text, list):
            return "\n".join(text for text in texts if text)
        named = dict(zip(self.parts, texts, strict=True))
        return re.sub(r"{([^{}]+)}", lambda found: named[found[1]], self.text) if any(texts) else ""


class Rows(Section):
    """How many rows each split has at most; drawn by seed, stratified by label."""

    train: Count | None = Field(
        None, description="At most so many rows to train on. null takes all."
    )
    train_seed: int | None = Field(
        None,
        description="Draws other rows where `train` asks for fewer than there are. The other "
        "splits stay.",
    )
    train_from: Literal["random", "easy", "hard"] = Field(
        "random",
        description="Which rows of each label are taken: random ones, or the easiest or hardest "
        "by `ranking`.",
    )
    ranking: Path | None = Field(None, description="The file that `make rank` left.")
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = Field(
        0.1,
        description=(
            "How many rows choose checkpoints. Below 1 it is a share of train. 0 means "
            "that only test could choose."
        ),
    )
    test: Count | None = Field(
        None,
        description=(
            "At most so many test rows. A split that the source has is used as it is. One "
            "that it lacks is drawn from train."
        ),
    )


class Data(Section):
    """Where the rows come from and what is done to them; letterhead/rows/sources.py has the forms
    of `source`."""

    source: str = Field(
        description=(
            "Where the rows come from: a path (with {split} for published splits), "
            "hf:ID[@REVISION],"
            " or pypi:PACKAGE==VERSION/PATH#sha256=HEX."
        ),
    )
    encoding: list[str] = Field(
        ["utf-8"],
        description="The encodings to try. The first in which the whole file decodes is taken.",
    )
    skip_lines: Annotated[int, Field(ge=0)] = Field(
        0, description="How many lines below the header are left out."
    )
    header: bool | None = Field(
        None,
        description="Whether the first line holds the names of the columns; else they are called "
        '"1", "2" and so on. null: it does, but for .txt.',
    )
    sheet: str | None = Field(
        None,
        description="The sheet of a workbook, such as .xlsx. null takes the first.",
    )
    columns: Columns = Field(default_factory=Columns)
    labels: list[str] | dict[str, str | None] = Field(
        description=(
            "A list holds the names as they stand in the source, or names for its numbers, which "
            "count from 0 or from 1 by all its rows. A map renames, merges and drops (null) labels."
        ),
    )
    group: str | None = Field(
        None,
        description="A column whose equal values belong together, such as a customer's number: no "
        "group has rows in two splits.",
    )
    time: str | None = Field(
        None,
        description="A column of dates or numbers: of splits that are drawn, test gets the latest "
        "rows, and validation those before them.",
    )
    max_words: Count | None = Field(
        None,
        description="Texts are cut behind so many words. A Chinese or Japanese character counts "
        "as a word.",
    )
    rows: Rows = Field(default_factory=Rows)
    duplicates: Literal["drop", "keep"] = Field(
        "drop", description="Whether train loses a text that stands in it twice."
    )
    shared: Literal["drop", "keep"] = Field(
        "keep", description="Whether train loses a text that stands in test or validation, too."
    )
    near_duplicates: Literal["drop", "keep"] = Field(
        "keep", description="Whether train loses a text that nearly stands in test or validation."
    )
    conflicts: Literal["stop", "drop", "majority", "keep"] = Field(
        "drop",
        description=(
            "What becomes of a text that stands in train with different labels: all its rows go "
            "(drop), the label of most of them counts (majority; a tie goes), all stay (keep), or "
            "the run ends (stop)."
        ),
    )
    bad_rows: Literal["stop", "drop"] = Field(
        "stop",
        description=(
            "Whether a row without a text, with an unknown label or with a wrong number of fields "
            "ends the run, or is left out and counted."
        ),
    )
    seed: int = Field(
        42, description="Draws the splits and subsets. Another training seed changes no rows."
    )
    license: str | None = Field(None, description="The license of the rows, for the data card.")

    @property
    def column_names(self) -> list[str]:
        """The columns that are read: those of the text, the label's, the group's and the time's."""
        more = [name for name in (self.group, self.time) if name is not None]
        return [*self.columns.parts, self.columns.label, *more]

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, labels: Any) -> Any:
        """A label is always text; YAML reads bare digits as a number, and a bare yes or no as a
        boolean."""
        if not isinstance(labels, list | dict):
            raise ValueError("write a list of names, or a map (value in the source: name)")
        if any(
            isinstance(part, bool)
            for part in [*labels, *(labels.values() if isinstance(labels, dict) else ())]
        ):
            raise ValueError(
                "YAML reads a bare yes, no, true or false as a boolean; put quotes around that "
                "label"
            )
        if isinstance(labels, dict):
            return {
                str(key): value if value is None else str(value) for key, value in labels.items()
            }
        if None in labels:
            raise ValueError(
                "a name is empty; to drop a class write a map (value in the source: null)"
            )
        return [str(label) for label in labels]

    @model_validator(mode="after")
    def _at_least_two(self) -> "Data":
        if isinstance(self.labels, list) and len(set(self.labels)) != len(self.labels):
            raise ValueError(
                "labels: a name stands twice; to merge classes write a map (source value: name)"
            )
        if len(self.label_names) < 2:
            raise ValueError("labels: name at least two classes")
        spellings: dict[str, str] = {}
        for name in self.label_names:
            other = spellings.setdefault(same_spelling(name), name)
            if other != name:
                raise ValueError(
                    f"labels: {other!r} and {name!r} differ in capitals or spaces alone; if they "
                    f"are one class, write a map "
                    f"with one name for both ({other}: {other}, {name}: {other}), else rename one"
                )
        return self

    @property
    def label_names(self) -> list[str]:
        """The classes in order; for a map, in the order in which its values first appear."""
        values = self.labels if isinstance(self.labels, list) else self.labels.values()
        return list(dict.fromkeys(value for value in values if value is not None))


def same_spelling(label: str) -> str:
    """What labels share that differ in capitals or spaces alone."""
    return " ".join(label.casefold().split())
