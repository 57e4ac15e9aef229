"""How long each stage will take (its multiply-adds over a rate: on a CPU that of matrix products,
measured; on a GPU that of the trial of SFT), and what it takes on disk."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.config.models import Head, Lora, Search
from letterhead.files import read_json
from letterhead.models.checkpoints import FLOAT, head_disk, sft_disk
from letterhead.models.cpu import linear_shapes
from letterhead.models.llamafactory import planned_steps, sft_plan, step_of
from letterhead.pipeline import (
    ALL,
    CASCADES,
    COMPARE,
    DECIDE,
    EVAL_CKPTS,
    METHODS,
    REPORT,
    SFT,
    SFT_TRAINING,
    ZERO_SHOT,
    compared_methods,
    inputs_sha256,
    reads_validation,
)
from letterhead.rows.balance import rows_read, sft_validation_rows
from letterhead.runs.devices import device_name, process_count

# Shares of the rate of bare matrix products that training and scoring reach, and seconds to start a
# stage; fitted to stages on two cores each: float32, where products are slower and weigh more, on
# Zen 3. In bfloat16 training reaches 0.36 on Zen 4 and Zen 5, and 0.20 to 0.31 on an Intel Xeon
# with AMX, whose products are faster; what is between is within 1.5 times on all.
TRAINING = {"bfloat16": 0.29, "float32": 0.50}
SCORING = {"bfloat16": 0.60, "float32": 0.70}
START_S = 6.0
# Of logistic regression with C by cross-validation: products of rows, words and classes a second of
# TF-IDF, on two cores of Zen 3, and of rows and classes on embeddings, on an Intel Xeon with AMX
FITTING_S, FITTED_WORDS_A_SECOND, FITTED_EMBEDDINGS_A_SECOND = 2.0, 140_000, 1_150
TRIAL = "trial.json"  # what preflight keeps of the steps that it times
FRAMING = 2  # special tokens of a text, as BERT has
ANSWER_TOKENS = 8  # a trained answer's, in round numbers


def stage_seconds(
    experiment: Experiment, card: dict[str, Any], reached: float | None = None
) -> dict[str, float]:
    """Seconds that each stage of `make report` is expected to take.

    Parameters
    ----------
    card : the data card; it tells rows and lengths of texts
    reached : FLOP a second of training and scoring; None: a CPU's are measured, and a GPU's are
        those of the trial of SFT that preflight made

    Returns
    -------
    dict : stage → seconds; empty where nothing is known: on a GPU without a trial, or of models
        whose layers are not torch's linear ones
    """
    import torch

    decoder, encoder = (section.folder for section in (experiment.decoder, experiment.encoder))
    if torch.cuda.is_available() and reached is None:
        reached = trial_rate(experiment, card)
        if reached is None:
            return {}
    rates = {folder: rate(experiment, folder, reached) for folder in (decoder, encoder)}
    if not all(parameters for parameters, *_ in rates.values()):
        return {}
    rows, shared, lengths = card["rows"], card["shared"]["rows"], card["token_lengths"]
    to_score = rows["validation"] + rows["test"]
    prompt = prompt_tokens(card)

    def head(folder: Path, head: Head, n: int, length: int, texts: dict[str, int]) -> float:
        parts, whole = parts_of_texts(head, texts)
        n = round(n * parts)
        head, (parameters, training, scoring) = head.on(n), rates[folder]
        _, evaluated = planned_steps(
            n,
            head.per_device_train_batch_size,
            head.gradient_accumulation_steps,
            head.num_train_epochs,
            head.eval_steps,
        )
        passed = head.num_train_epochs * n * passes(head.lora) / training
        passed += len(evaluated) * to_score * parts / scoring
        length = min(length, head.max_length) if parts == 1 else whole / parts
        once = START_S + 2 * parameters * length * passed
        return once + searching(head.search, once)

    parameters, training, scoring = rates[decoder]
    steps, saves = sft_plan(experiment, card["shared"]["sft_rows"])
    learnt = steps * math.prod(
        step_of(experiment.sft_arguments())
    )  # rows, as often as they are learnt from
    thinking = (
        min(experiment.eval.thinking.rows or rows["test"], rows["test"])
        * experiment.eval.thinking.tokens
    )
    sft = 2 * START_S + learnt * row_flop(experiment, card) / training
    if reads_validation(experiment):
        looked_at = len(saves) * sft_validation_rows(experiment, card)
        sft += looked_at * 2 * parameters * (prompt + ANSWER_TOKENS) / scoring
    options = lengths.get("options", 0)
    of_row = parameters * (prompt + options) + projection_adds(decoder) * (1 + options)
    once, untrained = 2 * of_row * to_score / scoring, experiment.eval.untrained
    found = {}
    if ZERO_SHOT.is_in(experiment):
        found[ZERO_SHOT.name] = START_S + 2 * parameters * thinking / scoring
    if SFT.is_in(experiment):
        found[SFT_TRAINING.name] = sft + searching(experiment.decoder.sft.search, sft)
        found[EVAL_CKPTS.name] = START_S + once * (len(saves) + untrained)
    if ZERO_SHOT.name in found and not (SFT.is_in(experiment) and untrained):
        found[ZERO_SHOT.name] += once  # else step 0 was scored with the checkpoints
    for method in compared_methods(experiment):
        n = rows["train"] if method.rows == ALL else shared
        if method.settings:
            settings = method.head(experiment)
            length = prompt if method.reads_prompt else lengths[method.model]["p50"]
            read = rows_read(experiment, card, method.rows == ALL)
            found[method.stage] = head(
                method.section(experiment).folder, settings, read, length, lengths[method.model]
            )
        elif method.fitter:
            products, length = n * len(experiment.labels), lengths["encoder"]["p50"]
            rate_of_fit = FITTED_EMBEDDINGS_A_SECOND
            if not method.model:
                products, rate_of_fit = products * length, FITTED_WORDS_A_SECOND
            found[method.stage] = FITTING_S + products / rate_of_fit
            if method.model:
                found[method.stage] += 2 * START_S  # to load sentence-transformers
                parameters, training, scoring = rates[method.section(experiment).folder]
                found[method.stage] += 2 * parameters * length * (n + to_score) / scoring
                if method.is_saved:  # trained on pairs of two texts
                    setfit = experiment.encoder.setfit
                    pairs = min(2 * setfit.iterations * n, setfit.most_steps * setfit.batch)
                    found[method.stage] += 2 * 3 * parameters * length * 2 * pairs / training
    closing = {COMPARE: START_S, DECIDE: START_S / 2, REPORT: 2 * START_S}
    closing |= {CASCADES: START_S} if CASCADES.when(experiment) else {}
    return found | {stage.name: seconds for stage, seconds in closing.items()}


def parts_of_texts(head: Head, lengths: dict[str, int]) -> tuple[float, float]:
    """How many parts a head reads of a text, and how many tokens of it, both in the mean: by the
    percentiles of the texts' lengths, with straight lines between them.

    Parameters
    ----------
    lengths : percentile ("p5" and so on) → tokens, from the data card

    Examples
    --------
    >>> head = Head(max_length=102, long_texts="chunks")
    >>> parts_of_texts(head, {"p5": 50, "p50": 100, "p95": 200, "p99": 400, "p100": 600})
    (1.59, 120.75)
    """
    known = [(int(name[1:]), tokens) for name, tokens in lengths.items()]
    quantiles = np.interp(np.arange(0.5, 100), *zip(*sorted(known), strict=True))
    if head.long_texts != "chunks":
        return 1.0, float(np.minimum(quantiles, head.max_length).mean())
    room = max(1, head.max_length - FRAMING)
    return float(np.ceil(np.maximum(quantiles, 1) / room).mean()), float(quantiles.mean())


def passes(lora: Lora | None) -> int:
    """How many times the work of a forward pass a training step is: the gradients of inputs and of
    weights are one each, and an adapter's weights are few."""
    return 2 if lora else 3


