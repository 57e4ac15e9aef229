"""A linear head on an encoder or a decoder, trained with HF's Trainer on the raw text.

Weights are float32; bfloat16 is used by autocast only (a head on bfloat16 weights would not move at
a learning rate of 1e-5).
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel
from scipy.special import softmax
from sklearn.metrics import log_loss
from torch.utils.data import SequentialSampler
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import EvalLoopOutput

from letterhead.config.models import Head
from letterhead.files import LetterheadError
from letterhead.models.adapters import load_merged, merged
from letterhead.models.callbacks import StepBar, StopAtDivergence, StopWithoutGain, diverged
from letterhead.models.checkpoints import base_of, prune_optimizer_states, require_model
from letterhead.models.cpu import attention, pack, quicken_dropout, use_onednn
from letterhead.models.precision import cast, project_in_float32, with_shared_weights
from letterhead.models.prompt import TextEncoder
from letterhead.runs.terminal import progress

# Every so many evaluations a checkpoint is saved to resume from, even if it is not the best.
RESUMABLE_EVERY = 4


def load_head(folder: Path, labels: Sequence[str], new_head: bool = False) -> PreTrainedModel:
    """Load a model with a linear head, in float32, merged with its adapter where the folder holds
    one; a folder without a head gets a new one, random by torch's seed.

    Parameters
    ----------
    new_head : begin with a new head also where the folder holds one, whose classes are others, or
        in another order

    Raises
    ------
    LetterheadError : no model there, or one that is cut off
    """
    require_model(folder)
    base = base_of(folder)
    if base != folder:  # an adapter, and in it the head
        return load_merged(load_head(base, labels, new_head=True), folder)
    names = dict(enumerate(labels))
    model, loading = AutoModelForSequenceClassification.from_pretrained(
        folder,
        id2label=names,
        label2id={name: i for i, name in names.items()},
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        ignore_mismatched_sizes=new_head,
        output_loading_info=True,
    )
    if new_head:
        begin_head_anew(model, loading, folder)
    # A decoder's head reads the last token that is not a padding, so it must know the padding.
    model.config.pad_token_id = load_tokenizer(folder).pad_token_id
    return ready(model)


def begin_head_anew(model: PreTrainedModel, loading: dict, folder: Path) -> None:
    """Give a model a new head where its folder held one, whose classes are others, or in another
    order.

    Parameters
    ----------
    loading : what transformers says of the loading: keys that were missing, and those of another
        size

    Raises
    ------
    LetterheadError : something else than the head has another size
    """
    heads = {
        name: module for name, module in model.named_children() if name != model.base_model_prefix
    }
    mismatched = {entry[0] for entry in loading["mismatched_keys"]}
    if wrong := sorted(key for key in mismatched if key.partition(".")[0] not in heads):
        raise LetterheadError(
            f"{folder}: {wrong[0]} has another size than config.json says; fetch the model again"
        )
    missing = set(loading["missing_keys"]) - mismatched
    loaded = [
        name
        for name, module in heads.items()
        for key, _ in module.named_parameters()
        if f"{name}.{key}" not in missing
    ]
    if not loaded:
        return
    classes = ", ".join(model.config.id2label.values())
    print(f"{folder}: holds a head already; it is left out, and a new one for {classes} is trained")
    for module in heads.values():
        for parameter in module.parameters():
            parameter._is_hf_initialized = False  # else transformers leaves what it has loaded
        module.apply(model._init_weights)


def ready(model: PreTrainedModel) -> PreTrainedModel:
    """A float32 model with a head as the trainer wants it: attention that suits the device, the
    head's products in float32 under autocast, and dropout from few random bits."""
    use_onednn()
    model.set_attn_implementation(attention())
    return quicken_dropout(project_in_float32(model))


