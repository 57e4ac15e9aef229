"""Ask a hosted LLM the experiment's question: every test and validation row once, some of them
twice.

    python -m eval.endpoint --experiment quick

Each reply is a line of runs/EXPERIMENT/endpoint/replies-*.jsonl before the next is awaited, so that
a run that was cut off asks no row again.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.special import softmax

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, sha256_json, whole_lines
from letterhead.models.answers import read_answer
from letterhead.models.embeddings import Embedder
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.pipeline import HOSTED, HOSTED_LLM
from letterhead.runs import results
from letterhead.runs.stage import StageRun, run, tell_absent
from letterhead.runs.terminal import progress
from letterhead.serving.endpoint import HostedLLM, Reply, user_turn
from letterhead.stats.metrics import NO_ANSWER

ALONE = "\n\nReply with the chosen option alone."
AGAIN = 100  # test rows that are asked a second time
FIRST_TOKENS = 20  # whose log-probabilities are asked for, the most that services give
# (split, row's id, number of the time that it is asked)
Question = tuple[str, str, int]


def main(experiment: Experiment) -> None:
    if experiment.endpoint is None:
        tell_absent(HOSTED, "no section endpoint, so no hosted LLM")
        return
    stage = StageRun(experiment, HOSTED)
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    settings, encoder = experiment.endpoint, load_prompt_encoder(experiment, thinking=True)
    rows = {split: draw(experiment, split) for split in results.SPLITS}
    rows = {split: drawn for split, drawn in rows.items() if drawn}
    messages = ask_about(experiment, encoder, rows)
    again = [("test", row["id"], 1) for row in rows["test"][:AGAIN]]
    messages |= {key: messages[(*key[:2], 0)] for key in again}
    asked = {"messages": ALONE, "seed": experiment.seed}
    asked["settings"] = {
        key: getattr(settings, key) for key in ("url", "model", "tokens", "logprobs")
    }
    path = stage.folder / f"replies-{sha256_json(asked)[:16]}.jsonl"
    start = time.monotonic()
    replies = asyncio.run(ask(experiment, messages, encoder, path))
    if all(reply.refused for reply in replies.values()):
        raise LetterheadError(
            f"{settings.url}: it refuses every question: {next(iter(replies.values())).refused}; "
            f"mend the section endpoint (endpoint.logprobs: false where it gives none)"
        )
    seconds, files = time.monotonic() - start, []
    answers = {key: read(reply, encoder) for key, reply in replies.items()}
    changed = [answers[key][0] != answers[(*key[:2], 0)][0] for key in again]
    for split, drawn in rows.items():
        keys = [(split, row["id"], 0) for row in drawn]
        shares = [answers[key][1] for key in keys]
        paid = paid_for([replies[key] for key in keys])
        cost = (
            paid["prompt_tokens"] * settings.price_of_prompts
            + paid["reply_tokens"] * settings.price_of_replies
        ) / 1e6
        results.write_result(
            experiment,
            HOSTED_LLM.name,
            split,
            drawn,
            predicted=np.array([answers[key][0] for key in keys]),
            probabilities=None if None in shares else np.array(shares),
            seconds=max(seconds * len(drawn) / len(messages), 1e-3),
            tokens=paid["prompt_tokens"] + paid["reply_tokens"],
            parameters=0,
            dtype="hosted",
            model=settings.model,
            inputs_sha256=stage.inputs_sha256,
            hosted=paid
            | {
                "cost": cost,
                "cost_per_million": 1e6 * cost / len(drawn) or None,  # no price was named
                "asked_again": len(again),
                "answered_otherwise": sum(changed),
            },
        )
        files += results.result_files(experiment, HOSTED_LLM.name, split)
    whole = paid_for(list(replies.values()))
    stage.finish(
        [path, *files],
        f"{whole['prompt_tokens']:,} tokens asked, {whole['reply_tokens']:,} written; "
        f"{sum(changed)} of {len(again)} rows answered otherwise when asked again",
        rows=len(rows["test"]),
        scoring_seconds=seconds,
        **whole,
    )


def draw(experiment: Experiment, split: str) -> list[dict]:
    """The rows of a split that are asked about, drawn by the data's seed."""
    rows, most = results.read_rows(experiment, split), experiment.endpoint.rows
    if most is None or most >= len(rows):
        return rows
    drawn = np.random.default_rng([experiment.data.seed, 4]).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(drawn)]


