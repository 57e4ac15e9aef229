"""What GRPO made, in both modes: option perplexity on test and validation rows, and answers with
thinking on test rows.

python -m eval.grpo --experiment quick
"""

from letterhead.config.experiment import Experiment
from letterhead.models import checkpoints
from letterhead.models.scoring import load_decoder
from letterhead.pipeline import DATA, GRPO, GRPO_SCORING, GRPO_THINK, GRPO_TRAINING, outputs
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import StageRun, run


def main(experiment: Experiment) -> None:
    from eval.score import score_model, split_prompts
    from eval.thinking import think

    stage_files = outputs(GRPO_TRAINING, experiment) | outputs(DATA, experiment)
    stage = StageRun(experiment, GRPO_SCORING)
    folder = checkpoints.whole_checkpoints(GRPO.checkpoints(experiment))[-1]
    step = checkpoints.step_of(folder)
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        scored = score_model(
            experiment, step, folder, stage_files, *split_prompts(experiment), method=GRPO.name
        )
        with Workers(process_count(), load_decoder, folder, experiment.decoder.dtype) as workers:
            think(experiment, workers, scored["test"], stage, f"{GRPO_THINK.name}@{step}")
        files = [
            file
            for split in scored
            for file in results.result_files(experiment, f"{GRPO.name}@{step}", split)
        ]
        files += results.result_files(experiment, f"{GRPO_THINK.name}@{step}", "test")
        stage.finish(
            files,
            rows=scored["test"].n,
            scoring_seconds=sum(result.seconds for result in scored.values()),
        )
    for name in (f"{GRPO.name}@{step}", f"{GRPO_THINK.name}@{step}"):
        result = results.read_result(experiment, name, "test")
        print(
            f"{name}: accuracy {result.accuracy:.4f}, macro F1 {result.f1_macro:.4f}, "
            f"{result.n} test rows"
        )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
