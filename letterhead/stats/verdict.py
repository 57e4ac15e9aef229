"""The decision in sentences: what to ship and why, how sure that is, how dear, and what would
change it."""

import math
import unicodedata
from collections.abc import Callable
from typing import Any

import numpy as np

from letterhead.pipeline import METHODS
from letterhead.stats import decision
from letterhead.stats.phrases import (
    DEARER,
    ENGLISH,
    MULTIPLY_ADDS,
    PER_MILLION,
    SIZES,
    UNPRICED,
    metric_title,
    phrase,
)

# A log loss within this ratio of guessing's, and a kappa below that, are those of a method that has
# hardly learnt.
NEAR_GUESSING, LITTLE = 0.7, 0.5
FEW_ROWS = 10  # a class with fewer test rows is named
FEW_SHOWN = 5
ROWS_THAT_DECIDE = {
    "rows_if_as_seen": "if the loss is as seen",
    "rows_if_equal": "if the two are equal",
}


def is_trained(entry: dict) -> bool:
    """Whether an entry of the comparison was trained on rows."""
    return METHODS[entry["method"]].is_trained


def sentence(pair: dict, chosen: dict[str, dict]) -> str:
    """A pair in words."""

    def named(name: str) -> str:
        return f"{chosen[name]['title']} ({chosen[name]['cost']['train_rows']:,} rows)"

    better, worse = (pair["a"], pair["b"]) if pair["f1_difference"] > 0 else (pair["b"], pair["a"])
    low, high = pair["ci95"] if better == pair["a"] else [-end for end in reversed(pair["ci95"])]
    figures = (
        f"F1 {signed(abs(pair['f1_difference']))}, its own 95 % interval {signed(low)} "
        f"to {signed(high)}, "
        f"p = {pair['f1_p_holm']:.2g} after Holm"
    )
    once = all(len(chosen[name]["trainings"]) == 1 for name in (better, worse))
    again = " These are two files; training again may turn it round." if once else ""
    if pair["f1_p_holm"] < decision.ALPHA:
        return f"{named(better)} has a higher macro F1 than {named(worse)}: {figures}.{again}"
    return f"{named(better)} over {named(worse)}: {figures}: chance could do that."


def signed(value: float, digits: int = 3) -> str:
    """A difference with its sign; what rounds to 0 has none.

    Examples
    --------
    >>> signed(0.0126), signed(-0.0001)
    ('+0.013', '0.000')
    """
    return f"{value:+.{digits}f}" if round(value, digits) else f"{0:.{digits}f}"


