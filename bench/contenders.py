"""One row of the bench: a trained method, in an engine, answering requests; its speed, memory and
answers.

Each row has a process (or a server) of its own, warm, and requests drawn by seed, test rows first;
no text comes twice in one measurement. A row that is done is kept, so what was cut off goes on
behind it.
"""

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import (
    LetterheadError,
    atomic_folder,
    model_identity,
    read_json,
    write_json,
)
from letterhead.models import onnx
from letterhead.models.classifier import asks_a_service, load_classifier, whole_folder
from letterhead.models.fitted import fit_method
from letterhead.models.precision import precision
from letterhead.pipeline import (
    CASCADE,
    DATA,
    FOLDED,
    HEAD_ON_PROMPT,
    METHODS,
    cascades_file,
    method_of,
    outputs,
)
from letterhead.runs import results
from letterhead.runs.devices import device_name, machine, peak_memory
from letterhead.runs.processes import call_in_a_process
from letterhead.serving.load import Measured, closed_loop, closed_loop_of_batches, open_loop
from letterhead.serving.process import http_client
from letterhead.serving.vllm import vllm_version
from letterhead.stats.metrics import NO_ANSWER

WARM_UP = 8
THOUGHT_TOKENS, THOUGHTS = 16, 200
# The open loops begin near what a closed loop reached, and go up or down by so much to the highest
# rate that holds.
FIRST_RATE, STEP, LOWEST_RATE, MOST_RATES = 0.9, 1.2, 0.2, 20
FOLDED_READS = (HEAD_ON_PROMPT, FOLDED)
MADE_FROM = "made_from.json"
# Engine → what ONNX Runtime computes in
ONNX = {"onnx": onnx.FLOAT32, "onnx_int8": onnx.INT8}


@dataclass(frozen=True)
class Row:
    """What is measured: a method, the engine that runs it, and how an answer is got out of it.

    `generate`: the whole answer through its end token (the published experiment's way);
    `one_token`: only the letter's; `forward`: the scores of all options in one forward pass;
    `head`: a classifier's logits. `linear_head_on_prompt` is the linear head on the prompt that the
    folded model reads: equal token counts, and an accuracy that means nothing.
    """

    method: str
    engine: str
    decode: str

    @property
    def key(self) -> str:
        return f"{self.method}-{self.engine}-{self.decode}"


def measure_rows(
    experiment: Experiment, rows: Sequence[Row], names: dict[str, str], folder: Path
) -> tuple[list, list]:
    """Measure rows, each kept in `folder` once it is done.

    Parameters
    ----------
    names : method → the full name, with the step, of the model that is measured

    Returns
    -------
    tuple : the rows measured; those that can't be measured here, each with `why`
    """
    folders = {
        method: whole_folder(experiment, name) for method, name in names.items() if is_on_disk(name)
    }
    measured = experiment.bench.model_dump(include={"open_requests", "objective_ms"})
    measured["load"] = list(experiment.bench.load(gpu=device_name() != "cpu"))
    dtype = precision(experiment.decoder.dtype, experiment.decoder.folder)
    settings = {"bench": measured, "data": outputs(DATA, experiment), "dtype": dtype}
    settings |= {
        "prompt": experiment.prompt.model_dump(),
        "cutoff_len": experiment.sft_arguments()["cutoff_len"],
    }
    settings |= {
        "eval": experiment.eval.model_dump(include={"batch_tokens", "score"}),
        "seed": experiment.seed,
    }
    for section in (experiment.encoder, experiment.decoder):
        settings[str(section.folder)] = [section.head.max_length, section.head.long_texts]
    settings["prefix"] = experiment.encoder.prefix
    settings |= {"machine": machine(), "device": device_name(), "vllm": vllm_version()}
    identities = {method: [str(path), model_identity(path)] for method, path in folders.items()}
    identities[CASCADE.name] = read_json(cascades_file(experiment))
    done, skipped = [], []
    for row in rows:
        kept, of_row = folder / f"{row.key}.json", settings | {"model": identities.get(row.method)}
        of_row |= {"onnxruntime": version("onnxruntime")} if row.engine in ONNX else {}
        result = read_json(kept)
        if not result or result.pop("settings") != of_row:
            print(f"{row.key}: {names[row.method]}", flush=True)
            identity = identities.get(row.method)
            result = measure(experiment, row, names[row.method], folder, identity)
            write_json(kept, result | {"settings": of_row})
        (skipped if "why" in result else done).append(result)
    return done, skipped


