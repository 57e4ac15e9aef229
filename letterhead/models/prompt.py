"""The prompt, and the token ids that training, scoring and service all see.

LLaMA-Factory's template code decides the ids: it is called here, never imitated. Two things are
done to a text before the template is applied, the same everywhere: strings that the tokenizer would
read as control tokens are broken up, and a text too long for `cutoff_len` is shortened.
(LLaMA-Factory cuts the tail of the *prompt*: the question, the options and the assistant's header
would go, and the article stay.)
"""

import logging
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from letterhead.config.evaluation import LETTERS, Prompt
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.runs import results

THINK = ("<think>", "</think>")
SEAM = 8
FEWEST_TOKENS = 8  # of a text beside examples


@dataclass(frozen=True)
class Answer:
    """An option as the answer that training sees.

    ids : the response's token ids, from the first answer token through the end of the turn
    start, stop : the tokens that spell the option are ids[start:stop]; ids[stop] ends the turn
    """

    ids: list[int]
    start: int
    stop: int


def option_texts(prompt: Prompt, labels: list[str]) -> list[str]:
    """What the model answers for each label: a letter, or the label's name."""
    return list(LETTERS[: len(labels)]) if prompt.options == "letters" else labels


# Chinese and Japanese write no spaces: each character counts as a word, as word processors count.
UNSPACED = r"\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff66-\uff9f\U00020000-\U0003ffff"
WORD = re.compile(rf"[{UNSPACED}]|[^\s{UNSPACED}]+")


def keep_words(text: str, words: int | None) -> str:
    """The text through its `words`-th word, spacing untouched."""
    if words is None:
        return text
    for number, word in enumerate(WORD.finditer(text), 1):
        if number == words:
            return text[: word.end()]
    return text


def not_of_reasoning(record: logging.LogRecord) -> bool:
    """Whether LLaMA-Factory's words are to be shown: not its advice to take a template without
    thinking, whose block our answers begin with on purpose."""
    return "_nothink" not in record.getMessage()


def _control_strings(tokenizer, more: Iterable[str] = ()) -> re.Pattern:
    """What the tokenizer reads as control tokens when it stands in a text."""
    control = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(more)
    # Runs of blanks, which some vocabularies add as tokens, are text; so is a single character.
    names = sorted((re.escape(c) for c in control if len(c.strip()) > 1), key=len, reverse=True)
    return re.compile("|".join(names) or r"(?!)")


def break_up(control: re.Pattern, text: str) -> str:
    """A text with a space inside each string that a pattern knows as a control token."""
    return control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)


