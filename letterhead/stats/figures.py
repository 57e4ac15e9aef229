"""Pictures: how they are saved, and figures against training step."""

import textwrap
from collections.abc import Sequence
from pathlib import Path

import matplotlib

from letterhead.config.experiment import Experiment

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt


def caption_of(
    experiment: Experiment, seeds: Sequence[int] = (), cells: Sequence[Experiment] = ()
) -> str:
    """What stands under a picture that travels alone: experiment, models and seeds (or those of a
    study's cells)."""
    experiments = cells or [experiment]
    llm, bert = (
        " and ".join(dict.fromkeys(getattr(one, key).folder.name for one in experiments))
        for key in ("decoder", "encoder")
    )
    seeds = seeds or experiment.seeds or [experiment.seed]
    return (
        f"{experiment.name}; LLM: {llm}, BERT: {bert}; seed{'s' * (len(seeds) > 1)} "
        f"{', '.join(map(str, seeds))}"
    )


def save(figure: plt.Figure, path: Path, caption: str = "") -> None:
    """Write a figure as PNG, whole or not at all, and close it; a caption stands small on its
    bottom."""
    if caption:
        width = int(figure.get_figwidth() * 16)
        figure.supxlabel(
            textwrap.fill(caption, width).replace("$", r"\$"), fontsize=7, color="grey"
        )
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    temporary.replace(path)


def plot_against_step(
    path: Path,
    title: str,
    ylabel: str,
    lines: dict[str, tuple[list[float], list[float]]],
    log: bool = False,
) -> None:
    """Draw one line a series: {name: (steps, values)}; a short series gets markers."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (steps, values) in lines.items():
        axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=4, label=name)
    axes.set(title=title, xlabel="training step", ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
