"""The README.md of an exported model, as model hubs read it: data, prompt, figures with intervals, how to call it."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from letterhead.experiment import Experiment, in_packages, source_name
from letterhead.records import atomic_open, read_json


def write_card(experiment: Experiment, name: str, folder: Path, asked: str, call: str) -> Path:
    """Write README.md beside an exported model.

    Parameters
    ----------
    name : the method and its step
    asked : what the model is to be given, in words
    call : lines of Python that call it
    """
    method, _, step = name.partition("@")
    section = experiment.encoder if method.startswith("bert") else experiment.decoder
    card = read_json(experiment.data_folder / "data_card.json")
    entry = ((read_json(experiment.results_folder / "comparison.json") or {}).get("methods") or {}).get(name)
    source = source_name(section.model)
    base = source.removeprefix("hf:") if source.startswith("hf:") else None
    data = ModelCardData(
        license=section.license or "other",
        base_model=base,
        library_name="transformers",
        pipeline_tag="text-classification",
        metrics=["f1", "accuracy"],
        tags=["letterhead"],
        model_name=folder.name,
        eval_results=_results(experiment, entry) if entry else None,
    )
    counts = card["rows"]
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# {experiment.name}, {name}",
        f"{experiment.title}. {len(experiment.labels)} classes: {', '.join(map(_plain, experiment.labels))}.",
        "## Figures",
        _figures(entry, counts["test"]) if entry else "Not compared yet (`make compare`).",
        "## Data",
        f"`{_plain(source_name(experiment.data.source))}` ({_plain(experiment.data.license or 'license not said')}): "
        f"{counts['train']:,} rows to train on, {counts['validation']:,} to choose by, {counts['test']:,} to measure on.",
        "## Model",
        f"From `{_plain(', '.join(in_packages(section.model)) or source)}`, step {step}, trained with Letterhead "
        f"(experiment `{experiment.name}`, seed {experiment.seed}).",
        "## How to call it",
        asked,
        f"```python\n{call.strip()}\n```",
    ]
    path = folder / "README.md"
    with atomic_open(path) as file:
        file.write("\n\n".join(lines) + "\n")
    return path


def _plain(text: str) -> str:
    """A text from the data that Markdown does not read as markup."""
    return " ".join(text.split()).replace("<", "&lt;").replace("`", "'").replace("|", "\\|")


def _results(experiment: Experiment, entry: dict) -> list[EvalResult]:
    of = {"task_type": "text-classification", "dataset_type": "custom", "dataset_name": experiment.name}
    of["dataset_split"] = "test"
    values = {"f1": ("macro F1", entry["f1_macro"]), "accuracy": ("accuracy", entry["accuracy"])}
    return [
        EvalResult(metric_type=kind, metric_name=title, metric_value=round(value, 4), **of)
        for kind, (title, value) in values.items()
    ]


def _figures(entry: dict, n: int) -> str:
    low, high = entry["f1_macro_ci95"]
    return (
        f"| macro F1 | 95 % interval | accuracy | test rows |\n| ---: | :---: | ---: | ---: |\n"
        f"| {entry['f1_macro']:.3f} | {low:.3f} to {high:.3f} | {entry['accuracy']:.3f} | {entry['n']} |\n\n"
        f"The step was chosen on {entry['chosen_on']}; none of the {n:,} test rows took part in training or choice."
    )
