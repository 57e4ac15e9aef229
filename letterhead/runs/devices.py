"""Which devices a run uses: what torch sees decides, and one GPU is used unless NPROC=n says how
many.

python -m letterhead.runs.devices

prints `gpu` or `cpu`, or ends with the reason why a GPU that is there can't be used.
"""

import os
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from math import gcd
from pathlib import Path

from letterhead.files import LetterheadError

# The oldest driver for each major version of CUDA (the CUDA Toolkit's release notes, "minor version
# compatibility").
OLDEST_DRIVER = {"11": "450.80.02", "12": "525.60.13", "13": "580"}
VERSIONED = (
    "torch",
    "transformers",
    "llamafactory",
    "datasets",
    "tokenizers",
    "scikit-learn",
    "numpy",
)
DRIVER_VERSION = re.compile(r"\b(\d{3}\.[\d.]*\d)\b")


def process_count() -> int:
    """How many processes a stage may spread over, each with a GPU of its own if there are any:
    NPROC, 1 by default.

    Raises
    ------
    LetterheadError : NPROC is not a number from 1 on
    """
    named = os.environ.get("NPROC") or "1"
    if not named.isdecimal() or int(named) < 1:
        raise LetterheadError(
            f"NPROC={named}: not a number of processes; write NPROC=2, or leave it out to "
            f"use one GPU"
        )
    return int(named)


def choose_devices() -> None:
    """Leave as many GPUs visible as NPROC says (see `narrow`), if they are there and torch can use
    them.

    Raises
    ------
    LetterheadError : fewer GPUs than NPROC, or a GPU that torch can't use
    """
    narrow()  # first: the driver reads the variable once, when torch asks it for the first time
    if refused := unusable_gpu():
        raise LetterheadError(refused)
    if (n := process_count()) > 1:
        import torch

        if 0 < torch.cuda.device_count() < n:
            raise LetterheadError(
                f"NPROC={n}, but torch sees {torch.cuda.device_count()} GPUs; lower NPROC"
            )


def narrow() -> None:
    """Leave the first NPROC GPUs visible to this process, and to all that it starts; before CUDA is
    started.

    Libraries take what they see: LLaMA-Factory would start torchrun, and the Trainer would split
    its batches.
    """
    os.environ["CUDA_VISIBLE_DEVICES"] = visible_devices(
        os.environ.get("CUDA_VISIBLE_DEVICES"), process_count()
    )


def visible_devices(named: str | None, n: int) -> str:
    """The first n of the devices that CUDA_VISIBLE_DEVICES names (all, if it is None); none stay
    none."""
    return ",".join((named.split(",") if named is not None else [str(i) for i in range(n)])[:n])


def worker_environment(rank: int) -> dict[str, str]:
    """What process `rank` of several sees of the devices that this one sees: one of them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    return {"CUDA_VISIBLE_DEVICES": visible[rank] if rank < len(visible) else ""}


def unusable_gpu() -> str | None:
    """Why torch can't use an NVIDIA GPU that is there, with the mend; None where it can, or where
    there is none."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") or not (driver := nvidia_driver()):
        return None
    import torch

    return (
        None
        if torch.cuda.is_available()
        else why_unusable(driver, torch.__version__, torch.version.cuda)
    )


def why_unusable(driver: str, torch_version: str, cuda: str | None) -> str:
    """The message for a driver, and a build of torch, that do not go together."""
    there = f"an NVIDIA GPU is here (driver {driver}), but torch {torch_version}"
    on_the_cpu = "or train on the CPU on purpose: put CUDA_VISIBLE_DEVICES= before make"
    if cuda is None:
        return f"{there} is built for the CPU only; remove .venv and run: make setup, {on_the_cpu}"
    oldest = OLDEST_DRIVER.get(cuda.split(".")[0])
    if oldest and driver != "unknown" and int(driver.split(".")[0]) >= int(oldest.split(".")[0]):
        return (
            f"{there}, built for CUDA {cuda}, sees none; set CUDA_VISIBLE_DEVICES to one "
            f"that is there, or give this "
            f"container the right to use it, {on_the_cpu}"
        )
    needs = f"CUDA {cuda}, which needs driver {oldest} or newer" if oldest else f"CUDA {cuda}"
    return (
        f"{there}, built for {needs}, can't use it; update the driver (nvidia-smi shows "
        f"what it sees), {on_the_cpu}"
    )


