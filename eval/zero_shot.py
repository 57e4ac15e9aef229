"""What the decoder knows before training: option perplexity, the same calibrated, and an answer after thinking.

python -m eval.zero_shot --experiment quick
"""

import os

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.models import checkpoints
from letterhead.models.answers import READING
from letterhead.models.scoring import load_decoder, score_in_parts, softmax
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import OFFLINE, Stage, run, stage_outputs

CONTENT_FREE = "N/A"  # Zhao et al. 2021, "Calibrate before use"


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    from eval.score import score_model, scoring_inputs, split_prompts
    from eval.thinking import SAMPLING, think

    made, folder = stage_outputs(experiment, "data"), experiment.decoder.folder
    inputs = {
        "model": checkpoints.model_identity(folder),
        "rows": [made[str(experiment.data_folder / f"{split}.jsonl")] for split in results.SPLITS],
        "thinking": experiment.eval.thinking.model_dump(exclude={"batch"}),
        "sampling": SAMPLING,
        "reading": READING,
        "content_free": CONTENT_FREE,
        "seed": experiment.seed,
        **scoring_inputs(experiment, made),
    }
    stage = Stage(experiment, "zero-shot", inputs)
    if not stage.is_current():
        encoder, prompts = split_prompts(experiment)
        scored, files = score_model(experiment, 0, folder, made, encoder, prompts), []
        with Workers(process_count(), load_decoder, folder, experiment.decoder.dtype) as workers:
            with_end = experiment.prompt.options == "names"
            asked = (workers, [encoder.encode(CONTENT_FREE)], encoder.answers, with_end, experiment.eval.batch_tokens)
            empty, _ = score_in_parts(*asked)
            for split, result in scored.items():
                write_scored(experiment, split, result, prompts(split)[0], empty)
                for name in ("zero_shot_no_think", "zero_shot_calibrated"):
                    files += results.result_files(experiment, name, split)
            think(experiment, workers, scored["test"], stage, "zero_shot_think")
        files += results.result_files(experiment, "zero_shot_think", "test")
        seconds, tokens = (sum(result[key] for result in scored.values()) for key in ("seconds", "tokens"))
        stage.finish(files, rows=scored["test"]["n"], tokens=tokens, scoring_seconds=seconds)
    print(summary(experiment))


def write_scored(experiment: Experiment, split: str, result: dict, rows: list[dict], empty) -> None:
    """Write the two rows that come from one scoring: as it is, and minus the scores of a text without content."""
    lines = results.read_predictions(experiment, "sft@0", split)
    perplexity = np.array([[line["perplexity"][label] for label in experiment.labels] for line in lines])
    score = -np.log(perplexity) * (1 if experiment.eval.score == "mean" else empty.token_count)
    kept = ("seconds", "tokens", "parameters", "dtype", "model", "inputs_sha256")
    measured = {key: result[key] for key in kept}
    own = {"perplexity": perplexity, "eval_loss": result["eval_loss"]}
    for name, shift, more in (("no_think", 0, own), ("calibrated", empty.score(experiment.eval.score), {})):
        probabilities = softmax(score - shift)
        results.write_result(experiment, f"zero_shot_{name}", split, rows, probabilities=probabilities, **more, **measured)


def summary(experiment: Experiment) -> str:
    """The rows in a few lines for the terminal."""
    lines = []
    for name in ("zero_shot_no_think", "zero_shot_calibrated", "zero_shot_think"):
        result = results.read_result(experiment, name, "test")
        lines.append(
            f"{name}: accuracy {result['accuracy']:.4f}, macro F1 {result['f1_macro']:.4f}, {result['n']} test rows"
        )
    t = result["thinking"]
    lines.append(
        f"thinking: {t['thought']} of {result['n']} answers hold a thought, {t['unfinished']} unfinished within "
        f"{t['budget_tokens']} tokens, {t['unparsed']} without an option (both wrong); {t['times_one_forward']:.0f}x the "
        f"time of option perplexity by one forward pass a row, whose accuracy on the same rows is "
        f"{t['no_think_accuracy_same_rows']:.4f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
