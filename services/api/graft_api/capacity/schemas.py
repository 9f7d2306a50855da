"""How the capacity table and the fleet look over HTTP."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

from graft_shared.jobs import Stage


class ForecastError(BaseModel):
    """How the table's forecasts compare with what the last jobs of a class really took."""

    jobs: int
    mean_ratio: float = Field(description="Measured by expected peak; 1 is perfect.")
    median_ratio: float
    highest_ratio: float = Field(description="Above 1: some job took more than was expected of it.")


class GpuClassBody(BaseModel):
    """One GPU class: a memory size with a name, a price and a queue."""

    name: str
    object: Literal["gpu_class"] = "gpu_class"
    memory_bytes: int
    usable_bytes: int = Field(description="What a job may take of it.")
    price_per_hour: float | None
    live_workers: int
    queue_length: int = Field(description="Jobs that wait to be trained, as `queue.position` counts them.")
    forecast_error: ForecastError | None = Field(description="Null until a job was measured on such a GPU.")
    largest_base_model: str | None = Field(description="The largest catalogue base that it trains, at 512 tokens.")


class WorkerBody(BaseModel):
    """One live worker."""

    name: str
    gpu_class: str
    device: str
    stages: list[Stage]
    seen_at: int = Field(description="Unix seconds.")


class CapacityBody(BaseModel):
    """The VRAM-capacity table, cheapest class first, and who is alive."""

    object: Literal["list"] = "list"
    data: list[GpuClassBody]
    workers: list[WorkerBody]
