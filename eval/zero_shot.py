"""What the decoder knows before training: option perplexity, the same calibrated, and an answer after thinking.

    python -m eval.zero_shot --experiment quick

Thinking is generated with the sampling that Qwen3's authors recommend, a batch at a time; a batch that is done is kept, so
that a killed run goes on behind it.
"""

import json
import os
import re
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from letterhead import checkpoints, results
from letterhead.experiment import Experiment
from letterhead.metrics import NO_ANSWER
from letterhead.prompt import load_prompt_encoder
from letterhead.scoring import load_decoder, score_options, softmax
from letterhead.stage import OFFLINE, Stage, run, stage_outputs

CONTENT_FREE = "N/A"  # Zhao et al. 2021, "Calibrate before use"
SAMPLING = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}  # Qwen3's model card, thinking mode


def main(experiment: Experiment) -> None:
    os.environ.update(OFFLINE)
    from eval.score import score_model, scoring_inputs, split_prompts

    made, folder = stage_outputs(experiment, "data"), experiment.decoder.folder
    inputs = {
        "model": checkpoints.model_identity(folder),
        "rows": [made[str(experiment.data_folder / f"{split}.jsonl")] for split in results.SPLITS],
        "thinking": experiment.eval.thinking.model_dump(),
        "sampling": SAMPLING,
        "content_free": CONTENT_FREE,
        "seed": experiment.seed,
        **scoring_inputs(experiment),
    }
    stage = Stage(experiment, "zero-shot", inputs)
    if not stage.is_current():
        encoder, prompts = split_prompts(experiment)
        scored, files = score_model(experiment, 0, folder, made, encoder, prompts), []
        model = load_decoder(folder, experiment.decoder.dtype)
        with_end = experiment.prompt.options == "names"
        empty = score_options(model, [encoder.encode(CONTENT_FREE)], encoder.answers, with_end, experiment.eval.batch_tokens)
        for split, result in scored.items():
            write_scored(experiment, split, result, prompts(split)[0], empty)
            for name in ("zero_shot_no_think", "zero_shot_calibrated"):
                files += results.result_files(experiment, name, split)
        think(experiment, model, scored["test"], stage)
        files += results.result_files(experiment, "zero_shot_think", "test")
        seconds, tokens = (sum(result[key] for result in scored.values()) for key in ("seconds", "tokens"))
        stage.finish(files, rows=scored["test"]["n"], tokens=tokens, scoring_seconds=seconds)
    print(summary(experiment))


def write_scored(experiment: Experiment, split: str, result: dict, rows: list[dict], empty) -> None:
    """Write the two rows that come from one scoring: as it is, and minus the scores of a text without content."""
    lines = results.read_predictions(experiment, "sft@0", split)
    perplexity = np.array([[line["perplexity"][label] for label in experiment.labels] for line in lines])
    score = -np.log(perplexity) * (1 if experiment.eval.score == "mean" else empty.token_count)
    kept = ("seconds", "tokens", "parameters", "dtype", "model", "inputs_sha256")
    measured = {key: result[key] for key in kept}
    own = {"perplexity": perplexity, "eval_loss": result["eval_loss"]}
    for name, shift, more in (("no_think", 0, own), ("calibrated", empty.score(experiment.eval.score), {})):
        probabilities = softmax(score - shift)
        results.write_result(experiment, f"zero_shot_{name}", split, rows, probabilities=probabilities, **more, **measured)


def think(experiment: Experiment, model, no_think: dict, stage: Stage) -> None:
    """Generate answers to (a sample of) the test rows, read the option from each, write the result."""
    settings, encoder = experiment.eval.thinking, load_prompt_encoder(experiment, thinking=True)
    rows = results.read_rows(experiment, "test")
    if settings.rows and settings.rows < len(rows):
        drawn = np.random.default_rng([experiment.seed, 2]).choice(len(rows), settings.rows, replace=False)
        rows = [rows[i] for i in sorted(drawn)]
    answers = generate(experiment, model, encoder, rows, stage)
    read = [read_answer(answer["text"], answer["ended"], encoder.options) for answer in answers]
    truth = results.class_numbers(experiment, rows)
    seconds, tokens = sum(a["seconds"] for a in answers), sum(a["tokens"] for a in answers)
    same = {row["id"] for row in rows}
    alike = [line for line in results.read_predictions(experiment, "sft@0", "test") if line["id"] in same]
    results.write_result(
        experiment,
        "zero_shot_think",
        "test",
        rows,
        predicted=np.array([option for option, _ in read]),
        seconds=round(seconds, 3),
        tokens=tokens,
        parameters=checkpoints.parameters_per_token(model),
        dtype=str(model.dtype).removeprefix("torch."),
        model=str(experiment.decoder.folder),
        inputs_sha256=stage.inputs_sha256,
        thinking={
            "budget_tokens": settings.tokens,
            "generated_tokens": sum(answer["generated"] for answer in answers),
            "begun": sum("think>" in answer["text"] for answer in answers),
            "thought": sum("</think>" in answer["text"] for answer in answers),
            **{kind: sum(k == kind for _, k in read) for kind in ("answered", "unfinished", "unparsed")},
            "no_think_accuracy_same_rows": sum(line["label"] == line["prediction"] for line in alike) / len(truth),
            "times_no_think": (seconds / len(rows)) / (no_think["seconds"] / no_think["n"]),
        },
    )


