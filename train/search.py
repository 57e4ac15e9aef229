"""Choose a training's learning rate on validation rows (`search`), by Optuna; test rows are not
looked at.

Trials are kept in STAGE/search.db: a search that was cut off goes on, and repeats no trial that it
has finished.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from letterhead.config.experiment import Experiment
from letterhead.config.models import Search
from letterhead.files import LetterheadError
from letterhead.models.callbacks import Diverged
from letterhead.runs import results

RATE, ERROR = "learning_rate", "error"
# A trial is given up where its loss is above the median of the others at the same step; the first
# so many are not.
BEFORE_PRUNING = 2


@dataclass(frozen=True)
class Searched:
    """What a search found.

    Attributes
    ----------
    rate : the learning rate of the lowest loss on validation rows
    loss, loss_before : that loss, and the one of the rate that the experiment names
    trials : how many were trained, the `pruned` among them not to their end
    seconds : of all trials
    """

    rate: float
    loss: float
    loss_before: float | None
    trials: int
    pruned: int
    seconds: float


def search(
    settings: Search,
    first: float,
    train_at: Callable[[float, optuna.Trial], float],
    folder: Path,
    key: str,
    experiment: Experiment,
    inputs_sha256: str,
) -> Searched:
    """Train at several rates and take the one with the lowest loss on validation rows.

    `first` and the rates of `settings` come first; what is left of its trials lies between the
    lowest and the highest of them, chosen by TPE (Bergstra et al. 2011).

    Parameters
    ----------
    first : the learning rate that the experiment names
    train_at : a rate and Optuna's trial → the loss, which may be reported to the trial on the way;
        Diverged ends the trial alone, any other error the search
    folder : the stage's, which takes search.db
    key : of the settings in the experiment

    Raises
    ------
    LetterheadError : no validation rows, or every trial diverged
    """
    require_validation(experiment, key)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'search.db'}",
        study_name=inputs_sha256,
        load_if_exists=True,
        pruner=optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING),
    )
    rates = list(dict.fromkeys([first, *settings.rates]))
    queue(study, rates)

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float(RATE, min(rates), max(rates), log=True)
        print(f"trial {trial.number + 1}: learning rate {rate:.3g}", flush=True)
        try:
            loss = train_at(rate, trial)
            if not math.isfinite(loss):
                raise Diverged(f"the loss on validation rows is {loss}")
            return loss
        except Diverged as error:
            print(error, flush=True)
            trial.set_user_attr(ERROR, str(error))
            raise optuna.TrialPruned from None

    while len(ended := finished(study)) < settings.trials:
        if ended and seconds_of(ended) > settings.seconds:
            break
        # A stream for each trial: a search that goes on draws no rate that it drew before.
        study.sampler = optuna.samplers.TPESampler(seed=experiment.seed + len(ended))
        study.optimize(objective, n_trials=1, gc_after_trial=True)
    return outcome(study, first, key)


def require_validation(experiment: Experiment, key: str) -> None:
    """Make sure that there are rows to choose by.

    Raises
    ------
    LetterheadError : there are none; names the key that wants them
    """
    if not results.read_rows(experiment, "validation"):
        raise LetterheadError(
            f"{key}: there are no validation rows to choose by; set data.rows.validation"
        )


def queue(study: optuna.Study, rates: Sequence[float]) -> None:
    """Queue the rates that were not tried yet, and the trials that were cut off: killed, they are
    still running; interrupted, they have failed."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)

    def tried(*kinds: optuna.trial.TrialState) -> list[float]:
        found = [
            trial.params or trial.system_attrs.get("fixed_params", {})
            for trial in study.get_trials(states=kinds)
        ]
        return [params[RATE] for params in found if params]

    known = {*tried(states.COMPLETE, states.PRUNED, states.WAITING)}
    for rate in dict.fromkeys([*rates, *tried(states.FAIL)]):
        if rate not in known:
            study.enqueue_trial({RATE: rate})


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that came to an end of their own: trained, pruned, or diverged."""
    states = optuna.trial.TrialState
    return study.get_trials(states=(states.COMPLETE, states.PRUNED))


def seconds_of(trials: Sequence[optuna.trial.FrozenTrial]) -> float:
    """How long trials took."""
    return sum(trial.duration.total_seconds() for trial in trials)


def outcome(study: optuna.Study, first: float, key: str) -> Searched:
    """What the trials of a search have found."""
    trials = finished(study)
    reached = {
        trial.params[RATE]: trial.value
        for trial in trials
        if trial.state == optuna.trial.TrialState.COMPLETE
    }
    if not reached:
        last = trials[-1].user_attrs[ERROR]
        raise LetterheadError(
            f"{key}: every trial diverged; name lower rates. The last one: {last}"
        )
    rate = min(reached, key=reached.get)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials)
    return Searched(
        rate, reached[rate], reached.get(first), len(trials), pruned, round(seconds_of(trials), 1)
    )