def ask_about(
    experiment: Experiment, encoder: PromptEncoder, rows: dict[str, list[dict]]
) -> dict[Question, list[dict[str, str]]]:
    """The messages of each question: the examples, asked and answered, and the row."""
    train = results.read_rows(experiment, "decoder_train")
    option = dict(zip(encoder.labels, encoder.options, strict=True))

    def turns(example: dict) -> list[dict[str, str]]:
        question = user_turn(encoder.instruction(example["text"]) + ALONE)
        return [*question, {"role": "assistant", "content": option[example["label"]]}]

    messages = {}
    for split, drawn in rows.items():
        chosen = choose_examples(experiment, train, [row["text"] for row in drawn])
        for row, near in zip(drawn, chosen, strict=True):
            before = [turn for i in near for turn in turns(train[i])]
            question = user_turn(encoder.instruction(row["text"]) + ALONE)
            messages[(split, row["id"], 0)] = [*before, *question]
    return messages


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


async def ask(
    experiment: Experiment,
    messages: dict[Question, list[dict[str, str]]],
    encoder: PromptEncoder,
    path: Path,
) -> dict[Question, Reply]:
    """The reply to each question; those on disk are not asked for again."""
    settings = experiment.endpoint
    hashes = {key: sha256_json(asked) for key, asked in messages.items()}
    replies = {}
    for one in whole_lines(path):
        # An id tells a place in a file, where another text may stand by now.
        if hashes.get(key := (one["split"], one["id"], one["time"])) == one["question"]:
            replies[key] = Reply(**one["reply"])
    left = [(key, asked, experiment.seed) for key, asked in messages.items() if key not in replies]
    tokens = sum(
        len(encoder.tokenizer(turn["content"])["input_ids"])
        for _, asked, _ in left
        for turn in asked
    )
    cost = (tokens * settings.price_of_prompts + len(left) * 2 * settings.price_of_replies) / 1e6
    print(
        f"{len(left):,} questions of about {tokens:,} tokens, for about {cost:.2f} in the currency "
        f"of endpoint.price_of_prompts; {len(replies):,} were answered before"
    )
    more = {"logprobs": True, "top_logprobs": FIRST_TOKENS} if settings.logprobs else {}
    llm = HostedLLM(settings.url, settings, max_tokens=settings.tokens, temperature=0, **more)
    with (
        open(path, "a", encoding="utf-8") as file,
        progress(total=len(messages), initial=len(replies), unit=" rows", desc="asking") as bar,
    ):
        async for key, reply in llm.ask_all(left):
            split, row, number = key
            one = {"split": split, "id": row, "time": number, "question": hashes[key]}
            file.write(json.dumps(one | {"reply": vars(reply)}, ensure_ascii=False) + "\n")
            file.flush()
            replies[key] = reply
            bar.update()
    return replies


def read(reply: Reply, encoder: PromptEncoder) -> tuple[int, list[float] | None]:
    """The option that a reply names, and the probability of each: from the log-probabilities of
    the first token where every option has one token of its own, an option that is not among the
    likeliest counting as the least of them; without them None, and the text is read."""
    if reply.first and all(len(option) == 1 for option in encoder.options):
        scores = {}
        for token, value in reply.first.items():
            if (letter := token.strip()) in encoder.options:
                scores[letter] = max(value, scores.get(letter, -np.inf))
        if scores:
            least = min(reply.first.values())
            shares = softmax([scores.get(option, least) for option in encoder.options])
            return int(shares.argmax()), shares.tolist()
    option, _ = read_answer(reply.content, True, encoder.options, encoder.labels)
    return (NO_ANSWER if reply.refused else option), None


def paid_for(replies: list[Reply]) -> dict[str, int]:
    """What came and what was paid for."""
    counted = {
        key: sum(getattr(reply, key) or 0 for reply in replies)
        for key in ("prompt_tokens", "reply_tokens")
    }
    return counted | {
        "refused": sum(bool(reply.refused) for reply in replies),
        "uncounted": sum(None in (reply.prompt_tokens, reply.reply_tokens) for reply in replies),
    }


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