def generate(experiment: Experiment, model, encoder, rows: list[dict], stage: Stage) -> list[dict]:
    """Answers by row: text, whether it ended by itself, tokens through the model and generated, seconds a row."""
    settings, tokenizer = experiment.eval.thinking, encoder.tokenizer
    prompts = [encoder.encode(row["text"]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    batches = [order[i : i + settings.batch] for i in range(0, len(order), settings.batch)]
    path = stage.folder / f"answers-{stage.inputs_sha256[:16]}.jsonl"
    for old in set(stage.folder.glob("answers-*.jsonl")) - {path}:
        old.unlink()
    done = _whole_lines(path)
    stop = encoder.template.get_stop_token_ids(tokenizer)
    answers: list = [None] * len(rows)
    with open(path, "a", encoding="utf-8") as file, tqdm(total=len(rows), desc="thinking", unit=" rows") as bar:
        for number, batch in enumerate(batches):
            if number >= len(done):
                width = max(len(prompts[i]) for i in batch)
                ids = torch.zeros(len(batch), width, dtype=torch.long)
                mask = torch.zeros_like(ids)
                for row, i in enumerate(batch):
                    ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
                    mask[row, width - len(prompts[i]) :] = 1
                torch.manual_seed(experiment.seed + number)
                start = time.perf_counter()
                with torch.inference_mode():
                    output = model.generate(
                        ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        max_new_tokens=settings.tokens,
                        eos_token_id=stop,
                        pad_token_id=stop[0],
                        **SAMPLING,
                    )[:, width:].tolist()
                each = (time.perf_counter() - start) / len(batch)
                done.append([])
                for new, i in zip(output, batch, strict=True):
                    length = next((n for n, token in enumerate(new) if token in stop), len(new))
                    text = tokenizer.decode(new[:length], clean_up_tokenization_spaces=False)
                    answer = {"id": rows[i]["id"], "text": text, "ended": length < len(new)}
                    answer |= {"generated": length, "tokens": length + len(prompts[i]), "seconds": each}
                    done[-1].append(answer)
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
                file.flush()
            for answer, i in zip(done[number], batch, strict=True):
                answers[i] = answer
            bar.update(len(batch))
    return answers


def _whole_lines(path: Path) -> list:
    """The batches on disk; what a kill left of one is cut off."""
    if not path.exists():
        return []
    whole, _, rest = path.read_bytes().rpartition(b"\n")
    if rest:
        os.truncate(path, len(whole) + bool(whole))
    return [json.loads(line) for line in whole.splitlines()]


def read_answer(text: str, ended: bool, options: list[str]) -> tuple[int, str]:
    """The option that an answer names: the first one after </think>, or, of a model that did not think, the first at all.

    Returns
    -------
    tuple : the option's number or NO_ANSWER; `answered`, `unfinished` (the budget, or the answer, ended before the thought
        did) or `unparsed` (no option named)
    """
    _, thought, rest = text.partition("</think>")
    if not thought:
        if not ended or "<think>" in text:
            return NO_ANSWER, "unfinished"
        rest = text
    letters = all(len(option) == 1 for option in options)
    longest = sorted(range(len(options)), key=lambda i: -len(options[i]))
    names = "|".join(f"({re.escape(options[i])})" for i in longest)
    # Edges of ASCII words only: other scripts write no spaces.
    found = re.search(rf"(?<![A-Za-z0-9_])(?:{names})(?![A-Za-z0-9_])", rest, 0 if letters else re.IGNORECASE)
    return (longest[found.lastindex - 1], "answered") if found else (NO_ANSWER, "unparsed")


def summary(experiment: Experiment) -> str:
    """The rows in a few lines for the terminal."""
    lines = []
    for name in ("zero_shot_no_think", "zero_shot_calibrated", "zero_shot_think"):
        result = results.read_result(experiment, name, "test")
        lines.append(
            f"{name}: accuracy {result['accuracy']:.4f}, macro F1 {result['f1_macro']:.4f}, {result['n']} test rows"
        )
    t = result["thinking"]
    lines.append(
        f"thinking: {t['thought']} of {result['n']} answers hold a thought, {t['unfinished']} unfinished within "
        f"{t['budget_tokens']} tokens, {t['unparsed']} without an option (both wrong); {t['times_no_think']:.0f}x the time "
        f"of option perplexity, whose accuracy on the same rows is {t['no_think_accuracy_same_rows']:.4f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    run(main, __doc__.splitlines()[0])