def nvidia_driver() -> str | None:
    """The version of the NVIDIA driver, by the kernel module or (WSL2 has none) nvidia-smi; None
    where there is no GPU."""
    device, module = any(Path("/dev").glob("nvidia[0-9]*")), Path("/proc/driver/nvidia/version")
    if device and module.is_file():
        return _version(module.read_text())
    program = shutil.which("nvidia-smi") or shutil.which("nvidia-smi", path="/usr/lib/wsl/lib")
    if program and (device or Path("/dev/dxg").exists()):
        query = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
        ended = subprocess.run(query, capture_output=True, text=True, timeout=30)
        if ended.returncode == 0:
            return _version(ended.stdout)
    return "unknown" if device else None


def _version(text: str) -> str:
    found = DRIVER_VERSION.search(text)
    return found[1] if found else "unknown"


def share_batch(batch: int, accumulation: int, n: int, key: str) -> tuple[int, int]:
    """Batch and gradient accumulation of each of n processes, such that an optimizer step takes the
    same rows as one's.

    The accumulation is divided first, then the batch.

    Raises
    ------
    LetterheadError : n does not divide the rows of a step; names `key` and what divides them
    """
    by_accumulation = gcd(accumulation, n)
    rest = n // by_accumulation
    if batch % rest:
        fits = [
            m
            for m in range(1, batch * accumulation + 1)
            if batch % (m // gcd(accumulation, m)) == 0
        ][:8]
        raise LetterheadError(
            f"NPROC={n} does not divide {key}'s step of {batch} x {accumulation} rows "
            f"(batch x accumulation); "
            f"take one of {', '.join(map(str, fits))}"
        )
    return batch // rest, accumulation // by_accumulation


def require_compiler(python: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Make sure of what Triton needs to compile its launcher when vLLM starts on a GPU: a C
    compiler and Python's headers.

    Raises
    ------
    LetterheadError : one of them is missing; names the package
    """
    compiler = (
        environment.get("CC")
        or shutil.which("gcc", path=environment.get("PATH"))
        or shutil.which("clang")
    )
    if not compiler:
        raise LetterheadError(
            "vLLM on a GPU needs a C compiler (Triton compiles with it): install gcc, or set CC"
        )
    ask = (
        "import sysconfig; print(sysconfig.get_paths()['include'], '%d.%d' % "
        "__import__('sys').version_info[:2])"
    )
    printed = subprocess.run(
        [python, "-c", ask], capture_output=True, text=True, check=True
    ).stdout.split()
    if not (Path(printed[0]) / "Python.h").is_file():
        raise LetterheadError(
            f"vLLM on a GPU needs Python's C headers, and {printed[0]}/Python.h is missing; "
            f"install them (Debian: apt-get install python{printed[1]}-dev)"
        )


def gpu_memory_used_mb() -> int | None:
    """MiB in use on all NVIDIA GPUs of this machine together, whoever uses them; None where NVML
    does not tell."""
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return sum(pynvml.nvmlDeviceGetMemoryInfo(handle).used for handle in handles) >> 20
    except pynvml.NVMLError:
        return None


def free_gpu_memory(n: int) -> int:
    """Bytes that are free on the fullest of the first n visible GPUs. Asked in a process of its
    own, since the question takes memory of the GPU for as long as its process lives."""
    from letterhead.runs.processes import call_in_a_process

    return call_in_a_process(_free_gpu_memory, n)


def _free_gpu_memory(n: int) -> int:
    import torch

    return min(torch.cuda.mem_get_info(number)[0] for number in range(n))


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide a figure."""
    return {"python": platform.python_version()} | {
        name: metadata.version(name) for name in VERSIONED
    }


def device_name() -> str:
    """The GPU's name, or cpu."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def machine() -> str:
    """The processor's name and how many cores there are."""
    try:
        names = re.findall(
            r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE
        )
    except OSError:
        names = []
    return f"{(names or [platform.processor() or platform.machine()])[0]}, {os.cpu_count()} cores"


def peak_memory() -> dict[str, int]:
    """The most memory that this process, or one of its children, has held so far; in MiB, the GPU's
    apart."""
    import torch

    own, children = (
        resource.getrusage(who).ru_maxrss
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    status = Path("/proc/self/status")  # getrusage counts what its starter held before exec, too
    if status.exists() and (peak := re.search(r"VmHWM:\s*(\d+)", status.read_text())):
        own = int(peak[1])
    peak = {
        "peak_memory_mb": max(own, children) // (1 if sys.platform == "linux" else 1024) // 1024
    }
    if torch.cuda.is_available():
        peak["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
    return peak


if __name__ == "__main__":
    try:
        choose_devices()
    except LetterheadError as error:
        sys.exit(f"error: {error}")
    import torch

    print("gpu" if torch.cuda.is_available() else "cpu")
