"""GRPO by TRL from the chosen SFT checkpoint on, rewarded for the right option and a finished
answer; resumable.

python -m train.grpo --experiment quick
"""

import os
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json
from letterhead.models import checkpoints
from letterhead.models.classifier import whole_model
from letterhead.models.precision import precision
from letterhead.models.prompt import load_prompt_encoder
from letterhead.pipeline import GRPO_TRAINING, SFT
from letterhead.runs import results
from letterhead.runs.contenders import choose
from letterhead.runs.stage import StageRun, run
from train.sft import CLOCK
from train.sft_worker import Clock

REWARDS = ("right_option", "finished")


def main(experiment: Experiment) -> None:
    settings = experiment.grpo
    chosen = choose(experiment, SFT)
    start = results.read_result(experiment, chosen.name, "test")
    stage = StageRun(experiment, GRPO_TRAINING)
    folder, pictures = stage.folder / "checkpoints", [stage.folder / "reward.png"]
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        from letterhead.models import grpo
        from letterhead.stats.figures import plot_against_step

        stage.begin(folder)
        checkpoints.set_aside_broken(folder)
        resume = checkpoints.resumable(folder)
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(stage.folder / "tensorboard")
        encoder = load_prompt_encoder(experiment, thinking=settings.think)
        rows = results.read_rows(experiment, "decoder_train")
        asked = grpo.questions(encoder, rows)
        if not len(asked):
            raise LetterheadError(
                "no prompt works as text, and TRL takes text alone; take another template"
            )
        dtype = precision(experiment.decoder.dtype, experiment.decoder.folder)
        arguments = grpo.arguments(settings, folder, experiment.seed, dtype)
        whole = whole_model(Path(start.model), experiment.labels, has_head=False)
        trainer = grpo.trainer(whole, encoder, asked, settings, arguments)
        trainer.add_callback(Clock(stage.folder / CLOCK))
        state = read_json(resume / "trainer_state.json") if resume else {"global_step": 0}
        if state["global_step"] < settings.steps:
            trainer.train(resume_from_checkpoint=str(resume) if resume else None)
        log = checkpoints.log_history(folder)
        lines = {
            reward: [
                list(values)
                for values in zip(
                    *((one["step"], one[key]) for one in log if key in one), strict=True
                )
            ]
            for reward in REWARDS
            if (key := f"rewards/{reward}/mean")
        }
        plot_against_step(
            pictures[0], f"{experiment.name}: GRPO", "mean reward of a step's answers", lines
        )
        last = checkpoints.whole_checkpoints(folder)[-1]
        stage.finish(
            [*sorted(last.glob("*.safetensors")), last / "trainer_state.json", *pictures],
            rows=len(asked),
            left_out=len(rows) - len(asked),
            start=chosen.name,
            steps=checkpoints.step_of(last),
            training_seconds=read_json(stage.folder / CLOCK)["training_seconds"][
                str(checkpoints.step_of(last))
            ],
            moved={reward: grpo.moved(log, reward) for reward in REWARDS},
            resumed_from=checkpoints.step_of(resume) if resume else 0,
        )
    for reward, by in stage.record["moved"].items():
        print(
            f"{reward}: {by['first']:.3f} over the first quarter of the steps, "
            f"{by['last']:.3f} over the last "
            f"(standard error of the difference {by['standard_error']:.3f})"
        )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
