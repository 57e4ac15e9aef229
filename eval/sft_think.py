"""The chosen SFT checkpoint with thinking: answers generated freely, for a model that has learnt a teacher's thoughts.

python -m eval.sft_think --experiment quick
"""

import os
from pathlib import Path

from letterhead.config.experiment import Experiment
from letterhead.models.answers import READING
from letterhead.runs import results
from letterhead.runs.devices import process_count
from letterhead.runs.processes import Workers
from letterhead.runs.stage import OFFLINE, Stage, run, stage_outputs


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    if experiment.distill is None:
        print("no section distill: no thoughts were learnt")
        return
    from eval.compare import choose
    from eval.thinking import SAMPLING, think
    from letterhead.models.scoring import load_decoder

    name, chosen = choose(experiment, "sft", stage_outputs(experiment, "eval-ckpts"))
    no_think = results.read_result(experiment, name, "test")
    inputs = {
        "no_think": no_think["inputs_sha256"],
        "thinking": experiment.eval.thinking.model_dump(exclude={"batch"}),
        "sampling": SAMPLING,
        "reading": READING,
        "seed": experiment.seed,
    }
    stage = Stage(experiment, "sft-think", inputs)
    made = f"sft_think@{chosen['step']}"
    if not stage.is_current():
        with Workers(process_count(), load_decoder, Path(no_think["model"]), experiment.decoder.dtype) as workers:
            think(experiment, workers, no_think, stage, made)
        result = results.read_result(experiment, made, "test")
        files = results.result_files(experiment, made, "test")
        stage.finish(list(files), rows=result["n"], tokens=result["tokens"], scoring_seconds=result["seconds"])
    result = results.read_result(experiment, made, "test")
    thinking = result["thinking"]
    print(
        f"{made}: accuracy {result['accuracy']:.4f} on {result['n']} rows, {thinking['thought']} with a thought, "
        f"{thinking['unfinished']} unfinished; without thinking {thinking['no_think_accuracy_same_rows']:.4f}"
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
