"""What makes a CPU fast; what this one can do decides, nothing is assumed.

- bfloat16 where the processor multiplies it itself (AVX512_BF16, AMX) and a measurement of the
  model's own shapes says that it is faster: `prefers_bfloat16`;
- oneDNN instead of MKL for float32: MKL leaves AVX-512 unused on processors that are not Intel's,
  oneDNN, which PyTorch brings along too, does not: `use_onednn` for training, `pack` for inference;
- attention by plain matrix products: PyTorch's fused kernel for CPUs is slower in bfloat16 on texts
  of a few hundred tokens, in its backward pass three times: `attention`;
- dropout by 16 random bits an element: PyTorch draws a double for each, which took a quarter of a
  BERT's step: `quicken_dropout`.

Memory is the Makefile's: it has glibc keep what is freed, in huge pages.
"""

import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from letterhead.files import exclusive, read_json, sha256_json, write_json
from letterhead.runs.devices import machine

# What was measured on this machine, so that all stages, and a training that is resumed, decide
# alike.
MEASURED = Path(".cache/precision.json")
ROWS = 1024
AGAIN_SECONDS, RECENT = 0.3, 10  # to time products once more, and how many times are kept
SECONDS = 1.0


def attention() -> str:
    """The implementation of attention to load a model with: `matrix_products` on a CPU, else
    PyTorch's fused kernels."""
    return "sdpa" if torch.cuda.is_available() else "matrix_products"


