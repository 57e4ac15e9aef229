"""Ask a hosted LLM the experiment's question: every test and validation row once, some of them
twice.

    python -m eval.endpoint --experiment quick

Each reply is a line of runs/EXPERIMENT/endpoint/replies-*.jsonl before the next is awaited, so that
a run that was cut off asks no row again.
"""

import asyncio
import json
import time
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, sha256_json, whole_lines
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.pipeline import HOSTED, HOSTED_LLM
from letterhead.runs import results
from letterhead.runs.stage import StageRun, is_absent, run
from letterhead.runs.terminal import progress
from letterhead.serving.endpoint import Reply
from letterhead.serving.hosted import ALONE, ask_about, hosted_llm, read
from letterhead.stats.metrics import NO_ANSWER

AGAIN = 100  # test rows that are asked a second time
# (split, row's id, number of the time that it is asked)
Question = tuple[str, str, int]


def main(experiment: Experiment) -> None:
    if is_absent(HOSTED, experiment, "no section endpoint, so no hosted LLM"):
        return
    stage = StageRun(experiment, HOSTED)
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    settings, encoder = experiment.endpoint, load_prompt_encoder(experiment, thinking=True)
    rows = {split: draw(experiment, split) for split in results.SPLITS}
    rows = {split: drawn for split, drawn in rows.items() if drawn}
    messages = {
        (split, row["id"], 0): asked
        for split, drawn in rows.items()
        for row, asked in zip(
            drawn, ask_about(experiment, encoder, [row["text"] for row in drawn]), strict=True
        )
    }
    again = [("test", row["id"], 1) for row in rows["test"][:AGAIN]]
    messages |= {key: messages[(*key[:2], 0)] for key in again}
    asked = {"messages": ALONE, "seed": experiment.seed}
    asked["settings"] = {
        key: getattr(settings, key) for key in ("url", "model", "tokens", "logprobs")
    }
    path = stage.folder / f"replies-{sha256_json(asked)[:16]}.jsonl"
    replies, took = asyncio.run(ask(experiment, messages, encoder, path))
    if all(reply.refused for reply in replies.values()):
        raise LetterheadError(
            f"{settings.url}: it refuses every question: {next(iter(replies.values())).refused}; "
            f"mend the section endpoint (endpoint.logprobs: false where it gives none)"
        )
    files: list[Path] = []
    answers = {key: read(reply, encoder) for key, reply in replies.items()}
    changed = [answers[key][0] != answers[(*key[:2], 0)][0] for key in again]
    for split, drawn in rows.items():
        keys = [(split, row["id"], 0) for row in drawn]
        shares = shares_of([answers[key] for key in keys], len(experiment.labels))
        paid = paid_for([replies[key] for key in keys])
        told = len(drawn) - paid["uncounted"]
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
            probabilities=shares,
            seconds=max(sum(took[key] for key in keys), 1e-3),
            tokens=paid["prompt_tokens"] + paid["reply_tokens"],
            parameters=0,
            dtype="hosted",
            model=settings.model,
            inputs_sha256=stage.inputs_sha256,
            hosted=paid
            | {
                "cost": cost,
                # None where no price was named, or no reply told its tokens
                "cost_per_million": 1e6 * cost / told if told and cost else None,
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
        scoring_seconds=sum(took.values()),
        **whole,
    )


def draw(experiment: Experiment, split: str) -> list[dict]:
    """The rows of a split that are asked about, drawn by the data's seed."""
    rows, most = results.read_rows(experiment, split), experiment.endpoint.rows
    if most is None or most >= len(rows):
        return rows
    drawn = np.random.default_rng([experiment.data.seed, 4]).permutation(len(rows))[:most]
    return [rows[i] for i in sorted(drawn)]


async def ask(
    experiment: Experiment,
    messages: dict[Question, list[dict[str, str]]],
    encoder: PromptEncoder,
    path: Path,
) -> tuple[dict[Question, Reply], dict[Question, float]]:
    """The reply to each question, and the seconds that passed for it; those on disk are not asked
    for again, but for refusals."""
    settings = experiment.endpoint
    hashes = {key: sha256_json(asked) for key, asked in messages.items()}
    replies, took = {}, {}
    for one in whole_lines(path):
        key, reply = (one["split"], one["id"], one["time"]), Reply(**one["reply"])
        # An id tells a place in a file, where another text may stand by now.
        if hashes.get(key) == one["question"] and not reply.refused:
            replies[key], took[key] = reply, one["seconds"]
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
    with (
        open(path, "a", encoding="utf-8") as file,
        progress(total=len(messages), initial=len(replies), unit=" rows", desc="asking") as bar,
    ):
        before = time.monotonic()
        async for key, reply in hosted_llm(experiment).ask_all(left):
            took[key], before = time.monotonic() - before, time.monotonic()
            one = dict(zip(("split", "id", "time"), key, strict=True))
            one |= {"question": hashes[key], "seconds": took[key], "reply": vars(reply)}
            file.write(json.dumps(one, ensure_ascii=False) + "\n")
            file.flush()
            replies[key] = reply
            bar.update()
    return replies, took


def shares_of(answers: list[tuple[int, list[float] | None]], classes: int) -> np.ndarray | None:
    """The options' probabilities, shape (rows, classes), equal ones in a row without an answer;
    None where an answered row has none."""
    even = [1 / classes] * classes
    rows = [shares or (even if option == NO_ANSWER else None) for option, shares in answers]
    return None if None in rows or not any(shares for _, shares in answers) else np.array(rows)


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
