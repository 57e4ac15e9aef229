"""LLaMA-Factory's `train` with two callbacks: a clock (training counts, saving does not), and a
model that computes the same with less work. Started by sft/train.py, also by torchrun.

python -m train.sft_worker CLOCK.json PATIENCE CONFIG.yaml key=value …
"""

import functools
import sys
import time
from pathlib import Path

from letterhead.runs.processes import begin_worker

if __name__ == "__main__":
    begin_worker()

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import TrainerCallback
from transformers.modeling_outputs import CausalLMOutput

from letterhead.files import read_json, write_json
from letterhead.models.callbacks import (
    DIVERGED,
    Diverged,
    StepBar,
    StopAtDivergence,
    StopWithoutGain,
)
from letterhead.models.cpu import attention, use_onednn
from letterhead.runs.stage import telling


class Clock(TrainerCallback):
    """Writes, at each checkpoint and at the end, the seconds trained so far by step (resumed runs
    go on counting) and the most GPU memory that this process has held."""

    def __init__(self, path: Path):
        self._path, self._seconds = path, {}

    def _write(self, state) -> None:
        self._seconds[str(state.global_step)] = round(
            self._before + time.perf_counter() - self._start, 1
        )
        peak = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None
        if state.is_world_process_zero:
            write_json(self._path, {"training_seconds": self._seconds, "peak_gpu_memory_mb": peak})

    def on_train_begin(self, args, state, control, **kwargs):
        kept = (read_json(self._path) or {"training_seconds": {}})["training_seconds"]
        self._seconds = {
            step: seconds for step, seconds in kept.items() if int(step) <= state.global_step
        }
        self._before = self._seconds.get(str(state.global_step), 0.0)
        self._start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_save:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self._write(state)
            self._saving = time.perf_counter()

    on_epoch_end = on_step_end  # where `save_strategy: epoch` decides to save

    def on_save(self, args, state, control, **kwargs):
        self._start += time.perf_counter() - self._saving

    def on_train_end(self, args, state, control, **kwargs):
        self._write(state)


class LessWork(TrainerCallback):
    """Projects hidden states to the vocabulary where the loss reads them: a few answer tokens of a
    prompt of a hundred; and on a CPU has `eager` attention computed by our `matrix_products`.

    LLaMA-Factory projects every position, takes the softmax of each, and multiplies most by zero.
    Loss and gradients are the same but for rounding and the order of summation.
    """

    IGNORED = -100  # HF's label of a position without loss

    def on_init_end(self, args, state, control, model=None, **kwargs):
        if isinstance(model, PeftModel):
            # LLaMA-Factory leaves an adapter's base in the type that its files have. Quantised
            # weights are bits in a type of that name, and stay.
            stored = torch.bfloat16 if args.bf16 else torch.float32
            for parameter in model.parameters():
                if not parameter.requires_grad and not hasattr(parameter, "quant_state"):
                    parameter.data = parameter.data.to(stored)
            model = model.get_base_model()
        if model.config._attn_implementation == "eager" and not torch.cuda.is_available():
            model.set_attn_implementation(attention())
        plain = model.forward

        @functools.wraps(plain)
        def forward(*positional, labels=None, num_items_in_batch=None, **inputs):
            if labels is None:
                return plain(*positional, **inputs)
            hidden = model.base_model(*positional, **inputs, use_cache=False).last_hidden_state
            following = functional.pad(labels, (0, 1), value=self.IGNORED)[:, 1:]
            read = following != self.IGNORED
            logits, targets = model.get_output_embeddings()(hidden[read]), following[read]
            loss = model.loss_function(
                logits,
                None,
                logits.shape[-1],
                num_items_in_batch=num_items_in_batch,
                shift_labels=targets,
            )
            return CausalLMOutput(loss=loss)

        model.forward = forward


if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    clock, patience = Path(sys.argv.pop(1)), int(sys.argv.pop(1))
    callbacks = [Clock(clock), LessWork(), StopAtDivergence(), StepBar("SFT")]
    callbacks += [StopWithoutGain(patience)] if patience else []
    use_onednn()
    with telling():
        try:
            run_exp(callbacks=callbacks)
        except Diverged as error:
            print(f"error: {error}", flush=True)
            sys.exit(DIVERGED)