def measure(
    experiment: Experiment, row: Row, name: str, folder: Path, model: list | None = None
) -> dict:
    """Measure one row; one that can't be measured says `why`.

    Parameters
    ----------
    model : what tells its model from another; None of one that is fitted where it is needed
    """
    head = {"method": row.method, "engine": row.engine, "decode": row.decode, "name": name}
    if experiment.prompt.options == "names" and (
        row.decode == "one_token" or row.method in FOLDED_READS
    ):
        return head | {
            "why": "the options are names of several tokens; only letters are answered in "
            "one "
            "token or folded"
        }
    if row.method == CASCADE.name and asks_a_service(experiment, name):
        return head | {"why": "its dear half is a hosted LLM, which is paid by the token"}
    if row.engine in ONNX:
        target = folder / f"{row.method}.onnx"
        made_from = {"name": name, "model": model, "data": outputs(DATA, experiment)}
        try:
            if read_json(target / MADE_FROM) != made_from:
                call_in_a_process(write_onnx, experiment, name, target, made_from)
        except LetterheadError as error:
            return head | {"why": str(error)}
        measured = call_in_a_process(measure_here, experiment, row, name, target)
        return head | measured | {"is_approximate": ONNX[row.engine] == onnx.INT8}
    if row.engine != "vllm":
        return head | call_in_a_process(measure_here, experiment, row, name)

    from letterhead.serving.vllm import NotSupported

    try:
        return head | asyncio.run(measure_vllm(experiment, row, name, folder))
    except NotSupported as error:
        return head | {"why": str(error)}
    except BaseExceptionGroup as group:  # one request of many has failed
        raise group.exceptions[0] from None


def draw(experiment: Experiment, n: int, seed: int) -> list[dict]:
    """Up to n rows in an order drawn by seed: test rows first, then the others (`split` says
    which); no text twice."""
    generator, rows = np.random.default_rng([experiment.seed, seed]), {}
    for split in ("test", "validation", "train"):
        found = results.read_rows(experiment, split)
        for i in generator.permutation(len(found)):
            rows.setdefault(found[i]["text"], found[i] | {"split": split})
    return list(rows.values())[:n]