def load_tokenizer(folder: Path):
    """The tokenizer of a model; one without a padding token pads with the end-of-text token.

    A decoder's head reads the last token that is not a padding. Where the tokenizer ends each text
    with the padding token, that would be the one before, and a service, which reads the last token,
    would answer otherwise; so another token pads.

    Raises
    ------
    LetterheadError : it ends each text with its padding, and has no other token to pad with
    """
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    framing = set(tokenizer("a")["input_ids"]) - set(
        tokenizer("a", add_special_tokens=False)["input_ids"]
    )
    if tokenizer.pad_token_id in framing:
        others = [token for token in (tokenizer.unk_token, *tokenizer.all_special_tokens) if token]
        free = [token for token in others if tokenizer.convert_tokens_to_ids(token) not in framing]
        if not free:
            raise LetterheadError(
                f"{folder}: its tokenizer ends each text with {tokenizer.pad_token!r}, which is "
                f"its padding, too; "
                "give it another pad_token in tokenizer_config.json"
            )
        tokenizer.pad_token = free[0]
    return tokenizer


def encoded(
    rows: Sequence[dict],
    classes: np.ndarray,
    encoder: TextEncoder,
    title: str,
    in_parts: bool = False,
) -> Dataset:
    """Rows as a data set of input_ids, labels and length, in the order of `rows`.

    Parameters
    ----------
    in_parts : make a row of each part that the model reads of a row
    """
    raw = Dataset.from_dict({"text": [row["text"] for row in rows], "labels": classes})

    def encode(batch: dict) -> dict:
        ids, labels = encoder.encode(batch["text"]), batch["labels"]
        if in_parts:
            of_rows = [encoder.parts(one) for one in ids]
            labels = [label for label, parts in zip(labels, of_rows, strict=True) for _ in parts]
            ids = list(chain.from_iterable(of_rows))
        return {"input_ids": ids, "labels": labels, "length": [len(one) for one in ids]}

    return raw.map(encode, batched=True, remove_columns=["text"], desc=title)


def training_arguments(
    head: Head,
    folder: Path | str,
    seed: int,
    best: str | None,
    dtype: str = "float32",
    keep: bool = True,
) -> TrainingArguments:
    """HF's arguments for a head: evaluated every `eval_steps`; of what is saved the last is kept,
    and the best.

    Parameters
    ----------
    best : the loss that decides which is best, or None where no split may decide it
    dtype : float32, or bfloat16 by autocast
    keep : write checkpoints, and a log for TensorBoard
    """
    gpu = torch.cuda.is_available()
    return TrainingArguments(
        output_dir=str(folder),
        seed=seed,
        learning_rate=head.learning_rate,
        lr_scheduler_type=head.lr_scheduler_type,
        warmup_steps=head.warmup_ratio,  # below 1: a share
        weight_decay=head.weight_decay,
        adam_beta2=head.adam_beta2,
        num_train_epochs=head.num_train_epochs,
        per_device_train_batch_size=head.per_device_train_batch_size,
        gradient_accumulation_steps=head.gradient_accumulation_steps,
        per_device_eval_batch_size=head.per_device_eval_batch_size,
        train_sampling_strategy="group_by_length" if head.group_by_length else "random",
        eval_strategy="steps",
        eval_steps=head.eval_steps,
        save_strategy="steps" if keep else "no",
        save_steps=head.eval_steps,
        save_total_limit=2,  # with 1 the Trainer ends by deleting the last one for the best
        metric_for_best_model=best,
        greater_is_better=False if best else None,
        logging_steps=head.eval_steps / 5,
        report_to="tensorboard" if keep else "none",
        bf16=dtype == "bfloat16",
        use_cpu=not gpu,
        dataloader_pin_memory=gpu,
    )


