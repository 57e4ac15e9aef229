"""Score one model by the options' perplexity on each split; zero-shot and every SFT checkpoint go
through here."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import model_identity, sha256_file, sha256_json
from letterhead.models import checkpoints
from letterhead.models.prompt import PromptEncoder, load_scoring_encoder, prompt_inputs
from letterhead.models.scoring import load_decoder, score_in_parts
from letterhead.pipeline import FIGURES, SFT
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers

# split → its rows, and their prompts as token ids
Prompts = Callable[[str], tuple[list[dict], list[list[int]]]]


def scoring_inputs(experiment: Experiment, stage_files: dict[str, str]) -> dict:
    """What decides a score but model and rows; how rows are batched does not.

    Parameters
    ----------
    made : path → sha256 of what earlier stages made
    """
    examples = experiment.eval.examples
    return {
        **prompt_inputs(experiment),
        "score": experiment.eval.score,
        "option_order": experiment.eval.option_order,
        "examples": examples
        and [examples, stage_files[str(experiment.data_folder / "decoder_train.jsonl")]],
        "seed": experiment.seed,
        "figures": FIGURES,
        "dtype": experiment.decoder.dtype,
    }


def split_prompts(experiment: Experiment) -> tuple[PromptEncoder, Prompts]:
    """The prompt's encoder, and a function that gives a split's rows and prompts, encoded once."""
    encoder = load_scoring_encoder(experiment)

    @cache
    def prompts(split: str) -> tuple[list[dict], list[list[int]]]:
        rows = results.read_rows(experiment, split)
        return rows, [encoder.encode(row["text"]) for row in rows]

    return encoder, prompts


def score_model(
    experiment: Experiment,
    step: int,
    folder: Path,
    stage_files: dict[str, str],
    encoder: PromptEncoder,
    prompts: Prompts,
    train_loss: float | None = None,
    method: str = SFT.name,
) -> dict[str, results.Result]:
    """Score a model on each split that has rows, unless that was done from the same inputs; writes
    METHOD@STEP.

    Parameters
    ----------
    made : path → sha256 of what earlier stages made

    Returns
    -------
    dict : split → result
    """
    checkpoints.require_model(folder)
    weights = {
        p.name: stage_files.get(str(p)) or sha256_file(p)
        for p in sorted(folder.glob("*.safetensors"))
    }
    if (base := checkpoints.base_of(folder)) != folder:
        weights |= {"base": model_identity(base)}
        weights |= {checkpoints.ADAPTER: sha256_file(folder / checkpoints.ADAPTER)}
    name, scored = f"{method}@{step}", {}
    how, with_end = experiment.eval.score, experiment.prompt.options == "names"
    asked = folder, experiment.decoder.dtype, True, True
    with Workers(process_count(), load_decoder, *asked) as workers:
        for split in results.SPLITS:
            rows_file = experiment.data_folder / f"{split}.jsonl"
            if not rows_file.stat().st_size:
                continue
            inputs = sha256_json(
                {
                    "weights": weights,
                    "rows": stage_files[str(rows_file)],
                    **scoring_inputs(experiment, stage_files),
                }
            )
            if kept := results.kept_result(experiment, name, split, inputs):
                scored[split] = kept
                continue
            rows, ids = prompts(split)
            scores, seconds = score_in_parts(
                workers,
                ids,
                encoder.answers,
                with_end,
                experiment.eval.batch_tokens,
                f"step {step}, {split}",
            )
            truth = results.class_numbers(experiment, rows)
            own = scores.log_likelihood[np.arange(len(rows)), truth] / scores.token_count[truth]
            scored[split] = results.write_result(
                experiment,
                name,
                split,
                rows,
                probabilities=scores.probabilities(how),
                perplexity=scores.perplexity,
                train_loss=train_loss,
                eval_loss=float(-own.mean()),
                seconds=round(seconds, 3),
                tokens=scores.tokens,
                **workers.map(checkpoints.model_facts, [()])[0],
                model=str(folder),
                inputs_sha256=inputs,
                **cuts(experiment, encoder, rows),
            )
    return scored


def cuts(experiment: Experiment, encoder: PromptEncoder, rows: list[dict]) -> dict[str, int]:
    """With examples, how many of these and of the rows' texts are cut so that the prompt fits
    `cutoff_len`."""
    if not experiment.eval.examples:
        return {}
    return {
        "examples_cut": encoder.examples_cut,
        "texts_cut": sum(encoder.is_cut(row["text"]) for row in rows),
    }