def loops(experiment: Experiment) -> list[tuple[int, list[dict]]]:
    """For each number of clients the rows that they ask, a multiple of the number of clients."""
    n, concurrency = experiment.bench.load(gpu=device_name() != "cpu")
    return [
        (clients, draw(experiment, -(-n // clients) * clients, clients)) for clients in concurrency
    ]


def warm_up_rows(experiment: Experiment) -> list[dict]:
    """Rows to warm up on."""
    return draw(experiment, WARM_UP, 0)


def figures(
    experiment: Experiment, row: Row, name: str, closed: dict[int, tuple[Measured, list[dict]]]
) -> dict:
    """What the closed loops give: percentiles of the single stream, RPS of all; of the test rows
    asked, how many are answered right, and how many as in the evaluation."""
    number = {label: i for i, label in enumerate(experiment.labels)}
    evaluated = {}
    if results.result_files(experiment, name, "test")[1].exists() and row.method != HEAD_ON_PROMPT:
        evaluated = {
            line["id"]: number[line["prediction"]]
            for line in results.read_predictions(experiment, name, "test")
        }
    right, same, unread, asked = 0, 0, 0, 0
    for measured, rows in closed.values():
        for answer, asked_row in zip(measured.answers, rows, strict=True):
            unread += answer == NO_ANSWER
            if asked_row["split"] == "test":
                asked += 1
                right += answer == number[asked_row["label"]]
                same += answer == evaluated.get(asked_row["id"])
    measures = {clients: measured.figures() for clients, (measured, _) in closed.items()}
    return {
        "rps_single": measures[1]["rps"],
        **{key: measures[1][key] for key in ("p50_ms", "p95_ms", "p99_ms", "requests")},
        "closed": {str(clients): values for clients, values in measures.items()},
        "accuracy": right / asked,
        "accuracy_requests": asked,
        "same_as_evaluated": same / asked if evaluated else None,
        "thought_again": None,
        "unread_answers": int(unread),
        "prefill_ms": None,
        "decode_ms": None,
        "open": [],
        "rps_at_objective": None,
    }


def write_onnx(experiment: Experiment, name: str, target: Path, made_from: dict) -> None:
    """Write an encoder for ONNX Runtime, and beside it what it was made from."""
    with atomic_folder(target) as folder, TemporaryDirectory() as fitted:
        source = Path(fitted)
        if method_of(name).fitter:
            fit_method(experiment, name).save(source)
        else:
            source = whole_folder(experiment, name)
        onnx.write(source, folder, experiment.labels, experiment.encoder.head)
        write_json(folder / MADE_FROM, made_from)


def measure_here(experiment: Experiment, row: Row, name: str, folder: Path | None = None) -> dict:
    """A row of an engine that runs in this process: one worker that answers all that wait at once.

    Parameters
    ----------
    folder : what `write_onnx` wrote, for ONNX Runtime
    """
    start = time.perf_counter()
    phases = {"prefill": [], "decode": []}
    if row.decode == "generate":
        answer = generator(experiment, whole_folder(experiment, name), phases)
    else:
        classify = (
            onnx.OnnxClassifier(folder, ONNX[row.engine])
            if folder
            else load_classifier(experiment, name)
        )

        def answer(texts: Sequence[str]) -> list[int]:
            return classify(texts).argmax(axis=1).tolist()

    load_seconds = time.perf_counter() - start
    (
        answer([r["text"] for r in warm_up_rows(experiment)]),
        answer([warm_up_rows(experiment)[0]["text"]]),
    )
    closed, single = {}, {}
    for clients, rows in loops(experiment):
        for times in phases.values():
            times.clear()
        texts = [r["text"] for r in rows]
        closed[clients] = (
            closed_loop_of_batches(answer, texts, clients, f"{row.key}, {clients} at once"),
            rows,
        )
        if clients == 1 and row.decode == "generate":
            single = {
                f"{phase}_ms": 1000 * float(np.mean(times)) for phase, times in phases.items()
            }
    return (
        figures(experiment, row, name, closed)
        | single
        | {"load_seconds": load_seconds, **peak_memory()}
    )


def generator(
    experiment: Experiment, folder: Path, phases: dict[str, list]
) -> Callable[[Sequence[str]], list[int]]:
    """Texts → class numbers, by generating whole answers through their end token with HF's
    generate."""
    import torch
    from transformers import StoppingCriteria

    from letterhead.models.prompt import load_prompt_encoder
    from letterhead.models.scoring import load_decoder

    encoder, model = load_prompt_encoder(experiment), load_decoder(folder, experiment.decoder.dtype)
    trained = [answer.ids[: answer.stop + 1] for answer in encoder.answers]
    pad, ends = encoder.tokenizer.pad_token_id, sorted({ids[-1] for ids in trained})

    class Clock(StoppingCriteria):
        """Never stops; notes when the first token is there, which is when the prefill ends."""

        first = None

        def __call__(self, input_ids, scores, **kwargs):
            if self.first is None:
                if input_ids.is_cuda:
                    torch.cuda.synchronize()
                self.first = time.perf_counter()
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    @torch.inference_mode()
    def answer(texts: Sequence[str]) -> list[int]:
        begin, clock = time.perf_counter(), Clock()
        prompts = [encoder.encode(text) for text in texts]
        batch = encoder.tokenizer.pad(
            {"input_ids": prompts}, padding_side="left", return_tensors="pt"
        ).to(model.device)
        asked = {
            "max_new_tokens": max(map(len, trained)),
            "do_sample": False,
            "repetition_penalty": 1.0,
            "pad_token_id": pad,
            "eos_token_id": ends,
        }
        generated = model.generate(**batch, **asked, stopping_criteria=[clock]).tolist()
        phases["prefill"].append(clock.first - begin)
        phases["decode"].append(time.perf_counter() - clock.first)
        width = batch["input_ids"].shape[1]
        return [
            next(
                (i for i, ids in enumerate(trained) if line[width : width + len(ids)] == ids),
                NO_ANSWER,
            )
            for line in generated
        ]

    return answer


async def measure_vllm(experiment: Experiment, row: Row, name: str, folder: Path) -> dict:
    """A row of vLLM's: closed loops, then open ones from near the closed loops' rate down to the
    objective."""
    from letterhead.serving import vllm as service

    model, route, encode = asked_of_vllm(experiment, row, name)
    runner = "pooling" if row.decode == "head" else "generate"
    length = model_length(experiment, row)
    with service.VllmServer(
        model,
        runner,
        length,
        folder / f"{row.key}.log",
        dtype=precision(experiment.decoder.dtype, model),
        gpu_memory=experiment.serve.gpu_memory_utilization,
    ) as server:
        async with http_client() as client:

            async def send(request: dict) -> int:
                return (await server.ask(client, route, encode(request["text"])))[0]

            for request in warm_up_rows(experiment):
                await send(request)
            closed, single = {}, {}
            for clients, rows in loops(experiment):
                before = server.phases()
                closed[clients] = (
                    await closed_loop(send, rows, clients, f"{row.key}, {clients} clients"),
                    rows,
                )
                if clients == 1 and row.decode == "generate":
                    after = server.phases()
                    single = {phase: (after[phase] - before[phase]) / len(rows) for phase in after}
            measures = figures(experiment, row, name, closed) | single
            measures |= await open_loops(experiment, row, send, measures)
            if row.decode == "one_token":
                measures |= await thought_again(experiment, server, client, encode)
            return measures | {"load_seconds": server.load_seconds, **server.peak_memory()}


async def open_loops(experiment: Experiment, row: Row, send, measures: dict) -> dict:
    """Poisson arrivals at rates a step apart: up while p99 is within the objective, else down until
    it is."""
    objective, reached = (
        experiment.bench.objective_ms,
        max(loop["rps"] for loop in measures["closed"].values()),
    )
    rows, tried, rate, best = (
        draw(experiment, experiment.bench.open_requests, 1000),
        [],
        FIRST_RATE * reached,
        None,
    )
    while rows and rate >= LOWEST_RATE * reached and measures["p50_ms"] < objective:
        title = f"{row.key}, {rate:.2f} a second"
        measured, held = await open_loop(send, rows, rate, objective / 1000, experiment.seed, title)
        tried.append({"rate": rate, "held": held, **measured.figures()})
        if held:
            best = rate
        if held != tried[0]["held"] or (held and len(tried) == MOST_RATES):
            break
        rate = rate * STEP if held else rate / STEP
    return {"open": tried, "rps_at_objective": best}


async def thought_again(experiment: Experiment, server, client, encode) -> dict:
    """How many answers, generated freely behind the prompt's think block, hold thinking again."""
    from letterhead.serving import vllm as service

    rows = draw(experiment, min(experiment.bench.load(gpu=False)[0], THOUGHTS), 1)
    route = service.text_route(THOUGHT_TOKENS)
    texts = [await server.ask(client, route, encode(row["text"])) for row in rows]
    return {
        "thought_again": sum("think>" in text for text in texts),
        "thought_again_requests": len(rows),
    }


def asked_of_vllm(experiment: Experiment, row: Row, name: str) -> tuple:
    """The folder that vLLM loads for a row, the route that is asked, and the function from a text
    to the ids sent."""
    from letterhead.models import heads
    from letterhead.models.folding import export_folded
    from letterhead.models.prompt import TextEncoder, load_prompt_encoder
    from letterhead.serving import vllm as service

    folder = whole_folder(experiment, name)
    if row.decode == "head" and row.method not in FOLDED_READS:
        if method_of(name).head(experiment).long_texts != "cut":
            raise service.NotSupported(f"{name}: vLLM reads a text in one piece, cut at its end")
        text_encoder = TextEncoder(heads.load_tokenizer(folder), model_length(experiment, row))
        return folder, service.classify_route(), lambda text: text_encoder.encode([text])[0]
    encoder = load_prompt_encoder(experiment)
    if row.decode == "generate":
        return folder, service.generate_route(encoder.answers), encoder.encode
    if row.decode == "one_token":
        return folder, service.one_token_route(encoder.answers), encoder.encode_before_option
    if row.method == FOLDED:
        # In a process of its own, which gives the GPU's memory back before vLLM asks for it.
        folder, _ = call_in_a_process(export_folded, experiment, name)
    return folder, service.classify_route(), encoder.encode_before_option


def model_length(experiment: Experiment, row: Row) -> int:
    """The longest request in tokens."""
    method = METHODS.get(row.method)
    if method is None or method.reads_prompt:
        return experiment.sft_arguments()["cutoff_len"]
    return method.head(experiment).max_length


def is_on_disk(name: str) -> bool:
    """Whether a method, by its full name, has a model on disk."""
    return method_of(name).model is not None
