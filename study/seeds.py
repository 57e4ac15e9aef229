"""Train every method once more for each further seed of an experiment; nothing where there is one
seed.

python -m study.seeds --experiment quick
"""

from letterhead.config.experiment import Experiment
from letterhead.pipeline import SFT_TRAINING, STAGES
from letterhead.runs.stage import run
from study.cells import make, seed_keys, settings


def main(experiment: Experiment, name: str, overrides: str) -> None:
    # SFT is made by the scoring of its checkpoints, which needs it.
    again = [stage for stage in STAGES.values() if stage.retrained and stage is not SFT_TRAINING]
    targets = [stage.make_target for stage in again if stage.is_in(experiment)]
    for training in experiment.trainings()[1:]:
        make(name, settings(overrides, seed_keys(training, experiment)), targets)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], with_arguments=True)
