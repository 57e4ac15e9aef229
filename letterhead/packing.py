"""Linear layers on oneDNN, for inference on a CPU.

PyTorch multiplies float32 matrices with MKL, which leaves AVX-512 unused on processors that are not Intel's; oneDNN, which
PyTorch brings along too, does not. The operation is the one that torch.compile's Inductor puts in place of a linear layer.
"""

import torch
from torch import nn


class PackedLinear(nn.Linear):
    """A linear layer whose weight oneDNN has laid out for itself; it can't be trained, saved or copied."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.weight, self.bias = nn.Parameter(packed, requires_grad=False), linear.bias

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def pack(model: nn.Module) -> nn.Module:
    """Replace the float32 linear layers of a model on a CPU, in place; one tied to an embedding stays. Returns the model."""
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if torch.backends.mkldnn.is_available():
        for module in list(model.modules()):
            for name, child in module.named_children():
                plain = type(child) is nn.Linear and id(child.weight) not in embeddings
                if plain and child.weight.device.type == "cpu" and child.weight.dtype == torch.float32:
                    setattr(module, name, PackedLinear(child))
    return model
