"""Write a checkpoint as a model of its own, with a model card; an SFT checkpoint is folded into a
classifier: a letter is a head.

    python -m serve.export --experiment quick --model sft@80

Anything that takes a sequence classifier serves what is written to runs/EXPERIMENT/export/NAME. For
an SFT checkpoint letterhead_export.json in it says how the fold was checked.
"""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_folder, exclusive, read_json, write_json
from letterhead.models.checkpoints import MERGED_FROM, require_finite_weights, temper
from letterhead.models.classifier import (
    EXPORTED_CASCADE,
    ON_PROMPT,
    frozen_cascade,
    model_folder,
    named_method,
    whole_folder,
)
from letterhead.models.fitted import fit_method
from letterhead.models.prompt import THINK, WORD, load_prompt_encoder
from letterhead.pipeline import (
    CASCADE,
    METHODS,
    STAGES,
    Method,
    find_method,
    inputs_sha256,
    method_of,
)
from letterhead.runs import contenders, results
from letterhead.runs.stage import run
from letterhead.serving.model_card import write_card

# What a checkpoint holds for a training that goes on, and nobody who uses it needs
TRAINING_FILES = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state*.pth",
    "trainer_state.json",
    "training_args.bin",
    MERGED_FROM,
)

READ_TEXT = """
import re
{imports}

WORD = re.compile({word!r})


def as_trained(text):
    \"\"\"The text as training cut it{cut_words}, strings that are control tokens broken up.\"\"\"
    words = [word.end() for word in WORD.finditer(text)]
    text = text[: words[{words} - 1]] if {words} and len(words) > {words} else text
    added = [token.content for token in tokenizer.added_tokens_decoder.values()]
    names = {{name for name in added if len(name.strip()) > 1}}{more_names}
    control = "|".join(sorted(map(re.escape, names), key=len, reverse=True)) or "(?!)"
    return re.sub(control, lambda found: found[0][0] + " " + found[0][1:], text.strip())

"""
CALL_TEXT = """
folder = {folder!r}  # or its id, once it is on a hub
classify = pipeline("text-classification", model=folder)
tokenizer = classify.tokenizer
print(classify(as_trained({text!r}), truncation=True, max_length={length}, top_k=None))
"""
CALL_EMBEDDING = """
folder = {folder!r}  # or its id, once it is on a hub
model = SentenceTransformer(folder)
tokenizer = model.tokenizer
logits = model.encode([as_trained({text!r})], convert_to_tensor=True)
print(model[0].auto_model.config.id2label, logits.softmax(-1))
"""
CALL_PROMPT = """
folder = {folder!r}  # or its id, once it is on a hub
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)
text = as_trained({text!r})
tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
text = text[: tokens[{room}][0]].rstrip() if len(tokens) > {room} else text
question = {question!r}.replace("{{text}}", text)
messages = [{{"role": "user", "content": question}}]
inputs = tokenizer.apply_chat_template(
    messages, enable_thinking=False, return_tensors="pt", return_dict=True
)
print(model.config.id2label, model(**inputs).logits.softmax(-1))
"""
CALL_IDS = """
import torch
from transformers import AutoModelForSequenceClassification

# Run in Letterhead's folder, with its environment.
from letterhead.config.experiment import load_experiment
from letterhead.models.prompt import load_prompt_encoder

encoder = load_prompt_encoder(load_experiment("{folder}/experiment.yaml"))
model = AutoModelForSequenceClassification.from_pretrained("{folder}")
ids = torch.tensor([encoder.encode_before_option({text!r})])
print(model.config.id2label, model(ids).logits.softmax(-1))
"""
CALL_TFIDF = """
import json
import re

import numpy
from safetensors.numpy import load_file
from sklearn.feature_extraction.text import TfidfVectorizer

folder = {folder!r}
config = json.load(open(folder + "/config.json", encoding="utf-8"))
settings = config["vectorizer"] | {{"ngram_range": tuple(config["vectorizer"]["ngram_range"])}}
vectorizer = TfidfVectorizer(**settings, vocabulary=config["terms"])
vectorizer.idf_ = numpy.array(config["idf"])
layer = load_file(folder + "/model.safetensors")
text = {text!r}
words = [word.end() for word in re.finditer({word!r}, text)]
text = text[: words[{words} - 1]].strip() if {words} and len(words) > {words} else text.strip()
logits = (vectorizer.transform([text]) @ layer["linear.weight"].T + layer["linear.bias"])[0]
shares = numpy.exp(logits - logits.max())
print(config["id2label"], (shares / shares.sum()).tolist())
"""
CASCADE_CARD = """# {name}

Two classifiers: {cheap} in `cheap/`, {dear} in `dear/`. The card of each says how to call it.

Ask the cheap one first. Where its highest probability lies below {threshold:.6f} (`cascade.json`),
take the dear one's answer; on validation rows that was a share of {validation_share:.3f}.

`make predict MODEL={folder}` does so for a file.
"""
TEXT_CLASSIFICATION = "text-classification"
EXAMPLE = "The text that is to be labelled."


