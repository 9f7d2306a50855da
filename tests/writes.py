"""Where Python processes write: a hook in each notes every path, for a root file system that nobody may write."""

from __future__ import annotations

from pathlib import Path

_SITECUSTOMIZE = """
import os, sys

_log = os.open({log!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
_writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_second = ("os.rename", "os.link", "os.symlink")
_first = ("os.mkdir", "os.truncate", "os.utime", "os.chmod", "sqlite3.connect")


def _note(event, arguments):
    if event == "open":
        path = arguments[0] if arguments[2] & _writing else None
    else:
        path = arguments[1] if event in _second else arguments[0] if event in _first else None
    if isinstance(path, (str, bytes, os.PathLike)):
        os.write(_log, (os.path.abspath(os.fsdecode(path)) + "\\n").encode())


sys.addaudithook(_note)
"""


class Writes:
    """The paths that processes with this environment have opened to write, made, or changed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._log = folder / "writes.log"
        self.temporary = folder / "tmp"
        self.temporary.mkdir()
        (folder / "sitecustomize.py").write_text(_SITECUSTOMIZE.format(log=str(self._log)))

    @property
    def environment(self) -> dict[str, str]:
        """What makes a Python process, and every one that it starts, note its writes."""
        return {"PYTHONPATH": str(self._folder), "TMPDIR": str(self.temporary)}

    def outside(self, *folders: Path) -> set[str]:
        """Those that lie in none of these folders; devices are no files, and images hold all bytecode."""
        allowed = (*folders, Path("/dev"), Path("/proc"))
        noted = {Path(line) for line in self._log.read_text().splitlines() if "__pycache__" not in line}
        return {str(path) for path in noted if not any(path.is_relative_to(folder) for folder in allowed)}

    def under(self, folder: Path) -> int:
        """How many lie in this folder."""
        return sum(Path(line).is_relative_to(folder) for line in set(self._log.read_text().splitlines()))