def searching(search: Search | None, once: float) -> float:
    """Seconds of the trials of a search, each of them a training of `once` seconds."""
    return min(search.trials * once, search.seconds + once) if search else 0.0


def stage_bytes(experiment: Experiment, folders: dict[str, Path], rows: int) -> dict[str, int]:
    """Bytes on disk at the peak of each training.

    Parameters
    ----------
    folders : of `decoder` and `encoder`, with their config.json; weights need not be there
    rows : that SFT learns from
    """
    from letterhead.models.adapters import adapter_parameters
    from letterhead.plan.memory import parameter_count

    classes = {"decoder": None, "encoder": len(experiment.labels)}
    whole = {name: parameter_count(folder, classes[name]) for name, folder in folders.items()}

    def trained(name: str, lora: Lora | None) -> int:
        return adapter_parameters(folders[name], lora) if lora else whole[name]

    saves, lora = len(sft_plan(experiment, rows)[1]), experiment.decoder.sft.lora
    peaks = {}
    if SFT.is_in(experiment):
        # With an adapter the best of them makes a whole model, too, for export and service.
        merged = FLOAT * whole["decoder"] if lora else 0
        peaks[SFT_TRAINING.name] = sft_disk(trained("decoder", lora), saves) + merged
    for method in METHODS.values():
        is_trained = method.rows != ALL or experiment.decoder.train_rows is not None
        is_trained = is_trained and method.name not in experiment.leave_out
        if method.settings and (head := method.head(experiment)) and is_trained:
            peaks[method.trained_by] = head_disk(trained(method.model, head.lora))
    return peaks


