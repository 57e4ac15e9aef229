"""Write a checkpoint as a model of its own, with a model card; an SFT checkpoint is folded into a classifier: a letter is a
head.

    python -m serve.export --experiment quick --model sft@80

Anything that takes a sequence classifier serves what is written to runs/EXPERIMENT/export/NAME. For an SFT checkpoint
letterhead_export.json in it says how the fold was checked.
"""

import os
import shutil
from pathlib import Path

from letterhead.card import write_card
from letterhead.classifier import model_folder, named_method
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError, atomic_folder
from letterhead.stage import OFFLINE, run

# What a checkpoint holds for a training that goes on, and nobody who uses it needs
TRAINING_FILES = ("optimizer.pt", "scheduler.pt", "rng_state*.pth", "trainer_state.json", "training_args.bin")
HEADS = ("bert", "bert_all", "linear_head")

CALL_TEXT = """
from transformers import pipeline

classify = pipeline("text-classification", model="{folder}")
print(classify("{text}", truncation=True, max_length={length}, top_k=None))
"""
CALL_IDS = """
import torch
from transformers import AutoModelForSequenceClassification

from letterhead.experiment import load_experiment
from letterhead.prompt import load_prompt_encoder

encoder = load_prompt_encoder(load_experiment("{experiment}"))
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
ids = torch.tensor([encoder.encode_before_option("{text}")])
print(model.config.id2label, model(ids).logits.softmax(-1))
"""


def main(experiment: Experiment, model: str) -> None:
    os.environ.update(OFFLINE)
    name = named_method(experiment, model)
    filled = {"experiment": experiment.name, "text": "A text"}
    if name.partition("@")[0] in HEADS:
        folder = export_head(experiment, name)
        section = experiment.encoder if name.startswith("bert") else experiment.decoder
        cut = f"the first {experiment.data.max_words} words of it" if experiment.data.max_words else "all of it"
        asked = f"It reads the raw text, as in training {cut}, at most {section.head.max_length} tokens."
        call = CALL_TEXT.format(folder=folder, length=section.head.max_length, **filled)
    else:
        from letterhead.folding import export_folded

        folder, facts = export_folded(experiment, name)
        checked, as_text = facts["rows_checked"], facts["rows_whose_prompt_works_as_text"]
        off = f"logits within {facts['largest_difference']:.2g} of the decoder's"
        same = f"the same prediction on {facts['same_predictions']} of {checked} rows"
        print(f"{folder}: {facts['architecture']}, {off}, {same}")
        told = f"the tokenizer gives the ids of training on {as_text} of {checked} prompts that are written as text"
        asked = (
            "It reads the token ids of the prompt below through its think block, and its classes are the option letters of "
            f"the decoder that it was folded from ({told}).\n\n```\n{experiment.prompt.template.replace('```', '')}\n```"
        )
        print("the prompt works as text too" if as_text == checked else "send token ids, not text", f"({told})", sep=": ")
        call = CALL_IDS.format(folder=folder, **filled)
    card = write_card(experiment, name, folder, asked, call)
    print(f"{card}: its model card")


def export_head(experiment: Experiment, name: str) -> Path:
    """Copy a sequence classifier's checkpoint without what only a training needs; returns the folder.

    Raises
    ------
    LetterheadError : no such checkpoint
    """
    source, target = model_folder(experiment, name), experiment.run_folder / "export" / name
    if name.endswith("@0"):
        raise LetterheadError(f"{name}: is the untrained model; choose a step that was trained")
    with atomic_folder(target) as folder:
        shutil.copytree(source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*TRAINING_FILES))
    return target


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"model": "a method, or METHOD@STEP"})
