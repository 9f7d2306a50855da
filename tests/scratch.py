"""Where a run's files lie that kills processes, never the machine: no disk has to keep them, so none is waited for."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

_IN_MEMORY = Path("/dev/shm")
_ENOUGH_BYTES = 2 << 30  # a container may have as little as 64 MiB there


def scratch_folder(prefix: str) -> Path:
    """A new folder in memory, or where there is too little room for that, among the temporary files."""
    has_room = _IN_MEMORY.is_dir() and shutil.disk_usage(_IN_MEMORY).free >= _ENOUGH_BYTES
    return Path(tempfile.mkdtemp(prefix=prefix, dir=_IN_MEMORY if has_room else None))
