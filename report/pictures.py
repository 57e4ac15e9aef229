"""The report's pictures: price against quality, ranking with intervals, F1 and losses against step,
confusion matrices, reliability."""

from pathlib import Path

import numpy as np
from matplotlib import font_manager
from sklearn.calibration import calibration_curve

from letterhead.config.experiment import ENGLISH
from letterhead.stats.decision import COSTS_MORE, FITS, UNDECIDED
from letterhead.stats.figures import plt, save
from letterhead.stats.metrics import ECE_BINS
from letterhead.stats.phrases import DEARER, UNPRICED, metric_title, phrase

# Labels may be Chinese; of these the ones that the machine has stand behind matplotlib's own font.
HAN_FONTS = {
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "WenQuanYi Zen Hei",
    "WenQuanYi Micro Hei",
    "SimHei",
    "PingFang SC",
}
MATRIX_LABELS = 20
# Of a verdict: colour and marker
MARKERS = {
    FITS: ("#2e7d4f", "o"),
    UNDECIDED: ("#4a6fa5", "s"),
    COSTS_MORE: ("#b3402e", "v"),
    DEARER: ("#777777", "D"),
    UNPRICED: ("#777777", "x"),
}


def use_fonts() -> bool:
    """Have matplotlib fall back on a font with Han characters; whether there is one."""
    found = sorted(HAN_FONTS & {font.name for font in font_manager.fontManager.ttflist})
    plt.rcParams["font.family"] = ["DejaVu Sans", *found]
    return bool(found)


def draw_frontier(
    path: Path,
    caption: str,
    rows: list[dict],
    shipped: str,
    curves: dict[str, list[list[float]]],
    margin: float,
    unit: str,
    metric: str,
    language: str = ENGLISH,
) -> None:
    """Quality against price, both with their intervals, and on the right how far behind the highest
    that is; each method has its number of the first table.

    Parameters
    ----------
    rows : of `verdict.table`
    shipped : the name of the method to be shipped, or of the highest seen
    curves : cascade → price and metric at any share of rows for its dear half
    unit, metric : `price_unit` and `metric` of the decision
    """
    metric = metric_title(metric, language)
    figure, axes = plt.subplots(figsize=(8.5, 4.6), layout="constrained")
    known = [(number, row) for number, row in enumerate(rows, 1) if row["price"]]
    top = max(row["value"] for row in rows)
    for points in curves.values():
        axes.plot(*zip(*points, strict=True), ":", color="#8fa8c8", linewidth=1.3)
    labelled = set()
    for number, row in known:
        color, marker = MARKERS[row["verdict"]]
        behind, low, high = row["behind"] or (0, 0, 0)
        x = row["price_seen"]
        axes.plot([x, x], [top - high, top - low], color=color, alpha=0.35, linewidth=3)
        axes.plot(row["price"], [top - behind] * 2, color=color, alpha=0.35, linewidth=3)
        label = None if row["verdict"] in labelled else phrase(language, row["verdict"])
        labelled.add(row["verdict"])
        axes.plot(x, top - behind, marker, color=color, markersize=7, label=label)
        if row["name"] == shipped:
            axes.plot(x, top - behind, "o", color="#1b3a63", markersize=15, fillstyle="none")
        beside = {"xytext": (9 if number % 2 else -14, 4), "textcoords": "offset points"}
        axes.annotate(str(number), (x, top - behind), **beside, size=9)
    bound = phrase(language, "margin")
    axes.axhline(top - margin, color="grey", linestyle="--", linewidth=0.8, label=bound)
    axes.set(
        xscale="log",
        xlabel=phrase(language, "price", unit=phrase(language, unit)),
        ylabel=phrase(language, "on test rows", metric=metric).strip().replace("$", r"\$"),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="best")
    if 0 < top <= 1:  # bounds may lie above what there is
        axes.set_ylim(top=min(axes.get_ylim()[1], 1.005))
    behind = axes.secondary_yaxis("right", functions=(lambda y: top - y, lambda lost: top - lost))
    behind.set_ylabel(phrase(language, "behind axis"))
    save(figure, path, caption)


def draw_ranking(path: Path, caption: str, groups: list[list[dict]]) -> None:
    """Macro F1 with its interval, the best on top; a panel with an axis of its own for each group.

    Parameters
    ----------
    groups : entries of the comparison, best first in each
    """
    groups = [methods for methods in groups if methods]
    heights = [0.5 * len(methods) + 0.6 for methods in groups]
    figure, panels = plt.subplots(
        len(groups),
        figsize=(7.5, sum(heights)),
        layout="constrained",
        height_ratios=heights,
        squeeze=False,
    )
    for axes, methods in zip(panels[:, 0], groups, strict=True):
        for y, entry in enumerate(reversed(methods)):
            low, high = entry["f1_macro_ci95"]
            axes.plot([low, high], [y, y], color="#8fa8c8", linewidth=5, solid_capstyle="butt")
            axes.plot(entry["f1_macro"], y, "o", color="#1b3a63")
            if len(each := [training["f1_macro"] for training in entry["trainings"]]) > 1:
                axes.plot(each, [y - 0.25] * len(each), "|", color="#1b3a63")
            axes.annotate(
                f"{entry['f1_macro']:.3f}",
                (entry["f1_macro"], y),
                (0, 8),
                textcoords="offset points",
                ha="center",
                size=8,
            )
        learnt = [
            f"{rows:,} training rows" if (rows := m["cost"]["train_rows"]) else "no training"
            for m in reversed(methods)
        ]
        names = [
            f"{m['title']}\n{rows}, {m['n']:,} test rows"
            for m, rows in zip(reversed(methods), learnt, strict=True)
        ]
        axes.set_yticks(range(len(methods)), names, fontsize=8)
        axes.set(ylim=(-0.6, len(methods) - 0.2))
        axes.grid(axis="x", alpha=0.3)
    panels[-1, 0].set_xlabel("macro F1 on test rows, 95 % interval")
    save(figure, path, caption)


