"""Requests per second, and how long one takes: every trained method, in each engine that serves it,
on the same kind of requests.

    python -m bench.rps --experiment quick

The rows are measured by bench/contenders.py; here they are chosen, compared and written down.
"""

from collections.abc import Iterable

from bench.contenders import Row, measure_rows
from letterhead.config.experiment import Experiment
from letterhead.files import atomic_open, read_json, write_json
from letterhead.models.classifier import named_method
from letterhead.models.precision import precision
from letterhead.pipeline import CASCADE, Method, cascades_file, compared_methods
from letterhead.runs.devices import device_name, machine
from letterhead.runs.results import bench_made_from
from letterhead.runs.stage import StageRun, run
from letterhead.serving.vllm import vllm_version

ENGINES = ("sklearn", "st", "hf", "onnx", "onnx_int8", "two", "vllm")


def rows_of(methods: Iterable[Method]) -> list[Row]:
    """What is measured of methods, engine by engine."""
    rows = [Row(*row) for method in methods for row in method.bench]
    return sorted(rows, key=lambda row: ENGINES.index(row.engine))


# ratio → the row, and the row that it is compared with: requests per second of a single stream
RATIOS = {
    "ONNX Runtime, int8 / HF (BERT)": ("bert-onnx_int8-head", "bert-hf-head"),
    "ONNX Runtime, float32 / HF (BERT)": ("bert-onnx-head", "bert-hf-head"),
    "letters in one forward / generate (HF)": ("sft-hf-forward", "sft-hf-generate"),
    "one token / generate (vLLM)": ("sft-vllm-one_token", "sft-vllm-generate"),
    "folded SFT / linear head at equal token counts (vLLM)": (
        "sft_folded-vllm-head",
        "linear_head_on_prompt-vllm-head",
    ),
}


def main(experiment: Experiment) -> None:
    methods = [
        method
        for method in compared_methods(experiment)
        if method is not CASCADE or read_json(cascades_file(experiment))
    ]
    # Each row is of the checkpoint that stands for its method.
    names = {
        row: named_method(experiment, method.name) for method in methods for row, *_ in method.bench
    }
    stage = StageRun(experiment, "bench")
    rows, skipped = measure_rows(experiment, rows_of(methods), names, stage.folder)
    price = experiment.bench.price_per_hour
    for row in rows:
        row["cost_per_million"] = cost_per_million(row, price)
    record = {
        "rows": rows,
        "skipped": skipped,
        "ratios": ratios(rows),
        "objective_ms": experiment.bench.objective_ms,
    }
    record |= {
        "price_per_hour": price,
        "names": names,
        "dtype": precision(experiment.decoder.dtype, experiment.decoder.folder),
        "device": device_name(),
    }
    path, table = (experiment.results_folder / f"bench_rps.{end}" for end in ("json", "md"))
    record["made_from"] = bench_made_from(experiment)
    write_json(path, record | {"machine": machine(), "versions": {"vllm": vllm_version()}})
    with atomic_open(table) as file:
        file.write(as_table(read_json(path)))
    stage.finish([path, table], rows=len(rows))
    print(table.read_text(encoding="utf-8"))
    measured = {row["method"] for row in rows}
    trained = [method for method in compared_methods(experiment) if method.is_trained]
    if unpriced := [
        method.name
        for method in trained
        if method is not CASCADE
        and not method.thinks
        and not {method.name, *method.priced_as} & measured
    ]:
        print(
            f"no row has the price of {', '.join(unpriced)}, so multiply-adds go on deciding which "
            "to ship"
        )


def ratios(rows: list[dict]) -> dict[str, float | None]:
    """Requests per second of a single stream, row over row, where both were measured."""
    rps = {Row(row["method"], row["engine"], row["decode"]).key: row["rps_single"] for row in rows}
    return {
        title: rps[a] / rps[b] if a in rps and b in rps else None
        for title, (a, b) in RATIOS.items()
    }


def cost_per_million(row: dict, price_per_hour: float) -> float:
    """What a million rows cost on a machine at that price, kept busy: the closed loop with the
    highest throughput."""
    return 1e6 * price_per_hour / 3600 / max(loop["rps"] for loop in row["closed"].values())


def as_table(record: dict) -> str:
    """The rows in Markdown."""
    clients = sorted(record["rows"][0]["closed"], key=int)
    machine = (
        f"{record['device']} ({record['machine']}), {record['dtype']}, {record['versions']['vllm']}"
    )
    columns = ["method", "engine", "decode", "RPS, 1 client", "p50 ms", "p95 ms", "p99 ms"]
    columns += [f"RPS, {n} clients" for n in clients if n != "1"]
    columns += [
        f"RPS at p99 < {record['objective_ms']:g} ms",
        "accuracy",
        "prefill ms",
        "decode ms",
        "MiB",
        "load s",
    ]
    columns += ["a million rows"]
    lines = [
        f"# Requests per second, {machine}\n",
        f"| {' | '.join(columns)} |",
        "|" + " --- |" * len(columns),
    ]
    for row in record["rows"]:
        cells = [row["method"], row["engine"], row["decode"], f"{row['rps_single']:.2f}"]
        cells += [f"{row[key]:.0f}" for key in ("p50_ms", "p95_ms", "p99_ms")]
        cells += [f"{row['closed'][n]['rps']:.2f}" for n in clients if n != "1"]
        held = row["rps_at_objective"]
        cells += [
            "–" if row["engine"] != "vllm" else "none" if held is None else f"{held:.2f}",
            f"{row['accuracy']:.3f}",
        ]
        cells += [
            "–" if row[key] is None else f"{row[key]:.0f}" for key in ("prefill_ms", "decode_ms")
        ]
        cells += [
            str(row["peak_memory_mb"]),
            f"{row['load_seconds']:.0f}",
            f"{row['cost_per_million']:.3g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        *(
            f"- {title}: {'not measured' if ratio is None else f'{ratio:.2f}'}"
            for title, ratio in record["ratios"].items()
        ),
    ]
    lines += [
        f"- not measured: {row['method']}, {row['engine']}, {row['decode']}: {row['why']}"
        for row in record["skipped"]
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
