"""Work folders that a killed worker left behind: weights and checkpoints of gigabytes that nobody else would remove."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from graft_shared.jobs import Stage
from graft_shared.logs import log_event
from graft_worker.supervisor.slot import Slot, taken_if_free

logger = logging.getLogger(__name__)


def folder_of(slot: Slot, work_dir: Path) -> Path:
    """Where the runs of a slot have their folders; only who holds the slot may change anything in it."""
    return work_dir / slot.worker / slot.stage.value


def remove_leftovers(held: Slot, work_dir: Path) -> None:
    """Remove what earlier lives of the held slot left, and what other workers of this host did that are dead or idle.

    An idle worker's folder is empty, so that no live worker finds its slot taken because of this.
    """
    _empty(folder_of(held, work_dir))
    for slot in _slots_with_folders(work_dir, held):
        if _children(folder_of(slot, work_dir)):
            with taken_if_free(slot) as is_free:
                if is_free:
                    _empty(folder_of(slot, work_dir))


def _slots_with_folders(work_dir: Path, held: Slot) -> Iterator[Slot]:
    for worker in _children(work_dir):
        for stage in Stage:
            slot = replace(held, worker=worker.name, stage=stage)
            if slot != held:
                yield slot


def _empty(folder: Path) -> None:
    for left in _children(folder):
        shutil.rmtree(left, ignore_errors=True)
        log_event(logger, "leftover_removed", folder=str(left), whole=not left.exists())


def _children(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
