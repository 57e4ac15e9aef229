"""Fold an SFT checkpoint into an ordinary sequence classifier: a letter is a head.

    python -m serve.export --experiment quick --model sft@80

Anything that takes a sequence classifier serves what is written to runs/EXPERIMENT/export/sft@STEP; letterhead_export.json
in it says how it was checked.
"""

import os

from letterhead.classifier import named_method
from letterhead.experiment import Experiment
from letterhead.stage import OFFLINE, run


def main(experiment: Experiment, model: str) -> None:
    os.environ.update(OFFLINE)
    from letterhead.folding import export_folded

    folder, facts = export_folded(experiment, named_method(experiment, model))
    checked, as_text = facts["rows_checked"], facts["rows_whose_prompt_works_as_text"]
    off = f"logits within {facts['largest_difference']:.2g} of the decoder's"
    print(f"{folder}: {facts['architecture']}, {off}, the same prediction on {facts['same_predictions']} of {checked} rows")
    if as_text == checked:
        print("the prompt works as text too: the tokenizer gives the ids of training on all rows")
    else:
        print(f"send token ids, not text: the tokenizer gives the ids of training on {as_text} of {checked} rows")


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"model": "sft@STEP, or sft for the one that was chosen"})