class TextEncoder:
    """Turns texts into what a model with a linear head reads: the raw text, without the prompt.

    Control strings are broken up.

    Parameters
    ----------
    max_length : tokens that the model reads at once, the tokenizer's special tokens included
    long_texts : what becomes of a longer text (see `Head.long_texts`)
    """

    def __init__(self, tokenizer, max_length: int, long_texts: str = "cut"):
        self.tokenizer, self.max_length, self.long_texts = tokenizer, max_length, long_texts
        self.control = _control_strings(tokenizer)

    @cached_property
    def _framing(self) -> tuple[list[int], list[int]]:
        """The special tokens before and behind a text."""
        plain, framed = (
            self.tokenizer("a", add_special_tokens=special)["input_ids"]
            for special in (False, True)
        )
        at = next(at for at in range(len(framed)) if framed[at : at + len(plain)] == plain)
        return framed[:at], framed[at + len(plain) :]

    @property
    def _room(self) -> int:
        room = self.max_length - sum(map(len, self._framing))
        if room < 1:
            raise LetterheadError(
                f"max_length is {self.max_length}, which leaves no token for a text; raise it"
            )
        return room

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, special tokens included, one list a text; of a text that is read in chunks
        all of them (see `parts`)."""
        clean = self.neutralise(texts)
        if self.long_texts == "cut":
            return self.tokenizer(clean, truncation=True, max_length=self.max_length)["input_ids"]
        bodies = self.tokenizer(clean, add_special_tokens=False, verbose=False)["input_ids"]
        if self.long_texts == "head_tail":
            bodies = [self._head_and_tail(body) for body in bodies]
        begin, end = self._framing
        return [[*begin, *body, *end] for body in bodies]

    def _head_and_tail(self, body: list[int]) -> list[int]:
        """The first quarter and the last three of what fits (Sun et al. 2019, arXiv 1905.05583,
        take 128 and 382 of 510)."""
        if len(body) <= self._room:
            return body
        head = self._room // 4
        return body[:head] + body[head - self._room :]

    def parts(self, ids: list[int]) -> list[list[int]]:
        """What the model reads of a text's ids: as many chunks as they need, of equal length but
        for a token, each with the special tokens."""
        if len(ids) <= self.max_length:
            return [ids]
        begin, end = self._framing
        body = ids[len(begin) : len(ids) - len(end)]
        n = math.ceil(len(body) / self._room)
        bounds = [len(body) * part // n for part in range(n + 1)]
        return [[*begin, *body[first:last], *end] for first, last in pairwise(bounds)]

    def neutralise(self, texts: Sequence[str]) -> list[str]:
        """The texts with a space inside each string that the tokenizer would read as a control
        token."""
        return [break_up(self.control, text) for text in texts]


class PromptEncoder:
    """Turns texts into prompts and prompts into ids, exactly as LLaMA-Factory does for training.

    Parameters
    ----------
    tokenizer : a fast transformers tokenizer
    data_arguments : LLaMA-Factory's DataArguments, or anything with the same fields
    prompt, labels : from the experiment
    rotate : list the options from the second on, the first last (each letter then stands for
        another label)
    examples : texts with their labels, asked and answered in turns before the question (few-shot)
    """

    def __init__(
        self,
        tokenizer,
        data_arguments,
        prompt: Prompt,
        labels: list[str],
        rotate: bool = False,
        examples: Sequence[tuple[str, str]] = (),
    ):
        from llamafactory.data.template import ReasoningTemplate, get_template_and_fix_tokenizer

        self.tokenizer, self.labels = tokenizer, labels
        logging.getLogger("llamafactory.data.template").addFilter(not_of_reasoning)
        self.template = get_template_and_fix_tokenizer(tokenizer, data_arguments)
        self.cutoff_len = data_arguments.cutoff_len
        self._control = _control_strings(tokenizer, THINK)
        names = [self.neutralise(label) for label in labels]  # a label is somebody's text, too
        listed, shown = option_texts(prompt, names), [*names[1:], names[0]] if rotate else names
        self.options = (
            names if prompt.options == "names" else [listed[shown.index(name)] for name in names]
        )
        self._prefix = prompt.answer_prefix
        self._removes_thought = (
            isinstance(self.template, ReasoningTemplate) and self.template.enable_thinking is False
        )
        lettered = [f"{letter}. {name}" for letter, name in zip(listed, shown, strict=True)]
        lines = lettered if prompt.options == "letters" else shown
        parts = prompt.template.split(
            "{text}"
        )  # before the labels are in it, which may hold {text}
        self._before, self._after = (part.replace("{options}", "\n".join(lines)) for part in parts)
        self._turns: list[dict[str, str]] = []
        self.examples_cut = 0
        if examples:
            self._turns = self._ask_examples(examples)

    def _ask_examples(self, examples: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
        """The turns of the examples. Each text has at most its share of the room that `cutoff_len`
        leaves; how many were cut for that is counted in `examples_cut`.

        Raises
        ------
        LetterheadError : that room is too small for so many examples
        """

        def turns(texts: Sequence[str]) -> list[dict[str, str]]:
            options = [self.options[self.labels.index(label)] for _, label in examples]
            return [
                turn
                for text, option in zip(texts, options, strict=True)
                for turn in (
                    {"role": "user", "content": self.fill(text)},
                    {"role": "assistant", "content": self.answer_text(option)},
                )
            ]

        self._turns = turns([""] * len(examples))
        share = self._room() // (len(examples) + 1)
        if share < FEWEST_TOKENS:
            raise LetterheadError(
                f"eval.examples: {len(examples)} examples leave {max(share, 0)} tokens for each "
                f"text within cutoff_len "
                f"{self.cutoff_len}, and {FEWEST_TOKENS} are the fewest; ask for fewer "
                f"examples, or raise cutoff_len "
                "(decoder.sft.overrides.cutoff_len)"
            )
        whole = [self.neutralise(text) for text, _ in examples]
        fitted = [self._cut(text, share) for text in whole]
        self.examples_cut = sum(
            len(cut) < len(text) for cut, text in zip(fitted, whole, strict=True)
        )
        return turns(fitted)

    def answer_text(self, option: str) -> str:
        """The answer that is trained for an option: the prefix and the option."""
        return self._prefix + option

    def neutralise(self, text: str) -> str:
        """The text with a space inside each string that the tokenizer would read as a control
        token."""
        return break_up(self._control, text)

    def fit(self, text: str) -> str:
        """The text as it stands in the prompt: neutralised, and shortened so that prompt and answer
        fit `cutoff_len`."""
        return self._cut(self.neutralise(text), self.text_budget)

    def is_cut(self, text: str) -> bool:
        """Whether `fit` shortens a text."""
        return len(self.fit(text)) < len(self.neutralise(text))

    def _cut(self, text: str, tokens: int) -> str:
        """A text's first `tokens` tokens."""
        # A byte-level tokenizer never makes more tokens than bytes, so a short ASCII text need not
        # be counted.
        if text.isascii() and len(text) <= tokens:
            return text
        offsets = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        return text if len(offsets) <= tokens else text[: offsets[tokens][0]].rstrip()

    def instruction(self, text: str) -> str:
        """The question about a text."""
        return self.fill(self.fit(text))

    def fill(self, fitted: str) -> str:
        """The question about a text that `fit` gave."""
        return self._before + fitted + self._after

    def encode(self, text: str) -> list[int]:
        """The prompt's token ids for a text, through the last token before the answer."""
        return self.encode_instruction(self.instruction(text))

    def encode_instruction(self, instruction: str) -> list[int]:
        """The prompt's token ids for an instruction that is already filled in."""
        return self.encode_turn(instruction, self.answer_text(self.options[0]))[0]

    def encode_before_option(self, text: str) -> list[int]:
        """The prompt's ids and the answer's through its think block: the next token is the option's
        first."""
        answer = self.answers[0]
        return [*self.encode(text), *answer.ids[: answer.start]]

    @cached_property
    def answers(self) -> list[Answer]:
        """The options as trained, in the order of the labels.

        Raises
        ------
        LetterheadError : the template writes an answer in a way that cannot be found again among
            its ids
        """
        return [self._answer(option) for option in self.options]

    def encode_turn(self, instruction: str, answer: str) -> tuple[list[int], list[int]]:
        """The ids of a question, filled in, and of an answer to it, as LLaMA-Factory trains on
        them."""
        messages = [
            *self._turns,
            {"role": "user", "content": instruction},
            {"role": "assistant", "content": answer},
        ]
        # encode_multiturn, as in LLaMA-Factory's supervised processor; but for examples there is
        # one turn.
        *before, (asked, answered) = self.template.encode_multiturn(self.tokenizer, messages)
        return [token for turn in before for part in turn for token in part] + asked, answered

    def _answer(self, option: str) -> Answer:
        text = self.answer_text(option)
        if self._removes_thought:
            text = self.template.remove_thought(text)
        response = self.encode_turn("", self.answer_text(option))[1]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, begins = encoded["input_ids"], len(text) - len(option)
        spelled = sum(end > begins for _, end in encoded["offset_mapping"])
        lead = (
            len(self.template.get_thought_word_ids(self.tokenizer))
            if response[: len(ids)] != ids
            else 0
        )
        stop = lead + len(ids)
        if response[lead:stop] != ids or stop >= len(response):
            raise LetterheadError(
                f"template {self.template}: its ids for the answer {text!r} do not end in the "
                f"option's"
            )
        return Answer(response, stop - spelled, stop)

    @cached_property
    def text_budget(self) -> int:
        """How many tokens a text may have, so that every option's answer still fits."""
        budget = self._room()
        if budget < 1:
            raise LetterheadError(
                f"cutoff_len {self.cutoff_len} leaves no room for a text: the prompt without it "
                f"has "
                f"{self.cutoff_len - budget} tokens; raise cutoff_len in the LLaMA-Factory "
                f"YAML, or shorten prompt.template"
            )
        return budget

    def _room(self) -> int:
        """How many tokens of `cutoff_len` are left behind the prompt without a text and the longest
        answer; some in reserve for the seams between a text and what stands around it."""
        fixed = len(
            self.encode_turn(self._before + self._after, self.answer_text(self.options[0]))[0]
        )
        seams = SEAM * (len(self._turns) // 2 + 1)
        return self.cutoff_len - fixed - max(len(answer.ids) for answer in self.answers) - seams


class OptionEncoder:
    """Turns texts into what a decoder with its letters for a head reads: the prompt through the
    last token before the option; as `TextEncoder`, from which the rest does not tell it apart."""

    def __init__(self, prompt: PromptEncoder):
        self.prompt = prompt

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids, one list a text."""
        return [self.prompt.encode_before_option(text) for text in texts]

    def parts(self, ids: list[int]) -> list[list[int]]:
        """What the model reads of a prompt: the whole."""
        return [ids]


def prompt_inputs(experiment: Experiment) -> dict:
    """The configuration that decides a prompt's ids."""
    arguments = experiment.sft_arguments()
    keys = ("template", "cutoff_len", "enable_thinking", "default_system")
    return {
        "prompt": experiment.prompt.model_dump(),
        "labels": experiment.labels,
        "template": {key: arguments.get(key) for key in keys},
    }


def draw_examples(experiment: Experiment) -> list[tuple[str, str]]:
    """`eval.examples` training rows as text and label, by seed; of each label as many as of any
    other, or one more, the labels of every turn in an order of its own.

    Raises
    ------
    LetterheadError : there are fewer training rows
    """
    rows = results.read_rows(experiment, "decoder_train") if experiment.eval.examples else []
    if len(rows) < experiment.eval.examples:
        raise LetterheadError(
            f"eval.examples asks for {experiment.eval.examples} rows, but train holds {len(rows)}"
        )
    rng = np.random.default_rng(experiment.seed)
    shuffled = [rows[i] for i in rng.permutation(len(rows))]
    by_label = [[row for row in shuffled if row["label"] == label] for label in experiment.labels]
    dealt = [
        turn[k] for turn in zip_longest(*by_label) for k in rng.permutation(len(turn)) if turn[k]
    ]
    return [(row["text"], row["label"]) for row in dealt[: experiment.eval.examples]]


def load_scoring_encoder(experiment: Experiment) -> PromptEncoder:
    """The encoder of the prompts that are scored: options in the order of `eval.option_order`,
    behind `eval.examples`."""
    rotate = experiment.eval.option_order == "rotated"
    return load_prompt_encoder(experiment, rotate=rotate, examples=draw_examples(experiment))


def load_prompt_encoder(
    experiment: Experiment, thinking: bool = False, folder: Path | None = None, **more: Any
) -> PromptEncoder:
    """The encoder for an experiment, with the tokenizer in `folder` (the decoder's by default).
    With `thinking` the prompt leaves the model free to think: `/no_think` goes from the template's
    end, and no empty think block stands in it. `more` is PromptEncoder's."""
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    arguments = experiment.sft_arguments()
    known = {
        key: value for key, value in arguments.items() if key in DataArguments.__dataclass_fields__
    }
    prompt = experiment.prompt
    if thinking:
        known["enable_thinking"] = True
        prompt = prompt.model_copy(update={"template": prompt.template.removesuffix("/no_think")})
    tokenizer = AutoTokenizer.from_pretrained(
        folder or experiment.decoder.folder, trust_remote_code=False
    )
    return PromptEncoder(tokenizer, DataArguments(**known), prompt, experiment.labels, **more)
