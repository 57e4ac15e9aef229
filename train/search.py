"""Choose a training's learning rate on validation rows (`search`), by Optuna; test rows are not
looked at.

Trials are kept in STAGE/search.db: a search that was cut off goes on, and repeats no trial that it
has finished.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import optuna

from letterhead.config.experiment import Experiment
from letterhead.config.models import Search
from letterhead.files import LetterheadError
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
        a LetterheadError, such as that of a training which diverged, ends the trial alone
    folder : the stage's, which takes search.db
    key : of the settings in the experiment

    Raises
    ------
    LetterheadError : no validation rows, or every trial ended with an error
    """
    if not results.read_rows(experiment, "validation"):
        raise LetterheadError(
            f"{key}: there are no validation rows to choose by; set data.rows.validation"
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder / 'search.db'}",
        study_name=inputs_sha256,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=experiment.seed),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=BEFORE_PRUNING),
    )
    rates = list(dict.fromkeys([first, *settings.rates]))
    if not study.trials:
        for rate in rates:
            study.enqueue_trial({RATE: rate})
    begin_again(study)

    def objective(trial: optuna.Trial) -> float:
        rate = trial.suggest_float(RATE, min(rates), max(rates), log=True)
        print(f"trial {trial.number + 1}: learning rate {rate:.3g}", flush=True)
        try:
            return train_at(rate, trial)
        except LetterheadError as error:
            print(error, flush=True)
            trial.set_user_attr(ERROR, str(error))
            raise optuna.TrialPruned from None

    while len(ended := finished(study)) < settings.trials:
        if ended and seconds_of(ended) > settings.seconds:
            break
        study.optimize(objective, n_trials=1)
    return outcome(study, first, key)


def begin_again(study: optuna.Study) -> None:
    """Queue the trials anew that were cut off: killed, they are still running; interrupted, they
    have failed."""
    states = optuna.trial.TrialState
    for trial in study.get_trials(states=(states.RUNNING,)):
        study.tell(trial.number, state=states.FAIL)
    known = {trial.params[RATE] for trial in finished(study)}
    for trial in study.get_trials(states=(states.WAITING,)):
        known.add(trial.system_attrs["fixed_params"][RATE])
    for trial in study.get_trials(states=(states.FAIL,)):
        if trial.params and trial.params[RATE] not in known:
            known.add(trial.params[RATE])
            study.enqueue_trial(trial.params)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """The trials that came to an end of their own: trained, pruned, or with an error."""
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
            f"{key}: every trial ended with an error; mend what the last one says, or name other "
            f"rates: {last}"
        )
    rate = min(reached, key=reached.get)
    pruned = sum(trial.state == optuna.trial.TrialState.PRUNED for trial in trials)
    return Searched(
        rate, reached[rate], reached.get(first), len(trials), pruned, round(seconds_of(trials), 1)
    )
