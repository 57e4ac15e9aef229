"""Which method is shipped: errors are as rare as promised, hopeless methods change nothing, the
promised rows decide."""

import numpy as np
import pytest
from scipy.stats import norm, ttest_rel

from letterhead.stats.decision import (
    ALPHA,
    COSTS_MORE,
    FITS,
    UNDECIDED,
    decide,
    rows_for_margin,
    rows_that_decide,
    smallest_margin,
)
from letterhead.stats.metrics import NO_ANSWER, Estimate, Metric, f1_loss

MARGIN = 0.01
RIGHT, APART = (
    0.95,
    0.04,
)  # accuracy of the better method, and the share of rows that only one of the two gets right


def answers(
    rng,
    n: int,
    classes: int,
    losses: list[float],
    trainings: int = 1,
    spread: float = 0.0,
    is_top_trained_once: bool = False,
):
    """Truth in equal shares, a method, and others whose macro F1 (here the accuracy) is lower by so
    much.

    `spread` is the standard deviation of a training's accuracy around its method's.
    """

    def wrong(size) -> np.ndarray:
        return (truth + rng.integers(1, classes, size=size)) % classes

    truth = np.arange(n) % classes
    base = rng.random(n) < RIGHT
    found = {}
    lost_by = {"top": None} | {f"cheap{i}": lost for i, lost in enumerate(losses)}
    for name, lost in lost_by.items():
        made = []
        for _ in range(trainings):
            off = (lost or 0.0) + spread * rng.normal()
            if lost is None and (not spread or is_top_trained_once):
                right = base
            else:
                only_base, only_this = (APART + off) / 2, (APART - off) / 2
                right = np.where(
                    base,
                    rng.random(n) >= only_base / RIGHT,
                    rng.random(n) < only_this / (1 - RIGHT),
                )
            made.append(np.where(right, truth, wrong(n)))
        found[name] = np.array(made[:1] if lost is None and is_top_trained_once else made)
    return truth, found


def prices(found: dict) -> dict[str, float]:
    return {name: 9.0 if name == "top" else 1.0 + i / 10 for i, name in enumerate(found)}


def verdicts(trials: int, seed: int, classes: int, **given) -> dict[str, float]:
    """How often the one cheap method gets each verdict against the other one."""
    rng, counted = np.random.default_rng(seed), dict.fromkeys((FITS, COSTS_MORE, UNDECIDED), 0)
    for _ in range(trials):
        truth, found = answers(rng, classes=classes, **given)
        # The order of prices makes `cheap0` a candidate even where it came out on top.
        decided = decide(truth, found, prices(found), classes, MARGIN)
        counted[decided["candidates"]["cheap0"]["verdict"]] += 1
    return {verdict: n / trials for verdict, n in counted.items()}


@pytest.mark.parametrize("classes", [4, 8])
@pytest.mark.parametrize("n", [300, 2000, 7600])
def test_how_often_each_verdict_falls(n, classes):
    """True losses of nothing, the margin, and twice the margin; `pytest -s` prints the shares."""
    trials, found = 150, {}
    for times in (0, 1, 2):
        found[times] = verdicts(
            trials, seed=n + times, classes=classes, n=n, losses=[times * MARGIN]
        )
        shares = ", ".join(f"{verdict} {share:.1%}" for verdict, share in found[times].items())
        print(f"{n} rows, {classes} classes, true loss {times} x margin: {shares}")
    noise = 2.33 * (ALPHA * (1 - ALPHA) / trials) ** 0.5
    assert found[1][FITS] <= ALPHA + noise and found[1][COSTS_MORE] <= ALPHA + noise
    assert found[2][FITS] <= found[1][FITS] + noise and found[0][COSTS_MORE] <= ALPHA
    if n == 7600:
        assert (
            found[0][FITS] > 0.7 and found[2][COSTS_MORE] > 0.7
        )  # with rows enough it is not always undecided


@pytest.mark.parametrize(("n", "margin"), [(300, 0.01), (2000, 0.02)])
def test_how_often_the_decision_is_wrong_and_how_often_there_is_none(n, margin):
    """Seven methods whose losses against the best are drawn up to 0.06, cheap or dear by chance;
    `pytest -s` prints the shares. Wrong is a method that truly loses more than the margin. With the
    highest seen shipped where nothing is established, as many decisions would be wrong as are told
    under `before`."""
    rng, trials = np.random.default_rng(n), 150
    counted = dict.fromkeys(("wrong", "none", "cheaper", "wrong before"), 0)
    for _ in range(trials):
        lost = rng.uniform(0, 0.06, 6).round(4).tolist()
        truth, found = answers(rng, n, 5, lost)
        true = dict(zip(found, [0.0, *lost], strict=True))
        cost = dict(zip(found, rng.permutation(7) + 1.0, strict=True))
        decided = decide(truth, found, cost, 5, margin)
        counted["none"] += not decided["established"]
        counted["wrong"] += decided["established"] and true[decided["ship"]] > margin
        counted["cheaper"] += decided["established"] and cost[decided["ship"]] < cost["top"]
        counted["wrong before"] += true[decided["ship"]] > margin
    shares = {what: number / trials for what, number in counted.items()}
    print(f"{n} rows, margin {margin}: {shares}")
    assert shares["wrong"] <= ALPHA + 2.33 * (ALPHA * (1 - ALPHA) / trials) ** 0.5
    assert shares["none"] < 0.9 or n == 300


