"""LLaMA-Factory's `train` with a clock in it: training counts, saving does not. Started by sft/train.py, also by torchrun.

python -m sft.worker CLOCK.json CONFIG.yaml key=value …
"""

import sys
import time
from pathlib import Path

from letterhead.processes import begin_worker

if __name__ == "__main__":
    begin_worker()

import torch
from transformers import TrainerCallback

from letterhead.records import read_json, write_json


class Clock(TrainerCallback):
    """Writes, at each checkpoint and at the end, the seconds trained so far by step (resumed runs go on counting) and the
    most GPU memory that this process has held."""

    def __init__(self, path: Path):
        self._path, self._seconds = path, {}

    def _write(self, state) -> None:
        self._seconds[str(state.global_step)] = round(self._before + time.perf_counter() - self._start, 1)
        peak = torch.cuda.max_memory_allocated() >> 20 if torch.cuda.is_available() else None
        if state.is_world_process_zero:
            write_json(self._path, {"training_seconds": self._seconds, "peak_gpu_memory_mb": peak})

    def on_train_begin(self, args, state, control, **kwargs):
        kept = (read_json(self._path) or {"training_seconds": {}})["training_seconds"]
        self._seconds = {step: seconds for step, seconds in kept.items() if int(step) <= state.global_step}
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


if __name__ == "__main__":
    from llamafactory.train.tuner import run_exp

    run_exp(callbacks=[Clock(Path(sys.argv.pop(1)))])