def words(decided: dict[str, Any], chosen: dict[str, dict]) -> dict:
    """The decision in sentences: `why`, `how_sure`, `how_dear`, `what_would_change`."""
    n, margin, top, ship = decided["n"], decided["margin"], decided["top"], decided["ship"]
    prices, found = decided["prices"], decided["candidates"]
    metric, metric_class = metric_title(decided["metric"]), decided["metric"].partition(":")[2]

    def named(name: str) -> str:
        return with_rows(chosen[name], ENGLISH)

    cheaper = [name for name in found if prices.get(name, math.inf) < prices.get(top, math.inf)]
    if not decided["established"]:
        reason = "why none"
    elif ship != top:
        reason = "why cheaper"
    else:
        reason = "why best" if cheaper else "why cheapest"
    why = because(reason, decided, chosen)
    sure = []
    for name, candidate in found.items():
        other = named(candidate["against"])
        loss, low, high = (
            signed(candidate[key]).removeprefix("+") for key in ("seen", "low", "high")
        )
        if candidate["verdict"] == decision.FITS:
            ahead = f"at least {-candidate['high']:.3f} of {metric} ahead of {other}, the nearest."
            behind = f"a loss of {metric} of at most {high} against {other}; {margin:g} is allowed."
            line = f"{named(name)} is good enough: {ahead if candidate['high'] < 0 else behind}"
        elif candidate["verdict"] == decision.COSTS_MORE:
            line = (
                f"{named(name)} loses too much: {loss} of {metric} against {other}, at least "
                f"{low}; {margin:g} is allowed."
            )
        else:
            seen = (
                f"{-candidate['seen']:.3f} of {metric} ahead of {other}"
                if candidate["seen"] < 0
                else f"{loss} of {metric} behind {other}"
            )
            allowed = between(candidate["low"], candidate["high"])
            line = (
                f"{named(name)} is undecided: it is {seen}, and anything from {allowed} goes with "
                f"these rows; {margin:g} behind is allowed."
            )
            needed = [
                f"{candidate[key]:,} {what}"
                for key, what in ROWS_THAT_DECIDE.items()
                if candidate[key]
            ]
            line += (
                f" Fresh test rows that would decide in 80 % of cases, against that one alone: "
                f"{', '.join(needed)}."
                if needed
                else ""
                if metric_class
                else " Only more trainings would decide."
            )
        sure.append(line)
    if metric_class and decided["rows_read"] < decision.FEWEST_ROWS:
        sure.append(
            f"Nothing is decided: {decided['rows_read']} test rows are {metric_class}, and a "
            f"verdict on it wants {decision.FEWEST_ROWS}."
        )
    if dearer := [
        name
        for name, candidate in chosen.items()
        if is_trained(candidate) and candidate["n"] == n and name not in found and name in prices
    ]:
        sure.append(
            f"Not considered, since dearer than the highest: {len(dearer)} methods of the table."
        )
    sure += [
        f"{named(name)} has learnt little yet: its log loss is {losses[0]:.2f}, and "
        f"{losses[1]:.2f} is that of guessing by the classes' shares. Before that counts against "
        f"the method, train it on: {training_key(entry)}.patience with more epochs goes on until "
        f"validation rows gain no more, {training_key(entry)}.search finds a better rate."
        for name, entry in chosen.items()
        if is_trained(entry) and entry["step"] and (losses := hardly_learnt(entry))
    ]
    sure += [line for line in [other_way_round(decided, chosen)] if line]
    sure.append(trained_again(decided, named))
    sure += [
        f"{chosen[name]['title']} is a cascade. The first method answers where its highest "
        f"probability, calibrated, is at least {halves['threshold']:.3f}; else the second answers. "
        "That threshold is the share of validation rows that the second gets right, drawn a "
        "little to one half. It was fixed before a test row was read."
        for name, entry in chosen.items()
        if (halves := entry["halves"])
    ]
    if few := list(decided["rare_classes"].items()):
        some = ", ".join(f"{label} ({rows})" for label, rows in few[:FEW_SHOWN]) + (
            " …" if len(few) > FEW_SHOWN else ""
        )
        sure.append(
            f"Fewer than {FEW_ROWS} test rows: {some}; a class without one is left out of "
            f"every figure."
        )
    known = sorted((name for name in chosen if name in prices), key=lambda name: prices[name])
    compared = [name for name in known if is_trained(chosen[name]) or name in found]
    dear = [
        f"{named(name)}: {priced(decided, name)}{timed(chosen[name])}"
        f"{passed_on(decided, chosen, name)}."
        for name in compared
    ]
    others = [name for name in compared if name != ship] if ship in prices else []
    pairs = [(ship, name) if prices[name] > prices[ship] else (name, ship) for name in others]
    change = larger_margin(decided, named)
    change += [line for cheap, other in pairs if (line := break_even(cheap, other, decided, named))]
    return {"why": why, "how_sure": sure, "how_dear": dear, "what_would_change": change}


def between(low: float, high: float) -> str:
    """Two bounds of a loss in words.

    Examples
    --------
    >>> between(-0.035, 0.024), between(-0.0001, 0.07)
    ('0.035 ahead to 0.024 behind', '0.000 to 0.070 behind')
    """
    if high <= 0:
        return f"{-high:.3f} to {-low:.3f} ahead"
    from_low = f"{-low:.3f} ahead" if round(low, 3) < 0 else f"{max(low, 0):.3f}"
    return f"{from_low} to {high:.3f} behind"


def other_way_round(decided: dict[str, Any], chosen: dict[str, dict]) -> str | None:
    """Which method is the highest on validation rows, where that is another than on test rows."""
    seen = {
        name: figure
        for name in decided["table"]
        if (figure := chosen[name]["f1_macro_validation"]) is not None
    }
    top = decided["top"]
    first = max(seen, key=seen.get, default=top)
    if first == top or top not in seen:
        return None
    return (
        f"On the validation rows {chosen[first]['title']} has the highest macro F1, "
        f"{seen[first]:.3f}, and {chosen[top]['title']} {seen[top]:.3f}. The two sets of rows "
        "disagree, so the differences seen on test rows are not the ones to expect."
    )


