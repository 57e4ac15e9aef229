"""Thinking, zero-shot or after SFT: answers generated freely, and the option read from each.

On a GPU with the serving environment vLLM generates, hundreds of rows at a time; elsewhere HF's
generate does, in batches, each of which waits for its slowest row. What is done is kept, so that a
killed run goes on behind it.
"""

import asyncio
import gc
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from letterhead.config.experiment import Experiment
from letterhead.files import whole_lines
from letterhead.models.answers import read_answer
from letterhead.models.classifier import whole_model
from letterhead.models.precision import precision
from letterhead.models.prompt import PromptEncoder, load_prompt_encoder
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import Stage
from letterhead.runs.terminal import progress
from letterhead.serving import vllm as service
from letterhead.serving.process import http_client

SAMPLING = {"temperature": 0.6, "top_p": 0.95, "top_k": 20}  # Qwen3's model card, thinking mode
IN_FLIGHT = 256


def engine() -> str:
    """What generates: `vllm` where torch sees a GPU and the serving environment is there, else
    `hf`."""
    return "vllm" if torch.cuda.is_available() and service.ENVIRONMENT.exists() else "hf"


def think(
    experiment: Experiment, workers: Workers, no_think: results.Result, stage: Stage, name: str
) -> None:
    """Generate answers to (a sample of) the test rows, read the option from each, write the result.

    Parameters
    ----------
    workers : that have loaded the model; where vLLM generates they are ended first, since it wants
        their memory
    no_think : the result of option perplexity by the same model on the test rows
    name : of the result
    """
    settings, encoder = experiment.eval.thinking, load_prompt_encoder(experiment, thinking=True)
    rows = results.read_rows(experiment, "test")
    if settings.rows and settings.rows < len(rows):
        drawn = np.random.default_rng([experiment.data.seed, 2]).choice(
            len(rows), settings.rows, replace=False
        )
        rows = [rows[i] for i in sorted(drawn)]
    answers = generate(experiment, workers, encoder, rows, stage, Path(no_think.model))
    read = [
        read_answer(answer["text"], answer["ended"], encoder.options, encoder.labels)
        for answer in answers
    ]
    truth = results.class_numbers(experiment, rows)
    seconds, tokens = sum(a["seconds"] for a in answers), sum(a["tokens"] for a in answers)
    same = {row["id"] for row in rows}
    without_thinking = [
        line
        for line in results.read_predictions(experiment, no_think.name, "test")
        if line["id"] in same
    ]
    results.write_result(
        experiment,
        name,
        "test",
        rows,
        predicted=np.array([option for option, _ in read]),
        seconds=round(seconds, 3),
        tokens=tokens,
        parameters=no_think.parameters,
        dtype=no_think.dtype,
        model=no_think.model,
        inputs_sha256=stage.inputs_sha256,
        thinking={
            "engine": answers[-1]["engine"],
            "budget_tokens": settings.tokens,
            "generated_tokens": sum(answer["generated"] for answer in answers),
            "begun": sum("think>" in answer["text"] for answer in answers),
            "thought": sum("</think>" in answer["text"] for answer in answers),
            **{
                kind: sum(k == kind for _, k in read)
                for kind in ("answered", "unfinished", "unparsed")
            },
            "no_think_accuracy_same_rows": sum(
                line["label"] == line["prediction"] for line in without_thinking
            )
            / len(truth),
            "times_one_forward": (seconds / len(rows)) / (no_think.seconds / no_think.n),
        },
    )


def generate(
    experiment: Experiment,
    workers: Workers,
    encoder: PromptEncoder,
    rows: list[dict],
    stage: Stage,
    folder: Path,
) -> list[dict]:
    """Answers by row, of the model in `folder`: text, whether it ended by itself, tokens through
    the model and generated, seconds (their sum is the time that all took)."""
    prompts = [encoder.encode(row["text"]) for row in rows]
    of_engine = engine()
    path = stage.folder / f"answers-{of_engine}-{stage.inputs_sha256[:16]}.jsonl"
    for old in set(stage.folder.glob("answers-*.jsonl")) - {path}:
        old.unlink()
    done = {answer["id"]: answer for answers in whole_lines(path) for answer in answers}
    missing = [i for i, row in enumerate(rows) if row["id"] not in done]
    stop = encoder.template.get_stop_token_ids(encoder.tokenizer)
    generate_answers = _generate_vllm if of_engine == "vllm" else _generate_hf
    title = f"thinking ({of_engine})"
    with (
        open(path, "a", encoding="utf-8") as file,
        progress(
            total=len(rows), initial=len(rows) - len(missing), desc=title, unit=" rows"
        ) as bar,
    ):
        for several in (
            generate_answers(experiment, workers, prompts, missing, stop, folder) if missing else ()
        ):
            answers = []
            for i, new, seconds in several:
                length = next((n for n, token in enumerate(new) if token in stop), len(new))
                text = encoder.tokenizer.decode(new[:length], clean_up_tokenization_spaces=False)
                answer = {
                    "id": rows[i]["id"],
                    "text": text,
                    "ended": length < len(new),
                    "engine": of_engine,
                }
                answer |= {
                    "generated": length,
                    "tokens": length + len(prompts[i]),
                    "seconds": seconds,
                }
                answers.append(answer)
                done[answer["id"]] = answer
            file.write(json.dumps(answers, ensure_ascii=False) + "\n")
            file.flush()
            bar.update(len(answers))
    return [done[row["id"]] for row in rows]


