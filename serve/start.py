"""Serve a checkpoint with vLLM on 127.0.0.1 until Ctrl-C.

    python -m serve.start --experiment quick --model sft@80 --port 8000

sft generates; bert, linear_head, sft_options and folded (which `make export` makes too) classify;
each may name its @STEP.
"""

import time
from contextlib import suppress
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.models.classifier import named_method, whole_folder
from letterhead.models.precision import precision
from letterhead.pipeline import METHODS, SFT
from letterhead.runs.devices import process_count
from letterhead.runs.stage import run
from letterhead.serving.vllm import VllmServer
from serve.export import export

FOLDED_MODEL = "folded"


def main(experiment: Experiment, model: str, port: str) -> None:
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise LetterheadError(f"PORT={port}: not a port; write a number up to 65535")
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
    with VllmServer(folder, runner, length, log, int(port), *settings) as server:
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
    """What a name stands for: full name, folder, vLLM's runner, and the longest request in tokens.

    Raises
    ------
    LetterheadError : no such model, or one that vLLM can't serve
    """
    cutoff = experiment.sft_arguments()["cutoff_len"]
    if model.partition("@")[0] == FOLDED_MODEL:
        source = named_method(experiment, SFT.name + model.removeprefix(FOLDED_MODEL))
        folder, _ = export(experiment, source)
        return source.replace(SFT.name, FOLDED_MODEL), folder, "pooling", cutoff
    name = named_method(experiment, model)
    method = METHODS.get(name.partition("@")[0])
    if method is None or not method.runner:
        known = ", ".join(one.name for one in METHODS.values() if one.runner)
        raise LetterheadError(
            f"{name}: vLLM serves {known} and {FOLDED_MODEL}; choose one with MODEL="
        )
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
            "model": "sft, bert, linear_head, sft_options or folded, with @STEP",
            "port": "of 127.0.0.1",
        },
    )
