"""A trained method as a function from texts to probabilities: what `predict` runs and what the
bench measures."""

import difflib
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from threading import Lock

import numpy as np

from letterhead import pipeline
from letterhead.config.experiment import Experiment
from letterhead.config.models import Head
from letterhead.files import LetterheadError, read_json
from letterhead.models import checkpoints, embeddings, onnx, tfidf
from letterhead.models.fitted import fit_method
from letterhead.pipeline import CASCADE, HOSTED_LLM, METHODS, Method, find_method, method_of
from letterhead.runs import contenders, results
from letterhead.runs.processes import Workers
from letterhead.stats.cascade import Cascade
from letterhead.stats.metrics import tempered

# Beside an exported model that reads the prompt, not the text alone: how it was checked
ON_PROMPT = "letterhead_export.json"
# In the folder of an exported cascade, beside those of its halves
EXPORTED_CASCADE = "cascade.json"
# An encoder knows some 512 positions, a decoder thousands.
MANY_POSITIONS = 1024
CHUNK = 1024  # rows that are labelled at a time
# Texts → probabilities, shape (rows, classes)
Classifier = Callable[[Sequence[str]], np.ndarray]


def named_method(experiment: Experiment, name: str) -> str:
    """The method (and step) that a name stands for: `best`, or a method without a step, is the
    comparison's choice.

    Raises
    ------
    LetterheadError : nothing was compared yet, or no such method
    """
    if "@" in name or is_source(name) or (":" in name and find_method(name) is CASCADE):
        return name
    method = METHODS.get(name)
    if name != "best" and not (method and method.loader):
        known = ["best", *(one.name for one in METHODS.values() if one.loader)]
        near = difflib.get_close_matches(name, known, 1)
        mend = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
        raise LetterheadError(f"{name}: no such method; {mend}")
    if method and not method.is_in(experiment):
        raise LetterheadError(
            f"{name}: {experiment.name} has no such method, for its rows or its keys (leave_out "
            f"is one)"
        )
    if method and not method.has_steps and method is not CASCADE:
        return name
    decided = read_json(experiment.results_folder / "decision.json")
    comparison = read_json(experiment.results_folder / "comparison.json")
    if comparison is None or (name == "best" and decided is None):
        raise LetterheadError(
            f"{name}: {experiment.name} has no report yet, which chooses it; run: make report "
            f"EXP={experiment.name}"
        )
    shipped = decided and decided["ship"]
    if name == "best" or (method is CASCADE and shipped and find_method(shipped) is CASCADE):
        return shipped
    if method is CASCADE and (frozen := read_json(pipeline.cascades_file(experiment))):
        return min(frozen, key=lambda full: frozen[full][0]["order"])
    for full in comparison["methods"]:
        if find_method(full) is method:
            return full
    raise LetterheadError(
        f"{name}: no such method; choose best or one of {', '.join(comparison['methods'])}"
    )


def is_source(name: str) -> bool:
    """Whether a name stands for a model of its own, hf:OWNER/ID[@REVISION] or a path, such as `make
    export` writes."""
    return "/" in name


def whole_folder(experiment: Experiment, name: str) -> Path:
    """The folder of a method's whole model, as another program loads it: where an adapter was
    trained, that of the model which it makes with its base.

    Raises
    ------
    LetterheadError : as `model_folder` and `whole_model`
    """
    method = find_method(name)
    folder = model_folder(experiment, name)
    return whole_model(folder, experiment.labels, bool(method and method.settings))


def model_folder(experiment: Experiment, name: str) -> Path:
    """The folder of a method's model, or of its adapter.

    Raises
    ------
    LetterheadError : no such method, its checkpoint is not there (of the heads the best and the
        last are kept), or it learnt other labels, texts or prompts than the experiment has
    """
    if is_source(name):
        return (
            Path("model/hub") / name.removeprefix("hf:").replace("/", "--")
            if name.startswith("hf:")
            else Path(name)
        )
    method, step = find_method(name), name.partition("@")[2]
    if method is None or not method.model:
        known = ", ".join(f"{one.name}@STEP" for one in METHODS.values() if one.has_steps)
        raise LetterheadError(f"{name}: no such method; choose best, or {known}")
    if method.is_saved:
        folder = method.saved(experiment)
        if not embeddings.is_saved(folder):
            raise LetterheadError(
                f"{folder}: no model; run: make {method.target} EXP={experiment.name}"
            )
        _require_same_reading(experiment, name, method)
        return folder
    if not method.is_trained or method.fitter or step == "0":
        return method.section(experiment).folder
    folder = method.checkpoints(experiment)
    kept = [str(checkpoints.step_of(path)) for path in checkpoints.whole_checkpoints(folder)]
    if step not in kept:
        raise LetterheadError(
            f"{name}: no whole checkpoint; {folder} holds steps {', '.join(kept) or 'none'}"
        )
    _require_same_reading(experiment, name, method)
    return folder / f"checkpoint-{step}"