@pytest.mark.parametrize("true", [0.0, 0.02])
def test_the_promised_number_of_rows_decides(true):
    rng, classes = np.random.default_rng(3), 4
    truth, found = answers(rng, 100_000, classes, [true])
    of = f1_loss(truth, found["cheap0"], found["top"], classes)
    n = rows_that_decide(of, abs(MARGIN - true), ALPHA)
    print(f"true loss {true}: {n} rows promised")
    shares = verdicts(300, seed=1, classes=classes, n=n, losses=[true])
    assert shares[FITS if true < MARGIN else COSTS_MORE] >= 0.8 - 2.33 * (0.8 * 0.2 / 300) ** 0.5, (
        shares
    )


def test_several_methods_at_the_margin_do_not_add_up_their_errors():
    rng, trials, shipped = np.random.default_rng(0), 100, 0
    alphas = []
    for _ in range(trials):
        truth, found = answers(rng, 1000, 4, [MARGIN, MARGIN, MARGIN, 0.04])
        decided = decide(truth, found, prices(found), 4, MARGIN)
        alphas.append(decided["alpha"])
        verdict = decided["candidates"]
        shipped += any(
            verdict[name]["verdict"] == FITS for name in found if name != "top" and name in verdict
        )
    assert np.median(alphas) == pytest.approx(
        ALPHA / 3
    )  # four are in contention, and one of them is the best
    print(f"some of three methods at the margin, and a worse one, fits: {shipped / trials:.1%}")
    assert shipped / trials <= ALPHA + 2.33 * (ALPHA * (1 - ALPHA) / trials) ** 0.5


@pytest.mark.parametrize("spread", [0.002, 0.01])
def test_trainings_that_differ_keep_the_error(spread):
    """Three trainings of each method, whose accuracies scatter as little as rows do, and more."""
    shares = verdicts(120, seed=5, classes=4, n=2000, losses=[MARGIN], trainings=3, spread=spread)
    print(f"three trainings, standard deviation {spread}: {shares}")
    assert shares[FITS] <= ALPHA + 2.33 * (ALPHA * (1 - ALPHA) / 120) ** 0.5
    if spread < MARGIN / 2:  # trainings that hardly differ leave it to the rows
        easy = verdicts(40, seed=6, classes=4, n=7600, losses=[0.0], trainings=3, spread=spread)
        assert easy[FITS] > 0.5, easy


@pytest.mark.parametrize("ratio", [1, 10, 50])
@pytest.mark.parametrize("alpha", [ALPHA, ALPHA / 4])
def test_a_bound_of_both_noises_errs_no_more_often_than_it_says(ratio, alpha):
    """Three trainings against one, whose variance is so many times that of the rows. (With one t
    for both noises and Satterthwaite's degrees of freedom a bound of 1.25 % errs in 2.6 %.)"""
    rng, trials, wrong = np.random.default_rng(0), 20_000, 0
    values = rng.normal(0, (1 + ratio) ** 0.5, trials)
    for value, variance in zip(values, ratio * rng.chisquare(2, trials) / 2, strict=True):
        rows = Estimate(value, 1, np.array([-1.0, 1.0]), np.array([0.5, 0.5]), variance, 2)
        wrong += value + rows.reach(alpha) < 0
    assert wrong / trials <= alpha + 2.33 * (alpha * (1 - alpha) / trials) ** 0.5


@pytest.mark.parametrize(("n", "spread"), [(2000, 0.01), (7600, 0.02)])
def test_a_best_method_that_is_trained_once_keeps_the_error(n, spread):
    """Such as TF-IDF, beside one whose three trainings scatter more than the rows."""
    trials = 150
    shares = verdicts(
        trials,
        seed=9,
        classes=4,
        n=n,
        losses=[MARGIN],
        trainings=3,
        spread=spread,
        is_top_trained_once=True,
    )
    print(f"{n} rows, one training against three, standard deviation {spread}: {shares}")
    assert shares[FITS] <= ALPHA + 2.33 * (ALPHA * (1 - ALPHA) / trials) ** 0.5


