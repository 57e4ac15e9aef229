"""What a training needs of memory, from the shape of the model alone, before any weight is there.

It is that of tensors at the worst of four moments of an optimizer step with float32 weights and
AdamW (a gradient is there already, as it is in all but the first of accumulated batches). What is
saved for the backward pass is not calculated but counted, on tensors without storage, as autograd
saves it. Checked against measured peaks in tests/test_preflight.py.
"""

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from letterhead.config.experiment import Experiment
from letterhead.config.models import Lora
from letterhead.models.adapters import adapted, adapter_parameters
from letterhead.models.checkpoints import FLOAT, GIB
from letterhead.models.cpu import linear_shapes
from letterhead.models.llamafactory import step_of
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import learns_thoughts
from letterhead.runs import results
from letterhead.runs.devices import free_gpu_memory, process_count, share_batch

HALF = 2  # bytes of a bfloat16
# Of a linear weight in NF4 with its scales (Dettmers et al. 2023, arXiv 2305.14314)
QUANTISED = 0.6
# CUDA's context, its libraries' workspaces and what the allocator can't fill; an estimate, never
# measured.
CUDA_OVERHEAD = GIB
# The share of a GPU's memory that a training may be planned to take where it need not: estimates
# were up to 17 % below measured peaks (docs/gpu.md).
ROOM = 0.8
LONGEST = 64  # texts of which the longest in tokens is sought
CHECKPOINTING = "disable_gradient_checkpointing"  # LLaMA-Factory's key
# A logit's bytes in the backward pass of the loss: log-softmax, its gradient, and the logit's own
LOGITS_BACKWARD = 12


