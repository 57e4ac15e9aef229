"""Scoring speed and agreement against lm-evaluation-harness: same process, model, rows, dtype and
threads.

    python -m bench.peers.scoring --experiment ag_news_small

Letters on the experiment's own test rows, and R52's 52 names, several tokens each. The two run in
turn, three times or more, each time on another part of the rows; start-up is not timed. The peer
gets the same prompts as text; where its own encoding of them gives other ids than training saw,
that is counted and reported.
"""

import itertools
import math
import operator
import statistics
import time
from pathlib import Path

import numpy as np

from letterhead.config.experiment import Experiment, load_experiment
from letterhead.files import LetterheadError, read_jsonl, write_json
from letterhead.models import checkpoints
from letterhead.pipeline import SFT_TRAINING, outputs
from letterhead.runs.stage import StageRun, run

PEER = "lm-eval 0.4.13"
PEER_BATCH = 16
NAMES_EXPERIMENT = "r52"
PROFILED_ROWS = 48
TOP_OPERATIONS = 8


def main(experiment: Experiment) -> None:
    import torch

    from letterhead.models.precision import precision
    from letterhead.models.scoring import load_decoder

    if experiment.prompt.options != "letters":
        raise LetterheadError(
            f"{experiment.name} answers with names; choose an experiment with letters, "
            f"names are R52's"
        )
    names = load_experiment(NAMES_EXPERIMENT)
    sources = {
        "letters": (experiment, experiment.bench.scoring_rows),
        "names": (names, experiment.bench.scoring_names_rows),
    }
    rows = {
        title: draw_rows(source, n, experiment.bench.scoring_runs)
        for title, (source, n) in sources.items()
    }
    stage = StageRun(
        experiment,
        "bench-scoring",
        {
            SFT_TRAINING.name: outputs(SFT_TRAINING, experiment),
            "bench": experiment.bench.model_dump(),
        },
    )
    folder = checkpoints.whole_checkpoints(Path(experiment.sft_arguments()["output_dir"]))[-1]
    report = {"peer": PEER, "checkpoint": str(folder), "threads": torch.get_num_threads()}
    # float32 always: in bfloat16 two right programs differ by more than what is asked of them.
    dtypes = dict.fromkeys(["float32", precision(experiment.decoder.dtype, folder)])
    for dtype in dtypes:
        model, runs = load_decoder(folder, dtype), experiment.bench.scoring_runs
        for name, (source, _) in sources.items():
            title = name if dtype == "float32" else f"{name}, {dtype}"
            report[title] = {
                "dtype": dtype,
                **compare(model, source, rows[name], runs, title, peers_model(model, folder)),
            }
    path = experiment.results_folder / "bench_scoring.json"
    write_json(path, report)
    stage.finish([path], device=str(model.device))
    for title, figures in report.items():
        if isinstance(figures, dict):
            print(summary(title, figures))
    print(path)


def summary(title: str, figures: dict) -> str:
    """The figures in a few lines for the terminal."""
    ratios = ", ".join(f"{ratio:.2f}" for ratio in figures["ratios"])
    return (
        f"{title}: {figures['rows_per_second']:.2f} rows/s, {PEER} "
        f"{figures['peer_rows_per_second']:.2f}; "
        f"ratio {figures['ratio']:.2f} (pairs {ratios})\n"
        f"  {figures['share_of_matmul_rate']:.2f} of the matmul rate, "
        f"{figures['matmul_gflops']:.0f} GFLOP/s; time goes to "
        + ", ".join(
            f"{name.removeprefix('aten::')} {share:.0%}"
            for name, share in list(figures["profile"].items())[:4]
        )
        + f"\n  the same prediction on {figures['same_predictions']:.2%} of "
        f"{figures['rows']} rows; ids equal on "
        f"{figures['rows_with_equal_ids']}, there differences between options agree to "
        f"{figures['max_difference']:.1e} nats"
    )