def test_a_p_value_is_where_the_bound_meets_nothing():
    truth, found = answers(np.random.default_rng(2), 2000, 4, [0.02], trainings=3, spread=0.01)
    loss = f1_loss(truth, found["cheap0"], found["top"], 4)
    assert loss.training_variance and loss.training_df < 4
    assert loss.reach(loss.p / 2) == pytest.approx(abs(loss.value), rel=1e-6)
    once = f1_loss(truth, found["cheap0"][:1], found["top"][:1], 4)
    assert once.p == pytest.approx(2 * norm.sf(abs(once.value) / once.se))


def test_the_smallest_margin_is_that_of_equal_answers_whatever_the_classes():
    for classes in (2, 5, 20):
        truth = np.arange(600) % classes
        same = dict.fromkeys("abcdef", truth[None])
        price = dict(zip(same, range(6), strict=True))
        least = smallest_margin(600, 6)
        fits = [decide(truth, same, price, classes, least * by) for by in (1.01, 0.99)]
        assert [one["established"] for one in fits] == [True, False]
    assert smallest_margin(rows_for_margin(0.005, 4), 4) <= 0.005
    assert smallest_margin(rows_for_margin(0.005, 4) - 10, 4) > 0.005


def test_trainings_that_differ_too_much_are_not_mended_by_rows():
    truth, found = answers(np.random.default_rng(2), 2000, 4, [0.0], trainings=3, spread=0.03)
    of = f1_loss(truth, found["cheap0"], found["top"], 4)
    assert of.training_variance > 0 and rows_that_decide(of, MARGIN, ALPHA) is None
    assert rows_that_decide(of, 0.9, ALPHA) > 0


R8 = np.array([1596, 253, 2840, 41, 190, 206, 108, 251]) / 5485


@pytest.mark.parametrize(("n", "apart"), [(300, 0.012), (1000, 0.012), (300, 0.04), (2189, 0.04)])
@pytest.mark.parametrize("mix", [np.full(4, 0.25), R8], ids=["balanced", "R8"])
def test_unbalanced_classes_and_nested_errors_keep_the_level(mix, n, apart):
    """Few rows tell the two methods apart (at 1.2 % nearly all errors of one are the other's too),
    and classes are rare.

    The true loss of macro F1 is exactly the margin: the cheap method errs more on every class
    alike.
    """
    rng, trials, fits, classes = np.random.default_rng(n), 300, 0, len(mix)
    only_top, only_cheap = (apart + MARGIN) / 2, (apart - MARGIN) / 2

    def cells(
        right: float,
    ) -> np.ndarray:  # shares of (truth, prediction): errors fall on the other classes by their mix
        shares = np.array([mix * (1 - right) / (1 - mix[k]) for k in range(classes)])
        np.fill_diagonal(shares, right)
        return mix[:, None] * shares

    def f1(cell: np.ndarray) -> float:
        return float((2 * np.diagonal(cell) / (cell.sum(0) + cell.sum(1))).mean())

    def wrong(truth: np.ndarray) -> np.ndarray:
        drawn = rng.choice(classes, (8, len(truth)), p=mix)
        return drawn[(drawn != truth).argmax(0), np.arange(len(truth))]

    true = f1(cells(RIGHT)) - f1(cells(RIGHT - MARGIN))
    for _ in range(trials):
        truth = np.repeat(np.arange(classes), np.maximum(1, np.round(mix * n).astype(int)))

        right = rng.random(len(truth)) < RIGHT
        top = np.where(right, truth, wrong(truth))
        still = rng.random(len(truth)) >= only_top / RIGHT
        cheap = np.where(right, np.where(still, truth, wrong(truth)), top)
        cheap = np.where(~right & (rng.random(len(truth)) < only_cheap / (1 - RIGHT)), truth, cheap)
        decided = decide(
            truth,
            {"top": top[None], "cheap": cheap[None]},
            {"top": 9.0, "cheap": 1.0},
            classes,
            true,
        )
        fits += decided["candidates"]["cheap"]["verdict"] == FITS
    print(
        f"{classes} classes, {n} rows, apart on {apart:.1%}: true loss {true:.4f} = "
        f"margin, fits in {fits / trials:.1%}"
    )
    assert fits / trials <= ALPHA + 2.33 * (ALPHA * (1 - ALPHA) / trials) ** 0.5


def test_hopeless_methods_change_nothing():
    """Neither one that guesses nor one without answers changes the verdicts, dear or cheap."""
    rng = np.random.default_rng(0)
    truth, found = answers(rng, 2000, 4, [0.0, 0.004])
    price = prices(found)
    alone = decide(truth, found, price, 4, MARGIN)
    guesses = {"guess": rng.integers(4, size=(1, 2000)), "mute": np.full((1, 2000), NO_ANSWER)}
    for cost in (0.1, 8.0, 99.0):
        more = decide(truth, found | guesses, price | dict.fromkeys(guesses, cost), 4, MARGIN)
        assert (more["ship"], more["established"], more["alpha"]) == (
            alone["ship"],
            alone["established"],
            alone["alpha"],
        )
        for name, verdict in alone["candidates"].items():
            assert more["candidates"][name] == verdict


