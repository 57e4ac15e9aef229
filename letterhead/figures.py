"""Pictures: how they are saved, and figures against training step."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # files only, no display
import matplotlib.pyplot as plt


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure as PNG, whole or not at all, and close it."""
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    plt.close(figure)
    temporary.replace(path)


def plot_against_step(
    path: Path, title: str, ylabel: str, lines: dict[str, tuple[list[float], list[float]]], log: bool = False
) -> None:
    """Draw one line a series: {name: (steps, values)}; a short series gets markers."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, (steps, values) in lines.items():
        axes.plot(steps, values, marker="o" if len(steps) < 30 else None, markersize=4, label=name)
    axes.set(title=title, xlabel="training step", ylabel=ylabel, yscale="log" if log else "linear")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)
