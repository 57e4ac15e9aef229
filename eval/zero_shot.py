"""What the decoder knows before training: option perplexity, the same calibrated, and an answer
after thinking.

python -m eval.zero_shot --experiment quick
"""

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.models.scoring import load_decoder, score_in_parts, softmax
from letterhead.pipeline import (
    DATA,
    SFT,
    ZERO_SHOT,
    ZERO_SHOT_CALIBRATED,
    ZERO_SHOT_LETTERS,
    ZERO_SHOT_THINKING,
    outputs,
)
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import StageRun, is_absent, run

CONTENT_FREE = "N/A"  # Zhao et al. 2021, "Calibrate before use"


def main(experiment: Experiment) -> None:
    from eval.score import score_model, split_prompts
    from eval.thinking import think

    if is_absent(ZERO_SHOT, experiment):
        return
    stage_files, folder = outputs(DATA, experiment), experiment.decoder.folder
    stage = StageRun(experiment, ZERO_SHOT)
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        encoder, prompts = split_prompts(experiment)
        scored, files = score_model(experiment, 0, folder, stage_files, encoder, prompts), []
        with Workers(process_count(), load_decoder, folder, experiment.decoder.dtype) as workers:
            with_end = experiment.prompt.options == "names"
            asked = (
                workers,
                [encoder.encode(CONTENT_FREE)],
                encoder.answers,
                with_end,
                experiment.eval.batch_tokens,
            )
            empty, _ = score_in_parts(*asked)
            for split, result in scored.items():
                write_scored(experiment, split, result, prompts(split)[0], empty)
                for method in (ZERO_SHOT_LETTERS, ZERO_SHOT_CALIBRATED):
                    files += results.result_files(experiment, method.name, split)
            think(experiment, workers, scored["test"], stage, ZERO_SHOT_THINKING.name)
        files += results.result_files(experiment, ZERO_SHOT_THINKING.name, "test")
        seconds, tokens = (
            sum(getattr(result, key) for result in scored.values()) for key in ("seconds", "tokens")
        )
        print(summary(experiment))
        untrained = results.read_result(experiment, ZERO_SHOT_LETTERS.name, "test")
        headline = f"macro F1 {untrained.f1_macro:.3f} on {untrained.n} test rows, untrained"
        stage.finish(
            files, headline=headline, rows=untrained.n, tokens=tokens, scoring_seconds=seconds
        )


def write_scored(
    experiment: Experiment, split: str, result: results.Result, rows: list[dict], empty
) -> None:
    """Write the two rows that come from one scoring: as it is, and minus the scores of a text
    without content."""
    lines = results.read_predictions(experiment, f"{SFT.name}@0", split)
    perplexity = np.array(
        [[line["perplexity"][label] for label in experiment.labels] for line in lines]
    )
    score = -np.log(perplexity) * (1 if experiment.eval.score == "mean" else empty.token_count)
    kept = ("seconds", "tokens", "parameters", "dtype", "model", "inputs_sha256")
    measured = {key: getattr(result, key) for key in kept}
    own = {"perplexity": perplexity, "eval_loss": result.eval_loss}
    shifts = (
        (ZERO_SHOT_LETTERS, 0, own),
        (ZERO_SHOT_CALIBRATED, empty.score(experiment.eval.score), {}),
    )
    for method, shift, more in shifts:
        probabilities = softmax(score - shift)
        results.write_result(
            experiment, method.name, split, rows, probabilities=probabilities, **more, **measured
        )


def summary(experiment: Experiment) -> str:
    """The rows in a few lines for the terminal."""
    lines = []
    for name in (ZERO_SHOT_LETTERS.name, ZERO_SHOT_CALIBRATED.name, ZERO_SHOT_THINKING.name):
        result = results.read_result(experiment, name, "test")
        lines.append(
            f"{name}: accuracy {result.accuracy:.4f}, macro F1 {result.f1_macro:.4f}, "
            f"{result.n} test rows"
        )
    t = result.thinking
    lines.append(
        f"thinking: {t['thought']} of {result.n} answers hold a thought, "
        f"{t['unfinished']} unfinished within "
        f"{t['budget_tokens']} tokens, {t['unparsed']} without an option (both wrong); "
        f"{t['times_one_forward']:.0f}x the "
        f"time of option perplexity by one forward pass a row, whose accuracy on the same rows is "
        f"{t['no_think_accuracy_same_rows']:.4f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
