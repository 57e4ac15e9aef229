"""SFT's speed against LLaMA-Factory as it comes, and against a plain torch loop: same YAML, rows,
batch and optimizer.

    python -m bench.peers.sft --experiment quick

Each trains `bench.sft_steps` optimizer steps in a process of its own, all of them in turn, three
times or more, in an order that rotates. Time is the trainer's own clock, which leaves out loading
and saving; the first steps of a process, in which it touches its memory for the first time, are
left out too (on a virtual machine they can take three times as long as the others, whoever trains),
and told apart. The loss curves say whether they train the same.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError, read_json, write_json
from letterhead.models.llamafactory import command, environment, for_device, step_of
from letterhead.plan.memory import for_memory
from letterhead.runs import results
from letterhead.runs.devices import device_name, machine, versions
from letterhead.runs.processes import call_in_a_process, guarded
from letterhead.runs.stage import run

PLAIN = "a plain torch loop"
AS_IT_COMES = "LLaMA-Factory as it comes"
OURS = "make sft"
FIRST_STEPS = 2


def main(experiment: Experiment) -> None:
    if experiment.decoder.sft.lora:
        raise LetterheadError(
            f"{experiment.decoder.sft.config}: trains an adapter, and the plain loop the whole "
            f"model; name another YAML"
        )
    half = bool(for_device(experiment).get("bf16", experiment.sft_arguments().get("bf16")))
    dtypes = ["float32", *(["bfloat16"] if half else [])]
    contenders = [(who, dtype) for dtype in dtypes for who in (AS_IT_COMES, PLAIN, OURS)]
    measured: dict[tuple[str, str], list[dict]] = {contender: [] for contender in contenders}
    for number in range(experiment.bench.sft_runs):
        at = number % len(contenders)
        for who, dtype in contenders[at:] + contenders[:at]:
            one = measure(experiment, who, dtype == "bfloat16")
            measured[who, dtype].append(one)
            print(
                f"run {number + 1}, {who}, {dtype}: {one['tokens_per_second']:.0f} tokens/s, "
                f"{one['seconds_a_step']:.2f} s "
                f"a step; the first {FIRST_STEPS} took {one['first_seconds']:.1f} s"
            )
    record = {
        "steps": experiment.bench.sft_steps,
        "machine": machine(),
        "device": device_name(),
        "versions": versions(),
    }
    record["runs"] = {f"{who}, {dtype}": runs for (who, dtype), runs in measured.items()}
    record["ratios"] = {}
    for dtype in dtypes:
        for base, its in dict.fromkeys(
            [(AS_IT_COMES, dtype), (PLAIN, dtype), (AS_IT_COMES, "float32")]
        ):
            pairs = zip(measured[OURS, dtype], measured[base, its], strict=True)
            ratios = [
                ours["tokens_per_second"] / theirs["tokens_per_second"] for ours, theirs in pairs
            ]
            title = f"{OURS}, {dtype} / {base}, {its}"
            record["ratios"][title] = {"median": statistics.median(ratios), "pairs": ratios}
            print(
                f"{title}: {statistics.median(ratios):.2f} "
                f"({', '.join(f'{ratio:.2f}' for ratio in ratios)})"
            )
        ours, theirs = (np.array(measured[who, dtype][0]["losses"]) for who in (OURS, AS_IT_COMES))
        record[f"largest_difference_of_losses_{dtype}"] = apart = float(np.abs(ours - theirs).max())
        print(
            f"losses of {OURS} and {AS_IT_COMES}, {dtype}: at most {apart:.1e} apart over "
            f"{len(ours)} steps"
        )
    write_json(experiment.results_folder / "bench_sft.json", record)


def measure(experiment: Experiment, who: str, half: bool) -> dict:
    """Train the steps once: tokens (padding left out) a second, seconds a step, the first steps
    left out; each step's loss.

    Raises
    ------
    LetterheadError : a training ended with an error; quotes the end of what it said
    """
    if who == PLAIN:
        return call_in_a_process(plain_loop, experiment, half)
    with TemporaryDirectory() as folder:
        more = {
            "output_dir": folder,
            "max_steps": experiment.bench.sft_steps,
            "save_strategy": "no",
            "logging_steps": 1,
        }
        more |= {"bf16": half, "report_to": "none", "plot_loss": False}
        more |= {} if who == AS_IT_COMES else for_memory(experiment)
        asked, variables = command(experiment, Path(folder) / "clock.json", **more), environment()
        if who == AS_IT_COMES:
            config = str(experiment.decoder.sft.config)
            arguments = [
                pair for pair in asked[asked.index(config) :] if not pair.startswith("flash_attn=")
            ]
            asked = [sys.executable, "-m", "llamafactory.cli", "train", *arguments]
            variables.pop("GLIBC_TUNABLES", None)
        ended = subprocess.run(
            guarded(asked),
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        if ended.returncode:
            raise LetterheadError(
                f"{who} ended with exit code {ended.returncode}:\n{ended.stdout[-2000:]}"
            )
        state = read_json(Path(folder) / "trainer_state.json")
    log = [line for line in state["log_history"] if "loss" in line]
    return rates(
        *([line[key] for line in log] for key in ("train_runtime", "num_input_tokens_seen", "loss"))
    )


def rates(seconds: list[float], tokens: list[int], losses: list[float]) -> dict:
    """The figures of a run, from what the clock and the count of tokens said after each step."""
    first, steps = FIRST_STEPS - 1, len(seconds) - FIRST_STEPS
    took = seconds[-1] - seconds[first]
    return {
        "tokens_per_second": (tokens[-1] - tokens[first]) / took,
        "seconds_a_step": took / steps,
        "first_seconds": seconds[first],
        "losses": losses,
    }


def plain_loop(experiment: Experiment, half: bool) -> dict:
    """Forward, backward, clipping and AdamW on LLaMA-Factory's rows, as one would write it without
    a trainer."""
    import torch
    from transformers import AutoModelForCausalLM

    from letterhead.models.prompt import load_prompt_encoder

    encoder, rows = load_prompt_encoder(experiment), results.read_rows(experiment, "decoder_train")
    batch, accumulation = step_of(experiment.sft_arguments())
    truth = results.class_numbers(experiment, rows)
    order = np.random.default_rng(experiment.seed).permutation(len(rows))
    order = np.resize(order, experiment.bench.sft_steps * batch * accumulation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(
        experiment.decoder.folder, dtype=torch.float32, use_safetensors=True
    )
    model.to(device).train()
    arguments = experiment.sft_arguments()
    betas = (arguments.get("adam_beta1", 0.9), arguments.get("adam_beta2", 0.999))
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments["learning_rate"], betas=betas, weight_decay=0.0
    )
    clock, tokens, losses, begin = [], [0], [], time.perf_counter()
    for step in range(experiment.bench.sft_steps):
        at = step * batch * accumulation
        batches = [
            as_tensors(encoder, rows, truth, order[first : first + batch])
            for first in range(at, at + batch * accumulation, batch)
        ]
        tokens.append(tokens[-1] + sum(int(one["attention_mask"].sum()) for one in batches))
        # A mean over the tokens of the step, as the Trainer's
        learnt = sum(int((one["labels"] != IGNORED).sum()) for one in batches)
        of_step = 0.0
        for one in batches:
            with torch.autocast(device, torch.bfloat16, enabled=half):
                loss = model(
                    **{name: tensor.to(device) for name, tensor in one.items()},
                    use_cache=False,
                    num_items_in_batch=learnt,
                ).loss
            loss.backward()
            of_step += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(of_step)
        clock.append(time.perf_counter() - begin)
    return rates(clock, tokens[1:], losses)


def as_tensors(encoder, rows: list[dict], truth, chosen) -> dict:
    """A batch of rows with their answers, padded at the right; int64 tensors, a row a line."""
    import torch

    pairs = [(encoder.encode(rows[row]["text"]), encoder.answers[truth[row]].ids) for row in chosen]
    size = len(pairs), max(len(prompt) + len(answer) for prompt, answer in pairs)
    inputs = {name: torch.full(size, fill) for name, fill in _FILL.items()}
    for i, (prompt, answer) in enumerate(pairs):
        n = len(prompt) + len(answer)
        inputs["input_ids"][i, :n] = torch.tensor(prompt + answer)
        inputs["attention_mask"][i, :n] = 1
        inputs["labels"][i, len(prompt) : n] = torch.tensor(answer)
    return inputs


IGNORED = -100  # HF's label of a position without loss
_FILL = {"input_ids": 0, "attention_mask": 0, "labels": IGNORED}

if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
