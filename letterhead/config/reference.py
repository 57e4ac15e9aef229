"""The reference of an experiment's keys, docs/keys.md, written from their descriptions.

python -m letterhead.config.reference > docs/keys.md
"""

from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from letterhead.config.experiment import Experiment
from letterhead.config.section import Section

HEAD = """# Keys

Every key of an experiment, with its default. This page is generated from the code (`make keys`).
[experiments.md](experiments.md) shows how an experiment is written.
"""
LONGEST_DEFAULT = 60


def reference() -> str:
    """The page, in Markdown."""
    return HEAD + "".join(tables(Experiment, "", set()))


def tables(section: type[Section], path: str, shown: set[type[Section]]) -> list[str]:
    """The table of a section's keys, and those of the sections in it; one that several keys may
    hold has its table once, if it may also be left out.

    Parameters
    ----------
    shown : the sections that have one already; this one is added
    """
    rows, below = [], []
    shown.add(section)
    for name, field in section.model_fields.items():
        inner = section_of(field)
        if inner is None or name == "model" or field.description:
            default, values = (
                shown_default(field),
                ", ".join(f"`{value}`" for value in values_of(field.annotation)),
            )
            description = " ".join(
                filter(None, [field.description, f"One of {values}." if values else ""])
            )
            rows.append(
                f"| `{path}{name}` | {default} | {description.replace('|', chr(92) + '|')} |"
            )
        else:
            below += tables(inner, f"{path}{name}.", shown)
            continue
        if inner and name != "model" and inner not in shown:
            below += tables(inner, f"{path}{name}.", shown)
    title = path.rstrip(".") or "The experiment"
    summary = " ".join((section.__doc__ or "").split())
    table = (
        "| key | default | meaning |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n"
        if rows
        else ""
    )
    return [f"\n## {title}\n\n{summary}\n\n{table}", *below] if rows else below


def section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a key holds, or None."""
    kinds = [field.annotation, *get_args(field.annotation)]
    return next(
        (kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section)), None
    )


def values_of(annotation: Any) -> tuple[Any, ...]:
    """The values of a key that has a fixed choice of them."""
    return get_args(annotation) if get_origin(annotation) is Literal else ()


def shown_default(field: FieldInfo) -> str:
    """A default as YAML would have it; a long one by its beginning."""
    if field.is_required():
        return "to be given"
    value = field.get_default(call_default_factory=True)
    if value is None or value is PydanticUndefined:
        return "`null`"
    text = (
        str(value).lower()
        if isinstance(value, bool)
        else str(value.value if isinstance(value, Enum) else value)
    )
    text = (
        str(Path(text))
        if isinstance(value, Path)
        else text.replace("\n", "\\n").replace("|", "\\|")
    )
    return (
        f"`{text[:LONGEST_DEFAULT]}{'…' if len(text) > LONGEST_DEFAULT else ''}`"
        if text
        else "empty"
    )


if __name__ == "__main__":
    print(reference(), end="")
