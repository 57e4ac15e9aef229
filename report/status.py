"""Which stages of an experiment are done, which are stale, how long each took or will take, and what runs next.

python -m report.status --experiment quick
"""

from importlib import import_module

from eval import compare
from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, exclusive, read_json, write_json
from letterhead.plan.time import stage_seconds
from letterhead.rows.fetch import is_there
from letterhead.runs.stage import ESTIMATE, ask, is_running, minutes, run

# stage → the module that makes it, and what the module is told
MAKERS = {
    "data": ("prep.data", []),
    "sft": ("train.sft", []),
    "eval-ckpts": ("eval.checkpoints", []),
    "zero-shot": ("eval.zero_shot", []),
    "tfidf": ("train.tfidf", ["tfidf"]),
    "tfidf-all": ("train.tfidf", ["tfidf_all"]),
    "bert": ("train.heads", ["bert"]),
    "bert-all": ("train.heads", ["bert_all"]),
    "linear-head": ("train.heads", ["linear_head"]),
    "sft-think": ("eval.sft_think", []),
    "sft-options": ("train.heads", ["sft_options"]),
    "compare": ("eval.compare", []),
    "report": ("report.build", []),
}
UNUSUAL = {"sft-options", "sft-think", "tfidf-all", "bert-all"}
# What each further seed trains and scores anew
AGAIN = {"sft", "eval-ckpts", "bert", "bert-all", "linear-head", "sft-options"}
# stage → the stages whose files it reads; the others read the data's alone
NEEDS = {"data": [], "eval-ckpts": ["sft"], "sft-think": ["eval-ckpts"], "report": ["compare"]}


def main(experiment: Experiment) -> None:
    card = read_json(experiment.data_folder / "data_card.json")
    named = {*stages_of(experiment), "data", "sft", "report"} if card else set(MAKERS) - UNUSUAL
    states: dict[str, str] = {}
    for name in (of for of in MAKERS if of in named):
        states[name] = state(experiment, name, states)
    seconds = stage_seconds(experiment, card) if states["data"] == "done" else {}
    to_do = [name for name, of in states.items() if of != "done"]
    if "running" not in states.values():  # else a report is at it, and tells how far it is by the plan that it began with
        with exclusive(experiment.run_folder / ".estimate.lock"):
            write_json(experiment.run_folder / ESTIMATE, {"seconds": seconds, "to_do": to_do})
    for name, of in states.items():
        record = read_json(experiment.run_folder / name / "stage.json") or {}
        took = f"took {record['seconds']:,.0f} s" if of == "done" else minutes(seconds[name]) if name in seconds else ""
        print(f"  {name:12} {of:28}  {took}".rstrip())
    if not to_do:
        print(f"all done: {experiment.run_folder}/report/report.html")
        return
    again = [name for training in experiment.trainings()[1:] for name in to_do_again(training, states["data"], seconds)]
    left = sum(seconds.get(name, 0.0) for name in [*to_do, *again])
    seeds = f", further seeds among them ({', '.join(map(str, experiment.seeds[1:]))})" if again else ""
    how_long = f", {minutes(left)}{seeds}" if seconds else ""
    print(f"next: {to_do[0]}; make report EXP={experiment.name} makes what is missing{how_long}", flush=True)


def to_do_again(training: Experiment, data: str, seconds: dict[str, float]) -> list[str]:
    """What a further seed trains and scores anew and is not done."""
    states = {"data": data}
    for name in (of for of in MAKERS if of in seconds.keys() & AGAIN):
        states[name] = state(training, name, states)
    return [name for name, of in states.items() if of != "done" and name != "data"]


def stages_of(experiment: Experiment) -> list[str]:
    """The stages that the report is of, those of methods that are not compared left out."""
    left_out = {compare.METHODS[name][0] for name in set(compare.METHODS) - set(compare.compared(experiment))}
    return [name for name in MAKERS if name not in left_out | {"report"}]


def state(experiment: Experiment, name: str, before: dict[str, str]) -> str:
    """`done`, `running`, `not made`, or `stale`, with what makes it so."""
    (module, told), folder = MAKERS[name], experiment.run_folder / name
    if is_running(experiment, name):
        return "running"
    if not (folder / "stage.json").is_file():
        return "begun, goes on" if any((folder / "checkpoints").glob("checkpoint-*")) else "not made"
    needs = list(before) if name == "compare" else NEEDS.get(name, ["data"])
    if stale := [of for of in needs if before.get(of, "done") != "done"]:
        return f"stale, since {stale[0]} is {before[stale[0]].partition(',')[0]}"
    models = (experiment.decoder, experiment.encoder)
    if name == "data" and not all(is_there(section.model, section.folder) for section in models):
        return "stale"  # the models are fetched with the data
    try:
        return ask(import_module(module).main, experiment, *told)
    except LetterheadError:
        return "stale"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
