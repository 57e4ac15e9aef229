"""The words of the report's first screen, in English and, for an experiment that asks in Chinese,
in Chinese."""

from letterhead.config.experiment import CHINESE, ENGLISH
from letterhead.stats.decision import COSTS_MORE, FITS, UNDECIDED

DEARER, UNPRICED = "dearer", "price unknown"
PER_MILLION, MULTIPLY_ADDS = "per_million_rows", "multiply_adds_per_row"

PHRASES = {
    ENGLISH: {
        "ship": "Ship {shipped}.",
        "too few": "No decision. A loss of {margin:g} of {metric} is allowed, and {n:,} test rows "
        "can't show so small a one, whichever method is best. The highest seen is {shipped}.",
        "open": "No decision. No method is shown to lose less than {margin:g} of {metric} against "
        "every other one. The highest seen is {shipped}.",
        "trained": "{title} ({rows:,} training rows)",
        "untrained": "{title} (no training)",
        "best": "{top} has the highest {metric}, {value:.3f} on {n:,} test rows, {errors:,} of "
        "them wrong",
        "why none": "{best}. The next, {second}, has {second_errors:,} wrong.",
        "why cheaper": "{ship}, {metric} {shipped_value:.3f} on {n:,} test rows, is the cheapest "
        "that is shown to lose less than {margin:g}. {best}.",
        "why best": "{best}; no cheaper method is shown to be within {margin:g} of it.",
        "why cheapest": "{best}, and none is cheaper.",
        "method": "method",
        "rows": "rows",
        "interval": "95 % interval",
        "times": "price, times",
        "milliseconds": "ms a row here",
        "verdict": "verdict",
        "behind": "behind the highest (bounds)",
        "fresh rows": "fresh rows, at least",
        "range": "{low} to {high}",
        "below": "Rows: labelled rows needed for training, of a cascade those of the half that "
        "needs more. Price: {unit}, the cheapest is 1; of a cascade the upper end of its 95 % "
        "interval. Milliseconds: test rows scored at once on this machine, a cascade's computed "
        "from its halves'.",
        "left out": "Left out, for time (leave_out): {methods}.",
        PER_MILLION: "a million rows in service, in the currency of bench.price_per_hour",
        MULTIPLY_ADDS: "multiply-adds a row, tokenising left out",
        "price": "price ({unit})",
        "on test rows": "{metric} on test rows",
        "margin": "the margin",
        "behind axis": "behind the highest",
        "macro_f1": "macro F1",
        "cost": "minus the mean cost",
        "f1": "F1",
        "accuracy": "accuracy",
        "recall": "recall",
        "precision": "precision",
        "of class": "{metric} of {label}",
        **{word: word for word in (FITS, COSTS_MORE, UNDECIDED, DEARER, UNPRICED)},
    },
    CHINESE: {  # a blank stands between Chinese and Latin letters
        "ship": "建议上线：{shipped}。",
        "too few": "无法定论。允许的损失为 {margin:g}（{metric}），而无论哪种方法最好，"
        "{n:,} 条测试样本都不足以证明这么小的损失。目前最高的是{shipped}。",
        "open": "无法定论。没有一种方法被证明相对其他每一种的损失都低于 {margin:g}（{metric}）。"
        "目前最高的是{shipped}。",
        "trained": "{title}（{rows:,} 条训练样本）",
        "untrained": "{title}（未训练）",
        "best": "{top}的{metric}最高，在 {n:,} 条测试样本上为 {value:.3f}，错 {errors:,} 条",
        "why none": "{best}；其次是{second}，错 {second_errors:,} 条。",
        "why cheaper": "{ship}在 {n:,} 条测试样本上的{metric}为 {shipped_value:.3f}，在被证明损失"
        "低于 {margin:g} 的方法中最便宜。{best}。",
        "why best": "{best}；更便宜的方法都未被证明与它相差不到 {margin:g}。",
        "why cheapest": "{best}，也没有更便宜的方法。",
        "method": "方法",
        "rows": "训练样本",
        "interval": "95 % 区间",
        "times": "价格（倍）",
        "milliseconds": "此机每条毫秒",
        "verdict": "判定",
        "behind": "落后最高者（上下界）",
        "fresh rows": "至少还需的新样本",
        "range": "{low} 至 {high}",
        "below": "训练样本：训练所需的标注条数，级联取所需较多的一半。价格：{unit}，最便宜者为 1；"
        "级联取其 95 % 区间的上端。毫秒：本机一次评完测试样本的平均，级联由其两半算得。",
        "left out": "为省时间未参评（leave_out）：{methods}。",
        PER_MILLION: "上线后每百万条的费用，货币同 bench.price_per_hour",
        MULTIPLY_ADDS: "每条文本的乘加次数（不含分词）",
        "price": "价格（{unit}）",
        "on test rows": "测试样本上的{metric}",
        "margin": "允许的损失",
        "behind axis": "落后最高者",
        "macro_f1": "宏平均 F1 ",
        "cost": "负的平均代价",
        "f1": " F1 ",
        "accuracy": "准确率",
        "recall": "召回率",
        "precision": "精确率",
        "of class": "“{label}”的{metric}",
        FITS: "达标",
        COSTS_MORE: "损失过大",
        UNDECIDED: "未定",
        DEARER: "更贵",
        UNPRICED: "价格未知",
    },
}

# Of large numbers, the largest first
SIZES = {
    ENGLISH: ((1e12, " trillion"), (1e9, " billion"), (1e6, " million")),
    CHINESE: ((1e12, " 万亿"), (1e8, " 亿"), (1e4, " 万")),
}


def phrase(language: str, name: str, **values: object) -> str:
    """A phrase of the first screen with its values in place.

    Examples
    --------
    >>> phrase("en", "ship", shipped="TF-IDF"), phrase("zh", "ship", shipped="TF-IDF")
    ('Ship TF-IDF.', '建议上线：TF-IDF。')
    """
    return PHRASES[language][name].format(**values)


def metric_title(metric: str, language: str = ENGLISH) -> str:
    """`compare.metric` in words.

    Examples
    --------
    >>> metric_title("macro_f1"), metric_title("recall:spam"), metric_title("cost")
    ('macro F1', 'recall of spam', 'minus the mean cost')
    """
    kind, _, label = metric.partition(":")
    title = phrase(language, kind)
    return phrase(language, "of class", metric=title, label=label) if label else title
