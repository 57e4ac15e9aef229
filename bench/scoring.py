"""Scoring speed and agreement against lm-evaluation-harness: same process, checkpoint, rows, dtype and threads.

    python -m bench.scoring --experiment ag_news_small

Letters on the experiment's own test rows, and R52's 52 names, several tokens each. The two run in turn, three times or
more, each time on another part of the rows; start-up is not timed. The peer gets the same prompts as text; where its own
encoding of them gives other ids than training saw, that is counted and reported.
"""

import itertools
import os
import statistics
import time
from pathlib import Path

import numpy as np

from letterhead import checkpoints
from letterhead.experiment import Experiment, load_experiment
from letterhead.records import read_jsonl, write_json
from letterhead.stage import OFFLINE, Stage, run

PEER = "lm-eval 0.4.13"
PEER_BATCH = 16
NAMES_EXPERIMENT = "r52"
PROFILED_ROWS = 48
TOP_OPERATIONS = 8


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    import torch

    from letterhead.scoring import load_decoder

    stage = Stage(experiment, "bench-scoring", None)
    folder = checkpoints.whole_checkpoints(Path(experiment.sft_arguments()["output_dir"]))[-1]
    model = load_decoder(folder, experiment.decoder.dtype)
    report = {"peer": PEER, "checkpoint": str(folder), "dtype": str(model.dtype), "threads": torch.get_num_threads()}
    names = load_experiment(NAMES_EXPERIMENT)
    for title, source, n in (
        (experiment.prompt.options, experiment, experiment.bench.scoring_rows),
        ("names", names, experiment.bench.scoring_names_rows),
    ):
        report[title] = compare(model, source, folder, n, experiment.bench.scoring_runs, title)
    path = experiment.results_folder / "bench_scoring.json"
    write_json(path, report)
    stage.finish([path], device=str(model.device))
    for title in ("letters", "names"):
        figures = report[title]
        print(
            f"{title}: {figures['rows_per_second']:.2f} rows/s, {PEER} {figures['peer_rows_per_second']:.2f}, "
            f"ratio {figures['ratio']:.2f} (pairs {', '.join(f'{r:.2f}' for r in figures['ratios'])}); "
            f"{figures['share_of_matmul_rate']:.2f} of the matmul rate ({figures['matmul_gflops']:.0f} GFLOP/s); "
            f"same predictions {figures['same_predictions']:.4f}, option differences within "
            f"{figures['max_difference']:.1e} on rows with equal ids"
        )
    print(path)


