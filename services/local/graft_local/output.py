"""The family's log on one screen: every line under the name of its process."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from typing import TextIO

_COLOURS = (36, 32, 35, 33, 34, 96, 92, 95, 93, 94)  # ANSI foregrounds that read on dark and on light
_OWN_NAME = "graft"


class Output:
    """Writes `name     | line`, coloured on a terminal that wants it (https://no-color.org)."""

    def __init__(self, stream: TextIO, environment: Mapping[str, str]) -> None:
        self._stream = stream
        self._coloured = stream.isatty() and not environment.get("NO_COLOR")
        self._names: list[str] = [_OWN_NAME]

    def fit(self, names: Iterable[str]) -> None:
        """Make room for these names."""
        self._names = [_OWN_NAME, *names]

    def say(self, name: str, line: str) -> None:
        """Write one line; a terminal that is gone is no reason to fail."""
        label = f"{name:<{max(map(len, self._names))}} |"
        if self._coloured:
            label = f"\x1b[{self._colour(name)}m{label}\x1b[0m"
        with contextlib.suppress(OSError):
            self._stream.write(f"{label} {line}\n")
            self._stream.flush()

    def _colour(self, name: str) -> int:
        if name == _OWN_NAME or name not in self._names:
            return 1
        return _COLOURS[self._names.index(name) % len(_COLOURS)]
