"""The section `data`: where rows come from, what their labels are called, and what is done to them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from letterhead.config.section import Count, Section


class Columns(Section):
    """The names of the columns (or JSON keys) that hold a row's text and label.

    The text may be put together from several: a list ([title, body]) joins them by line breaks, and a template
    ("{title}: {body}") says how. A part may be empty only with `empty_parts`; a list then leaves it out.
    """

    text: str | Annotated[list[str], Field(min_length=1)] = "text"
    label: str = "label"
    empty_parts: bool = False

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
                raise ValueError(f"column {name!r} is of type {type(part).__name__}; write it as a string")
            texts.append((part or "").strip())
            if not texts[-1] and not self.empty_parts:
                raise ValueError(
                    f"column {name!r} is empty; fill it in, delete the row, or set data.columns.empty_parts: true"
                )
        if isinstance(self.text, list):
            return "\n".join(text for text in texts if text)
        named = dict(zip(self.parts, texts, strict=True))
        return re.sub(r"{([^{}]+)}", lambda found: named[found[1]], self.text) if any(texts) else ""


class Rows(Section):
    """How many rows each split has at most; drawn by seed, stratified by label.

    `validation` below 1 is a share of train. A split that the source has is used as it is; one that it lacks is drawn
    from train. 0 validation rows means that no checkpoint can be chosen but on test. Where `train` asks for fewer rows than
    there are, `train_seed` draws others of them, and leaves the other splits as they are; `train_from` takes the easiest or
    hardest of each label instead, by a `ranking` (what `make rank` leaves).
    """

    train: Count | None = None
    train_seed: int | None = None
    train_from: Literal["random", "easy", "hard"] = "random"
    ranking: Path | None = None
    validation: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Count | None = None


class Data(Section):
    """Where the rows come from and what is done to them; see prep/sources.py for the forms of `source`.

    A list of `labels` holds the names as they stand in the source, or names for its numbers, which count from 0 or from 1;
    which, is decided by all rows, and where neither fits them all, nothing is read.

    `duplicates`, `shared` and `near_duplicates` say whether train loses a text that stands in it twice, that stands in test
    or validation too, or that nearly does. `conflicts` says what becomes of a text that stands in train with different
    labels: all its rows go (drop), one stays with the label that most of them have (majority; a tie goes), all stay, as
    published (keep), or the run ends (stop). `bad_rows` says whether a row without a text, with an unknown label or with a
    wrong number of fields ends the run or is left out and counted. `seed` draws the splits and subsets: another training
    seed changes no rows.
    `license` is said in the data card, here and of the models.
    """

    source: str
    encoding: list[str] = ["utf-8"]
    skip_lines: Annotated[int, Field(ge=0)] = 0
    columns: Columns = Field(default_factory=Columns)
    labels: list[str] | dict[str, str | None]
    max_words: Count | None = None
    rows: Rows = Field(default_factory=Rows)
    duplicates: Literal["drop", "keep"] = "drop"
    shared: Literal["drop", "keep"] = "keep"
    near_duplicates: Literal["drop", "keep"] = "keep"
    conflicts: Literal["stop", "drop", "majority", "keep"] = "drop"
    bad_rows: Literal["stop", "drop"] = "stop"
    seed: int = 42
    license: str | None = None

    @field_validator("labels", mode="before")
    @classmethod
    def _names(cls, labels: Any) -> Any:
        """A label is always text; YAML reads bare digits as a number, and a bare yes or no as a boolean."""
        if not isinstance(labels, list | dict):
            raise ValueError("write a list of names, or a map (value in the source: name)")
        if any(isinstance(part, bool) for part in [*labels, *(labels.values() if isinstance(labels, dict) else ())]):
            raise ValueError("YAML reads a bare yes, no, true or false as a boolean; put quotes around that label")
        if isinstance(labels, dict):
            return {str(key): value if value is None else str(value) for key, value in labels.items()}
        if None in labels:
            raise ValueError("a name is empty; to drop a class write a map (value in the source: null)")
        return [str(label) for label in labels]

    @model_validator(mode="after")
    def _at_least_two(self) -> "Data":
        if isinstance(self.labels, list) and len(set(self.labels)) != len(self.labels):
            raise ValueError("labels: a name stands twice; to merge classes write a map (source value: name)")
        if len(self.label_names) < 2:
            raise ValueError("labels: name at least two classes")
        spellings: dict[str, str] = {}
        for name in self.label_names:
            other = spellings.setdefault(" ".join(name.casefold().split()), name)
            if other != name:
                raise ValueError(
                    f"labels: {other!r} and {name!r} differ in capitals or spaces alone; if they are one class, write a map "
                    f"with one name for both ({other}: {other}, {name}: {other}), else rename one"
                )
        return self

    @property
    def label_names(self) -> list[str]:
        """The classes in order; for a map, in the order in which its values first appear."""
        values = self.labels if isinstance(self.labels, list) else self.labels.values()
        return list(dict.fromkeys(value for value in values if value is not None))