def matrix_products(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_,
) -> tuple[torch.Tensor, None]:
    """What transformers' `eager` computes, without copying keys and values for each query head that
    shares them, and with the softmax's output in the dtype of the values (inside autocast too; the
    kernel itself computes in float32).

    Parameters
    ----------
    query : (rows, heads, length, width)
    key, value : (rows, groups, seen, width); heads / groups heads share a group
    attention_mask : to be added, broadcastable to (rows, heads, length, seen)

    Returns
    -------
    tuple : (rows, length, heads, width), and None for the weights
    """
    (rows, heads, length, width), (groups, seen) = query.shape, key.shape[1:3]
    scaling = width**-0.5 if scaling is None else scaling
    stacked = (rows * groups, heads // groups * length)
    with torch.autocast(query.device.type, enabled=False):
        query = (query * scaling).to(value.dtype).reshape(*stacked, width)
        key, value = (
            tensor.to(value.dtype).reshape(rows * groups, seen, width) for tensor in (key, value)
        )
        weights = torch.bmm(query, key.transpose(1, 2)).view(rows, heads, length, seen)
        if attention_mask is not None:
            weights = (
                weights.add_(attention_mask)
                if torch.is_inference_mode_enabled()
                else weights + attention_mask
            )
        weights = quick_dropout(weights.softmax(-1), dropout if module.training else 0.0)
        mixed = torch.bmm(weights.view(*stacked, seen), value).view(rows, heads, length, width)
    return mixed.transpose(1, 2).contiguous(), None


def _mask(*positional, dtype: torch.dtype = torch.float32, **more) -> torch.Tensor | None:
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
    return eager_mask(*positional, dtype=dtype, **more)


AttentionInterface.register("matrix_products", matrix_products)
AttentionMaskInterface.register("matrix_products", _mask)


def quick_dropout(input: torch.Tensor, p: float) -> torch.Tensor:
    """Dropout whose noise takes 16 bits of torch's generator an element: p is rounded to a multiple
    of 2**-16."""
    if not p:
        return input
    words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
    kept = words.view(torch.int16)[: input.numel()].view(input.shape) >= round(p * (1 << 16)) - (
        1 << 15
    )
    return input * kept.to(input.dtype).div_(1 - p)


class QuickDropout(nn.Dropout):
    """`nn.Dropout` by `quick_dropout`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return quick_dropout(input, self.p if self.training else 0.0)


def quicken_dropout(model: nn.Module) -> nn.Module:
    """Have the dropout layers of a model on a CPU draw their noise by `quick_dropout`, in place;
    returns the model."""
    if not torch.cuda.is_available():
        for module in model.modules():
            if type(module) is nn.Dropout:
                module.__class__ = QuickDropout
    return model


def use_onednn() -> None:
    """Have oneDNN multiply float32 matrices in this process, in training too.

    PyTorch hands them to oneDNN only when it may round them to bfloat16, which oneDNN does with AMX
    and not otherwise; so where AMX is everything stays as it is.
    """
    if not torch.cuda.is_available() and not torch.cpu.get_capabilities().get("amx_tile"):
        torch.set_float32_matmul_precision("medium")


class PackedLinear(nn.Linear):
    """A linear layer whose weight oneDNN has laid out for itself; it can't be trained, saved or
    copied.

    The operation is the one that torch.compile's Inductor puts in place of a linear layer.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model on a CPU, in place, for inference; one tied to an
    embedding stays.

    Layers in bfloat16 are replaced where oneDNN has kernels for them. Returns the model.
    """
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)
    }
    dtypes = {torch.float32} if torch.backends.mkldnn.is_available() else set()
    if dtypes and torch.ops.mkldnn._is_mkldnn_bf16_supported():
        dtypes.add(torch.bfloat16)
    for module in list(model.modules()):
        for name, child in module.named_children():
            plain = type(child) is nn.Linear and id(child.weight) not in embeddings
            if plain and child.weight.device.type == "cpu" and child.weight.dtype in dtypes:
                setattr(module, name, PackedLinear(child))
    return model


def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16 matrices."""
    can = torch.cpu.get_capabilities()
    return bool(can.get("avx512_bf16") or can.get("amx_bf16"))


def prefers_bfloat16(folder: Path) -> bool:
    """Whether this processor multiplies a model's matrices faster in bfloat16 than in float32.

    Parameters
    ----------
    folder : holds the model's config.json; weights need not be there
    """
    if not multiplies_bfloat16() or not torch.backends.mkldnn.is_available():
        return False
    if not linear_shapes(folder):
        return False
    rates = measured_rates(folder)
    return rates["bfloat16"] > rates["float32"]


def measured_rates(folder: Path) -> dict[str, float]:
    """dtype → GFLOP/s on matrices of a model's shapes; bfloat16 only where the processor multiplies
    it itself.

    Measured once a machine and shape, in about a second, and kept in `MEASURED`.
    """
    return _measured(folder)["gflops"]


@cache
def recent_rate(folder: Path, dtype: str) -> float:
    """GFLOP/s on matrices of a model's shapes, the highest of the last `RECENT` measurements here,
    now included: a machine may be busy with something else."""
    now = matmul_rates(linear_shapes(folder), [dtype], AGAIN_SECONDS)[dtype]
    return max(_measured(folder, {dtype: now})["recent"][dtype])


def _measured(folder: Path, again: dict[str, float] | None = None) -> dict[str, Any]:
    """What is kept of a model's shapes on this machine: `gflops`, which decides the dtype and so
    stays as it is, and the `recent` rates."""
    shapes = linear_shapes(folder)
    dtypes = ["float32", *(["bfloat16"] if multiplies_bfloat16() else [])]
    where = [machine(), dict(torch.cpu.get_capabilities()), torch.__version__]
    key = sha256_json([where, sorted([*shape, n] for shape, n in shapes.items())])
    with exclusive(MEASURED.with_suffix(".lock")):
        known = read_json(MEASURED) or {}
        kept = known.get(key) or {"gflops": matmul_rates(shapes, dtypes)}
        rates, recent = kept["gflops"], kept.get("recent", {})
        recent = {name: recent.get(name, [rate]) for name, rate in rates.items()}
        for name, rate in (again or {}).items():
            recent[name] = [*recent[name], rate][-RECENT:]
        found = {"model": str(folder), "machine": machine(), "gflops": rates, "recent": recent}
        if found != known.get(key):
            write_json(MEASURED, known | {key: found})
    return found


def linear_shapes(folder: Path) -> Counter[tuple[int, int]]:
    """(input, output) → how many of the linear layers of a model, its projection left out, have
    that shape."""
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        model = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return Counter(
        (m.in_features, m.out_features) for m in model.modules() if isinstance(m, nn.Linear)
    )


@torch.inference_mode()
def matmul_rates(
    shapes: Counter[tuple[int, int]], dtypes: Sequence[str], seconds: float = SECONDS
) -> dict[str, float]:
    """dtype → GFLOP/s of oneDNN on matrices of these shapes, each as often as it is there.

    The dtypes run in turn, for so many seconds in all, and the fastest of each shape counts.
    """
    work = []
    for shape in shapes:
        for name in dtypes:
            dtype = getattr(torch, name)
            layer = pack(nn.Sequential(nn.Linear(*shape, bias=False).to(dtype)))
            work.append((name, shape, layer, torch.randn(ROWS, shape[0], dtype=dtype)))
    best: dict[tuple, float] = {}
    end = time.perf_counter() + seconds
    while len(best) < len(work) or time.perf_counter() < end:
        for name, shape, layer, rows in work:
            start = time.perf_counter()
            layer(rows)
            best[name, shape] = min(
                best.get((name, shape), float("inf")), time.perf_counter() - start
            )
    flops = sum(2 * ROWS * i * o * n for (i, o), n in shapes.items())
    taken = {name: sum(best[name, shape] * n for shape, n in shapes.items()) for name in dtypes}
    return {name: round(flops / seconds / 1e9, 1) for name, seconds in taken.items()}
