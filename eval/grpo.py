"""What GRPO made, in both modes: option perplexity on test and validation rows, and answers with thinking on test rows.

python -m eval.grpo --experiment quick
"""

import os

from letterhead.config.experiment import Experiment
from letterhead.models import checkpoints
from letterhead.models.answers import READING
from letterhead.models.scoring import load_decoder
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import OFFLINE, Stage, run, stage_outputs


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    from eval.score import score_model, scoring_inputs, split_prompts
    from eval.thinking import SAMPLING, think

    made = stage_outputs(experiment, "grpo") | stage_outputs(experiment, "data")
    thinking = experiment.eval.thinking.model_dump(exclude={"batch"})
    inputs = {
        "made": made,
        "thinking": thinking,
        "sampling": SAMPLING,
        "reading": READING,
        **scoring_inputs(experiment, made),
    }
    stage = Stage(experiment, "eval-grpo", inputs)
    folder = checkpoints.whole_checkpoints(experiment.run_folder / "grpo" / "checkpoints")[-1]
    step = checkpoints.step_of(folder)
    if not stage.is_current():
        scored = score_model(experiment, step, folder, made, *split_prompts(experiment), method="grpo")
        with Workers(process_count(), load_decoder, folder, experiment.decoder.dtype) as workers:
            think(experiment, workers, scored["test"], stage, f"grpo_think@{step}")
        files = [file for split in scored for file in results.result_files(experiment, f"grpo@{step}", split)]
        files += results.result_files(experiment, f"grpo_think@{step}", "test")
        stage.finish(files, rows=scored["test"]["n"], scoring_seconds=sum(of["seconds"] for of in scored.values()))
    for name in (f"grpo@{step}", f"grpo_think@{step}"):
        result = results.read_result(experiment, name, "test")
        print(f"{name}: accuracy {result['accuracy']:.4f}, macro F1 {result['f1_macro']:.4f}, {result['n']} test rows")


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
