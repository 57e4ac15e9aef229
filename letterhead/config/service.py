"""The sections `bench` and `serve`: what is measured in service, and how vLLM serves."""

from typing import Annotated

from pydantic import Field, field_validator

from letterhead.config.section import Count, Section


class Bench(Section):
    """How much is measured."""

    scoring_rows: Count = Field(
        500, description="Rows that `make bench-scoring` scores with the experiment's options."
    )
    scoring_names_rows: Count = Field(20, description="Rows that it scores with R52's names.")
    scoring_runs: Annotated[int, Field(ge=3)] = Field(3, description="Paired runs of it.")
    training_rows: Count = Field(512, description="Rows that `make bench-training` trains on.")
    training_runs: Annotated[int, Field(ge=3)] = Field(3, description="Paired runs of it.")
    sft_steps: Annotated[int, Field(ge=4)] = Field(
        12, description="Optimizer steps of `make bench-sft`."
    )
    sft_runs: Annotated[int, Field(ge=3)] = Field(3, description="Paired runs of it.")
    requests: Count | None = Field(
        None, description="Requests of each closed loop. null takes what suits the device."
    )
    concurrency: Annotated[list[Count], Field(min_length=1)] | None = Field(
        None, description="Numbers of clients of the closed loops, 1 among them."
    )
    open_requests: Annotated[int, Field(ge=0)] = Field(
        1000, description="Requests of an open loop. 0 measures none."
    )
    objective_ms: Annotated[float, Field(gt=0)] = Field(
        1000, description="The objective for the 99th percentile of latency."
    )
    price_per_hour: Annotated[float, Field(gt=0)] = Field(
        1.0, description="What an hour of the machine costs."
    )
    soak_seconds: Annotated[float, Field(gt=0)] = Field(
        1200, description="How long `make soak` lasts."
    )

    @field_validator("concurrency")
    @classmethod
    def _single_stream_too(cls, concurrency: list[int] | None) -> list[int] | None:
        if concurrency is None:
            return None
        if 1 not in concurrency:
            raise ValueError("name 1 too: latencies are told for a single stream")
        return sorted(set(concurrency))

    def load(self, gpu: bool) -> tuple[int, list[int]]:
        """Requests and numbers of clients of the closed loops: a GPU is not busy before dozens ask
        at once."""
        requests, concurrency = (2000, [1, 4, 16, 64, 256]) if gpu else (200, [1, 4, 16])
        return self.requests or requests, self.concurrency or concurrency


class Serve(Section):
    """How vLLM serves: the share of a GPU's memory that it may take; the default leaves a desktop
    alive."""

    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = Field(
        0.8, description="The share of a GPU's memory that vLLM may take."
    )
