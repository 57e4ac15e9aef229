"""A hosted LLM as a classifier: the experiment's question with its examples, and the option that a
reply names."""

import asyncio
from collections.abc import Callable, Sequence

import numpy as np
from scipy.special import softmax

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.models.answers import read_answer
from letterhead.models.embeddings import Embedder
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.runs import contenders, results
from letterhead.serving.endpoint import HostedLLM, Reply, user_turn
from letterhead.stats.metrics import NO_ANSWER

ALONE = "\n\nReply with the chosen option alone."
FIRST_TOKENS = 20  # whose log-probabilities are asked for, the most that services give


def hosted_llm(experiment: Experiment) -> HostedLLM:
    """The LLM of the section `endpoint`, asked for its likeliest answer."""
    settings = experiment.endpoint
    more = {"logprobs": True, "top_logprobs": FIRST_TOKENS} if settings.logprobs else {}
    return HostedLLM(settings.url, settings, max_tokens=settings.tokens, temperature=0, **more)


def ask_about(
    experiment: Experiment, encoder: PromptEncoder, texts: Sequence[str]
) -> list[list[dict[str, str]]]:
    """The messages of the question about each text: the examples, asked and answered, and the
    text."""
    train = results.read_rows(experiment, "decoder_train")
    option = dict(zip(encoder.labels, encoder.options, strict=True))

    def turns(example: dict) -> list[dict[str, str]]:
        question = user_turn(encoder.instruction(example["text"]) + ALONE)
        return [*question, {"role": "assistant", "content": option[example["label"]]}]

    return [
        [
            *(turn for i in examples for turn in turns(train[i])),
            *user_turn(encoder.instruction(text) + ALONE),
        ]
        for text, examples in zip(texts, choose_examples(experiment, train, texts), strict=True)
    ]


def choose_examples(
    experiment: Experiment, train: Sequence[dict], texts: Sequence[str]
) -> list[list[int]]:
    """The places in train of each text's examples, the nearest last."""
    settings = experiment.endpoint
    if not settings.examples:
        return [[] for _ in texts]
    if settings.examples > len(train):
        raise LetterheadError(
            f"endpoint.examples asks for {settings.examples} rows, but train holds {len(train)}"
        )
    if settings.choose == "random":
        rng = np.random.default_rng([experiment.seed, 5])
        return [rng.permutation(len(train))[: settings.examples].tolist()] * len(texts)
    embedder = Embedder(experiment)
    known = embedder.embed([row["text"] for row in train], keep=True).vectors
    near = embedder.embed(texts, keep=True).vectors @ known.T
    return np.argsort(near, axis=1, kind="stable")[:, -settings.examples :].tolist()


def read(reply: Reply, encoder: PromptEncoder) -> tuple[int, list[float] | None]:
    """The option that a reply names, and the probability of each: from the log-probabilities of
    the first token where every option has one token of its own, an option that is not among the
    likeliest counting as the least of them; without them None, and the text is read."""
    if reply.first and all(len(option) == 1 for option in encoder.options):
        likeliest = max(reply.first, key=reply.first.get)
        if likeliest.strip() in encoder.options:  # else an "A" may begin a sentence
            least = min(reply.first.values())
            scores = [
                np.logaddexp.reduce(
                    [value for token, value in reply.first.items() if token.strip() == option]
                    or [least]
                )
                for option in encoder.options
            ]
            shares = softmax(scores)
            return int(shares.argmax()), shares.tolist()
    option, _ = read_answer(reply.content, True, encoder.options, encoder.labels)
    return (NO_ANSWER if reply.refused else option), None


def load_hosted_method(experiment: Experiment, name: str) -> Callable[[Sequence[str]], np.ndarray]:
    """The hosted LLM as a function from texts to probabilities, shape (rows, classes); a row
    without an answer is all 0. Where it gives none, the option that it names has the share of
    validation rows on which it was right."""
    encoder = load_prompt_encoder(experiment, thinking=True)
    share = contenders.share_of_hits(experiment, name)

    llm = hosted_llm(experiment)

    async def ask(messages: list[list[dict[str, str]]]) -> dict[int, Reply]:
        asked = [(number, one, experiment.seed) for number, one in enumerate(messages)]
        return {number: reply async for number, reply in llm.ask_all(asked)}

    def classify(texts: Sequence[str]) -> np.ndarray:
        replies = asyncio.run(ask(ask_about(experiment, encoder, texts)))
        found = [read(replies[number], encoder) for number in range(len(texts))]
        answers = np.array([option for option, _ in found])
        probabilities = contenders.as_probabilities(answers, len(encoder.labels), share)
        for row, (_, shares) in enumerate(found):
            if shares is not None:
                probabilities[row] = shares
        return probabilities

    return classify
