"""The documents: every link resolves, every target that they name is there."""

import re
import subprocess

import pytest

from letterhead.config.reference import reference
from tests.conftest import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")


def anchors(text: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_resolves(page):
    for link in LINK.findall(page.read_text()):
        if link.startswith("https://"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target.read_text()), f"{page.name}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_target_that_is_named_is_there(page):
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    known = set(re.findall(r"^  ([a-z-]+) ", listed, re.MULTILINE))
    code = " ".join(re.findall(r"```.*?```|`[^`\n]+`", page.read_text(), re.DOTALL))
    named = re.findall(r"\bmake ([a-z][a-z-]+)", code)
    assert set(named) <= known, set(named) - known


def test_the_reference_of_keys_is_that_of_the_code():
    assert (ROOT / "docs/keys.md").read_text() == reference(), "run: make keys"


def sentences(text: str) -> list[str]:
    """A page's sentences, roughly: without code, tables, headings and pictures."""
    text = re.sub(r"```.*?```", " ", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not re.match(r"\s*(\||#|>|!\[)", line))
    text = re.sub(r"\]\([^)]*\)", "]", re.sub(r"`[^`]*`", "x", text))
    return [part for part in re.split(r"(?<=[.!?])\s+|\n\n", text) if len(part.split()) > 2]


@pytest.mark.parametrize(
    "page", [page for page in PAGES if ".zh" not in page.name], ids=lambda page: page.name
)
def test_sentences_are_short(page):
    lengths = [len(sentence.split()) for sentence in sentences(page.read_text())]
    assert sum(lengths) / len(lengths) <= 18 and max(lengths) <= 45


def test_the_readme_is_a_screen_and_a_half():
    for name in ("README.md", "README.zh.md"):
        assert (ROOT / name).read_text().count("\n") < 75, name
