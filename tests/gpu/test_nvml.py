"""What the driver says of a real card is what nvidia-smi says, in base units."""

from __future__ import annotations

import subprocess

import pytest

from graft_shared.defaults import load_capacity
from graft_shared.jobs import Stage
from graft_worker.device import find_device
from graft_worker.gpu import Gpu


def test_a_workers_card_tells_what_nvidia_smi_tells() -> None:
    device = find_device("auto", Stage.TRAIN, load_capacity(None))
    card = Gpu.of(device)
    assert card is not None
    told = {sample.name: sample.value for family in card.collect() for sample in family.samples}
    query = ["nvidia-smi", f"--id={device.index}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    total_mib = int(subprocess.run(query, capture_output=True, text=True, check=True).stdout)
    assert told["graft_gpu_memory_total_bytes"] == pytest.approx(total_mib * 1024**2, rel=0.01)
    assert 0 < told["graft_gpu_memory_used_bytes"] < told["graft_gpu_memory_total_bytes"]
    assert 0 <= told["graft_gpu_utilization_ratio"] <= 1
    assert 0 < told["graft_gpu_power_watts"] < 2000
    assert 0 < told["graft_gpu_temperature_celsius"] < 120
    assert told["graft_gpu_energy_joules_total"] > 0
