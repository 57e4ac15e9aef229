"""Which stages of an experiment are done, which are stale, how long each took or will take, and what runs next.

python -m report.status --experiment quick
"""

from importlib import import_module

from letterhead.estimate import stage_seconds
from letterhead.experiment import Experiment
from letterhead.records import LetterheadError, read_json, write_json
from letterhead.stage import ESTIMATE, ask, minutes, run
from report.build import stages_of

# stage → the module that makes it with what it is told, and the stages whose files it reads
MAKERS = {
    "data": ("prep.data", [], []),
    "sft": ("sft.train", [], ["data"]),
    "eval-ckpts": ("eval.checkpoints", [], ["data", "sft"]),
    "zero-shot": ("eval.zero_shot", [], ["data"]),
    "tfidf": ("baselines.tfidf", ["tfidf"], ["data"]),
    "tfidf-all": ("baselines.tfidf", ["tfidf_all"], ["data"]),
    "bert": ("baselines.train", ["bert"], ["data"]),
    "bert-all": ("baselines.train", ["bert_all"], ["data"]),
    "linear-head": ("baselines.train", ["linear_head"], ["data"]),
    "sft-options": ("baselines.train", ["sft_options"], ["data"]),
    "sft-think": ("eval.sft_think", [], ["eval-ckpts"]),
    "compare": ("eval.compare", [], ["eval-ckpts", "zero-shot", "tfidf", "bert", "linear-head"]),
    "report": ("report.build", [], ["compare"]),
}


def main(experiment: Experiment) -> None:
    stages = [name for name in MAKERS if name in {*stages_of(experiment), "data", "sft", "report"}]
    states = {}
    for name in stages:
        states[name] = state(experiment, name, states)
    card = read_json(experiment.data_folder / "data_card.json")
    estimated = stage_seconds(experiment, card) if card else {}
    write_json(experiment.run_folder / ESTIMATE, {name: of for name, of in estimated.items() if name in stages})
    for name, of in states.items():
        record = read_json(experiment.run_folder / name / "stage.json") or {}
        took = f"took {record['seconds']:,.0f} s" if of == "done" else minutes(estimated[name]) if name in estimated else ""
        print(f"  {name:12} {of:28}  {took}".rstrip())
    to_do = [name for name, of in states.items() if of != "done"]
    if not to_do:
        print(f"all done: {experiment.run_folder}/report/report.html")
        return
    left = f", {minutes(sum(estimated.get(name, 0.0) for name in to_do))}" if estimated else ""
    print(f"next: {to_do[0]}; make report EXP={experiment.name} makes what is missing{left}", flush=True)


def state(experiment: Experiment, name: str, before: dict[str, str]) -> str:
    """`done`, `running`, `not made`, or `stale`, with what makes it so."""
    module, told, needs = MAKERS[name]
    if not (experiment.run_folder / name / "stage.json").is_file():
        begun = any((experiment.run_folder / name / "checkpoints").glob("checkpoint-*"))
        return "begun, goes on" if begun else "not made"
    if stale := [of for of in needs if before.get(of, "done") != "done"]:
        return f"stale, since {stale[0]} is {before[stale[0]].partition(',')[0]}"
    try:
        return ask(import_module(module).main, experiment, *told)
    except LetterheadError:
        return "stale"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