def test_less_data_does_not_ship_the_cheaper_method():
    """With few rows the cheaper method is undecided and the best is shipped; a better and cheaper
    method always is."""
    rng = np.random.default_rng(0)
    truth, found = answers(rng, 60, 4, [0.03])
    found["cheap0"] = found["top"].copy()
    found["cheap0"][0, :2] = (truth[:2] + 1) % 4
    found["top"][0, :2] = truth[:2]
    few = decide(truth, found, {"top": 9.0, "cheap0": 1.0}, 4, MARGIN)
    assert (
        few["ship"] == few["top"] == "top" and few["candidates"]["cheap0"]["verdict"] == UNDECIDED
    )
    truth, found = answers(rng, 7600, 4, [0.03])
    swapped = {"top": found["cheap0"], "cheap0": found["top"]}
    better = decide(truth, swapped, {"top": 9.0, "cheap0": 1.0}, 4, MARGIN)
    assert (better["ship"], better["established"], better["top"]) == ("cheap0", True, "cheap0")
    assert list(better["candidates"]) == ["cheap0"]
    equal = decide(truth, {"a": found["top"], "b": found["top"]}, {"a": 1.0, "b": 2.0}, 4, MARGIN)
    assert (equal["ship"], equal["established"]) == ("a", True)


def test_bounds_are_scipys_where_macro_f1_is_the_accuracy():
    truth, found = answers(np.random.default_rng(1), 7600, 4, [0.01])
    right = {name: (of[0] == truth).astype(float) for name, of in found.items()}
    theirs = ttest_rel(right["top"], right["cheap0"]).confidence_interval(1 - 2 * ALPHA)
    ours = f1_loss(truth, found["cheap0"], found["top"], 4).interval(ALPHA)
    assert np.abs(np.array(ours) - np.array(theirs)).max() < 3e-4


def test_another_metric_decides_in_its_own_unit_and_not_on_a_handful_of_rows():
    truth = np.repeat([0, 1], [900, 100])
    good = np.where(np.arange(1000) % 50 == 0, 1 - truth, truth)
    blind = np.where(truth == 1, np.where(np.arange(1000) % 2 == 0, 0, 1), truth)
    found, prices = {"dear": good[None], "cheap": blind[None]}, {"dear": 9.0, "cheap": 1.0}
    by_recall = decide(truth, found, prices, 2, 0.1, metric=Metric("recall", 1))
    assert by_recall["candidates"]["cheap"]["verdict"] == COSTS_MORE
    assert by_recall["candidates"]["cheap"]["loss"] == pytest.approx(0.48, abs=0.02)
    few = np.concatenate([np.arange(900), np.arange(900, 929)])
    alone = {name: one[:, few] for name, one in found.items()}
    decided = decide(truth[few], alone, prices, 2, 0.1, metric=Metric("recall", 1))
    assert {one["verdict"] for one in decided["candidates"].values()} == {UNDECIDED}
    costs = Metric("cost", costs=np.array([[0, 1, 1], [100, 0, 100]], float))
    by_cost = decide(truth, found, prices, 2, 8.0, metric=costs)
    assert by_cost["candidates"]["cheap"]["loss"] == pytest.approx(5 - 0.218, abs=0.3)
    assert by_cost["ship"] == "cheap" and by_cost["established"]
    assert decide(truth, found, prices, 2, 2.0, metric=costs)["ship"] != "cheap"


def test_an_assumed_spread_of_trainings_widens_every_bound_that_it_is_in():
    truth = np.arange(3000) % 4
    one, two = (np.where(np.arange(3000) % k == 0, (truth + 1) % 4, truth)[None] for k in (50, 45))
    found, cost = {"dear": one, "cheap": two}, {"dear": 9.0, "cheap": 1.0}
    plain = decide(truth, found, cost, 4, 0.02)["candidates"]["cheap"]
    spread = decide(truth, found, cost, 4, 0.02, {"cheap": 0.02})["candidates"]["cheap"]
    both = decide(truth, found, cost, 4, 0.02, {"cheap": 0.02, "dear": 0.02})["candidates"]["cheap"]
    assert plain["verdict"] == FITS and spread["verdict"] == UNDECIDED
    assert both["se"] ** 2 - plain["se"] ** 2 == pytest.approx(2 * 0.02**2)
    assert plain["high"] < spread["high"] < both["high"]