def whole_model(folder: Path, labels: Sequence[str], has_head: bool) -> Path:
    """The folder of a checkpoint's whole model: one that holds an adapter is merged with its base
    once, and written.

    Raises
    ------
    LetterheadError : there is no room for it
    """
    if checkpoints.base_of(folder) == folder:
        return folder
    from letterhead.models import adapters, heads
    from letterhead.models.scoring import load_merged_decoder

    def load(folder: Path):
        return heads.load_head(folder, labels) if has_head else load_merged_decoder(folder)

    return adapters.write_merged(folder, load)


def _require_same_reading(experiment: Experiment, name: str, method: Method) -> None:
    """A model that learnt other labels or other texts would answer all the same."""
    then = (read_json(experiment.run_folder / method.trained_by / "stage.json") or {}).get(
        "reading", {}
    )
    now = experiment.reading
    if not method.reads_prompt:
        del now["prompt"]
    for section in ("encoder", "decoder"):
        if (method.model, method.settings) != (section, "head"):
            del now[f"{section}.head"]
    if changed := [key for key, value in now.items() if then.get(key, value) != value]:
        raise LetterheadError(
            f"{name}: was trained with another {' and '.join(changed)} than the experiment "
            f"has now; give the value of then, "
            f"or train anew: make report EXP={experiment.name}"
        )


def load_classifier(experiment: Experiment, name: str) -> Classifier:
    """Load a method by its full name (see `named_method`), its probabilities at the temperature
    that validation rows say.

    Raises
    ------
    LetterheadError : no such method or checkpoint, or one that gives no probabilities; the
        classifier raises it where a probability is not a number
    """
    classify, at = load_raw(experiment, name), contenders.temperature_of(experiment, name)
    if at is None:
        return classify

    def calibrated(texts: Sequence[str]) -> np.ndarray:
        probabilities = classify(texts)
        answered = probabilities.any(axis=1)
        probabilities[answered] = tempered(probabilities[answered], at)
        return probabilities

    return calibrated


def load_raw(experiment: Experiment, name: str) -> Classifier:
    """The same with probabilities as the model gives them; a cascade is a `CascadeClassifier`,
    whose halves are checked."""
    classify = _load(experiment, name)
    if isinstance(classify, CascadeClassifier):
        return classify

    def checked(texts: Sequence[str]) -> np.ndarray:
        probabilities = classify(texts)
        results.require_finite(probabilities, "predicting", name)
        return probabilities

    return checked


def _load(experiment: Experiment, name: str) -> Classifier:
    if is_cascade(name):
        return load_cascade_method(experiment, name)
    if is_source(name):
        return _exported(experiment, model_folder(experiment, name))
    method = find_method(name)
    if method is None or not method.loader:
        raise LetterheadError(
            f"{name}: can't be used to predict; choose one that gives probabilities, like "
            f"bert or sft"
        )
    return method.load()(experiment, name)


def load_fitted_method(experiment: Experiment, name: str) -> Classifier:
    """A method that is fitted in seconds."""
    score = fit_method(experiment, method_of(name).name).score
    return lambda texts: score(texts).probabilities


def load_saved_method(experiment: Experiment, name: str) -> Classifier:
    """A method whose stage left it as a model of its own."""
    return embeddings.load_saved(model_folder(experiment, name))


def load_head_method(experiment: Experiment, name: str) -> Classifier:
    """A checkpoint with a linear head."""
    method, folder = method_of(name), model_folder(experiment, name)
    return _head(
        experiment, folder, experiment.labels, method.head(experiment), method.reads_prompt
    )


def load_options_method(experiment: Experiment, name: str) -> Classifier:
    """A decoder that answers with an option."""
    return _options(experiment, model_folder(experiment, name))