def main(experiment: Experiment, model: str) -> None:
    folder, how = export(experiment, named_method(experiment, model))
    print(f"{folder}: {how}; README.md in it is its model card")


def export(experiment: Experiment, name: str) -> tuple[Path, str]:
    """Write a method's checkpoint, or what it is fitted to, by its full name, with its card to
    runs/<experiment>/export/NAME; a second process waits.

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
    method = find_method(name)
    if method is CASCADE:
        return export_cascade(experiment, name)
    if method is None or not can_export(method):
        known = ", ".join(one.name for one in METHODS.values() if can_export(one))
        raise LetterheadError(f"{name}: can't be exported; choose {known}")
    if method.fitter:
        folder = export_fitted(experiment, name)
        write_card(
            experiment, name, folder, *fitted_call(experiment, name, folder), TEXT_CLASSIFICATION
        )
        what = "the encoder" if method.model else "terms"
        return folder, f"{what} with logistic regression as the last layer"
    if not method.reads_prompt:
        folder = export_head(experiment, name)
        how = "the checkpoint without its trainer's files"
        write_card(
            experiment, name, folder, *head_call(experiment, name, folder), TEXT_CLASSIFICATION
        )
        return folder, how
    from letterhead.models.folding import export_folded, write_tokenizer

    if method.settings:
        folder = export_head(experiment, name, write_tokenizer)
        facts, how = read_json(folder / ON_PROMPT), "the checkpoint without its trainer's files"
    else:
        folder, facts = export_folded(experiment, name)
        how = (
            f"{facts['architecture']}, logits (before their temperature) within "
            f"{facts['largest_difference']:.2g} of the decoder's, the same "
            f"answer on {facts['same_predictions']} of {facts['rows_checked']} rows"
        )
    checked = facts["rows_checked"]
    by_chat, by_text = (
        facts["rows_whose_chat_template_gives_the_ids"],
        facts["rows_whose_prompt_works_as_text"],
    )
    ways = (
        f"the chat template gives the ids of training on {by_chat} of {checked} rows, "
        f"the prompt sent as text on {by_text}"
    )
    # A raw text is no prompt, which the tag text-classification would promise.
    write_card(
        experiment,
        name,
        folder,
        *prompt_call(experiment, folder, ways, 2 * by_chat > checked),
        None,
    )
    return folder, f"{how}; {ways}"


def can_export(method: Method) -> bool:
    """Whether a method can be written as a model of its own."""
    return bool(method.loader and (method.has_steps or method.fitter) and method.is_trained)


def export_cascade(experiment: Experiment, name: str) -> tuple[Path, str]:
    """Export both methods of a cascade, and write them to one folder with its threshold."""
    frozen = frozen_cascade(experiment, name)
    halves = {"cheap": frozen.cheap, "dear": frozen.dear}
    for full in halves.values():
        if not can_export(method_of(full)):
            raise LetterheadError(f"{name}: {full} can't be exported, so the cascade can't")
    folders = {half: _export(experiment, full)[0] for half, full in halves.items()}
    target = experiment.run_folder / "export" / name
    with atomic_folder(target) as folder:
        for half, source in folders.items():
            shutil.copytree(source, folder / half)
        write_json(
            folder / EXPORTED_CASCADE,
            halves | {"threshold": frozen.threshold, "validation_share": frozen.validation_share},
        )
        (folder / "README.md").write_text(
            CASCADE_CARD.format(name=name, folder=target, **vars(frozen)), encoding="utf-8"
        )
    return target, f"{frozen.cheap} and {frozen.dear}, each with its own card"


def export_fitted(experiment: Experiment, name: str) -> Path:
    """Fit a method on its rows and write it; returns the folder.

    Raises
    ------
    LetterheadError : what was measured is not what would be written
    """
    stage = STAGES[method_of(name).stage]
    measured = results.parse_result(results.result_files(experiment, name, "test")[0])
    if not measured or measured.inputs_sha256 != inputs_sha256(stage, experiment):
        raise LetterheadError(
            f"{name}: not measured as it would be written; run: make {stage.make_target} "
            f"EXP={experiment.name}"
        )
    target = experiment.run_folder / "export" / name
    method = method_of(name)
    with atomic_folder(target) as folder:
        if method.is_saved:
            shutil.copytree(model_folder(experiment, name), folder, dirs_exist_ok=True)
        else:
            fit_method(experiment, name).save(folder)
        require_finite_weights(folder)
        temper(folder, contenders.temperature_of(experiment, name))
    return target


def fitted_call(experiment: Experiment, name: str, folder: Path) -> tuple[str, str]:
    """What an exported method that was fitted reads, in Markdown, and lines of Python that call
    it."""
    max_words, length = experiment.data.max_words, experiment.encoder.head.max_length
    if not method_of(name).model:
        call = CALL_TFIDF.format(
            folder=str(folder), word=WORD.pattern, words=max_words or 0, text=EXAMPLE
        )
        return f"It reads the raw text, as in training {cut_in_words(max_words)}.", call
    asked = (
        f"It reads the raw text, as in training {cut_in_words(max_words)}, at most {length} "
        "tokens. What it gives are logits, one for each class."
    )
    call = read_text("from sentence_transformers import SentenceTransformer", max_words, "")
    return asked, call + CALL_EMBEDDING.format(folder=str(folder), text=EXAMPLE)


def head_call(experiment: Experiment, name: str, folder: Path) -> tuple[str, str]:
    """What an exported head reads, in Markdown, and lines of Python that call it."""
    length, max_words = method_of(name).head(experiment).max_length, experiment.data.max_words
    asked = (
        f"It reads the raw text, as in training {cut_in_words(max_words)}, at most {length} tokens."
    )
    call = read_text("from transformers import pipeline", max_words, "")
    return asked, call + CALL_TEXT.format(folder=str(folder), length=length, text=EXAMPLE)


def prompt_call(
    experiment: Experiment, folder: Path, ways: str, chat_gives_ids: bool
) -> tuple[str, str]:
    """What an exported model reads that was trained on the prompt, in Markdown with one prompt
    filled in, and lines of Python that call it.

    Parameters
    ----------
    ways : on how many rows which way of asking gives the ids of training, in words
    chat_gives_ids : whether the chat template does (texts that hold placeholders of
        LLaMA-Factory's, such as {{idx}}, apart)
    """
    encoder = load_prompt_encoder(experiment)
    prompt = encoder.tokenizer.decode(
        encoder.encode_before_option(EXAMPLE), clean_up_tokenization_spaces=False
    )
    asked = (
        "It reads a prompt through its think block, not a raw text, and its classes "
        "are the options of that prompt. As in "
        f"training the text is {cut_in_words(experiment.data.max_words)}, and so long "
        f"that the prompt has at most "
        f"{encoder.cutoff_len} tokens. On test rows {ways}. A whole "
        f"prompt:\n\n{textwrap.indent(prompt, '    ')}"
    )
    if not chat_gives_ids:
        return asked, CALL_IDS.format(folder=folder, text=EXAMPLE)
    imports = "from transformers import AutoModelForSequenceClassification, AutoTokenizer"
    call = read_text(imports, experiment.data.max_words, f" | {set(THINK)!r}")
    return asked, call + CALL_PROMPT.format(
        folder=str(folder), question=encoder.fill("{text}"), text=EXAMPLE, room=encoder.text_budget
    )


def cut_in_words(max_words: int | None) -> str:
    """How much of a text is read."""
    if max_words is None:
        return "read whole"
    return f"cut behind its first {max_words} words (a Chinese or Japanese character counts as one)"


def read_text(imports: str, max_words: int | None, more_names: str) -> str:
    """Lines of Python that do to a text what training did."""
    cut_words = f" (its first {max_words} words)" if max_words else ""
    return READ_TEXT.format(
        imports=imports,
        word=WORD.pattern,
        words=max_words or 0,
        cut_words=cut_words,
        more_names=more_names,
    )


def export_head(
    experiment: Experiment, name: str, write_tokenizer: Callable[..., dict] | None = None
) -> Path:
    """Copy a sequence classifier's checkpoint without what only a training needs; returns the
    folder. One that reads the prompt gets its tokenizer by `write_tokenizer`, whose facts are
    written beside it.

    Raises
    ------
    LetterheadError : no such checkpoint
    """
    source, target = whole_folder(experiment, name), experiment.run_folder / "export" / name
    if name.endswith("@0"):
        raise LetterheadError(f"{name}: is the untrained model; choose a step that was trained")
    with atomic_folder(target) as folder:
        shutil.copytree(
            source, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(*TRAINING_FILES)
        )
        require_finite_weights(folder)
        temper(folder, contenders.temperature_of(experiment, name))
        if write_tokenizer:
            write_json(folder / ON_PROMPT, write_tokenizer(experiment, folder))
    return target


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], options={"model": "a method, or METHOD@STEP"})
