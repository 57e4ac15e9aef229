"""The chosen SFT checkpoint with thinking: answers generated freely, for a model that has learnt a
teacher's thoughts.

python -m eval.sft_think --experiment quick
"""

from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.pipeline import SFT, SFT_THINK, SFT_THINKING
from letterhead.runs import results
from letterhead.runs.contenders import choose
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import StageRun, is_absent, run


def main(experiment: Experiment) -> None:
    if is_absent(SFT_THINKING, experiment, "no section distill, so no thoughts were learnt"):
        return
    from eval.thinking import think
    from letterhead.models.scoring import load_decoder

    chosen = choose(experiment, SFT)
    no_think = results.read_result(experiment, chosen.name, "test")
    stage = StageRun(experiment, SFT_THINKING)
    name = f"{SFT_THINK.name}@{chosen.result.step}"
    if stage.is_current():
        stage.tell_current()
    else:
        stage.start()
        with Workers(
            process_count(), load_decoder, Path(no_think.model), experiment.decoder.dtype
        ) as workers:
            think(experiment, workers, no_think, stage, name)
        result = results.read_result(experiment, name, "test")
        files = results.result_files(experiment, name, "test")
        thinking = result.thinking
        headline = (
            f"accuracy {result.accuracy:.3f} on {result.n} rows, "
            f"{thinking['thought']} with a thought, "
            f"{thinking['unfinished']} unfinished; without thinking "
            f"{thinking['no_think_accuracy_same_rows']:.3f}"
        )
        stage.finish(
            list(files),
            headline,
            rows=result.n,
            tokens=result.tokens,
            scoring_seconds=result.seconds,
        )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