def draw_rows(experiment: Experiment, n: int, runs: int) -> list[dict]:
    """Up to n test rows, in an order drawn by seed; a clear error where there are fewer than the
    runs need."""
    path = experiment.data_folder / "test.jsonl"
    rows = list(read_jsonl(path)) if path.exists() else []
    if min(len(rows), n) < runs:
        raise LetterheadError(
            f"{path}: {len(rows)} rows, {runs} needed; run: make data EXP={experiment.name}"
        )
    return [rows[i] for i in np.random.default_rng(experiment.seed).permutation(len(rows))[:n]]


def peers_model(model, folder: Path):
    """The peer's model, packed like ours: in float32 ours itself; in bfloat16 one whose projection
    is bfloat16 too, for the peer ties it to the embedding again."""
    import torch

    if model.dtype == torch.float32:
        return model
    from transformers import AutoModelForCausalLM

    from letterhead.models.cpu import attention, pack

    asked = {
        "dtype": model.dtype,
        "attn_implementation": attention(),
        "use_safetensors": True,
        "trust_remote_code": False,
    }
    return pack(AutoModelForCausalLM.from_pretrained(folder, **asked).to(model.device).eval())


def compare(
    model, experiment: Experiment, rows: list[dict], runs: int, title: str, of_peer=None
) -> dict:
    """Score rows with both, each run on its own part of them; agreement, rates and a profile.

    Ours is timed from texts to scores; the peer from ready requests to scores.
    """
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from letterhead.models.prompt import load_prompt_encoder
    from letterhead.models.scoring import score_options

    encoder = load_prompt_encoder(experiment)
    prompts, n = [encoder.encode(row["text"]) for row in rows], len(rows)
    answers, with_end = encoder.answers, experiment.prompt.options == "names"
    peer = HFLM(
        pretrained=of_peer or model,
        tokenizer=encoder.tokenizer,
        batch_size=PEER_BATCH,
        max_length=encoder.cutoff_len,
    )
    pairs = [[peer_pair(encoder, ids, answer, with_end) for answer in answers] for ids in prompts]

    def ours(begin: int, end: int) -> np.ndarray:
        part = [encoder.encode(row["text"]) for row in rows[begin:end]]
        return score_options(
            model, part, answers, with_end, experiment.eval.batch_tokens
        ).log_likelihood

    def theirs(begin: int, end: int) -> np.ndarray:
        requests = [
            Instance("loglikelihood", {}, pair, 0) for row in pairs[begin:end] for pair in row
        ]
        scores = [likelihood for likelihood, _ in peer.loglikelihood(requests, disable_tqdm=True)]
        return np.reshape(scores, (end - begin, -1))

    ours(0, 4), theirs(0, 1)  # warm-up
    times, scores = {ours: [], theirs: []}, {ours: [], theirs: []}
    parts = list(itertools.pairwise(np.linspace(0, n, runs + 1).astype(int)))
    for number, (begin, end) in enumerate(parts):
        for score in (ours, theirs) if number % 2 == 0 else (theirs, ours):
            start = time.perf_counter()
            scores[score].append(score(begin, end))
            times[score].append(time.perf_counter() - start)
        print(
            f"{title}, pair {number + 1} of {runs}: {times[ours][-1]:.1f} s, peer "
            f"{times[theirs][-1]:.1f} s",
            flush=True,
        )
    seconds, peer_seconds = times[ours], times[theirs]
    lengths = [int(end - begin) for begin, end in parts]
    equal = [
        peer_ids_are_trained(peer, encoder, ids, answer, with_end)
        for ids in prompts
        for answer in answers
    ]
    return {
        "rows": n,
        "options": len(answers),
        "mean_prompt_tokens": float(np.mean([len(ids) for ids in prompts])),
        "rows_of_each_pair": lengths,
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "rows_per_second": statistics.median(map(operator.truediv, lengths, seconds)),
        "peer_rows_per_second": statistics.median(map(operator.truediv, lengths, peer_seconds)),
        "ratios": list(map(operator.truediv, peer_seconds, seconds)),
        "ratio": statistics.median(map(operator.truediv, peer_seconds, seconds)),
        **share_of_matmul_rate(model, lambda: ours(0, PROFILED_ROWS), experiment.eval.batch_tokens),
        **agreement(rows, *map(np.concatenate, scores.values()), np.reshape(equal, (n, -1))),
    }


