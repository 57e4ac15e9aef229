"""Which stages of an experiment are done, which are stale, how long each took or will take, and
what runs next.

python -m report.status --experiment quick
"""

from letterhead import pipeline
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, exclusive, write_json
from letterhead.pipeline import DATA, STAGES, Stage
from letterhead.plan.evidence import evidence
from letterhead.plan.time import stage_seconds
from letterhead.rows.fetch import is_there
from letterhead.runs.stage import (
    ESTIMATE,
    is_current,
    is_running,
    minutes,
    read_record,
    run,
    was_asked,
)

DONE = "done"


def main(experiment: Experiment) -> None:
    print(f"{experiment.name}: {experiment.title}")
    card = pipeline.read_card(experiment)
    if card and card["rows"]["test"] and was_asked("status"):
        print(evidence(experiment, card))
    states: dict[str, str] = {}
    for stage in pipeline.stages_of(experiment) if card else usual_stages(experiment):
        states[stage.name] = state(experiment, stage, states)
    seconds = stage_seconds(experiment, card) if states[DATA.name] == DONE else {}
    to_do = [name for name, found in states.items() if found != DONE]
    # A report at work tells how far it is by the plan that it began with.
    if "running" not in states.values():
        with exclusive(experiment.run_folder / ".estimate.lock"):
            write_json(experiment.run_folder / ESTIMATE, {"seconds": seconds, "to_do": to_do})
    if was_asked("status"):
        for name, found in states.items():
            how_long = minutes(seconds[name]) if name in seconds else ""
            if found == DONE:
                how_long = f"took {read_record(experiment.run_folder / name)['seconds']:,.0f} s"
            print(f"  {name:14} {found:28}  {how_long}".rstrip())
    if not to_do:
        print(f"all done: {experiment.run_folder}/report/report.html")
        return
    again = [
        name
        for training in experiment.trainings()[1:]
        for name in to_do_again(training, states[DATA.name], seconds)
    ]
    left = sum(seconds.get(name, 0.0) for name in [*to_do, *again])
    seeds = (
        f", further seeds among them ({', '.join(map(str, experiment.seeds[1:]))})" if again else ""
    )
    how_long = f", {minutes(left)}{seeds}" if seconds else ""
    print(
        f"next: {to_do[0]}; make report EXP={experiment.name} makes what is missing{how_long}",
        flush=True,
    )


def usual_stages(experiment: Experiment) -> list[Stage]:
    """The stages of an experiment whose rows are not made yet: those that hang on nothing but its
    keys."""
    left_out = pipeline.stages_left_out(experiment)
    return [
        stage
        for stage in STAGES.values()
        if stage.when is pipeline.always and stage.name not in left_out
    ]


def to_do_again(training: Experiment, data: str, seconds: dict[str, float]) -> list[str]:
    """What a further seed trains and scores anew and is not done."""
    states = {DATA.name: data}
    for stage in STAGES.values():
        if stage.retrained and stage.name in seconds:
            states[stage.name] = state(training, stage, states)
    return [name for name, found in states.items() if found != DONE and name != DATA.name]


def state(experiment: Experiment, stage: Stage, before: dict[str, str]) -> str:
    """`done`, `running`, `not made`, or `stale`, with what makes it so.

    Parameters
    ----------
    before : the states of the stages before it
    """
    folder = experiment.run_folder / stage.name
    if is_running(experiment, stage.name):
        return "running"
    record = read_record(folder)
    if not record:
        return (
            "begun, goes on" if any((folder / "checkpoints").glob("checkpoint-*")) else "not made"
        )
    try:
        needs = pipeline.stage_needs(stage, experiment)
    except LetterheadError:
        return "stale"  # of an earlier version
    stale = [name for name in needs if before.get(name, DONE) != DONE]
    if stale:
        return f"stale, since {stale[0]} is {before[stale[0]].partition(',')[0]}"
    models = (experiment.decoder, experiment.encoder)
    if stage is DATA and not all(is_there(section.model, section.folder) for section in models):
        return "stale"  # the models are fetched with the data
    try:
        return DONE if is_current(record, pipeline.inputs_sha256(stage, experiment)) else "stale"
    except LetterheadError:
        return "stale"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
