"""What a run holds of its device: the peak of torch's allocator, and what lies outside it."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from dataclasses import dataclass
from typing import Any

import torch

MIB = 1024**2


@dataclass
class Footprint:
    """Measures this process alone: as the driver tells it, or else by what the card lost since it was there."""

    others: int | None  # bytes that others held when the run began; None where nobody can tell
    loaded_bytes: int | None = None

    @classmethod
    def begin(cls) -> Footprint:
        """Look who is on the card, before this process is; then take no more of it than it may.

        `GRAFT_MEMORY_FRACTION` lets the process have only a share of the card, for tests and for shared cards.
        """
        if not torch.cuda.is_available():
            return cls(others=0)
        found = cls(others=_in_use())
        fraction = os.environ.get("GRAFT_MEMORY_FRACTION")
        if fraction is not None:
            torch.cuda.set_per_process_memory_fraction(float(fraction))
        return found

    def base_is_loaded(self) -> None:
        """Note what loading the base took at most; called once, right after it."""
        if torch.cuda.is_available():
            self.loaded_bytes = torch.cuda.max_memory_reserved()

    def peak(self, managed_bytes: int = 0) -> dict[str, Any]:
        """The most memory that the run held, in bytes.

        Args:
            managed_bytes: What this process has in managed memory, which the driver does not call any process's.

        Returns:
            `measured_peak_bytes`, and on a GPU what it is made of: the allocator's peak (and until the base was
            loaded), and what is outside now (CUDA's context, libraries, managed memory); on the CPU it is the process's
            resident set.
        """
        if not torch.cuda.is_available():
            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            return {"measured_peak_bytes": resident, "measured_on": "host"}
        reserved = torch.cuda.max_memory_reserved()
        outside = self._outside(managed_bytes)
        return {
            "measured_peak_bytes": reserved + outside,
            "reserved_peak_bytes": reserved,
            "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
            "loaded_peak_bytes": self.loaded_bytes,
            "outside_bytes": outside,
            "measured_on": "cuda",
        }

    def _outside(self, managed_bytes: int) -> int:
        reserved = torch.cuda.memory_reserved()
        own = _held_by(os.getpid())
        if own is not None and own >= reserved:
            return own - reserved + managed_bytes
        if self.others is None:
            return 0
        free, total = torch.cuda.mem_get_info()
        return max(0, total - free - reserved - self.others)


def _in_use() -> int | None:
    """Bytes in use on this process's card, asked of the driver's own tool: it needs no context on the card."""
    lines = _ask("--query-gpu=memory.used")
    return int(lines[0]) * MIB if lines and lines[0].isdigit() else None


def _held_by(pid: int) -> int | None:
    """Bytes of the card that a process holds; None where the driver does not know processes by our numbers."""
    for line in _ask("--query-compute-apps=pid,used_memory"):
        found, _, used = line.partition(",")
        if found.strip() == str(pid) and used.strip().isdigit():
            return int(used) * MIB
    return None


def _ask(query: str) -> list[str]:
    if shutil.which("nvidia-smi") is None:
        return []
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    command = ["nvidia-smi", f"--id={card}", query, "--format=csv,noheader,nounits"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return answer.stdout.splitlines() if answer.returncode == 0 else []
