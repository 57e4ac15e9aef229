"""Run targets of the Makefile for an experiment that differs from another in some keys: each is an
ordinary experiment."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

from letterhead.config.experiment import Experiment
from letterhead.files import LetterheadError
from letterhead.runs.devices import process_count


def settings(overrides: str, keys: dict[str, Any], under: dict[str, Any] | None = None) -> str:
    """What SET is for keys over a user's own overrides, and these over the keys `under` them."""

    def pairs(keys: dict[str, Any]) -> list[str]:
        return [
            shlex.quote(f"{key}={json.dumps(value, ensure_ascii=False)}")
            for key, value in keys.items()
        ]

    return " ".join([*pairs(under or {}), overrides, *pairs(keys)]).strip()


def seed_keys(training: Experiment, experiment: Experiment) -> dict[str, Any]:
    """The keys of a single training of an experiment: its name, its seed, and the seed of the rows;
    a teacher that `of` has asked is not asked again."""
    keys = {
        "name": training.name,
        "seed": training.seed,
        "seeds": [],
        "data.seed": experiment.data.seed,
    }
    return keys | (
        {"distill.of": experiment.distill.of or experiment.name} if experiment.distill else {}
    )


def make(experiment: str, overrides: str, targets: Sequence[str]) -> None:
    """Have make bring targets up to date.

    Raises
    ------
    LetterheadError : one of them failed (its message is on the terminal)
    """
    # What the outer make was told on its command line would override what this one is told.
    environment = {
        key: value
        for key, value in os.environ.items()
        if key not in ("MAKEFLAGS", "MAKEOVERRIDES", "MFLAGS")
    }
    command = [
        "make",
        "--no-print-directory",
        *targets,
        f"EXP={experiment}",
        f"SET={overrides}",
        f"NPROC={process_count()}",
    ]
    if subprocess.run(command, env=environment).returncode:
        raise LetterheadError(f"{shlex.join(command)} failed; its message is above")