class CascadeClassifier:
    """Two methods as one: the dear one is asked where the cheap one is not sure.

    Parameters
    ----------
    frozen : what validation rows said
    cheap, dear : the two methods
    """

    def __init__(self, frozen: Cascade, cheap: Classifier, dear: Classifier):
        self.frozen, self.cheap, self.dear = frozen, cheap, dear

    def answer(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Probabilities, shape (rows, classes), and whether the dear method answered, shape
        (rows,)."""
        cheap = self.cheap(texts)
        deferred = self.frozen.is_deferred(cheap)
        passed = [text for text, is_passed in zip(texts, deferred, strict=True) if is_passed]
        dear = self.dear(passed) if passed else cheap[:0]
        return self.frozen.combine(cheap, dear, deferred), deferred

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        return self.answer(texts)[0]


def is_cascade(name: str) -> bool:
    """Whether a name stands for a cascade of the comparison, or for the folder of an exported
    one."""
    if is_source(name):
        return (Path(name) / EXPORTED_CASCADE).is_file()
    return find_method(name) is CASCADE


def asks_a_service(experiment: Experiment, name: str) -> bool:
    """Whether a method asks a hosted LLM, which is paid for."""
    parts = [name]
    if is_cascade(name):
        frozen = frozen_cascade(experiment, name)
        parts = [frozen.cheap, frozen.dear]
    return any(find_method(part) is HOSTED_LLM for part in parts)


def frozen_cascade(experiment: Experiment, name: str) -> Cascade:
    """A cascade as validation rows froze it.

    Raises
    ------
    LetterheadError : there is none
    """
    if is_source(name):  # its halves have their temperatures in them
        halves = (str(Path(name) / half) for half in ("cheap", "dear"))
        frozen = read_json(Path(name) / EXPORTED_CASCADE)
        return Cascade(*halves, (1.0, 1.0), frozen["threshold"], frozen["validation_share"])
    path = pipeline.cascades_file(experiment)
    if not CASCADE.when(experiment):
        raise LetterheadError(f"{name}: {experiment.name} has too few validation rows for cascades")
    if name not in (found := read_json(path) or {}):
        known = ", ".join(found) or "no cascade"
        raise LetterheadError(f"{name}: {path} holds {known}; choose of these")
    known = {field.name for field in fields(Cascade)}
    return Cascade(**{key: value for key, value in found[name][0].items() if key in known})


def load_cascade_method(experiment: Experiment, name: str) -> CascadeClassifier:
    """A cascade: both of its methods."""
    frozen = frozen_cascade(experiment, name)
    halves = (load_raw(experiment, half) for half in (frozen.cheap, frozen.dear))
    return CascadeClassifier(frozen, *halves)


def in_parts(workers: Workers) -> Classifier:
    """A classifier whose rows are spread over workers that have loaded one each."""

    def classify(texts: Sequence[str]) -> np.ndarray:
        order = np.argsort([len(text) for text in texts], kind="stable")
        parts = [part for rank in range(workers.n) if len(part := order[rank :: workers.n])]
        found = workers.map(_classify, [([texts[row] for row in part],) for part in parts])
        probabilities = np.empty((len(texts), found[0].shape[1]))
        for part, of_part in zip(parts, found, strict=True):
            probabilities[part] = of_part
        return probabilities

    return classify


def _classify(classifier: Classifier, texts: Sequence[str]) -> np.ndarray:
    return classifier(texts)


def _head(
    experiment: Experiment, folder: Path, labels: Sequence[str], head: Head, on_prompt: bool
) -> Classifier:
    from letterhead.models import heads
    from letterhead.models.precision import precision
    from letterhead.models.prompt import OptionEncoder, TextEncoder, load_prompt_encoder

    tokenizer, base = heads.load_tokenizer(folder), checkpoints.base_of(folder)
    model = heads.for_inference(
        heads.load_head(folder, labels), precision(experiment.decoder.dtype, base)
    )
    encoder = TextEncoder(tokenizer, head.max_length, head.long_texts)
    if on_prompt:
        encoder = OptionEncoder(load_prompt_encoder(experiment, folder=folder))
    turn = Lock()

    def classify(texts: Sequence[str]) -> np.ndarray:
        ids = encoder.encode(texts)  # while another thread's texts are in the model
        with turn:
            budget = experiment.eval.batch_tokens
            return heads.classify(model, tokenizer, ids, budget, encoder.parts)

    return classify


def _exported(experiment: Experiment, folder: Path) -> Classifier:
    config = read_json(folder / "config.json") or {}
    labels = [
        label
        for _, label in sorted(config.get("id2label", {}).items(), key=lambda pair: int(pair[0]))
    ]
    if sorted(labels) != sorted(experiment.labels):
        raise LetterheadError(
            f"{folder}: its classes are {', '.join(labels) or 'not named'}, and the experiment's "
            f"{', '.join(experiment.labels)}; choose a model of these labels, or name them "
            f"so in its config.json (id2label)"
        )
    columns = [labels.index(label) for label in experiment.labels]
    for saved in (onnx, embeddings, tfidf):
        if saved.is_saved(folder):
            classify_saved = saved.load_saved(folder)
            return lambda texts: classify_saved(texts)[:, columns]
    on_prompt = (folder / ON_PROMPT).is_file()
    section = (
        experiment.encoder
        if config.get("max_position_embeddings", 0) < MANY_POSITIONS
        else experiment.decoder
    )
    classify = _head(experiment, folder, labels, section.head, on_prompt)
    return lambda texts: classify(texts)[:, columns]


def _options(experiment: Experiment, folder: Path) -> Classifier:
    from letterhead.models.prompt import load_prompt_encoder
    from letterhead.models.scoring import load_decoder, score_options

    encoder, model = load_prompt_encoder(experiment), load_decoder(folder, experiment.decoder.dtype)
    with_end, budget, how = (
        experiment.prompt.options == "names",
        experiment.eval.batch_tokens,
        experiment.eval.score,
    )
    turn = Lock()

    def classify(texts: Sequence[str]) -> np.ndarray:
        prompts = [encoder.encode(text) for text in texts]
        with turn:
            return score_options(model, prompts, encoder.answers, with_end, budget).probabilities(
                how
            )

    return classify
