"""The sections `prompt`, `eval` and `compare`: what the decoder is asked, how answers are scored, what decides."""

from typing import Annotated, Literal

from pydantic import Field, field_validator

from letterhead.config.section import Count, Section

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


PROMPT = """Please read the following text and determine its category from the options below.

Text:
{text}

Question: What is the most appropriate category for this text?
{options}

Answer:/no_think"""


class Prompt(Section):
    """The question put to the decoder. `{text}` and `{options}` are filled in; the answer is the prefix and an option."""

    template: str = PROMPT
    options: Literal["letters", "names"] = "letters"
    answer_prefix: str = "<think>\n\n</think>\n\n"

    @field_validator("template")
    @classmethod
    def _placeholders(cls, template: str) -> str:
        for placeholder in ("{text}", "{options}"):
            if template.count(placeholder) != 1:
                raise ValueError(f"write {placeholder} once where it belongs; it stands {template.count(placeholder)}x")
        return template


class Thinking(Section):
    """Zero-shot with thinking: on how many test rows (null: all), and how many tokens an answer may have."""

    rows: Count | None = 24
    tokens: Count = 64
    batch: Count = 24


class Eval(Section):
    """How checkpoints are scored: `sum` is the log-likelihood of the whole option, `mean` that of a token (perplexity).

    For letters of one token each the two are equal. For names the mean favours long ones, whose later tokens follow from
    the first. With `untrained` the decoder before training is scored, too, as step 0.

    `option_order: rotated` lists the options from the second on, the first last, so that each letter stands for another
    label than in training; `examples` training rows are asked and answered before each question (few-shot).
    """

    score: Literal["mean", "sum"] = "sum"
    batch_tokens: Count = 2048
    untrained: bool = True
    option_order: Literal["listed", "rotated"] = "listed"
    examples: Annotated[int, Field(ge=0)] = 0
    thinking: Thinking = Field(default_factory=Thinking)


class Compare(Section):
    """What decides which method to ship: the loss of macro F1 that a lower price is worth, set before a test row is seen."""

    margin: Annotated[float, Field(gt=0, lt=1)] = 0.01
