"""What all trainings of HF's Trainer are given: an end where they diverge, and a bar."""

import math

import torch
from transformers import EarlyStoppingCallback, TrainerCallback

from letterhead.files import LetterheadError
from letterhead.runs.terminal import progress

# The exit code of a process whose training diverged
DIVERGED = 3


class StopAtDivergence(TrainerCallback):
    """Ends a training at the first loss, gradient or weight that is not finite, and leaves no such
    checkpoint.

    Left to itself the Trainer goes on: it logs the mean of earlier losses in place of one that is
    not a number, and saves weights that are none, with which every row gets the first class.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        args.logging_nan_inf_filter = False  # so that what is logged is what was computed

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        # With float16 an overflow now and then is expected: the step is left out and the loss
        # scaled down.
        if args.fp16 or not gradients:
            return
        norm = float(torch.stack(torch._foreach_norm(gradients)).norm())
        if not math.isfinite(norm):
            self._stop(state.global_step + 1, f"the gradient's norm is {norm}", kwargs)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if control.should_save or control.should_evaluate:
            self._require_finite_weights(state.global_step, model, kwargs)

    on_epoch_end = on_step_end  # where `save_strategy: epoch` decides to save

    def on_train_end(self, args, state, control, model=None, **kwargs):
        self._require_finite_weights(state.global_step, model, kwargs)

    def on_log(self, args, state, control, logs=None, **kwargs):
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)) and not args.fp16:
                self._stop(state.global_step, f"{name} is {float(value)}", kwargs)

    def _require_finite_weights(self, step: int, model, kwargs: dict) -> None:
        for name, parameter in model.named_parameters():
            if parameter.numel() and not all(
                math.isfinite(bound) for bound in parameter.detach().aminmax()
            ):
                self._stop(step, f"the weights {name} are not finite", kwargs)

    @staticmethod
    def _stop(step: int, what: str, kwargs: dict) -> None:
        rates = kwargs["lr_scheduler"].get_last_lr() if kwargs.get("lr_scheduler") else []
        raise diverged(step, what, rates[0] if rates else None)


class StopWithoutGain(EarlyStoppingCallback):
    """HF's early stopping, with two differences: at each evaluation without a gain the learning
    rate falls to a third, so that the last steps settle as a decay to a known end would have them;
    and a resumed training goes on counting.

    Parameters
    ----------
    patience : training ends after so many evaluations in a row whose loss got no lower
    """

    FALL = 1 / 3

    def __init__(self, early_stopping_patience: int, early_stopping_threshold: float = 0.0):
        super().__init__(early_stopping_patience, early_stopping_threshold)

    def on_train_begin(self, args, state, control, **kwargs):
        self.early_stopping_patience_counter = evaluations_without_gain(vars(state))

    def on_evaluate(self, args, state, control, metrics, lr_scheduler=None, **kwargs):
        if f"eval_{args.metric_for_best_model.removeprefix('eval_')}" not in metrics:
            return  # of another split
        super().on_evaluate(args, state, control, metrics, **kwargs)
        if self.early_stopping_patience_counter:
            # The schedule is a factor on these, and a checkpoint holds them. DeepSpeed's wrapper
            # and accelerate's hold it in `scheduler`.
            schedule = getattr(lr_scheduler, "scheduler", lr_scheduler)
            schedule.base_lrs = [rate * self.FALL for rate in schedule.base_lrs]


def has_ended(state: dict, patience: int | None) -> bool:
    """Whether a Trainer's state is that of the end of its training, with or without
    `StopWithoutGain`."""
    return is_stopped(state, patience) or state["global_step"] >= state["max_steps"]


def is_stopped(state: dict, patience: int | None) -> bool:
    """Whether a Trainer's state is that of a training that ended for want of a gain."""
    return patience is not None and evaluations_without_gain(state) >= patience


def evaluations_without_gain(state: dict) -> int:
    """How many evaluations in a row brought no gain, from a Trainer's state; 0 without
    `StopWithoutGain`."""
    kept = (state.get("stateful_callbacks") or {}).get(StopWithoutGain.__name__)
    return kept["attributes"]["early_stopping_patience_counter"] if kept else 0


class StepBar(TrainerCallback):
    """The bar of a training: its optimizer steps."""

    def __init__(self, title: str):
        self._title = title

    def on_train_begin(self, args, state, control, **kwargs):
        shown = state.is_world_process_zero
        self._bar = progress(
            total=state.max_steps,
            initial=state.global_step,
            desc=self._title,
            unit=" steps",
            disable=not shown,
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._bar.update(state.global_step - self._bar.n)

    def on_train_end(self, args, state, control, **kwargs):
        self._bar.close()


class Diverged(LetterheadError):
    """A training diverged."""


def diverged(step: int, what: str, rate: float | None = None) -> Diverged:
    """The error that ends a training which diverged."""
    at_rate = "" if rate is None else f" (learning rate there {rate:.3g})"
    return Diverged(
        f"the training diverged at step {step}: {what}{at_rate}; lower the learning "
        f"rate, or warm up longer. What was saved "
        "before is kept, nothing of this step is"
    )
