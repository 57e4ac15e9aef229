"""Choose cascades on validation rows, freeze them, and only then put them to the test rows.

python -m eval.cascade --experiment quick
"""

import math
from dataclasses import asdict

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import sha256_file, write_json
from letterhead.pipeline import (
    CASCADE,
    CASCADES,
    cascade_members,
    cascades_file,
    most_cascades,
)
from letterhead.runs import contenders, results
from letterhead.runs.contenders import Chosen
from letterhead.runs.stage import StageRun, is_absent, run
from letterhead.stats import cascade
from letterhead.stats.cascade import Cascade, Member
from letterhead.stats.metrics import NO_ANSWER


def main(experiment: Experiment) -> None:
    if is_absent(CASCADES, experiment, "too few validation rows to choose a cascade"):
        return
    stage = StageRun(experiment, CASCADES)
    if stage.is_current():
        stage.tell_current()
        return
    stage.start()
    path, pairs = cascades_file(experiment), choose(experiment)
    frozen = {name: [freeze(*halves) for halves in trainings] for name, trainings in pairs.items()}
    write_json(
        path,
        {
            name: [
                asdict(one) | {"order": order, "sha256": [half.sha256 for half in halves]}
                for one, halves in zip(frozen[name], trainings, strict=True)
            ]
            for order, (name, trainings) in enumerate(pairs.items(), 1)
        },
    )
    # From here on nothing is chosen.
    files = [path]
    for name, trainings in pairs.items():
        for training, one, halves in zip(
            experiment.trainings(), frozen[name], trainings, strict=False
        ):
            for split in results.SPLITS:
                put_to(training, name, one, halves, split, stage.inputs_sha256)
                files += results.result_files(training, name, split)
    found = ", ".join(pairs) or "every one harms its cheap half on validation rows"
    rows = len(results.read_rows(experiment, "test"))
    stage.finish(files, found, rows=rows, training_seconds=0.0, scoring_seconds=0.0)


class Half:
    """A method in one of its trainings, and its answers.

    Parameters
    ----------
    experiment : that of the training
    """

    def __init__(self, experiment: Experiment, chosen: Chosen):
        self.experiment, self.chosen, self.name = experiment, chosen, chosen.name

    @property
    def sha256(self) -> str:
        """Of its predictions on validation rows."""
        return sha256_file(results.result_files(self.experiment, self.name, "validation")[1])

    def probabilities(self, split: str) -> np.ndarray:
        """Shape (rows, classes); all 0 for a row without an answer."""
        number = {label: i for i, label in enumerate(self.experiment.labels)}
        lines = results.read_predictions(self.experiment, self.name, split)
        answers = np.array([number.get(line["prediction"], NO_ANSWER) for line in lines])
        if results.read_result(self.experiment, self.name, split).log_loss is None:
            share = contenders.share_of_hits(self.experiment, self.name)
            return contenders.as_probabilities(answers, len(number), share)
        probabilities = contenders.read_probabilities(self.experiment, self.name, split)
        probabilities[answers == NO_ANSWER] = 0.0
        return probabilities

    def member(self) -> Member:
        """What validation rows show of it."""
        result = self.chosen.validation
        price = math.inf if result.hosted else result.parameters * result.tokens / result.n
        family = self.chosen.method.family
        probabilities = self.probabilities("validation")
        return Member(self.name, family, price, probabilities, self.price_in_errors())

    def price_in_errors(self) -> float:
        """What a hosted LLM's answer to a validation row costs, as a share of an error's price."""
        hosted, settings = self.chosen.validation.hosted, self.experiment.endpoint
        if not hosted or settings.price_of_error is None:
            return 0.0
        return (hosted["cost_per_million"] or 0.0) / 1e6 / settings.price_of_error


def choose(experiment: Experiment) -> dict[str, list[tuple[Half, Half]]]:
    """Each cascade's name → its cheap and its dear half, once a training. The pair is chosen by the
    first."""
    halves = {}
    for method in cascade_members(experiment):
        for name, chosen in contenders.choose_trainings(experiment, method).items():
            trainings = zip(experiment.trainings(), chosen, strict=False)
            halves[name] = [Half(*training) for training in trainings]
    rows = {split: len(results.read_rows(experiment, split)) for split in results.SPLITS}
    known = {
        name: found
        for name, found in halves.items()
        if (one := found[0].chosen).validation
        and (one.result.n, one.validation.n) == (rows["test"], rows["validation"])
    }
    pairs = cascade.choose_pairs(
        validation_truth(experiment),
        [found[0].member() for found in known.values()],
        most_cascades(experiment),
    )
    return {
        f"{CASCADE.name}:{known[dear][0].chosen.method.name}": [
            tuple(known[half][number % len(known[half])] for half in (cheap, dear))
            for number in range(max(len(known[cheap]), len(known[dear])))
        ]
        for cheap, dear in pairs
    }


def freeze(cheap: Half, dear: Half) -> Cascade:
    """The cascade of two methods, from validation rows alone."""
    return cascade.freeze(validation_truth(cheap.experiment), cheap.member(), dear.member())


def validation_truth(experiment: Experiment) -> np.ndarray:
    """Class numbers, shape (rows,)."""
    return results.class_numbers(experiment, results.read_rows(experiment, "validation"))


def put_to(
    training: Experiment,
    name: str,
    frozen: Cascade,
    halves: tuple[Half, Half],
    split: str,
    inputs_sha256: str,
) -> None:
    """Write a cascade's answers to the rows of a split, and their figures."""
    cheap, dear = (half.probabilities(split) for half in halves)
    deferred = frozen.is_deferred(cheap)
    of_cheap, of_dear = (results.read_result(half.experiment, half.name, split) for half in halves)
    share = float(deferred.mean())
    results.write_result(
        training,
        name,
        split,
        results.read_rows(training, split),
        probabilities=frozen.combine(cheap, dear[deferred], deferred),
        halves=asdict(frozen) | {"deferred": int(deferred.sum())},
        seconds=of_cheap.seconds + share * of_dear.seconds,
        tokens=of_cheap.tokens,
        parameters=of_cheap.parameters + of_dear.parameters,
        dtype=of_dear.dtype,
        model=f"{of_cheap.model}; {of_dear.model}",
        inputs_sha256=inputs_sha256,
    )


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
