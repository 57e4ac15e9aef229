"""Train every method once more for each further seed of an experiment; nothing where there is one seed.

python -m study.seeds --experiment quick
"""

from letterhead.config.experiment import Experiment
from letterhead.runs.stage import run
from study.cells import make, seed_keys, settings

TARGETS = ("eval-ckpts", "sft-think", "bert", "bert-all", "linear-head", "sft-options")


def main(experiment: Experiment, name: str, overrides: str) -> None:
    for training in experiment.trainings()[1:]:
        make(name, settings(overrides, seed_keys(training, experiment)), TARGETS)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0], with_arguments=True)
