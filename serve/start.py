"""Serve a method on 127.0.0.1 until Ctrl-C: a decoder with vLLM, the others by a small server.

    python -m serve.start --experiment quick --model sft@80 --port 8000

Of the decoders sft generates; linear_head, sft_options and folded (which `make export` makes too)
classify; each may name its @STEP. The small server takes texts; with --error it says from which
answers it had better abstain.
"""

import signal
import time
from contextlib import suppress
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.models import onnx
from letterhead.models.checkpoints import require_model
from letterhead.models.classifier import (
    is_cascade,
    is_source,
    load_classifier,
    model_folder,
    named_method,
    whole_folder,
)
from letterhead.models.precision import precision
from letterhead.pipeline import SFT, find_method, method_of
from letterhead.runs.devices import process_count
from letterhead.runs.stage import run
from letterhead.serving.process import require_free
from letterhead.serving.vllm import VllmServer, prepare_environment
from serve.export import export
from serve.predict import as_share, fetch_named, promise_of

FOLDED_MODEL = "folded"


def main(experiment: Experiment, model: str, port: str, error: str = "") -> None:
    number = as_port(port)
    require_free(number)
    if is_decoder(experiment, model):
        if error:
            raise LetterheadError(
                f"ERROR={error}: vLLM, which serves {model}, can't abstain; leave ERROR= out, or "
                f"serve another method"
            )
        serve_by_vllm(experiment, model, number)
    else:
        serve_texts(experiment, model, number, error)


def as_port(port: str) -> int:
    """PORT as a number.

    Raises
    ------
    LetterheadError : it is no port
    """
    if not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise LetterheadError(f"PORT={port}: not a port; write a number up to 65535")
    return int(port)


def is_decoder(experiment: Experiment, model: str) -> bool:
    """Whether a name stands for a decoder that vLLM serves: not one that reads more of a text than
    one piece."""
    if model.partition("@")[0] == FOLDED_MODEL:
        return True
    method = find_method(named_method(experiment, model))
    if not method or not method.runner:
        return False
    head = method.head(experiment) if method.settings else None
    return head is None or head.long_texts == "cut"


def serve_texts(experiment: Experiment, model: str, port: int, error: str) -> None:
    """Serve a method that is no decoder, or a cascade, from this process until it is ended."""
    import uvicorn

    from letterhead.serving import server

    fetch_named(experiment, model)
    name = named_method(experiment, model)
    if is_source(name) and not is_cascade(name) and not onnx.is_saved(Path(name)):
        require_model(model_folder(experiment, name))
    promised = promise_of(experiment, name, as_share(error)) if error else None
    print(f"loading {name}", flush=True)
    start = time.perf_counter()
    served = server.Served(
        name,
        experiment.labels,
        load_classifier(experiment, name),
        experiment.data.max_words,
        promised and promised.threshold,
        max(experiment.eval.batch_tokens, 1),
    )
    url = f"http://{server.HOST}:{port}"
    print(
        f"{name} is loaded ({time.perf_counter() - start:.0f} s) and served at "
        f"{url}{server.CLASSIFY}, described at {url}/docs; Ctrl-C ends it",
        flush=True,
    )
    application = server.create(served)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # uvicorn ends by it, and then raises it anew
    uvicorn.run(
        application,
        host=server.HOST,
        port=port,
        log_level="warning",
        timeout_graceful_shutdown=server.ENDING_S,
    )
    metrics = application.state.metrics
    print(f"ended; {metrics.ended:,} of {metrics.begun:,} requests were answered", flush=True)


def serve_by_vllm(experiment: Experiment, model: str, port: int) -> None:
    """Serve a decoder's checkpoint with vLLM until it is ended."""
    prepare_environment()
    name, folder, runner, length = served(experiment, model)
    log = experiment.run_folder / "serve" / f"{name}.log"
    print(f"loading {folder}; vLLM's log is {log}", flush=True)
    dtype, memory = (
        precision(experiment.decoder.dtype, folder),
        experiment.serve.gpu_memory_utilization,
    )
    tokenizer = None
    if (
        runner == "generate"
    ):  # chats get the prompt of training, where the model's own template may add a system prompt
        from letterhead.models.folding import write_tokenizer

        tokenizer = experiment.run_folder / "serve" / "tokenizer"
        facts = write_tokenizer(experiment, tokenizer)
        print(
            f"/v1/chat/completions gives the ids of training on "
            f"{facts['rows_whose_chat_template_gives_the_ids']} of "
            f"{facts['rows_checked']} test rows (chat_template_kwargs: enable_thinking false)",
            flush=True,
        )
    # Prompts of a decoder begin alike; a classifier's texts do not.
    keeps = runner == "generate"
    settings = (dtype, memory, process_count(), tokenizer, keeps)
    with VllmServer(folder, runner, length, log, port, *settings) as server:
        route = "/v1/completions" if runner == "generate" else "/classify"
        print(
            f"{name} is served at {server.url}{route} (loaded in {server.load_seconds:.0f} "
            f"s); Ctrl-C ends it",
            flush=True,
        )
        with suppress(KeyboardInterrupt):
            while True:
                server.require_alive()
                time.sleep(1)
        print("ended")


def served(experiment: Experiment, model: str) -> tuple[str, Path, str, int]:
    """What the name of a decoder stands for: full name, folder, vLLM's runner, and the longest
    request in tokens.

    Raises
    ------
    LetterheadError : no such checkpoint
    """
    cutoff = experiment.sft_arguments()["cutoff_len"]
    if model.partition("@")[0] == FOLDED_MODEL:
        source = named_method(experiment, SFT.name + model.removeprefix(FOLDED_MODEL))
        folder, _ = export(experiment, source)
        return source.replace(SFT.name, FOLDED_MODEL), folder, "pooling", cutoff
    name = named_method(experiment, model)
    method = method_of(name)
    length = cutoff if method.reads_prompt else method.head(experiment).max_length
    # An exported classifier's probabilities are calibrated.
    is_classifier = method.runner == "pooling"
    folder = export(experiment, name)[0] if is_classifier else whole_folder(experiment, name)
    return name, folder, method.runner, length


if __name__ == "__main__":
    run(
        main,
        __doc__.splitlines()[0],
        options={
            "model": "best, a method, folded, METHOD@STEP, or a folder that make export wrote",
            "port": "of 127.0.0.1",
        },
        optional={"error": "the share of wrong answers that is allowed"},
    )