@torch.inference_mode()
def class_logits(
    model: PreTrainedModel,
    tokenizer,
    ids: Sequence[list[int]],
    batch_tokens: int,
    title: str | None = None,
    parts: Callable[[list[int]], list[list[int]]] | None = None,
) -> np.ndarray:
    """Logits of the classes, float32 of shape (rows, classes), in the order of `ids`; like lengths
    share a batch. Of a row in several parts they are the logarithms of the mean probabilities.

    Parameters
    ----------
    batch_tokens : how many tokens a forward pass may hold, padding included
    parts : what the model reads of a row (`TextEncoder.parts`); None: the whole
    """
    if parts:
        of_rows = [parts(row) for row in ids]
        owners = np.repeat(np.arange(len(ids)), list(map(len, of_rows)))
        if len(owners) > len(ids):
            every = list(chain.from_iterable(of_rows))
            logits = class_logits(model, tokenizer, every, batch_tokens, title)
            return mean_probabilities(logits, owners)
    logits = np.zeros((len(ids), model.config.num_labels), np.float32)
    with progress(
        total=len(ids), desc=title, unit=" rows", disable=title is None, mininterval=0.5
    ) as bar:
        for rows in batches_of([len(row) for row in ids], batch_tokens):
            inputs = tokenizer.pad(
                {"input_ids": [ids[row] for row in rows]}, return_tensors="pt"
            ).to(model.device)
            logits[rows] = model(**inputs).logits.float().cpu().numpy()
            bar.update(len(rows))
    return logits


def mean_probabilities(logits: np.ndarray, owners: np.ndarray) -> np.ndarray:
    """The logarithms, shape (rows, classes), of the mean of the probabilities that each row's parts
    have.

    Parameters
    ----------
    logits : of the parts, shape (parts, classes)
    owners : the row of each part, from 0 on, each row at least once; shape (parts,)
    """
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    total = np.zeros((owners.max() + 1, logits.shape[1]))
    np.add.at(total, owners, probabilities)
    floor = np.finfo(np.float64).tiny
    return np.log(total / np.bincount(owners)[:, None] + floor).astype(np.float32)