def compare(model, experiment: Experiment, folder: Path, n: int, runs: int, title: str) -> dict:
    """Score n test rows with both; every paired run takes its own part of the rows. Agreement, rates and a profile."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    from letterhead.prompt import load_prompt_encoder
    from letterhead.scoring import score_options

    encoder = load_prompt_encoder(experiment, folder)
    rows = list(read_jsonl(experiment.data_folder / "test.jsonl"))
    rows = [rows[i] for i in np.random.default_rng(experiment.seed).permutation(len(rows))[:n]]
    prompts = [encoder.encode(row["text"]) for row in rows]
    answers, with_end = encoder.answers, experiment.prompt.options == "names"
    peer = HFLM(pretrained=model, tokenizer=encoder.tokenizer, batch_size=PEER_BATCH, max_length=encoder.cutoff_len)

    def ours(part: list[list[int]]) -> np.ndarray:
        return score_options(model, part, answers, with_end, experiment.eval.batch_tokens).log_likelihood

    def theirs(part: list[list[int]]) -> np.ndarray:
        pairs = [peer_pair(encoder, ids, answer, with_end) for ids in part for answer in answers]
        requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
        scores = [likelihood for likelihood, _ in peer.loglikelihood(requests, disable_tqdm=True)]
        return np.reshape(scores, (len(part), -1))

    ours(prompts[:4]), theirs(prompts[:1])  # warm-up
    seconds, peer_seconds, scores, peer_scores = [], [], [], []
    parts = [prompts[begin:end] for begin, end in itertools.pairwise(np.linspace(0, n, runs + 1).astype(int))]
    for number, part in enumerate(parts, 1):
        for score, times, results in ((ours, seconds, scores), (theirs, peer_seconds, peer_scores)):
            start = time.perf_counter()
            results.append(score(part))
            times.append(time.perf_counter() - start)
        print(f"{title}, pair {number} of {runs}: {seconds[-1]:.1f} s, peer {peer_seconds[-1]:.1f} s", flush=True)
    equal = [peer_ids_are_trained(peer, encoder, ids, answer, with_end) for ids in prompts for answer in answers]
    return {
        "rows": n,
        "options": len(answers),
        "mean_prompt_tokens": float(np.mean([len(ids) for ids in prompts])),
        "rows_of_each_pair": [len(part) for part in parts],
        "seconds": seconds,
        "peer_seconds": peer_seconds,
        "rows_per_second": statistics.median(len(p) / s for p, s in zip(parts, seconds, strict=True)),
        "peer_rows_per_second": statistics.median(len(p) / s for p, s in zip(parts, peer_seconds, strict=True)),
        "ratios": [b / a for a, b in zip(seconds, peer_seconds, strict=True)],
        "ratio": statistics.median(b / a for a, b in zip(seconds, peer_seconds, strict=True)),
        **share_of_matmul_rate(model, lambda: ours(prompts[:PROFILED_ROWS]), experiment.eval.batch_tokens),
        **agreement(rows, np.concatenate(scores), np.concatenate(peer_scores), np.reshape(equal, (n, -1))),
    }


def peer_pair(encoder, prompt: list[int], answer, with_end: bool) -> tuple[str, str]:
    """The peer's request: context and continuation as text, split where the option's spelling begins."""
    decode = encoder.tokenizer.decode
    return decode(prompt + answer.ids[: answer.start]), decode(answer.ids[answer.start : answer.stop + with_end])


def peer_ids_are_trained(peer, encoder, prompt: list[int], answer, with_end: bool) -> bool:
    """Whether the peer's own encoding of a request gives the ids that training saw."""
    context, continuation = peer._encode_pair(*peer_pair(encoder, prompt, answer, with_end))
    return context + continuation == prompt + answer.ids[: answer.stop + with_end]


def agreement(rows: list[dict], ours: np.ndarray, theirs: np.ndarray, ids_equal: np.ndarray) -> dict:
    """How far the two agree: both of shape (rows, options), log-likelihoods in nats; tokens that all options share may
    be counted by one and not by the other, so differences between options are compared."""
    apart = np.abs((ours - ours[:, :1]) - (theirs - theirs[:, :1])).max(axis=1)
    same = ours.argmax(axis=1) == theirs.argmax(axis=1)
    equal = ids_equal.all(axis=1)
    top = np.sort(ours, axis=1)
    return {
        "same_predictions": float(same.mean()),
        "rows_with_equal_ids": int(equal.sum()),
        "max_difference": float(apart[equal].max()) if equal.any() else None,
        "rows_that_differ": [
            {"id": rows[i]["id"], "margin": float(top[i, -1] - top[i, -2]), "equal_ids": bool(equal[i])}
            for i in np.flatnonzero(~same)
        ],
    }


def share_of_matmul_rate(model, work, tokens: int) -> dict:
    """FLOPs that `work` executes (attention included) a second, over the rate of bare matrix products of the shapes of
    the model's layers at a batch of that many tokens; measured in turn, medians of three."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
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
    """FLOP/s of one pass of bare matrix products, one for each linear layer's weight."""
    import torch

    weights = [m.weight for layer in model.base_model.layers for m in layer.modules() if isinstance(m, torch.nn.Linear)]
    inputs = {w.shape[1]: torch.randn(tokens, w.shape[1], dtype=w.dtype, device=w.device) for w in weights}
    with torch.inference_mode():
        for timed in (False, True):
            start = time.perf_counter()
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)
            if weights[0].is_cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start if timed else 0.0
    return sum(2 * tokens * w.numel() for w in weights) / seconds


def profile(work) -> dict[str, float]:
    """The operations that take the most time, each with its share of all."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CPU]) as recorded:
        work()
    events = sorted(recorded.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:TOP_OPERATIONS]}


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
