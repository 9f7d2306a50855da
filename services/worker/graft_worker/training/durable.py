"""Files that must be whole after a power failure."""

from __future__ import annotations

import os
from pathlib import Path


def sync(path: Path) -> None:
    """Let the disk have a file, or a folder's list of names."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: Path) -> None:
    """Let the disk have a folder and every file in it."""
    for path in folder.iterdir():
        sync(path)
    sync(folder)
