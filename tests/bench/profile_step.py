"""Where the time of one optimizer step goes: the device's by kind of kernel, the host's by part, as JSON.

    python tests/bench/profile_step.py --dims llama-2-7b --recompute none --out profile.json

The trainer's own recipe runs here in one process: some updates to warm up, some timed without a profiler, three under
`torch.profiler`. Device time is the sum of kernel times; what is left of the step's time, the device was idle.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import time
import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

import torch
from torch.profiler import ProfilerActivity, profile

from graft_worker.protocol import EventWriter
from graft_worker.training import recipe
from graft_worker.training.guard import Guard
from graft_worker.training.versions import versions
from tests.bench.train_once import DIMS, arguments_of, command_line, make_base, make_request, make_workload

WARM_UP, TIMED, PROFILED = 6, 20, 3
# Kernels by what they do, the first pattern that matches; the rest is `other`.
KINDS = {
    "attention": r"flash|fmha",
    "dequantise": r"_dequantise|kDequantize",
    "products": r"gemm|cutlass|nvjet|xmma|cublas",
    "optimizer": r"Optimizer|Preconditions|adam",
    "compiled elementwise": r"^triton_",
    "copies": r"Memcpy|Memset|copy_kernel|CatArray",
}


class Silent(EventWriter):
    """Says nothing."""

    def __init__(self) -> None:
        pass

    def emit(self, event: Any) -> None:
        """Forget it."""


def main() -> None:
    """Warm up, time, profile, report."""
    arguments = arguments_of(__doc__ or "")
    arguments.workspace.mkdir(parents=True, exist_ok=True)
    base = make_base(arguments.workspace / arguments.dims, arguments.dims)
    data = make_workload(arguments.workspace, arguments.workload, DIMS[arguments.dims]["vocab_size"])
    request = make_request(base, data, arguments)
    memory: dict[str, list[float]] = {}
    began = time.monotonic()
    run = recipe.load(arguments.workspace, request, Silent(), Guard())
    loaded = time.monotonic() - began
    memory["loading"] = peaks()
    began = time.monotonic()
    recipe.update(run).read()
    first = time.monotonic() - began
    memory["first update"] = peaks()
    for _ in range(WARM_UP):
        recipe.update(run).read()
    waits = host_waits(run)
    memory["warming up"] = peaks()
    speeds = timed(run)
    memory["later"] = peaks()
    seen = run.progress.tokens_seen
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            recipe.update(run)
        torch.cuda.synchronize()
    memory["profiled"] = peaks()
    recipe.finish(run)
    memory["proving"] = peaks()
    result = {
        "load_seconds": round(loaded, 2),
        "first_update_seconds": round(first, 2),
        "tokens_per_second": round(statistics.median(speeds)),
        "tokens_per_profiled_update": (run.progress.tokens_seen - seen) // PROFILED,
        "device_ms_per_update": by_kind(profiler.events()),
        "device_idle_ms_per_update": idle_ms(profiler.events()),
        "kernels": heaviest(profiler.events()),
        "host_ms_per_update": host_parts(profiler),
        "host_waits_for_the_device": waits,
        "allocated_and_reserved_gib_at_most": memory,
        "plain_layers": run.layers.plain,
        "versions": versions(),
        "command": command_line(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def peaks() -> list[float]:
    """The most GiB that were allocated, and that were reserved, since this was last asked."""
    found = [torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()]
    torch.cuda.reset_peak_memory_stats()
    return [round(peak / 2**30, 3) for peak in found]


def host_waits(run: recipe.Run) -> list[str]:
    """Where the host waits for the device in one update."""
    torch.cuda.set_sync_debug_mode("warn")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        recipe.update(run)
    torch.cuda.set_sync_debug_mode("default")
    places = [
        f"{Path(str(found.filename)).name}:{found.lineno}" for found in caught if "synchron" in str(found.message)
    ]
    return sorted(f"{places.count(place)} × {place}" for place in set(places))


def timed(run: recipe.Run) -> list[float]:
    """Tokens per second of each timed update, as the recipe runs them: the host one update ahead."""
    before, at, speeds = run.progress.tokens_seen, time.monotonic(), []
    waiting = recipe.update(run)
    for _ in range(TIMED):
        following = recipe.update(run)
        waiting.read()
        now = time.monotonic()
        speeds.append((waiting.tokens_seen - before) / (now - at))
        before, at, waiting = waiting.tokens_seen, now, following
    waiting.read()
    return speeds[len(speeds) // 2 :]


def by_kind(events: Any) -> dict[str, float]:
    """Milliseconds of device time by kind of kernel, for one update."""
    sums: dict[str, float] = defaultdict(float)
    for event in _kernels(events):
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, event.name)), "other")
        sums[kind] += event.time_range.elapsed_us() / 1000 / PROFILED
    total = sum(sums.values())
    return {kind: round(ms, 2) for kind, ms in sorted(sums.items(), key=lambda item: -item[1])} | {
        "all": round(total, 2)
    }


def idle_ms(events: Any) -> float:
    """Milliseconds of an update in which no kernel ran, as far as the profiler itself does not make the host late."""
    spans = sorted((kernel.time_range.start, kernel.time_range.end) for kernel in _kernels(events))
    idle, until = 0.0, spans[0][0]
    for start, end in spans:
        idle, until = idle + max(0.0, start - until), max(until, end)
    return round(idle / 1000 / PROFILED, 2)


def heaviest(events: Any, most: int = 30) -> list[tuple[str, int, float]]:
    """The kernels that take most: name, launches and milliseconds for one update."""
    sums: dict[str, list[float]] = defaultdict(list)
    for event in _kernels(events):
        sums[event.name[:90]].append(event.time_range.elapsed_us() / 1000)
    rows = [(name, round(len(ms) / PROFILED), round(sum(ms) / PROFILED, 3)) for name, ms in sums.items()]
    return sorted(rows, key=lambda row: -row[2])[:most]


def host_parts(profiler: Any, most: int = 20) -> list[tuple[str, int, float]]:
    """What the host is busy with: name, calls and own milliseconds for one update, the profiler's cost included."""
    rows = [
        (event.key[:90], round(event.count / PROFILED), round(event.self_cpu_time_total / 1000 / PROFILED, 2))
        for event in profiler.key_averages()
    ]
    return sorted(rows, key=lambda row: -row[2])[:most]


def _kernels(events: Any) -> list[Any]:
    return [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]


if __name__ == "__main__":
    main()