# Row number, the ids generated, seconds
Generated = list[tuple[int, list[int], float]]


def _generate_hf(
    experiment: Experiment,
    workers: Workers,
    prompts: Sequence[list[int]],
    missing: list[int],
    stop: list[int],
    _: Path,
) -> Iterator[Generated]:
    """HF's generate in batches of like length, each seeded by its place, one at a time in each
    worker."""
    settings = experiment.eval.thinking
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    batches = [
        (begin, order[begin : begin + settings.batch])
        for begin in range(0, len(order), settings.batch)
    ]
    wanted = set(missing)
    batches = [
        (begin, rows) for begin, batch in batches if (rows := [i for i in batch if i in wanted])
    ]
    for at in range(0, len(batches), workers.n):
        together, start = batches[at : at + workers.n], time.perf_counter()
        arguments = [
            ([prompts[i] for i in rows], experiment.seed + begin, settings.tokens, stop)
            for begin, rows in together
        ]
        generated = workers.map(_generate_batch, arguments)
        each = (time.perf_counter() - start) / sum(len(rows) for _, rows in together)
        for (_, rows), news in zip(together, generated, strict=True):
            yield [(i, new, each) for i, new in zip(rows, news, strict=True)]


@torch.inference_mode()
def _generate_batch(
    model, prompts: list[list[int]], seed: int, tokens: int, stop: list[int]
) -> list[list[int]]:
    width = max(map(len, prompts))
    ids = torch.zeros(len(prompts), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    torch.manual_seed(seed)
    return model.generate(
        ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=tokens,
        eos_token_id=stop,
        pad_token_id=stop[0],
        do_sample=True,
        **SAMPLING,
    )[:, width:].tolist()


def _generate_vllm(
    experiment: Experiment,
    workers: Workers,
    prompts: Sequence[list[int]],
    missing: list[int],
    stop: list[int],
    folder: Path,
) -> Iterator[Generated]:
    """A vLLM server, asked for the missing rows, each with a seed of its own; answers as they
    come."""
    workers.unload()
    gc.collect()
    torch.cuda.empty_cache()
    tokens, folder = experiment.eval.thinking.tokens, whole_model(folder, experiment.labels, False)
    server = service.VllmServer(
        folder,
        "generate",
        max(len(prompts[i]) for i in missing) + tokens,
        experiment.run_folder / "thinking" / "vllm.log",
        dtype=precision(experiment.decoder.dtype, folder),
        gpu_memory=experiment.serve.gpu_memory_utilization,
        processes=process_count(),
    )
    with server, asyncio.Runner() as runner:
        answers, last = (
            _ask(server, experiment.seed, prompts, missing, stop, tokens),
            time.perf_counter(),
        )

        async def next_answer() -> tuple[int, list[int]] | None:
            return await anext(answers, None)

        while (answer := runner.run(next_answer())) is not None:
            now = time.perf_counter()
            yield [(*answer, now - last)]
            last = now


async def _ask(
    server, seed: int, prompts: Sequence[list[int]], rows: list[int], stop: list[int], tokens: int
):
    """Row number and generated ids, as answers come, so many requests in flight."""
    waiting, flying = iter(rows), set()
    async with http_client() as client:

        async def one(i: int) -> tuple[int, list[int]]:
            route = service.sampled_route(tokens, stop, SAMPLING | {"seed": seed + i})
            return i, await server.ask(client, route, prompts[i])

        try:
            while True:
                while (
                    len(flying) < IN_FLIGHT * process_count()
                    and (i := next(waiting, None)) is not None
                ):
                    flying.add(asyncio.create_task(one(i)))
                if not flying:
                    return
                done, flying = await asyncio.wait(flying, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    yield task.result()
        finally:
            for task in flying:
                task.cancel()
