"""Runs of a bench script in processes of their own, as many at once as one card has room for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graft_shared.memory import GIB

KEPT_FREE_BYTES = 2 * GIB  # of the card
AT_ONCE = 6  # each takes a core while it imports and compiles
LOOK_SECONDS = 0.2


@dataclass(frozen=True, kw_only=True)
class Task:
    """One run to be made: the script prints its result as the last line of its output, in JSON."""

    name: str
    command: list[str]
    bytes_kept: int  # of the card, while it runs


@dataclass(frozen=True, kw_only=True)
class Done:
    """One run that was made, or could not be."""

    name: str
    result: dict[str, Any] | None
    problem: str = ""


@dataclass
class _Started:
    task: Task
    process: subprocess.Popen[str]
    began: float = field(default_factory=time.monotonic)


def script(path: str, *words: str) -> list[str]:
    """The command that runs a script with this Python."""
    return [sys.executable, path, *words]


def run_together(
    tasks: Iterable[Task], out_dir: Path, *, seconds: float | None = None, at_once: int = AT_ONCE
) -> Iterator[Done]:
    """Start whatever fits beside what runs, in the order given; yield each run when it has ended.

    Args:
        out_dir: Keeps what each run writes on standard error, in `<name>.log`.
        seconds: After these nothing is started any more, and what still runs is ended.
    """
    waiting, under_way = list(tasks), list[_Started]()
    card, ends_at = card_bytes() - KEPT_FREE_BYTES, None if seconds is None else time.monotonic() + seconds
    try:
        while waiting or under_way:
            if ends_at is not None and time.monotonic() > ends_at:
                yield from (Done(name=task.name, result=None, problem="not started in time") for task in waiting)
                yield from (Done(name=run.task.name, result=None, problem="not over in time") for run in under_way)
                return
            free = card - sum(run.task.bytes_kept for run in under_way)
            for task in list(waiting):
                if task.bytes_kept <= free and len(under_way) < at_once:
                    waiting.remove(task)
                    under_way.append(_start(task, out_dir))
                    free -= task.bytes_kept
            if not under_way:
                yield from (Done(name=task.name, result=None, problem="too large for this card") for task in waiting)
                return
            time.sleep(LOOK_SECONDS)
            for run in [run for run in under_way if run.process.poll() is not None]:
                under_way.remove(run)
                yield _read(run)
    finally:
        for run in under_way:
            run.process.kill()
            run.process.communicate()


def require_card(*, smoke: bool) -> None:
    """End here where no GPU would hold what is to be made; smoke tests run anywhere."""
    if not smoke and shutil.which("nvidia-smi") is None:
        raise SystemExit("These runs need a GPU, and nvidia-smi tells of none here; --smoke goes the same way without.")


def card_bytes() -> int:
    """What is free on the GPU that runs will see first; enough for tiny runs where there is none."""
    if shutil.which("nvidia-smi") is None:
        return 8 * GIB
    card = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0] or "0"
    query = ["nvidia-smi", f"--id={card}", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    return int(subprocess.run(query, capture_output=True, text=True, check=True).stdout) * 2**20


def _start(task: Task, out_dir: Path) -> _Started:
    with (out_dir / f"{task.name}.log").open("w") as errors:
        return _Started(
            task, subprocess.Popen(task.command, stdout=subprocess.PIPE, stderr=errors, text=True, env=_environment())
        )


def _environment() -> dict[str, str]:
    """This one, in which a script finds its neighbours."""
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def _read(run: _Started) -> Done:
    output, _ = run.process.communicate()
    name = run.task.name
    if run.process.returncode != 0:
        print(f"{name}: failed, see its log", flush=True)
        return Done(name=name, result=None, problem=f"left with {run.process.returncode}, see its log")
    print(f"{name}: {time.monotonic() - run.began:.0f} s", flush=True)
    return Done(name=name, result=json.loads(output.splitlines()[-1]))
