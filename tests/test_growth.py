"""The benchmark of growth: its drawn predictions are compared as real ones are, and a quadratic
line is told."""

import pytest

from bench.peers import growth
from eval import compare
from letterhead.config.experiment import load_experiment
from letterhead.files import LetterheadError, read_json
from letterhead.pipeline import CASCADE, compared_methods
from prep import data


def test_drawn_results_are_compared(make_experiment, workplace, tiny_models):
    of = make_experiment("rows.csv", ["a", "b"])
    path = growth.write_experiment(
        of, workplace, "rows400", 400, tiny_models["smollm2"], tiny_models["bert"]
    )
    data.main(experiment := load_experiment(path))
    assert read_json(experiment.data_folder / "data_card.json")["rows"]["test"] == 400
    names = {method.name for method in compared_methods(experiment)} - {CASCADE.name}
    # four are trained in steps
    assert growth.draw_results(experiment, steps=[1, 2]) == len(names) + 4
    compare.main(experiment)
    methods = read_json(experiment.results_folder / "comparison.json")["methods"]
    assert {of.partition("@")[0] for of in methods} == names
    assert 0.6 < methods["tfidf"]["f1_macro"] < 0.99


def test_the_power_of_growth_is_told(tmp_path):
    points = [
        {"of": "data", "n": n, "seconds": n * n / 1e4, "peak_mib": 100 + n / 10}
        for n in (1000, 10_000, 100_000)
    ]
    points += [
        {"of": "scoring, options", "n": n, "seconds": n / 10, "peak_mib": 900} for n in (4, 100)
    ]
    points += [{"of": "report", "n": 1000, "seconds": 1, "peak_mib": 100}]
    for (of, n), seconds in zip(growth.OWN_POINTS, (12.0, 30.0, 18.0), strict=True):
        points.append({"of": of, "n": n, "seconds": seconds, "peak_mib": 100})
    assert growth.slope(points[:3], "seconds") == pytest.approx(2)
    table = growth.as_table(points)
    assert (
        "| 2.00 (seconds), 0.96 (peak memory, MiB) |" in table
        and "| scoring, options | 100 | 10.00 | 900 | 1.00 (seconds), 0.00" in table
    )
    assert "that model takes 90%." in table  # 18 s for 18,000 rows, and 18 for 20,000
    growth.draw_picture(tmp_path / "growth.png", "a test", points)
    assert (tmp_path / "growth.png").stat().st_size > 10_000


def test_a_process_is_measured_by_itself():
    heavy = b"\1" * 300_000_000  # what starts it holds more
    small, large = (growth.call("-c", f"x = b'1' * {n}")["peak_mib"] for n in (1, 100_000_000))
    assert small < 60 and 85 < large - small < 110 and len(heavy) > 0
    with pytest.raises(LetterheadError, match="exit code 3, it said: no such"):
        growth.call("-c", "import sys; print('no such'); sys.exit(3)")
