"""The sections `prompt`, `eval` and `compare`: what the decoder is asked, how answers are scored,
what decides."""

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from letterhead.config.section import Count, Section

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


PROMPT = """Please read the following text and determine its category from the options below.

Text:
{text}

Question: What is the most appropriate category for this text?
{options}

Answer:/no_think"""


class Prompt(Section):
    """The question put to the decoder. `{text}` and `{options}` are filled in; the answer is the
    prefix and an option."""

    options: Literal["letters", "names"] = Field(
        "letters", description="What the decoder answers with: a letter, or the name of the label."
    )
    template: str = Field(
        PROMPT,
        description="The question. {text} and {options} are filled in; where the options are names "
        "it need not list them.",
    )
    answer_prefix: str = Field(
        "<think>\n\n</think>\n\n",
        description="What stands before the option in an answer that is trained.",
    )

    @field_validator("template")
    @classmethod
    def _placeholders(cls, template: str, known: ValidationInfo) -> str:
        for placeholder in ("{text}", "{options}"):
            found = template.count(placeholder)
            may_lack = placeholder == "{options}" and known.data.get("options") == "names"
            if found != 1 and not (may_lack and not found):
                raise ValueError(f"write {placeholder} once where it belongs; it stands {found}x")
        return template


class Thinking(Section):
    """Zero-shot with thinking: on how many test rows (null: all), and how many tokens an answer may
    have."""

    rows: Count | None = Field(
        24, description="On how many test rows the decoder thinks. null takes all."
    )
    tokens: Count = Field(64, description="How many tokens an answer may have.")
    batch: Count = Field(24, description="How many answers HF generates at a time.")


class Eval(Section):
    """How checkpoints are scored."""

    score: Literal["mean", "sum"] = Field(
        "sum",
        description=(
            "An option's log-likelihood (sum), or its mean over the option's tokens "
            "(mean), which is"
            " perplexity. For letters of one token the two are equal. For names the mean favours "
            "long ones."
        ),
    )
    batch_tokens: Count = Field(2048, description="How many tokens a forward pass may hold.")
    untrained: bool = Field(
        True, description="Whether the decoder before training is scored, too, as step 0."
    )
    option_order: Literal["listed", "rotated"] = Field(
        "listed",
        description=(
            "rotated lists the options from the second on, the first last. Each letter then stands "
            "for another label than in training."
        ),
    )
    examples: Annotated[int, Field(ge=0)] = Field(
        0, description="How many training rows are asked and answered before each question."
    )
    thinking: Thinking = Field(default_factory=Thinking)


class Compare(Section):
    """What decides which method to ship."""

    metric: Annotated[
        str, Field(pattern=r"^(macro_f1|accuracy|cost|(f1|recall|precision):.+)$")
    ] = Field(
        "macro_f1",
        description=(
            "What is compared: macro_f1, accuracy, cost (the mean of compare.costs), or "
            "f1:LABEL, recall:LABEL, precision:LABEL."
        ),
    )
    costs: dict[str, dict[str, Annotated[float, Field(ge=0)]]] | None = Field(
        None,
        description=(
            "What an error costs: {true label: {predicted label: cost}}; what is not named costs "
            "nothing. No answer costs as much as the dearest error."
        ),
    )
    margin: Annotated[float, Field(gt=0)] = Field(
        0.01,
        description="The loss of the metric, in its unit, that a lower price is worth. Set it "
        "before a test row is seen.",
    )

    @model_validator(mode="after")
    def _fitting(self) -> "Compare":
        if (self.metric == "cost") != (self.costs is not None):
            raise ValueError("metric: cost and costs go together; write both, or neither")
        if self.costs and not any(cost for row in self.costs.values() for cost in row.values()):
            raise ValueError("costs: nothing costs anything")
        if self.metric != "cost" and self.margin >= 1:
            raise ValueError(f"margin: {self.margin:g} of {self.metric} is all of it; write 0.01")
        return self
