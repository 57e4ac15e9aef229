"""GRPO by TRL: prompts with the ids that the rest of the pipeline sees, and the rewards."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from letterhead.config.models import Grpo
from letterhead.models.answers import read_answer
from letterhead.models.callbacks import StepBar, StopAtDivergence
from letterhead.models.cpu import attention, use_onednn
from letterhead.models.folding import text_gives_ids
from letterhead.models.prompt import PromptEncoder


def trl():
    """TRL, imported; 0.24 takes what transformers 5 says of a package, (False, None), for a truth,
    and would import what is not there."""
    found = import_module("trl.import_utils")
    for name, value in list(vars(found).items()):
        if name.endswith("_available") and isinstance(value, tuple):
            setattr(found, name, value[0])
    return import_module("trl")


class Rewards:
    """What an answer is worth: 1 for the right option, and 1 for one that is finished: it ended by
    itself, and holds, after one closed thought that says something (or, where none is asked for, at
    most one), an option and nothing else.

    Parameters
    ----------
    encoder : of the prompts
    think : whether a thought is asked for
    """

    def __init__(self, encoder: PromptEncoder, think: bool):
        self._options, self._labels, self._think = encoder.options, encoder.labels, think
        self._stop = set(encoder.template.get_stop_token_ids(encoder.tokenizer))

    def right_option(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[list[int]],
        option: Sequence[str],
        **_,
    ):
        """1 where the answer names the option, shape (answers,)."""
        read = [
            read_answer(text, self._ended(ids), self._options, self._labels)[0]
            for text, ids in self._both(completions, completion_ids)
        ]
        return [
            float(number >= 0 and self._options[number] == right)
            for number, right in zip(read, option, strict=True)
        ]

    def finished(self, completions: Sequence[str], completion_ids: Sequence[list[int]], **_):
        """1 where the answer is finished, shape (answers,)."""
        found = []
        for text, ids in self._both(completions, completion_ids):
            thought, closed, rest = text.rpartition("</think>")
            whole = bool(closed) and thought.count("<think>") == 1 and "</think>" not in thought
            thinks = (
                whole and bool(thought.partition("<think>")[2].strip())
                if self._think
                else whole or not closed
            )
            found.append(float(self._ended(ids) and thinks and rest.strip() in self._options))
        return found

    def _ended(self, ids: list[int]) -> bool:
        return bool(ids) and ids[-1] in self._stop

    @staticmethod
    def _both(
        completions: Sequence[str], completion_ids: Sequence[list[int]]
    ) -> list[tuple[str, list[int]]]:
        return list(zip(completions, completion_ids, strict=True))


def questions(encoder: PromptEncoder, rows: list[dict]) -> Dataset:
    """Prompts as text, each with its right option; TRL encodes text, so rows whose text does not
    give the ids of training back are left out."""
    option = dict(zip(encoder.labels, encoder.options, strict=True))
    asked = []
    for row in rows:
        ids = encoder.encode(row["text"])
        if text_gives_ids(encoder, ids):
            prompt = encoder.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
            asked.append({"prompt": prompt, "option": option[row["label"]]})
    return Dataset.from_list(asked)


def arguments(settings: Grpo, folder: Path, seed: int, dtype: str):
    """TRL's arguments: `prompts` questions a step, each answered `generations` times at once."""
    gpu = torch.cuda.is_available()
    return trl().GRPOConfig(
        output_dir=str(folder),
        seed=seed,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=0.1,
        max_steps=settings.steps,
        per_device_train_batch_size=settings.generations,
        gradient_accumulation_steps=settings.prompts,
        num_generations=settings.generations,
        max_completion_length=settings.tokens,
        max_prompt_length=None,
        temperature=settings.temperature,
        beta=settings.beta,
        logging_steps=1,
        save_strategy="steps",
        save_steps=max(1, settings.steps // 4),
        save_total_limit=2,
        report_to="tensorboard",
        bf16=dtype == "bfloat16",
        fp16=False,
        gradient_checkpointing=gpu,
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
    )


def trainer(model: Path, encoder: PromptEncoder, asked: Dataset, settings: Grpo, training):
    """TRL's trainer of the model in a folder, float32 weights."""
    use_onednn()
    loaded = AutoModelForCausalLM.from_pretrained(
        model,
        dtype=torch.float32,
        attn_implementation=attention(),
        use_safetensors=True,
        trust_remote_code=False,
    )
    loaded.warnings_issued = {}  # which trl 0.24 writes to, and transformers 5 no longer has
    rewards = Rewards(encoder, settings.think)
    return trl().GRPOTrainer(
        model=loaded,
        reward_funcs=[rewards.right_option, rewards.finished],
        args=training,
        train_dataset=asked,
        processing_class=encoder.tokenizer,
        callbacks=[StopAtDivergence(), StepBar("GRPO")],
    )


def moved(log: list[dict[str, Any]], reward: str) -> dict[str, float]:
    """The mean reward over the first and the last quarter of the steps, and the standard error of
    their difference."""
    values = torch.tensor(
        [line[f"rewards/{reward}/mean"] for line in log if f"rewards/{reward}/mean" in line]
    )
    n = max(2, len(values) // 4)
    first, last = values[:n], values[-n:]
    error = ((first.var() + last.var()) / n).sqrt()
    return {
        "first": float(first.mean()),
        "last": float(last.mean()),
        "standard_error": float(error),
    }