def larger_margin(decided: dict[str, Any], named: Callable[[str], str]) -> list[str]:
    """What would have been shipped at which larger margin, where nothing is decided."""
    if decided["established"]:
        return []
    bounds = {name: found["high"] for name, found in decided["candidates"].items()}
    first = min(bounds, key=bounds.get)
    return [
        f"A margin of about {math.ceil(100 * bounds[first]) / 100:g}, set before a test row was "
        f"read: {named(first)} would have been shipped."
    ]


def errors_of(entry: dict) -> int:
    """How many test rows the first training gets wrong."""
    return round((1 - entry["trainings"][0]["accuracy"]) * entry["n"])


def with_rows(entry: dict, language: str) -> str:
    """A method and the number of rows that it was trained on."""
    rows = entry["cost"]["train_rows"]
    name = "trained" if rows else "untrained"
    return phrase(language, name, title=entry["title"], rows=rows)


def because(reason: str, decided: dict[str, Any], chosen: dict[str, dict]) -> str:
    """Why that is the decision, in a sentence or two.

    Parameters
    ----------
    reason : which of the phrases
    """
    language, top, ship = decided["language"], decided["top"], decided["ship"]
    values = {
        "n": decided["n"],
        "margin": decided["margin"],
        "metric": metric_title(decided["metric"], language),
        "ship": with_rows(chosen[ship], language),
    }
    figures = {name: row["reached"][0] for name, row in decided["table"].items()}
    best = phrase(
        language,
        "best",
        top=with_rows(chosen[top], language),
        value=figures[top],
        errors=errors_of(chosen[top]),
        **values,
    )
    second = max((name for name in figures if name != top), key=figures.get, default=top)
    return phrase(
        language,
        reason,
        best=best,
        shipped_value=figures[ship],
        second=with_rows(chosen[second], language),
        second_errors=errors_of(chosen[second]),
        **values,
    )


def trained_again(decided: dict[str, Any], named: Callable[[str], str]) -> str:
    """What training again would do to the decision, in words: as the further seeds say, or, with
    one, if it moved the metric by so much."""

    def outcome(found: dict[str, Any]) -> str:
        if not found["established"]:
            return "nothing is decided"
        still = "still " if decided["established"] and found["ship"] == decided["ship"] else ""
        return f"{still}ship {named(found['ship'])}"

    if not decided["trained_again"]:
        return (
            "The bounds hold the noise of the test rows, for these trained files; seeds: [1, 2, 3] "
            "adds that of training."
        )
    if decided["trainings"] > 1:
        [found] = decided["trained_again"]
        return (
            "The bounds hold the noise of the test rows, for the files of the first training, "
            f"which are served. By the mean of {decided['trainings']} trainings, with the noise of "
            f"both: {outcome(found)}."
        )
    was = decided["ship"], decided["established"]
    moved = [
        f"with {found['sd']:g} {outcome(found)}"
        for found in decided["trained_again"]
        if (found["ship"], found["established"]) != was
    ]
    spread = " or ".join(f"{found['sd']:g}" for found in decided["trained_again"])
    assumed = (
        f"assuming a standard deviation, {', and '.join(moved)}"
        if moved
        else f"with a standard deviation of {spread} assumed, the outcome stays"
    )
    return (
        "The bounds hold the noise of the test rows, for these trained files. Training again moves "
        f"{metric_title(decided['metric'])}, too: {assumed}. seeds: [1, 2, 3] measures it."
    )


def training_key(entry: dict) -> str:
    """The key of the experiment that says how a method is trained."""
    method = METHODS[entry["method"]]
    return f"{method.model}.{method.settings or method.trained_by}"