def peer_pair(encoder, prompt: list[int], answer, with_end: bool) -> tuple[str, str]:
    """The peer's request: context and continuation as text, split where the option's spelling
    begins."""

    def decode(ids: list[int]) -> str:
        return encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)

    return decode(prompt + answer.ids[: answer.start]), decode(
        answer.ids[answer.start : answer.stop + with_end]
    )


def peer_ids_are_trained(peer, encoder, prompt: list[int], answer, with_end: bool) -> bool:
    """Whether the peer's own encoding of a request gives the ids that training saw."""
    context, continuation = peer._encode_pair(*peer_pair(encoder, prompt, answer, with_end))
    return context + continuation == prompt + answer.ids[: answer.stop + with_end]


def agreement(
    rows: list[dict], ours: np.ndarray, theirs: np.ndarray, ids_equal: np.ndarray
) -> dict:
    """How far the two agree: both of shape (rows, options), log-likelihoods in nats; tokens that
    all options share may be counted by one and not by the other, so differences between options are
    compared."""
    apart = np.abs((ours - ours[:, :1]) - (theirs - theirs[:, :1])).max(axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    equal = ids_equal.all(axis=1)
    top = np.sort(ours, axis=1)
    return {
        "same_predictions": float(same.mean()),
        "rows_with_equal_ids": int(equal.sum()),
        "max_difference": float(apart[equal].max()) if equal.any() else None,
        "rows_that_differ": [
            {
                "id": rows[i]["id"],
                "margin": float(top[i, -1] - top[i, -2]),
                "equal_ids": bool(equal[i]),
            }
            for i in np.flatnonzero(~same)
        ],
    }


def share_of_matmul_rate(model, work, tokens: int) -> dict:
    """FLOPs that `work` executes (attention included) a second, over the rate of bare matrix
    products of the shapes of the model's layers at a batch of that many tokens; measured in turn,
    medians of three."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

    def attention_flops(
        query, key, value, *_, **__
    ):  # torch counts the other kernels of attention, not the CPU's
        return sdpa_flop_count(query, key, value)

    def packed_flops(input, weight, *_, out_shape, **__):
        return 2 * math.prod(out_shape) * input[-1]

    counted = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    counted[torch.ops.mkldnn._linear_pointwise] = packed_flops
    with FlopCounterMode(display=False, custom_mapping=counted) as counter:
        work()
    flops, rates, shares = counter.get_total_flops(), [], []
    for _ in range(3):
        rates.append(matmul_rate(model, tokens))
        start = time.perf_counter()
        work()
        shares.append(flops / (time.perf_counter() - start) / rates[-1])
    return {
        "matmul_gflops": statistics.median(rates) / 1e9,
        "share_of_matmul_rate": statistics.median(shares),
        "profile": profile(work),
    }


def matmul_rate(model, tokens: int) -> float:
    """FLOP/s of one pass of bare matrix products: the model's linear layers, as they are."""
    import torch

    linear = [
        m
        for layer in model.base_model.layers
        for m in layer.modules()
        if isinstance(m, torch.nn.Linear)
    ]
    inputs = {
        m.in_features: torch.randn(tokens, m.in_features, dtype=model.dtype, device=model.device)
        for m in linear
    }
    with torch.inference_mode():
        for timed in (False, True):
            start = time.perf_counter()
            for module in linear:
                module(inputs[module.in_features])
            if model.device.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start if timed else 0.0
    return sum(2 * tokens * m.in_features * m.out_features for m in linear) / seconds


def profile(work) -> dict[str, float]:
    """The operations that take the most time, each with its share of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {
        event.key: round(event.self_cpu_time_total / total, 4) for event in events[:TOP_OPERATIONS]
    }


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