def prompt_tokens(card: dict[str, Any]) -> int:
    """Tokens of a prompt with a text of median length."""
    return card["token_lengths"]["decoder"]["p50"] + card["token_lengths"]["prompt"]


def row_flop(experiment: Experiment, card: dict[str, Any]) -> float:
    """The FLOP that SFT takes for a row."""
    tokens, lora = prompt_tokens(card) + ANSWER_TOKENS, experiment.decoder.sft.lora
    return passes(lora) * 2 * multiply_adds(experiment.decoder.folder) * tokens


def projection_adds(folder: Path) -> int:
    """Multiply-adds of a decoder's projection onto its vocabulary, for a token that is predicted
    from."""
    config = read_json(folder / "config.json")
    return config["hidden_size"] * config["vocab_size"]


def multiply_adds(folder: Path) -> int:
    """Multiply-adds of a model's linear layers for a token; 0 where its layers are of another
    kind."""
    return sum(i * o * n for (i, o), n in linear_shapes(folder).items())


def trial_of(experiment: Experiment) -> dict[str, Any]:
    """What a trial of SFT must have been of, to stand for this experiment here."""
    inputs = inputs_sha256(SFT_TRAINING, experiment)
    return {"inputs": inputs, "device": device_name(), "processes": process_count()}


def trial_rate(experiment: Experiment, card: dict[str, Any]) -> float | None:
    """FLOP a second of training, from the steps of SFT that preflight timed on this device; None
    where it timed none of these inputs."""
    found = read_json(experiment.run_folder / TRIAL)
    if not found or not trial_of(experiment).items() <= found.items():
        return None
    rows = math.prod(step_of(experiment.sft_arguments()))
    return rows * row_flop(experiment, card) / found["seconds_a_step"]


def rate(
    experiment: Experiment, folder: Path, reached: float | None = None
) -> tuple[int, float, float]:
    """A model's multiply-adds a token, and the FLOP a second that training and scoring reach:
    `reached`, or as measured on this CPU.

    Products are timed anew, in the stages' dtype, once a process.
    """
    from letterhead.models import cpu
    from letterhead.models.precision import precision

    shapes = cpu.linear_shapes(folder)
    if not shapes:
        return 0, 0.0, 0.0
    if reached is not None:
        return multiply_adds(folder), reached, reached
    dtype = precision(experiment.decoder.dtype, folder)
    if dtype not in cpu.measured_rates(folder):
        dtype = "float32"
    flops = 1e9 * cpu.recent_rate(folder, dtype)
    return multiply_adds(folder), flops * TRAINING[dtype], flops * SCORING[dtype]