def hardly_learnt(entry: dict) -> tuple[float, float] | None:
    """The log loss of a method, and that of guessing by the classes' shares, where the two are near
    and the predictions agree with the labels little better than chance would (Cohen's kappa, 1960);
    None for a method that has learnt."""
    confusion = np.array(entry["confusion"], float)
    shares, predicted = (confusion.sum(axis) / confusion.sum() for axis in (1, 0))
    chance = shares @ predicted[: len(shares)]  # a column more counts the rows without an answer
    kappa = (np.trace(confusion) / confusion.sum() - chance) / (1 - chance) if chance < 1 else 0.0
    guessing = float(-sum(share * np.log(share) for share in shares if share))
    loss = entry.get("log_loss")
    near = (
        loss is not None and NEAR_GUESSING * guessing < loss < guessing / NEAR_GUESSING
    )  # above: sure, and wrong
    return (loss, guessing) if near and kappa < LITTLE else None


def priced(decided: dict[str, Any], name: str) -> str:
    """A method's price in words, a cascade's with its interval."""
    ends = decided["price_intervals"].get(name, [decided["prices"][name]])
    if decided["price_unit"] == PER_MILLION:
        numbers = " to ".join(f"{end:.3g}" for end in ends)
        return f"{numbers} for {phrase(ENGLISH, PER_MILLION)}"
    interval = " (95 % interval)" if len(ends) > 1 else ""
    return f"{' to '.join(map(human, ends))} {phrase(ENGLISH, MULTIPLY_ADDS)}{interval}"


def passed_on(decided: dict[str, Any], chosen: dict[str, dict], name: str) -> str:
    """How many rows a cascade passes on to its dear half, in words; nothing for another method."""
    halves = chosen[name]["halves"]
    if not halves:
        return ""
    share, seen = halves["deferred"] / chosen[name]["n"], halves["validation_share"]
    cheap, dear = (decided["prices"][halves[half]] for half in ("cheap", "dear"))
    even = 1 - cheap / dear
    beyond = f"; from {100 * even:.0f} % on the second alone is cheaper" if even < 0.995 else ""
    return (
        f"; {chosen[halves['dear']]['title']} answers {100 * share:.0f} % of the test rows, and "
        f"{100 * seen:.0f} % of the validation rows{beyond}"
    )


def timed(entry: dict) -> str:
    """How long a test row took to score, in words."""
    milliseconds = as_milliseconds(1000 * entry["cost"]["test_seconds"] / entry["n"])
    computed = ", computed from its halves'" if entry["halves"] else ""
    return f"; {milliseconds} ms a test row here{computed}"


def break_even(cheap: str, dear: str, decided: dict, named: Callable[[str], str]) -> str | None:
    """From which price of an error on the dearer of two methods is worth it, in words; None where
    it errs no less."""
    shipped = cheap == decided["ship"]
    fewer, low, high = decided["right_more"][dear if shipped else cheap]
    if not shipped:
        fewer, low, high = -fewer, -high, -low
    more = decided["prices"][dear] - decided["prices"][cheap]
    if fewer <= 0 or more <= 0:
        return None
    spared = (
        f"{named(dear)} made {1000 * fewer:.0f} errors in 1,000 rows fewer (95 % interval "
        f"{1000 * low:.0f} to {1000 * high:.0f}) than {named(cheap)}"
    )
    if decided["price_unit"] == PER_MILLION:
        return (
            f"{spared}: if that holds, it pays where 1,000 errors cost more than "
            f"{more / 1000 / fewer:.2g}."
        )
    return f"{spared}. make bench finds the price of an error from which that pays."


def table(decided: dict[str, Any], chosen: dict[str, dict]) -> list[dict[str, Any]]:
    """The methods that may be shipped, the best first, as the first table shows them.

    Returns
    -------
    list : of each `name`, `title`, `rows` to train on, the metric's `value` and `ci95` of the
        file that would be served, `milliseconds` a test row, `price`, an interval, `price_seen`
        and `times` the cheapest one's (None where nobody knows), `behind` the top method with its
        bounds, `verdict` in words, and `would_decide`, a number of test rows or None
    """
    prices, found = decided["prices"], decided["candidates"]
    least = min(prices.values(), default=0.0)
    rows = []
    for name in sorted(decided["table"], key=lambda name: decided["table"][name]["behind"][0]):
        entry, candidate = chosen[name], found.get(name)
        price = prices.get(name)
        interval = decided["price_intervals"].get(name, [price, price])
        if halves := entry["halves"]:
            share = halves["deferred"] / entry["n"]
        value, *ci95 = decided["table"][name]["reached"]
        undecided = candidate and candidate["verdict"] == decision.UNDECIDED
        rows.append(
            {
                "name": name,
                "title": entry["title"],
                "rows": entry["cost"]["train_rows"],
                "value": value,
                "ci95": ci95,
                "milliseconds": 1000 * entry["cost"]["test_seconds"] / entry["n"],
                "price": interval if price is not None else None,
                "price_seen": prices[halves["cheap"]] + share * prices[halves["dear"]]
                if halves and price is not None
                else price,
                "times": price / least if price is not None and least else None,
                "behind": None if name == decided["top"] else decided["table"][name]["behind"],
                "verdict": UNPRICED
                if price is None
                else candidate["verdict"]
                if candidate
                else DEARER,
                "would_decide": candidate["rows_if_as_seen"] if undecided else None,
            }
        )
    return rows


