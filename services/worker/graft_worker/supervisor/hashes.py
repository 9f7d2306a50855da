"""What a host knows of its files' sha256, so that a base of many gigabytes is not read again for every job."""

from __future__ import annotations

import json
from pathlib import Path
from uuid import uuid4

from graft_worker.supervisor.locks import locked


def known_hashes(memory: Path) -> dict[str, str]:
    """What was remembered; nothing, where it cannot be read: then files are hashed once more."""
    try:
        known = json.loads(memory.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def remember_hashes(memory: Path, learnt: dict[str, str]) -> None:
    """Add to what is known. Readers find whole files only, and of two writers at once neither is forgotten."""
    with locked(memory.with_suffix(".lock")):
        partial = memory.with_name(f"{memory.name}.{uuid4().hex}")  # containers number their processes alike
        try:
            partial.write_text(json.dumps(known_hashes(memory) | learnt))
            partial.replace(memory)
        finally:
            partial.unlink(missing_ok=True)
