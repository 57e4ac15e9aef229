"""Written answers: the last declared option, a bare letter only where it stands alone, none where
several are named."""

import json
from pathlib import Path

import pytest

from letterhead.models.answers import named_option, read_answer
from letterhead.stats.metrics import NO_ANSWER

# Each line of the table: which options, the one that is named ("-": none), the reply.
TABLE = [
    json.loads(line)
    for line in Path(__file__).with_name("written_replies.jsonl").read_text("utf-8").splitlines()
]
OPTIONS = {
    "news": ("ABCD", ["World", "Sports", "Business", "Science/Technology"]),
    "nine": (
        "ABCDEFGHI",
        [
            "Politics",
            "Economy",
            "Sports",
            "Culture",
            "Health",
            "Travel",
            "Science",
            "Weather",
            "Education",
        ],
    ),
    "mood": (None, ["positive", "negative", "neutral"]),
    "zh": ("ABCD", ["国际", "体育", "财经", "科技"]),
    "zhmood": (None, ["满意", "不满意", "一般般"]),
}


@pytest.mark.parametrize("kind", OPTIONS)
def test_written_replies_are_read_as_a_person_reads_them(kind):
    letters, labels = OPTIONS[kind]
    options = list(letters or labels)
    replies = [(reply, expected) for of, expected, reply in TABLE if of == kind]
    found = {reply: read_answer(reply, True, options, labels)[0] for reply, _ in replies}
    named = {
        reply: "-" if option == NO_ANSWER else options[option] for reply, option in found.items()
    }
    assert named == dict(replies) and len(replies) > 20


def test_the_table_holds_300_replies_in_two_languages():
    assert len(TABLE) >= 300 and sum(kind.startswith("zh") for kind, *_ in TABLE) >= 100


@pytest.mark.parametrize(
    ("answer", "option"),
    [
        ("** B. Sports", 1),
        ("B (Sports). I hope so!", 1),
        ("Neither", NO_ANSWER),
        ("B, not World", NO_ANSWER),
        ("A. Sports", NO_ANSWER),
        ("word " * 5000 + "(B)", 1),
    ],
)
def test_a_letter_and_a_label_that_contradict_each_other_are_no_answer(answer, option):
    assert named_option(answer, ["A", "B"], ["World", "Sports"]) == option


def test_labels_that_are_others_letters_are_no_answer():
    assert named_option("A", ["A", "B"], ["B", "A"]) == NO_ANSWER
    assert named_option("2", ["1", "2"], ["1", "2"]) == 1


def test_what_stands_behind_the_last_thought_is_read():
    assert read_answer("<think>A</think> B? <think>no</think> C", True, ["A", "B", "C"]) == (
        2,
        "answered",
    )
    assert read_answer("<think>A</think> World", True, ["A", "B"], ["World", "Sports"]) == (
        0,
        "answered",
    )
