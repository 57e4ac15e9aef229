"""Write a checkpoint as a model of its own, with a model card; an SFT checkpoint is folded into a
classifier: a letter is a head.

    python -m serve.export --experiment quick --model sft@80

Anything that takes a sequence classifier serves what is written to runs/EXPERIMENT/export/NAME. For
an SFT checkpoint letterhead_export.json in it says how the fold was checked. With --format onnx an
encoder is written once more, to NAME.onnx, for ONNX Runtime.
"""

import shutil
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, atomic_folder, exclusive, read_json, write_json
from letterhead.models.checkpoints import MERGED_FROM, require_finite_weights, temper
from letterhead.models.classifier import (
    EXPORTED_CASCADE,
    ON_PROMPT,
    frozen_cascade,
    load_classifier,
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
from letterhead.runs.devices import machine
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
CALL_ONNX = """
import json
import re

import numpy
from onnxruntime import InferenceSession
from tokenizers import Tokenizer

folder = {folder!r}
config = json.load(open(folder + "/config.json", encoding="utf-8"))
tokenizer = Tokenizer.from_file(folder + "/tokenizer.json")
session = InferenceSession(folder + "/" + config["file"])


def as_trained(text):
    \"\"\"The text as training read it{cut_words}, control tokens in it broken up.\"\"\"
    words = [word.end() for word in re.finditer({word!r}, text)]
    text = text[: words[{words} - 1]] if {words} and len(words) > {words} else text
    control = re.compile(config["control"])
    return config["prefix"] + control.sub(lambda at: at[0][0] + " " + at[0][1:], text.strip())


read = tokenizer.encode_batch([as_trained({text!r})])
ids = numpy.array([one.ids for one in read])
mask = numpy.array([one.attention_mask for one in read])
logits = session.run(None, {{"input_ids": ids, "attention_mask": mask}})[0]
shares = numpy.exp(logits - logits.max(axis=1, keepdims=True))
print(config["id2label"], (shares / shares.sum(axis=1, keepdims=True)).tolist())
"""
ONNX_CHECKED = (
    "{precision}: {same} of {rows} test rows have the label of the torch model, whose logits (less "
    "their mean) are {difference:.2g} away at most; of validation rows {validation_same} of "
    "{validation_rows}"
)
CASCADE_CARD = """# {name}

Two classifiers: {cheap} in `cheap/`, {dear} in `dear/`. The card of each says how to call it.

Ask the cheap one first. Where its highest probability lies below {threshold:.6f} (`cascade.json`),
take the dear one's answer; on validation rows that was a share of {validation_share:.3f}.

`make predict MODEL={folder}` does so for a file.
"""
TEXT_CLASSIFICATION = "text-classification"
EXAMPLE = "The text that is to be labelled."


# A model as torch and safetensors know it, or for ONNX Runtime
FORMATS = ("safetensors", ONNX := "onnx")


def main(experiment: Experiment, model: str, form: str = "") -> None:
    if form not in ("", *FORMATS):
        raise LetterheadError(f"FORMAT={form}: no such format; choose {' or '.join(FORMATS)}")
    name = named_method(experiment, model)
    folder, how = (export_onnx if form == ONNX else export)(experiment, name)
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


def export_onnx(experiment: Experiment, name: str) -> tuple[Path, str]:
    """Export a method whose model is an encoder, and write it for ONNX Runtime beside that, checked
    on validation and test rows; returns as `export` does.

    int8 is what config.json names if it gives enough validation rows float32's label.

    Raises
    ------
    LetterheadError : as `export`, or the method is no encoder
    """
    from letterhead.models import onnx

    known = [one.name for one in METHODS.values() if can_export(one) and one.model == "encoder"]
    method = find_method(name)
    if method is None or method.name not in known:
        raise LetterheadError(
            f"{name}: is no encoder; FORMAT=onnx writes {', '.join(known)}, and the others as they "
            f"are without FORMAT="
        )
    with exclusive(experiment.run_folder / "export" / ".lock"):
        source, _ = _export(experiment, name)
        target = source.with_name(f"{source.name}.onnx")
        head, length = experiment.encoder.head, experiment.encoder.head.max_length
        with atomic_folder(target) as folder:
            onnx.write(source, folder, experiment.labels, head)
            checked = check_onnx(experiment, source, folder)
            config = read_json(folder / onnx.CONFIG)
            found = checked[onnx.INT8]
            least = max(1, results.LEAST_AGREEMENT * found["validation_rows"])
            if found["validation_same"] >= least:
                config["file"] = onnx.FILES[onnx.INT8]
            write_json(folder / onnx.CONFIG, config | {"checked": checked})
        found = [ONNX_CHECKED.format(precision=one, **checked[one]) for one in checked]
        how = f"config.json names {config['file']}; {'; '.join(found)}; checked on {machine()}"
        max_words = experiment.data.max_words
        asked = (
            f"It reads the raw text, as in training {cut_in_words(max_words)}, at most {length} "
            f"tokens, and needs onnxruntime, tokenizers and numpy alone. It was checked on "
            f"{machine()}:\n\n" + "\n".join(f"- {line}." for line in found)
        )
        call = CALL_ONNX.format(
            folder=str(target),
            word=WORD.pattern,
            words=max_words or 0,
            cut_words=first_words(max_words),
            text=EXAMPLE,
        )
        write_card(experiment, name, target, asked, call, TEXT_CLASSIFICATION)
    return target, how


def check_onnx(experiment: Experiment, source: Path, folder: Path) -> dict[str, dict]:
    """Precision → what its answers to validation and test rows have in common with those of the
    exported model."""
    from letterhead.models import onnx

    decoder = experiment.decoder.model_copy(update={"dtype": "float32"})
    float32 = experiment.model_copy(update={"decoder": decoder})
    texts = {
        split: [row["text"] for row in results.read_rows(experiment, split)]
        for split in results.SPLITS
    }
    texts = {split: of_split for split, of_split in texts.items() if of_split}
    classify = load_classifier(float32, str(source))
    expected = {split: classify(of_split) for split, of_split in texts.items()}
    checked = {}
    for precision in onnx.FILES:
        model = onnx.OnnxClassifier(folder, precision)
        logits = {split: model.logits(of_split).astype(float) for split, of_split in texts.items()}
        same = {
            split: int((logits[split].argmax(axis=1) == expected[split].argmax(axis=1)).sum())
            for split in texts
        }
        smallest = np.finfo(float).tiny
        expected_logits = np.log(np.clip(expected["test"], smallest, None))
        checked[precision] = {
            "same": same["test"],
            "rows": len(texts["test"]),
            "validation_same": same.get("validation", 0),
            "validation_rows": len(texts.get("validation", ())),
            "difference": float(np.abs(centred(logits["test"]) - centred(expected_logits)).max()),
        }
    return checked


def centred(logits: np.ndarray) -> np.ndarray:
    """Logits less their mean over the classes, shape (rows, classes); of log-probabilities the
    same."""
    return logits - logits.mean(axis=1, keepdims=True)


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
    head, max_words = method_of(name).head(experiment), experiment.data.max_words
    length = head.max_length
    asked = (
        f"It reads the raw text, as in training {cut_in_words(max_words)}, at most {length} tokens."
    )
    if head.long_texts != "cut":
        asked += (
            f" Of a longer text Letterhead gives it more than the beginning (`long_texts: "
            f"{head.long_texts}`), which the lines below do not."
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


def first_words(max_words: int | None) -> str:
    """The same in a few words, for a comment."""
    return f" (its first {max_words} words)" if max_words else ""


def read_text(imports: str, max_words: int | None, more_names: str) -> str:
    """Lines of Python that do to a text what training did."""
    cut_words = first_words(max_words)
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
    method = method_of(name)
    if not method.reads_prompt and method.head(experiment).long_texts == "chunks":
        raise LetterheadError(
            f"{name}: answers by the mean over a text's chunks (long_texts), which a model alone "
            f"does not; label files with make predict, or serve it with make serve"
        )
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
    run(
        main,
        __doc__.splitlines()[0],
        options={"model": "a method, or METHOD@STEP"},
        optional={"format": " or ".join(FORMATS)},
    )
