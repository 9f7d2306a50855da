"""Arming a process: the function of one point is wrapped, so that one call of it strikes. Once in a trial."""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graft_shared.jobs import Stage
from tests.failpoints.points import Call, Fault, Moment, Point


class Unexpected(RuntimeError):
    """What nobody expects."""


@dataclass(frozen=True, kw_only=True)
class Strike:
    """That the point was reached: which processes were struck, and when, by the machine's clock (Unix seconds)."""

    pids: list[int]
    at: float


@dataclass
class Presence:
    """What this process is at; a child is forked with it."""

    stage: Stage | None = None


PRESENCE = Presence()


def arm(point: Point, fault: Fault, folder: Path) -> None:
    """Wrap the point's function in this process and in those that it forks from now on."""
    owner, name, original = found(point.target)
    calls = itertools.count(1)

    def strike_if(call: Call) -> None:
        if point.stage in (None, PRESENCE.stage) and point.matters(call) and next(calls) == point.nth:
            strike(fault, folder)

    @functools.wraps(original)
    def struck(*args: Any, **kwargs: Any) -> Any:
        if point.moment is Moment.BEFORE:
            strike_if(Call(args=args, kwargs=kwargs))
        if point.moment is Moment.AMID:
            call = Call(args=args, kwargs=kwargs)
            args = (*args[:-1], _then(args[-1], lambda: strike_if(call)))
        result = original(*args, **kwargs)
        if point.moment is Moment.AFTER:
            strike_if(Call(args=args, kwargs=kwargs, result=result))
        return result

    setattr(owner, name, struck)


def found(target: str) -> tuple[Any, str, Callable[..., Any]]:
    """The owner of a target, its name there, and the function itself.

    Raises:
        AttributeError, ModuleNotFoundError: The code has moved, and the point with it.
    """
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner: Any = functools.reduce(getattr, owners, importlib.import_module(module))
    return owner, name, getattr(owner, name)


def strike(fault: Fault, folder: Path) -> None:
    """Do it, unless it was done in this trial before."""
    pids = [os.getppid(), os.getpid()] if fault is Fault.SUSPEND else [os.getpid()]
    try:
        mark = os.open(folder / "struck", os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    os.write(mark, json.dumps(asdict(Strike(pids=pids, at=time.time()))).encode())
    os.close(mark)
    if fault is Fault.RAISE:
        raise Unexpected("This was not expected.")
    number = signal.SIGKILL if fault is Fault.KILL else signal.SIGSTOP
    for pid in pids:
        os.kill(pid, number)


def struck_in(folder: Path) -> Strike | None:
    """The strike of this trial; None as long as there was none."""
    try:
        return Strike(**json.loads((folder / "struck").read_text()))
    except (FileNotFoundError, ValueError):  # not yet, or just being written
        return None


def _then(pieces: Iterator[Any], do: Callable[[], None]) -> Iterator[Any]:
    yield from pieces
    do()
