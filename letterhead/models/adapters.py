"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685), by peft: one that a head is trained
with, and the whole model that an adapter makes with its base.

What is scored on a CPU is the merged model, as it is exported and served: the adapter is added to
float32 weights, and the sum is cast. (On a GPU a head is scored in training as it is trained.)
"""

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer, PreTrainedModel

from letterhead.config.models import Lora
from letterhead.files import (
    LetterheadError,
    atomic_folder,
    exclusive,
    model_identity,
    read_json,
    write_json,
)
from letterhead.models.checkpoints import (
    FLOAT,
    MERGED_FROM,
    base_of,
    require_base,
    require_disk,
    stored_parameters,
)
from letterhead.models.cpu import linear_shapes

PREFIX = "base_model.model."  # of peft's names, which transformers' own have not


def adapted(model: PreTrainedModel, lora: Lora) -> PeftModel:
    """A model of which an adapter is trained, and of a sequence classifier its head.

    A pooler is trained whole: some encoders are shipped without one and get a random one, which
    nobody could load again.
    """
    kept = None
    if model.get_output_embeddings() is None:
        kept = [
            name
            for name, module in model.named_children()
            if name != model.base_model_prefix and any(True for _ in module.parameters())
        ]
        kept += ["pooler"] if getattr(model.base_model, "pooler", None) is not None else []
    settings = LoraConfig(
        task_type="SEQ_CLS" if kept else "CAUSAL_LM",
        r=lora.rank,
        lora_alpha=lora.alpha or 2 * lora.rank,
        lora_dropout=lora.dropout,
        target_modules="all-linear" if lora.targets == "all" else lora.targets,
        modules_to_save=kept,
    )
    try:
        return get_peft_model(model, settings)
    except ValueError as error:
        if "targeted" not in str(error) and "not found in the base model" not in str(error):
            raise
        layers = {
            name.rpartition(".")[2]
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear)
        }
        raise LetterheadError(
            f"lora.targets: {', '.join(lora.targets)}: no such layers; choose of "
            f"{', '.join(sorted(layers))}, or all"
        ) from None


def with_adapter(model: PreTrainedModel, lora: Lora, base: Path) -> PeftModel:
    """A sequence classifier of which an adapter and the head are trained.

    Parameters
    ----------
    model : in float32
    base : the folder that its other weights came from
    """
    trained = adapted(model, lora)
    trained.peft_config["default"].base_model_name_or_path = str(base)
    return trained


def adapter_parameters(folder: Path, lora: Lora) -> int:
    """How many parameters an adapter to all linear layers of a model has (one to fewer has
    fewer)."""
    shapes = linear_shapes(folder).items()
    return sum(number * lora.rank * (width + height) for (width, height), number in shapes)


def merged(model: PeftModel) -> PreTrainedModel:
    """The whole model. Its weights are new tensors, so those of the base may be shared."""
    return model.merge_and_unload(safe_merge=True)


def load_merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A base in float32 with the adapter of a folder added to it.

    Raises
    ------
    LetterheadError : the adapter was trained on another base, or a weight of it has no place there
    """
    require_base(folder)
    model = PeftModel.from_pretrained(base, folder, torch_device=str(base.device))
    require_loaded(model, folder)
    return merged(model)


def require_loaded(model: PreTrainedModel | PeftModel, folder: Path) -> None:
    """Make sure that a model holds every weight of an adapter. transformers by itself loads an
    adapter into a classifier and leaves the trained head out, without an error.

    Raises
    ------
    LetterheadError : it lacks one; names the weight
    """
    held = get_peft_model_state_dict(model)
    held = {name.removeprefix(PREFIX): weight for name, weight in held.items()}
    for name, weight in load_file(folder / "adapter_model.safetensors").items():
        found = held.get(name.removeprefix(PREFIX))
        if found is None or not torch.equal(found.float().cpu(), weight.float()):
            raise LetterheadError(
                f"{folder}: its weight {name} was not loaded; the adapter is of another base "
                f"than {base_of(folder)}"
            )


def write_merged(folder: Path, load: Callable[[Path], PreTrainedModel]) -> Path:
    """The folder of the whole model that a folder's adapter makes, written where it is not there
    yet; a second process waits.

    Parameters
    ----------
    load : gives the merged model in float32

    Raises
    ------
    LetterheadError : there is no room for it
    """
    base = base_of(folder)
    target = folder.parent.with_name("merged") / folder.name
    made_from = {"adapter": model_identity(folder), "base": model_identity(base)}
    with exclusive(target.parent / ".lock"):
        if read_json(target / MERGED_FROM) == made_from:
            return target
        for old in target.parent.glob("checkpoint-*"):  # of an earlier training
            if not (folder.parent / old.name).exists():
                shutil.rmtree(old)
        require_disk(target, FLOAT * stored_parameters(base), "the model merged with its adapter")
        with atomic_folder(target) as whole:
            load(folder).save_pretrained(whole)
            AutoTokenizer.from_pretrained(folder, trust_remote_code=False).save_pretrained(whole)
            write_json(whole / MERGED_FROM, made_from)
    return target
