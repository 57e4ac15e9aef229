"""Write a checkpoint as a model of its own, with a model card; an SFT checkpoint is folded into a classifier: a letter is a
head.

    python -m serve.export --experiment quick --model sft@80

Anything that takes a sequence classifier serves what is written to runs/EXPERIMENT/export/NAME. For an SFT checkpoint
letterhead_export.json in it says how the fold was checked.
"""

import os
import shutil
import textwrap
from pathlib import Path

from letterhead.card import write_card
from letterhead.classifier import ON_PROMPT, model_folder, named_method
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError, atomic_folder, exclusive, write_json
from letterhead.stage import OFFLINE, run

# What a checkpoint holds for a training that goes on, and nobody who uses it needs
TRAINING_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")
HEADS = ("bert", "bert_all", "linear_head")

CALL_TEXT = """
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}")  # or its id, once it is on a hub
print(classify("{text}", truncation=True, max_length={length}, top_k=None))
"""
CALL_IDS = """
import torch
from transformers import AutoModelForSequenceClassification

from letterhead.experiment import load_experiment  # run in Letterhead's folder, with its environment
from letterhead.prompt import load_prompt_encoder

encoder = load_prompt_encoder(load_experiment("{folder}/experiment.yaml"), folder="{folder}")
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
ids = torch.tensor([encoder.encode_before_option("{text}")])
print(model.config.id2label, model(ids).logits.softmax(-1))
"""


def main(experiment: Experiment, model: str) -> None:
    os.environ.update(OFFLINE)
    folder, said = export(experiment, named_method(experiment, model))
    print(f"{folder}: {said}; README.md in it is its model card")


def export(experiment: Experiment, name: str) -> tuple[Path, str]:
    """Write a method's checkpoint, by its full name, with its card to runs/<experiment>/export/NAME; a second process waits.

    Returns
    -------
    tuple : the folder, and how it was made, in words

    Raises
    ------
    LetterheadError : a method that can't be exported, or a checkpoint that is not there
    """
    with exclusive(experiment.run_folder / "export" / ".lock"):
        return _export(experiment, name)


def _export(experiment: Experiment, name: str) -> tuple[Path, str]:
    method = name.partition("@")[0]
    if method in HEADS:
        folder = export_head(experiment, name)
        section = experiment.encoder if name.startswith("bert") else experiment.decoder
        words = "words of it (a Chinese or Japanese character counts as one)"
        cut = f"the first {experiment.data.max_words} {words}" if experiment.data.max_words else "all of it"
        asked = f"It reads the raw text, as in training {cut}, at most {section.head.max_length} tokens."
        call = CALL_TEXT.format(folder=folder, length=section.head.max_length, text="A text")
        said = "the checkpoint without its trainer's files"
    else:
        from letterhead.folding import export_folded, prompts_as_text

        if method == "sft_options":
            facts = prompts_as_text(experiment)
            folder, said = export_head(experiment, name, facts), "the checkpoint without its trainer's files"
        else:
            folder, facts = export_folded(experiment, name)
            said = f"{facts['architecture']}, logits within {facts['largest_difference']:.2g} of the decoder's, the same "
            said += f"answer on {facts['same_predictions']} of {facts['rows_checked']} rows"
        checked, as_text = facts["rows_checked"], facts["rows_whose_prompt_works_as_text"]
        told = "the prompt works as text too" if as_text == checked else "send token ids, not text"
        told += f": the tokenizer gives the ids of training on {as_text} of {checked} prompts"
        said += f"; {told}"
        asked = (
            "It reads the token ids of this prompt through its think block; its classes are the option letters of the "
            f"decoder that it was made from ({told}).\n\n{textwrap.indent(experiment.prompt.template, '    ')}"
        )
        call = CALL_IDS.format(folder=folder, text="A text")
    write_card(experiment, name, folder, asked, call)
    return folder, said


def export_head(experiment: Experiment, name: str, facts: dict | None = None) -> Path:
    """Copy a sequence classifier's checkpoint without what only a training needs; returns the folder. With `facts` it is one
    that reads the prompt, and they say whether as text, too.

    Raises
    ------
    LetterheadError : no such checkpoint
    """
    source, target = model_folder(experiment, name), experiment.run_folder / "export" / name
    if name.endswith("@0"):
        raise LetterheadError(f"{name}: is the untrained model; choose a step that was trained")
    with atomic_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*TRAINING_FILES))
        if facts:
            write_json(folder / ON_PROMPT, facts)
    return target


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"model": "a method, or METHOD@STEP"})
