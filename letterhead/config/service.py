"""The sections `bench` and `serve`: what is measured in service, and how vLLM serves."""

from typing import Annotated

from pydantic import Field, field_validator

from letterhead.config.section import Count, Section


class Bench(Section):
    """How much is measured: rows with the experiment's own options and with R52's names, rows to train, optimizer steps of
    SFT, paired runs.

    In service: requests of each closed loop and its numbers of clients (null: what suits the device, see `load`), requests
    of an open loop (0: none is measured), the objective for its 99th percentile, what an hour of the machine costs, and for
    how long a service is soaked.
    """

    scoring_rows: Count = 500
    scoring_names_rows: Count = 20
    scoring_runs: Annotated[int, Field(ge=3)] = 3
    training_rows: Count = 512
    training_runs: Annotated[int, Field(ge=3)] = 3
    sft_steps: Annotated[int, Field(ge=4)] = 12
    sft_runs: Annotated[int, Field(ge=3)] = 3
    requests: Count | None = None
    concurrency: Annotated[list[Count], Field(min_length=1)] | None = None
    open_requests: Annotated[int, Field(ge=0)] = 1000
    objective_ms: Annotated[float, Field(gt=0)] = 1000
    price_per_hour: Annotated[float, Field(gt=0)] = 1.0
    soak_seconds: Annotated[float, Field(gt=0)] = 1200

    @field_validator("concurrency")
    @classmethod
    def _single_stream_too(cls, concurrency: list[int] | None) -> list[int] | None:
        if concurrency is None:
            return None
        if 1 not in concurrency:
            raise ValueError("name 1 too: latencies are told for a single stream")
        return sorted(set(concurrency))

    def load(self, gpu: bool) -> tuple[int, list[int]]:
        """Requests and numbers of clients of the closed loops: a GPU is not busy before dozens ask at once."""
        requests, concurrency = (2000, [1, 4, 16, 64, 256]) if gpu else (200, [1, 4, 16])
        return self.requests or requests, self.concurrency or concurrency


class Serve(Section):
    """How vLLM serves: the share of a GPU's memory that it may take; the default leaves a desktop alive."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.8