def batches_of(lengths: Sequence[int], batch_tokens: int) -> list[list[int]]:
    """Row numbers in batches that hold so many tokens with their padding, the longest row first; a
    longer row is a batch of its own.

    Examples
    --------
    >>> batches_of([2, 9, 3, 1], 6)
    [[1], [2, 0], [3]]
    """
    order, batches = sorted(range(len(lengths)), key=lambda row: -lengths[row]), []
    while order:
        rows = max(1, batch_tokens // max(1, lengths[order[0]]))
        batches.append(order[:rows])
        order = order[rows:]
    return batches


def read_lengths(
    ids: Sequence[list[int]], parts: Callable[[list[int]], list[list[int]]] | None
) -> list[int]:
    """The lengths of what a model reads of rows, longest first; `parts` as for `class_logits`."""
    of_rows = ([row] if parts is None else parts(row) for row in ids)
    return sorted(map(len, chain.from_iterable(of_rows)), reverse=True)


def padded_tokens(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> int:
    """How many tokens go through a model that reads rows of these lengths in these batches, padding
    included."""
    return sum(int(max(lengths[row] for row in rows)) * len(rows) for rows in batches)


def by_rows(lengths: Sequence[int], rows: int) -> list[list[int]]:
    """Row numbers in batches of so many rows, the longest row first."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    return [order[at : at + rows] for at in range(0, len(order), rows)]


def for_inference(model: PreTrainedModel, dtype: str) -> PreTrainedModel:
    """A float32 model with a head, in place, as it answers: cast, and on a CPU with packed
    layers."""
    return pack(cast(model, dtype).to("cuda" if torch.cuda.is_available() else "cpu").eval())


def classify(
    model: PreTrainedModel,
    tokenizer,
    ids: Sequence[list[int]],
    batch_tokens: int,
    parts: Callable[[list[int]], list[list[int]]] | None = None,
) -> np.ndarray:
    """Probabilities of the classes, shape (rows, classes), in the order of `ids`; `parts` as for
    `class_logits`."""
    logits = class_logits(model, tokenizer, ids, batch_tokens, parts=parts)
    return softmax(logits.astype(np.float64), axis=-1)


def mean_over_rows(
    outputs,
    labels: torch.Tensor,
    num_items_in_batch: torch.Tensor | None = None,
    weights: Sequence[float] | None = None,
) -> torch.Tensor:
    """Cross-entropy, times the weight of each row's class where there are weights, summed over a
    batch's rows, divided by the rows of the whole optimizer step, so that loss and gradients do not
    depend on how the step is cut into batches and processes; without `num_items_in_batch` by the
    batch's own.

    (Left to itself the Trainer would not divide by the accumulation: it takes a `forward` with
    **kwargs for one that does, and sequence classifiers do not.)
    """
    logits = outputs.logits.float()
    weight = None if weights is None else logits.new_tensor(weights)
    total = torch.nn.functional.cross_entropy(logits, labels, weight, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class EpochLengthGroupedSampler(LengthGroupedSampler):
    """HF's sampler, drawn from seed and epoch, so that a resumed training sees the rows in the
    order it would have."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)


class _LogWhatIsEvaluated(TrainerCallback):
    """Log the loss at each evaluation: a checkpoint then holds all losses so far, and none is lost
    to a resume."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log |= control.should_evaluate


class HeadTrainer(Trainer):
    """HF's Trainer for a head, evaluated on several splits (at the last step too); hands out what
    it evaluated.

    Parameters
    ----------
    model, arguments, tokenizer : as for Trainer
    train : from `encoded`
    evaluated : split → data set from `encoded`
    weights : of the classes in the training loss
    patience : ends the training after so many evaluations without a gain
    batch_tokens : how many tokens a forward pass of an evaluation may hold; several processes share
        the arguments' rows instead
    parts : what the model reads of an evaluated row, as for `class_logits`; several processes read
        the whole
    on_evaluated : called, in the first process, with split, logits (rows, classes) in the rows'
        order, seconds, and how many tokens went through the model, padding included; returns the
        metrics of that split

    Attributes
    ----------
    saving_seconds : spent on writing checkpoints so far
    """

    def __init__(
        self,
        model: PreTrainedModel,
        arguments: TrainingArguments,
        tokenizer,
        train: Dataset,
        evaluated: dict[str, Dataset] | None = None,
        on_evaluated: Callable[[str, np.ndarray, float, int], dict[str, float]] | None = None,
        weights: Sequence[float] | None = None,
        patience: int | None = None,
        batch_tokens: int = 2048,
        parts: Callable[[list[int]], list[list[int]]] | None = None,
    ):
        # The Trainer drops the column `length` before its samplers see the rows.
        self._lengths = {"train": np.array(train["length"])}
        self.saving_seconds, self._batch_tokens, self._parts = 0.0, batch_tokens, parts
        self._order, self._on_evaluated, by_length, self._read = {}, on_evaluated, {}, {}
        for split, rows in (
            evaluated or {}
        ).items():  # longest first: what does not fit in memory fails at once
            self._lengths[split] = -np.sort(-np.array(rows["length"]))
            self._order[split] = np.argsort(-np.array(rows["length"]), kind="stable")
            by_length[split] = rows.select(self._order[split])
            self._read[split] = read_lengths(rows["input_ids"], parts)
        super().__init__(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            data_collator=DataCollatorWithPadding(tokenizer),
            train_dataset=train,
            eval_dataset=by_length or None,
            callbacks=[
                _LogWhatIsEvaluated,
                StopAtDivergence(),
                StepBar("training"),
                *([StopWithoutGain(patience)] if patience else []),
            ],
            compute_loss_func=partial(mean_over_rows, weights=weights),
        )

    def _get_train_sampler(self, train_dataset=None):
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        batch = (
            self.args.train_batch_size
            * self.args.gradient_accumulation_steps
            * self.args.world_size
        )
        return EpochLengthGroupedSampler(batch, self._lengths["train"].tolist(), self.args.seed)

    def _get_eval_sampler(self, eval_dataset):
        return SequentialSampler(eval_dataset)  # they are sorted already

    def _determine_best_metric(self, metrics, trial):
        """Says, too, whether this evaluation is saved: a checkpoint is three times the model's
        size, the optimizer's state included, so one that is not the best is saved only now and
        then, to resume from, and at the end."""
        best, state = super()._determine_best_metric(metrics, trial), self.state
        now_and_then = state.global_step // state.eval_steps % RESUMABLE_EVERY == 0
        ends = state.global_step == state.max_steps or self.control.should_training_stop
        self.control.should_save &= best or now_and_then or ends
        return best

    def _save_checkpoint(self, model, trial):
        start = time.perf_counter()
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            prune_optimizer_states(Path(self.args.output_dir))
        self.saving_seconds += time.perf_counter() - start

    def evaluation_loop(self, dataloader, *args, metric_key_prefix="eval", **kwargs):
        start = time.perf_counter()
        split = metric_key_prefix.removeprefix("eval_")
        lengths = self._read[split]
        if self.args.world_size == 1:
            output = self._score(split, metric_key_prefix)
            batches = batches_of(lengths, self._batch_tokens)
        else:
            batches = by_rows(lengths, self.args.eval_batch_size)
            kwargs["prediction_loss_only"] = (
                False  # which the Trainer takes for granted without compute_metrics
            )
            output = super().evaluation_loop(
                dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs
            )
            self._require_finite(output.predictions)
        seconds = time.perf_counter() - start
        logits = np.empty_like(output.predictions)
        logits[self._order[split]] = output.predictions
        tokens = padded_tokens(lengths, batches)
        metrics = [
            self._on_evaluated(split, logits, seconds, tokens)
            if self.is_world_process_zero()
            else None
        ]
        (metrics,) = broadcast_object_list(metrics)  # from the first process to all
        output.metrics.update(
            {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        )
        return output

    def _require_finite(self, logits: np.ndarray) -> None:
        if not np.isfinite(logits).all():
            raise diverged(
                self.state.global_step, "its logits are not finite", self._get_learning_rate()
            )

    def _score(self, split: str, prefix: str) -> EvalLoopOutput:
        """What the Trainer's loop gives; on a CPU by a copy of the model that is made for
        inference."""
        model, rows = self.model.eval(), self.eval_dataset[split]
        if self.args.device.type == "cpu":
            model = self._packed()
        logits = class_logits(
            model,
            self.processing_class,
            rows["input_ids"],
            self._batch_tokens,
            f"scoring {split}",
            self._parts,
        )
        del model
        gc.collect()  # modules are cycles, and this copy must not be there at the next evaluation
        self._require_finite(logits)
        labels = np.array(rows["labels"])
        loss = log_loss(
            labels, softmax(logits.astype(np.float64), axis=-1), labels=range(logits.shape[1])
        )
        return EvalLoopOutput(logits, labels, {f"{prefix}_loss": loss}, len(labels))

    def _packed(self) -> PreTrainedModel:
        model = with_shared_weights(self.model)
        for wrapped in ("forward", "_original_forward"):  # accelerate's, which computes in autocast
            vars(model).pop(wrapped, None)
        if isinstance(model, PeftModel):
            model = merged(model)
        return for_inference(model, "bfloat16" if self.args.bf16 else "float32")


def require_length(folder: Path, max_length: int, key: str) -> None:
    """Make sure that a model has positions for `max_length` tokens.

    Raises
    ------
    LetterheadError : it has fewer; names the key to lower
    """
    from transformers import AutoConfig

    positions = getattr(
        AutoConfig.from_pretrained(folder, trust_remote_code=False),
        "max_position_embeddings",
        math.inf,
    )
    if max_length > positions:
        raise LetterheadError(
            f"{key}.max_length is {max_length}, but {folder} has {positions} positions; lower it"
        )
