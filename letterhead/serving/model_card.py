"""The README.md of an exported model, as model hubs read it: data, prompt, figures with intervals,
how to call it."""

from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from omegaconf import OmegaConf

from letterhead.config.experiment import Experiment
from letterhead.config.models import source_name
from letterhead.files import LetterheadError, atomic_open, escape_markdown, read_json
from letterhead.pipeline import ALL, Method, method_of
from letterhead.runs import contenders, results
from letterhead.runs.results import Result

EXPERIMENT = "experiment.yaml"


def write_card(
    experiment: Experiment, name: str, folder: Path, asked: str, call: str, pipeline_tag: str | None
) -> Path:
    """Write README.md beside an exported model, and the experiment that made it.

    Parameters
    ----------
    name : the method and its step
    asked : what the model is to be given, in Markdown
    call : lines of Python that call it
    pipeline_tag : the task by which hubs offer it, None where none fits

    Raises
    ------
    LetterheadError : the data card is gone
    """
    path = experiment.data_folder / "data_card.json"
    if (card := read_json(path)) is None:
        raise LetterheadError(f"{path}: gone; run: make data EXP={experiment.name}")
    step = name.partition("@")[2]
    method = method_of(name)
    how = "fine-tuned by SetFit" if method.is_saved else "frozen"
    fitted = f"{how}, with logistic regression" if method.model else "with logistic regression"
    training = f"trained to step {step}" if step else fitted
    section = method.section(experiment) if method.model else None
    of_training = results.parse_result(results.result_files(experiment, name, "test")[0])
    source = source_name(section.model) if section else "TF-IDF of words and word pairs"
    library = "transformers" if step else "sentence-transformers" if section else "scikit-learn"
    library = "onnx" if any(folder.glob("*.onnx")) else library
    data = ModelCardData(
        license=(section and section.license) or "other",
        base_model=source.removeprefix("hf:") if source.startswith("hf:") else None,
        library_name=library,
        pipeline_tag=pipeline_tag,
        metrics=["f1", "accuracy"],
        tags=["letterhead"],
        model_name=folder.name,
        eval_results=_for_hubs(experiment, of_training) if of_training else None,
    )
    counts, shared = (
        card["rows"],
        max(card["shared_with_train"].get("test", 0), len(card["near_duplicates"]["test"])),
    )
    learnt = counts["train"] if method.rows == ALL else card["shared"]["rows"]
    chosen = "for validation" if method.fitter else "to choose a step by"
    twice = f" {shared} of the test rows stand in train too, or nearly." if shared else ""
    paragraphs = [
        f"---\n{data.to_yaml()}\n---",
        f"# {escape_markdown(experiment.name)}, {name}",
        f"{escape_markdown(experiment.title)}. Classes: "
        f"{', '.join(map(escape_markdown, experiment.labels))}.",
        "## Figures",
        _table(of_training) if of_training else "Not measured.",
        "## Data",
        f"{escape_markdown(shown_source(experiment))} "
        f"({escape_markdown(experiment.data.license or 'its license is not said')}): "
        f"{learnt:,} rows to train on, {counts['validation']:,} {chosen}, "
        f"{counts['test']:,} to measure on.{twice}",
        "## Model",
        f"{escape_markdown(source)}, {training}, seed {experiment.seed}. "
        f"{adapter_in_words(experiment, method)}The experiment is in {EXPERIMENT}.",
        *(
            [f"Its last layer is divided by the temperature that validation rows say, {at:.2f}."]
            if (at := contenders.temperature_of(experiment, name))
            else []
        ),
        "## How to call it",
        asked,
        f"```python\n{call.strip()}\n```",
    ]
    values = experiment.model_dump(mode="json")
    values["data"]["source"] = shown_source(experiment)
    with atomic_open(folder / EXPERIMENT) as file:
        file.write(OmegaConf.to_yaml(OmegaConf.create(values)))
    with atomic_open(folder / "README.md") as file:
        file.write("\n\n".join(paragraphs) + "\n")
    return folder / "README.md"


def adapter_in_words(experiment: Experiment, method: Method) -> str:
    """The adapter that a method trained, which is merged with its base here; nothing for a method
    that trains the whole model."""
    head = method.settings and method.head(experiment)
    lora = head.lora if head else experiment.decoder.sft.lora if method.has_steps else None
    if lora is None:
        return ""
    targets = "all linear layers" if lora.targets == "all" else ", ".join(lora.targets)
    return (
        f"A low-rank adapter was trained and is merged with its base: rank {lora.rank}, alpha "
        f"{lora.alpha or 2 * lora.rank}, to {escape_markdown(targets)}. "
    )


def shown_source(experiment: Experiment) -> str:
    """Where the data come from; of a path on somebody's disk, which is nobody's business, the last
    part alone."""
    source = experiment.data.source
    return (
        source if source.startswith(("hf:", "pypi:")) else Path(source.replace("/{split}", "")).name
    )


def _for_hubs(experiment: Experiment, result: Result) -> list[EvalResult]:
    task = {
        "task_type": "text-classification",
        "dataset_type": "custom",
        "dataset_name": experiment.name,
        "dataset_split": "test",
    }
    values = {"f1": ("macro F1", result.f1_macro), "accuracy": ("accuracy", result.accuracy)}
    return [
        EvalResult(metric_type=kind, metric_name=title, metric_value=round(value, 4), **task)
        for kind, (title, value) in values.items()
    ]


def _table(result: Result) -> str:
    low, high = result.f1_macro_ci95
    return (
        "| macro F1 | 95 % interval | accuracy | test rows |\n| ---: | :---: | ---: | ---: |\n"
        f"| {result.f1_macro:.3f} | {low:.3f} to {high:.3f} | "
        f"{result.accuracy:.3f} | {result.n} |"
    )
