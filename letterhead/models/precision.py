"""What a model computes in, and its last projection in float32 whatever that is.

A bfloat16 has 8 bits of mantissa: logits of 16 to 32 lie on a grid of 1/8, so close options tie,
and a tie goes to the first label. The projection of the few positions that are read costs nothing
in float32.
"""

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from letterhead.models.cpu import prefers_bfloat16


def precision(dtype: str, folder: Path) -> str:
    """What `auto` stands for: bfloat16 on a GPU that has it, and on a CPU where it is faster; else
    float32.

    Parameters
    ----------
    dtype : auto, float32 or bfloat16
    folder : the model's, whose shapes decide on a CPU
    """
    if dtype != "auto":
        return dtype
    half = gpu_has_bfloat16() if torch.cuda.is_available() else prefers_bfloat16(folder)
    return "bfloat16" if half else "float32"


def gpu_has_bfloat16() -> bool:
    """Whether there is a GPU that multiplies bfloat16 itself; torch emulates it on those before
    Ampere."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False)


class Float32Linear(nn.Linear):
    """A copy of a linear layer that multiplies in float32, inside autocast too."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(linear.weight.detach().float().clone())
        self.bias = (
            None if linear.bias is None else nn.Parameter(linear.bias.detach().float().clone())
        )

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        with torch.autocast(input.device.type, enabled=False):
            return functional.linear(input.float(), self.weight, self.bias)


def project_in_float32(model: PreTrainedModel) -> PreTrainedModel:
    """Replace a model's last projection, in place, by one in float32; returns the model.

    It is the projection to the vocabulary, or of a sequence classifier the last linear layer with
    an output for each class.
    """
    last = model.get_output_embeddings()
    if last is None:
        classes = model.config.num_labels
        last = [
            m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == classes
        ][-1]
    name = next(name for name, module in model.named_modules() if module is last)
    model.set_submodule(name, Float32Linear(last))
    return model


def with_shared_weights(model: nn.Module) -> nn.Module:
    """A copy whose parameters are views of a model's, so that only what is cast, packed or merged
    takes memory, and the model stays as it is."""
    views = {id(p): nn.Parameter(p.detach(), False) for p in model.parameters()}
    return copy.deepcopy(model, views)


def cast(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """Cast the parameters of a float32 model, in place, all but those of its last projection;
    returns the model.

    Buffers stay as they are: rotary frequencies in bfloat16 would turn long texts by wrong angles.
    """
    if dtype == "float32":
        return model
    for module in project_in_float32(model).modules():
        if not isinstance(module, Float32Linear):
            for parameter in module.parameters(recurse=False):
                parameter.data = parameter.data.to(getattr(torch, dtype))
    return model