@dataclass
class Memory:
    """Bytes at the worst moment of training, by what they are for.

    `weights`, `gradients` and `optimizer` are float32 (the last has two moments a parameter);
    `activations` are saved for the backward pass; `logits` are those of the loss with their
    gradients; `casts` the half-precision copies of weights.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    casts: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in vars(self).items())
        return f"{self.total / GIB:.2f} GiB ({parts})"


def parameter_count(folder: Path, classes: int | None = None) -> int:
    """How many parameters a model has, tied ones once; with `classes` that of a sequence
    classifier."""
    return sum(parameter.numel() for parameter in _model(folder, classes, None).parameters())


def training_memory(
    folder: Path,
    batch: int,
    length: int,
    half: bool,
    classes: int | None = None,
    checkpointing: bool = False,
    lora: Lora | None = None,
    projected: int | None = None,
    processes: int = 1,
    quantised: bool = False,
) -> Memory:
    """The memory of fine-tuning, full or, with `lora`, of an adapter.

    Parameters
    ----------
    folder : holds the model's config.json; weights need not be there
    batch, length : rows of one forward pass, and tokens of the longest of them
    half : bfloat16 by autocast
    classes : for a sequence classifier how many; None for a language model with a loss at every
        position
    checkpointing : only what goes into each layer is saved, and the rest computed anew (gradient
        checkpointing)
    lora : the base of a language model then has bfloat16 weights where `half`, as LLaMA-Factory
        loads it, and that of a classifier float32
    projected : how many tokens of a row a language model projects to its vocabulary; None for all
    processes : several exchange their gradients in buckets, which are copies (accelerate's
        `gradient_as_bucket_view` is false)
    quantised : the layers of an adapter's base have four bits a weight
    """
    stored = torch.bfloat16 if lora and half and classes is None else torch.float32
    whole, *few = (_model(folder, classes, layers, lora, stored) for layers in (None, 1, 2))
    with FakeTensorMode():
        saved_one, saved_two = (
            _saved_bytes(_as_fakes(model), batch, length, half, projected) for model in few
        )
    base = whole.get_base_model() if lora else whole
    config, trained = base.config, adapter_parameters(folder, lora) if lora else 0
    parameters = sum(parameter.numel() for parameter in whole.parameters()) - trained
    layers, layer = config.num_hidden_layers, saved_two - saved_one
    outputs = batch * (classes or (projected or length) * config.vocab_size)
    outside = saved_one - layer
    if projected is None:
        outside -= FLOAT * outputs  # log-softmax is among the logits
    elif half and stored is torch.float32:
        outside += HALF * base.get_output_embeddings().weight.numel()
    saved, casts = (
        layers * layer + outside,
        0,
    )  # among what a layer saves are the casts of its weights
    if checkpointing:
        saved = layers * batch * length * config.hidden_size * FLOAT + outside
        linear = (
            m.weight.numel() for m in base.base_model.modules() if isinstance(m, torch.nn.Linear)
        )
        casts = (
            HALF * sum(linear) if half and stored is torch.float32 else 0
        )  # autocast keeps them to the end of the forward pass
    learnt = trained or parameters
    spared = 0
    if quantised:
        spared = (stored.itemsize - QUANTISED) * sum(
            width * height * number for (width, height), number in linear_shapes(folder).items()
        )
    at_once = {
        "weights": stored.itemsize * parameters + FLOAT * trained - int(spared),
        "gradients": FLOAT * learnt * (1 if processes == 1 else 2),
        "optimizer": 2 * FLOAT * learnt,
    }
    largest = max(parameter.numel() for parameter in whole.parameters())
    if classes is None:  # the projection's gradient comes first, by way of its cast's
        of_largest = {"activations": saved, "casts": (FLOAT + (HALF if half else 0)) * largest}
    else:  # the embedding's comes last, when nothing is left that was saved
        of_largest = {"activations": 0, "casts": FLOAT * largest}
    in_forward = (HALF if half else 0) + 2 * FLOAT  # the logits, in float32, and their log-softmax
    moments = [
        Memory(**at_once, activations=saved, logits=in_forward * outputs, casts=casts),  # the loss
        Memory(
            **at_once, activations=saved, logits=LOGITS_BACKWARD * outputs, casts=0
        ),  # its gradient
        Memory(
            **at_once, activations=saved + layer, logits=0, casts=0
        ),  # the last layer's gradient
    ]
    if not lora:  # the largest weight's gradient, before it is added
        moments.append(Memory(**at_once, **of_largest, logits=0))
    if not lora and classes is None and config.tie_word_embeddings:
        # That of the projection waits for that of the embedding, and then comes their sum.
        moments.append(Memory(**at_once, activations=0, logits=0, casts=3 * FLOAT * largest))
    return max(moments, key=lambda memory: memory.total)


def sft_lengths(
    experiment: Experiment, texts: Iterable[str], folder: Path | None = None
) -> tuple[int, int | None]:
    """Tokens of the longest row of SFT, answer included, and how many of a row are projected; None
    where a teacher's thoughts have any number, and the row then has as many as are allowed.

    Parameters
    ----------
    folder : holds the decoder's tokenizer; None for its own
    """
    if learns_thoughts(experiment):
        return experiment.sft_arguments()["cutoff_len"], None
    encoder = load_prompt_encoder(experiment, folder=folder)
    answer = max(len(answer.ids) for answer in encoder.answers)
    longest = heapq.nlargest(LONGEST, texts, key=len)
    return max(len(encoder.encode(text)) for text in longest) + answer, answer


def may_keep_layers(arguments: dict[str, Any], kept: Memory, free: int) -> bool:
    """Whether SFT saves what its layers compute, and computes none of them twice: where
    LLaMA-Factory's YAML leaves that open, and there is room.

    Parameters
    ----------
    kept : the memory of SFT without gradient checkpointing
    free : bytes that are free on the GPU
    """
    return arguments.get(CHECKPOINTING) is None and kept.total + CUDA_OVERHEAD <= ROOM * free


def for_memory(experiment: Experiment) -> dict[str, Any]:
    """LLaMA-Factory's keys that suit the memory of the GPU, of those that the YAML leaves open.
    Gradients do not hang on them."""
    arguments = experiment.sft_arguments()
    if not torch.cuda.is_available() or arguments.get(CHECKPOINTING) is not None:
        return {}
    n = process_count()
    texts = (row["text"] for row in results.read_rows(experiment, "decoder_train"))
    length, projected = sft_lengths(experiment, texts)
    kept = training_memory(
        experiment.decoder.folder,
        share_batch(*step_of(arguments), n, "decoder.sft")[0],
        length,
        bool(arguments.get("bf16", True)),
        lora=experiment.decoder.sft.lora,
        projected=projected,
        processes=n,
        quantised=experiment.decoder.sft.quantised,
    )
    return {CHECKPOINTING: may_keep_layers(arguments, kept, free_gpu_memory(n))}


def _model(
    folder: Path,
    classes: int | None,
    layers: int | None,
    lora: Lora | None = None,
    dtype: torch.dtype = torch.float32,
):
    """The architecture on tensors without storage, with so many layers (None: its own), and with an
    adapter."""
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config.use_cache = False
    # A GPU's kernels draw dropout anew in the backward pass; the CPU's saves all probabilities.
    for dropout in ("attention_dropout", "attention_probs_dropout_prob"):
        if hasattr(config, dropout):
            setattr(config, dropout, 0.0)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    kind = AutoModelForCausalLM
    if classes is not None:
        kind, config.num_labels, config.pad_token_id = (
            AutoModelForSequenceClassification,
            classes,
            0,
        )
    with torch.device("meta"):
        model = kind.from_config(config, dtype=dtype, attn_implementation="sdpa")
        return adapted(model, lora) if lora else model


def _as_fakes(model: torch.nn.Module) -> torch.nn.Module:
    """A model on the meta device as one on the CPU, in place, by the fake mode that is active; tied
    weights stay tied."""
    fakes: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in fakes:
                    fakes[id(tensor)] = torch.empty(tensor.shape, dtype=tensor.dtype)
                    if isinstance(tensor, torch.nn.Parameter):
                        fakes[id(tensor)] = torch.nn.Parameter(
                            fakes[id(tensor)], tensor.requires_grad
                        )
                tensors[name] = fakes[id(tensor)]
    return model


def _saved_bytes(model, batch: int, length: int, half: bool, projected: int | None) -> int:
    """Bytes of the tensors, parameters left out, that autograd saves in one forward pass with its
    loss; where not all tokens are projected, without the projection."""
    own = {id(parameter.untyped_storage()) for parameter in model.parameters()}
    found: dict[int, torch.UntypedStorage] = {}

    def save(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if id(storage) not in own:
            found[id(storage)] = storage
        return tensor

    ids = torch.ones(batch, length, dtype=torch.long)
    labels = (
        ids if model.get_output_embeddings() is not None else torch.zeros(batch, dtype=torch.long)
    )
    model.train()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(save, lambda t: t),
    ):
        if projected is None:
            model(input_ids=ids, attention_mask=ids, labels=labels)
        else:
            base = model.get_base_model() if isinstance(model, PeftModel) else model
            base.base_model(input_ids=ids, attention_mask=ids)
    return sum(storage.nbytes() for storage in found.values())