def draw_curves(
    path: Path,
    caption: str,
    panels: dict[str, dict[str, tuple[list, list]]],
    ylabel: str,
    log: bool = False,
) -> None:
    """One panel a method, its lines against step.

    Parameters
    ----------
    panels : title → line's name → (steps, values)
    """
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(4 * len(panels), 3.4),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (title, lines) in zip(grid[0], panels.items(), strict=True):
        for name, (steps, values) in lines.items():
            axes.plot(
                steps, values, marker="o" if len(steps) < 25 else None, markersize=3.5, label=name
            )
        axes.set(title=title, xlabel="training step", yscale="log" if log else "linear")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    grid[0][0].set_ylabel(ylabel)
    save(figure, path, caption)


def draw_confusions(path: Path, caption: str, methods: list[dict], labels: list[str]) -> None:
    """One confusion matrix a method, rows true, shares of the true class; the last column may be
    `no answer`."""
    columns = min(3, len(methods))
    lines = -(-len(methods) // columns)
    size = 2.6 + min(len(labels), MATRIX_LABELS) * 0.12
    shape = {"figsize": (size * columns, size * lines), "layout": "constrained", "squeeze": False}
    figure, grid = plt.subplots(lines, columns, **shape)
    for axes in grid.flat[len(methods) :]:
        axes.axis("off")
    for axes, entry in zip(grid.flat, methods, strict=False):
        counts = np.array(entry["confusion"])
        share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
        axes.set_title(entry["title"], fontsize=8)
        written = [label.replace("$", r"\$") for label in labels]  # else matplotlib reads formulas
        named = [*written, "no answer"][: counts.shape[1]]
        if len(labels) <= MATRIX_LABELS:
            axes.set_xticks(range(len(named)), named, rotation=60, ha="right", fontsize=7)
            axes.set_yticks(range(len(labels)), written, fontsize=7)
        if len(labels) <= 10:
            for (i, j), n in np.ndenumerate(counts):
                axes.text(
                    j,
                    i,
                    n,
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if share[i, j] > 0.5 else "black",
                )
        axes.set_xlabel("predicted", fontsize=7)
        axes.set_ylabel("true", fontsize=7)
    save(figure, path, caption)


def draw_reliability(
    path: Path, caption: str, methods: dict[str, tuple[np.ndarray, np.ndarray, float, float]]
) -> None:
    """Accuracy against confidence in equal-width bins; the area of a point is the share of rows in
    its bin.

    Parameters
    ----------
    methods : title → (confidence of the prediction, whether it was right, ECE, what a perfectly
        calibrated one would show)
    """
    figure, axes = plt.subplots(figsize=(8.5, 4.4), layout="constrained")
    axes.plot([0, 1], [0, 1], linestyle="--", color="grey", linewidth=1)
    for title, (confidence, right, ece, floor) in methods.items():
        accuracy, mean_confidence = calibration_curve(
            right, confidence, n_bins=ECE_BINS, strategy="uniform"
        )
        rows = np.histogram(confidence, bins=ECE_BINS, range=(0, 1))[0]
        (line,) = axes.plot(
            mean_confidence,
            accuracy,
            linewidth=0.8,
            label=f"{title}, ECE {ece:.3f} (floor {floor:.3f})",
        )
        axes.scatter(
            mean_confidence,
            accuracy,
            s=4 + 150 * rows[rows > 0] / rows.sum(),
            color=line.get_color(),
            alpha=0.8,
        )
    axes.set(
        xlabel="confidence (highest probability)",
        ylabel="accuracy",
        xlim=(0, 1.02),
        ylim=(-0.02, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
    save(figure, path, caption)


def draw_service(path: Path, caption: str, rows: dict[str, dict], objective_ms: float) -> None:
    """Throughput of the closed loops, and the latency of the open ones against the rate at which
    requests arrive.

    Parameters
    ----------
    rows : title → row of the bench
    """
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 0.36 * len(rows) + 2.4), layout="constrained"
    )
    clients = list(next(iter(rows.values()))["closed"])
    height = 0.8 / len(clients)
    for number, n in enumerate(clients):
        reached = [row["closed"][n]["rps"] for row in rows.values()]
        at = np.arange(len(rows)) + (number - (len(clients) - 1) / 2) * height
        left.barh(at, reached, height, label=f"{n} client{'' if n == '1' else 's'}")
    left.set_yticks(range(len(rows)), list(rows), fontsize=8)
    left.set(xlabel="requests per second, logarithmic", xscale="log")
    left.invert_yaxis()
    left.grid(axis="x", alpha=0.3)
    left.legend(fontsize=8)
    for title, row in rows.items():
        if row["open"]:
            loops = sorted(row["open"], key=lambda loop: loop["rate"])
            rates = [loop["rate"] for loop in loops]
            (line,) = right.plot(
                rates, [loop["p99_ms"] for loop in loops], marker="o", markersize=4, label=title
            )
            right.plot(
                rates,
                [loop["p50_ms"] for loop in loops],
                ":",
                marker=".",
                markersize=4,
                color=line.get_color(),
            )
    right.axhline(objective_ms, linestyle="--", color="grey", linewidth=1)
    right.set(
        xlabel="requests per second that arrive (Poisson)",
        ylabel="latency, ms: p99 (line), p50 (dots)",
    )
    right.set(xscale="log", yscale="log")
    right.grid(alpha=0.3)
    if right.get_lines()[1:]:
        right.legend(fontsize=7)
    save(figure, path, caption)
