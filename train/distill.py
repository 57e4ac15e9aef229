"""Have a teacher write its thinking for training rows; keep what led to the right option, for SFT
to learn.

    python -m train.distill --experiment quick

Every try is a line of runs/EXPERIMENT/distill/tries-*.jsonl as soon as it has come, so that a run
that was cut off goes on behind it. data/EXPERIMENT/distilled.jsonl holds the right ones in
LLaMA-Factory's Alpaca form.
"""

import asyncio
import json
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import (
    LetterheadError,
    read_json,
    read_jsonl,
    sha256_json,
    whole_lines,
    write_jsonl,
)
from letterhead.models.answers import named_option
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.pipeline import DISTILL
from letterhead.runs import results
from letterhead.runs.stage import StageRun, is_absent, run
from letterhead.runs.terminal import progress
from letterhead.serving.endpoint import HostedLLM, Reply, user_turn

# What the teacher is told besides the question; the student is not.
HOW = (
    "\n\nBefore you answer, say in one or two short sentences what the text is "
    "about and which option that speaks for. "
    'Then write "Answer:" and the chosen option on the last line.'
)
# What decides which rows are asked and how often, and not what the teacher says.
LIMITS = {"concurrency", "requests_per_minute", "price_of_prompts", "price_of_replies", "key"}


def main(experiment: Experiment) -> None:
    if is_absent(DISTILL, experiment, "no section distill, so no teacher"):
        return
    settings = experiment.distill
    path = experiment.data_folder / "distilled.jsonl"
    if settings.of not in (None, experiment.name):
        copy(experiment, path)
        return
    stage = StageRun(experiment, DISTILL)
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        encoder = load_prompt_encoder(experiment, thinking=True)
        rows = draw(experiment)
        # More rows, or more tries, go on behind those that were paid for.
        asked = {
            "prompt": experiment.prompt.model_dump(),
            "labels": experiment.labels,
            "how": HOW,
            "seed": experiment.seed,
        }
        asked["settings"] = settings.model_dump(exclude=LIMITS | {"rows", "tries"})
        kept = stage.folder / f"tries-{sha256_json(asked)[:16]}.jsonl"
        tries = asyncio.run(teach(experiment, encoder, rows, kept))
        replies = [reply for by_try in tries.values() for reply in by_try.values()]
        right = [(row, thought_of(encoder, row, tries[row["id"]])) for row in rows]
        written = [alpaca(encoder, row, thought) for row, thought in right if thought]
        fitting = [one for one in written if tokens(encoder, one) <= encoder.cutoff_len]
        if not fitting:
            refused = next(
                (f"; it refuses: {reply.refused}" for reply in replies if reply.refused), ""
            )
            raise LetterheadError(
                f"{kept}: none of {len(rows)} rows was answered rightly and briefly; take "
                f"another teacher{refused}"
            )
        write_jsonl(path, fitting)
        paid = {
            count: sum(getattr(reply, count) or 0 for reply in replies)
            for count in ("prompt_tokens", "reply_tokens")
        }
        cost = (
            paid["prompt_tokens"] * settings.price_of_prompts
            + paid["reply_tokens"] * settings.price_of_replies
        )
        stage.finish(
            [path],
            rows=len(fitting),
            asked=len(rows),
            tries=len(replies),
            unfinished=sum(not reply.ended for reply in replies),
            refused=sum(bool(reply.refused) for reply in replies),
            uncounted=sum(None in (reply.prompt_tokens, reply.reply_tokens) for reply in replies),
            too_long=len(written) - len(fitting),
            cost=cost / 1e6,
            **paid,
        )
    print(summary(stage.record, path))


def taken_over(experiment: Experiment) -> dict | None:
    """The record of the teacher whose thoughts are taken over (distill.of), None where the
    experiment asks one itself.

    Raises
    ------
    LetterheadError : they are not made yet
    """
    other = experiment.distill.of
    if other in (None, experiment.name):
        return None
    record = read_json(Path("runs") / other / DISTILL.name / "stage.json")
    if record is None:
        raise LetterheadError(
            f"data/{other}/distilled.jsonl: not made yet; run: make distill EXP={other}"
        )
    return record