def as_times(times: float | None, language: str = ENGLISH) -> str:
    """A price as a multiple of the cheapest one's, in words.

    Examples
    --------
    >>> as_times(1.0), as_times(9.53), as_times(41600), as_times(3.1e6), as_times(None)
    ('1', '9.5', '42,000', '3.1 million', '–')
    """
    if times is None:
        return "–"
    if times < 10:
        return f"{times:.1f}".removesuffix(".0")
    return human(float(f"{times:.2g}"), language)


def as_milliseconds(milliseconds: float) -> str:
    """Milliseconds with two digits.

    Examples
    --------
    >>> as_milliseconds(0.0531), as_milliseconds(1080.0)
    ('0.053', '1,080')
    """
    return f"{milliseconds:.2g}" if milliseconds < 99.5 else f"{milliseconds:,.0f}"


def summary(comparison: dict[str, Any], decided: dict[str, Any]) -> str:
    """The methods that may be shipped, and the decision, for the terminal."""
    language = decided["language"]
    heads = ("method", "rows", "metric", "interval", "times", "milliseconds", "verdict")
    lines = [
        [
            metric_title(decided["metric"], language).strip()
            if head == "metric"
            else phrase(language, head)
            for head in heads
        ]
    ]
    for row in table(decided, comparison["methods"]):
        low, high = (f"{end:.3f}" for end in row["ci95"])
        lines.append(
            [
                row["title"],
                str(row["rows"] or "–"),
                f"{row['value']:.3f}",
                phrase(language, "range", low=low, high=high),
                as_times(row["times"], language),
                as_milliseconds(row["milliseconds"]),
                phrase(language, row["verdict"]),
            ]
        )
    columns = [max(map(cells, column)) for column in zip(*lines, strict=True)]
    # Words begin on the left of their column, figures end on the right.
    written = [
        "  ".join(
            text + gap if number in (0, len(heads) - 1) else gap + text
            for number, (text, width) in enumerate(zip(line, columns, strict=True))
            for gap in [" " * (width - cells(text))]
        ).rstrip()
        for line in lines
    ]
    return "\n".join([*written, f"{headline(decided, decided['ship'])} {decided['why']}"])


def cells(text: str) -> int:
    """How many places of a terminal a text takes.

    Examples
    --------
    >>> cells("F1"), cells("判定")
    (2, 4)
    """
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


def headline(decided: dict[str, Any], shipped: str) -> str:
    """The decision in a sentence.

    Parameters
    ----------
    shipped : what a reader calls the method that is to be shipped, or is the highest seen
    """
    name = "ship"
    if not decided["established"]:
        name = "too few" if decided["smallest_margin"] > decided["margin"] else "open"
    metric = metric_title(decided["metric"], decided["language"]).strip()
    return phrase(
        decided["language"],
        name,
        shipped=shipped,
        metric=metric,
        n=decided["n"],
        margin=decided["margin"],
    )


def human(number: float, language: str = ENGLISH) -> str:
    """A large number in words, two digits.

    Examples
    --------
    >>> human(210), human(5500), human(5.5e8)
    ('210', '5,500', '550 million')
    """
    for size, word in SIZES[language]:
        if number >= size:
            scaled = number / size
            return f"{scaled:.1f}{word}" if scaled < 10 else f"{scaled:,.0f}{word}"
    return f"{number:,.0f}"
