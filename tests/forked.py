"""What a process does first and last that was forked from one that has done its imports."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_HIGHEST_FD = 65_536


def stand_alone(*, stdin: str, stdout: int, stderr: int) -> None:
    """Take these as 0, 1 and 2, and close all else."""
    with Path(stdin).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    os.dup2(stdout, 1)
    os.dup2(stderr, 2)
    os.closerange(3, _HIGHEST_FD)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def end_after(act: Callable[[], Any]) -> NoReturn:
    """Do this, and leave with its exit code, or 1 if it raised."""
    code = 1
    try:
        act()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001 (a forked process may not go on where its parent was)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