def copy(experiment: Experiment, path: Path) -> None:
    """Take over what another experiment's teacher wrote."""
    source = Path("data") / experiment.distill.of / path.name
    record = taken_over(experiment)
    stage = StageRun(experiment, DISTILL)
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        write_jsonl(path, read_jsonl(source))
        stage.finish([path], rows=record["rows"])
    print(f"{path}: {record['rows']} rows, from {source}")


def draw(experiment: Experiment) -> list[dict]:
    """The training rows that the teacher is asked about, drawn by seed."""
    rows = results.read_rows(experiment, "decoder_train")
    n = min(experiment.distill.rows, len(rows))
    drawn = np.random.default_rng([experiment.seed, 3]).permutation(len(rows))[
        :n
    ]  # more rows hold the fewer
    return [rows[i] for i in sorted(drawn)]


async def teach(
    experiment: Experiment, encoder: PromptEncoder, rows: list[dict], path: Path
) -> dict[str, dict[int, Reply]]:
    """Ask about each row until the teacher is right, at most `tries` times.

    Returns
    -------
    dict : a row's id → number of the try → reply, those on disk included; what is there is judged
        anew
    """
    settings, tries = experiment.distill, {row["id"]: {} for row in rows}
    questions = {row["id"]: encoder.instruction(row["text"]) + HOW for row in rows}
    for one in whole_lines(path):
        # An id tells a place in a file, where another text may stand by now.
        if one["id"] in questions and one["question"] == sha256_json(questions[one["id"]]):
            tries[one["id"]][one["try"]] = Reply(**one["reply"])
    path.parent.mkdir(parents=True, exist_ok=True)
    teacher = HostedLLM(
        settings.endpoint, settings, max_tokens=settings.tokens, temperature=settings.temperature
    )
    with (
        open(path, "a", encoding="utf-8") as file,
        progress(total=len(rows), unit=" rows right") as bar,
    ):
        for number in range(settings.tries):
            bar.set_description(f"try {number + 1} of at most {settings.tries}")
            open_rows = {
                row["id"]: row for row in rows if not thought_of(encoder, row, tries[row["id"]])
            }
            bar.update(len(rows) - len(open_rows) - bar.n)
            asked = [
                (row_id, user_turn(questions[row_id]), experiment.seed + number)
                for row_id in open_rows
                if number not in tries[row_id]
            ]
            async for row_id, reply in teacher.ask_all(asked):
                one = {
                    "id": row_id,
                    "question": sha256_json(questions[row_id]),
                    "try": number,
                    "reply": vars(reply),
                }
                file.write(json.dumps(one, ensure_ascii=False) + "\n")
                file.flush()
                tries[row_id][number] = reply
                bar.update(bool(thought_of(encoder, open_rows[row_id], {number: reply})))
    return tries


def thought_of(encoder: PromptEncoder, row: dict, tries: dict[int, Reply]) -> str:
    """The thought of the first try that came to its end, thought, and named the row's label; empty
    where none did."""
    for _, reply in sorted(tries.items()):
        thought, answer = reply.parts()
        option = named_option(answer, encoder.options, encoder.labels)
        if reply.ended and thought and option == encoder.labels.index(row["label"]):
            return thought
    return ""


def alpaca(encoder: PromptEncoder, row: dict, thought: str) -> dict:
    """What the student learns: the question without `/no_think`, the thought that led to its
    option, the option."""
    option = dict(zip(encoder.labels, encoder.options, strict=True))[row["label"]]
    output = f"<think>\n{encoder.neutralise(thought)}\n</think>\n\n{option}"
    return {"instruction": encoder.instruction(row["text"]), "input": "", "output": output}


def tokens(encoder: PromptEncoder, one: dict) -> int:
    """How many tokens a row takes in training."""
    return sum(map(len, encoder.encode_turn(one["instruction"], one["output"])))


def summary(record: dict, path: Path) -> str:
    """The stage in a few lines for the terminal."""
    untold = (
        f" ({record['uncounted']} replies told no tokens and count none)"
        if record["uncounted"]
        else ""
    )
    return (
        f"{path}: {record['rows']} of {record['asked']} rows with the thought that led "
        f"to the right option, in "
        f"{record['tries']} tries ({record['unfinished']} unfinished, "
        f"{record['refused']} refused; {record['too_long']} "
        "rows too long for cutoff_len); "
        f"{record['prompt_tokens']:,} tokens asked, {record['reply_tokens']:,} written, "
        f"cost {record['cost']:.2f}{untold}"
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
