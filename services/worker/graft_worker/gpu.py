"""What the driver says of this worker's GPU, by NVML; nothing where there is neither."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from graft_worker.device import Device


class Nvml(Protocol):
    """The part of `pynvml` that is used."""

    NVMLError: type[Exception]
    NVML_TEMPERATURE_GPU: int

    def nvmlInit(self) -> None: ...  # noqa: D102, N802 (NVML's own names, here and below)
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any: ...  # noqa: D102, N802
    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int: ...  # noqa: D102, N802
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any) -> int: ...  # noqa: D102, N802


class Gpu:
    """One card, named by the driver's index: NVML counts as nvidia-smi does, whatever CUDA_VISIBLE_DEVICES says."""

    def __init__(self, nvml: Nvml, index: int) -> None:
        """Begin; raises NVMLError where there is no driver or no such card."""
        self._nvml = nvml
        self._label = str(index)
        nvml.nvmlInit()
        self._handle = nvml.nvmlDeviceGetHandleByIndex(index)

    @classmethod
    def of(cls, device: Device) -> Gpu | None:
        """The card of a worker; None where it has none, or where NVML is not to be had."""
        if device.kind != "cuda":
            return None
        try:
            import pynvml
        except ImportError:
            return None
        try:
            return cls(pynvml, device.index)
        except pynvml.NVMLError:
            return None

    def collect(self) -> Iterator[Metric]:
        """Ask the driver. A figure that this card does not give is left out."""
        for name, says, read in _GAUGES:
            yield from self._family(GaugeMetricFamily(name, says, labels=["gpu"]), read)
        energy = CounterMetricFamily("graft_gpu_energy_joules", "Energy taken since the driver began.", labels=["gpu"])
        yield from self._family(energy, lambda nvml, card: nvml.nvmlDeviceGetTotalEnergyConsumption(card) / 1000)

    def _family(
        self, family: GaugeMetricFamily | CounterMetricFamily, read: Callable[[Nvml, Any], float]
    ) -> Iterator[Metric]:
        try:
            family.add_metric([self._label], read(self._nvml, self._handle))
        except self._nvml.NVMLError:
            return
        yield family


_GAUGES: tuple[tuple[str, str, Callable[[Nvml, Any], float]], ...] = (
    (
        "graft_gpu_memory_used_bytes",
        "Memory of the card that is taken, by whomever.",
        lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).used,
    ),
    (
        "graft_gpu_memory_total_bytes",
        "Memory of the card.",
        lambda nvml, card: nvml.nvmlDeviceGetMemoryInfo(card).total,
    ),
    (
        "graft_gpu_utilization_ratio",
        "Share of the last moment in which a kernel ran.",
        lambda nvml, card: nvml.nvmlDeviceGetUtilizationRates(card).gpu / 100,
    ),
    (
        "graft_gpu_temperature_celsius",
        "Temperature of the die.",
        lambda nvml, card: nvml.nvmlDeviceGetTemperature(card, nvml.NVML_TEMPERATURE_GPU),
    ),
    ("graft_gpu_power_watts", "Power drawn.", lambda nvml, card: nvml.nvmlDeviceGetPowerUsage(card) / 1000),
)
