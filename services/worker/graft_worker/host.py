"""What the machine has of memory: as the kernel tells it, and the control groups that this process is in."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import NamedTuple

ROOT = Path("/")


class _Names(NamedTuple):
    """What a version of control groups calls its files, and in `memory.stat` the cache: given back when needed."""

    limit: str
    used: str
    events: str
    cache: tuple[str, str]


_V1 = _Names(
    "memory.limit_in_bytes", "memory.usage_in_bytes", "memory.oom_control", ("total_inactive_file", "total_active_file")
)
_V2 = _Names("memory.max", "memory.current", "memory.events", ("inactive_file", "active_file"))


def free_memory_bytes(root: Path = ROOT) -> int:
    """What may be taken before something is killed for it."""
    lines = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    names, groups = _memory_groups(root)
    for group in groups:
        with suppress(OSError, ValueError):  # the root of all has no such files, a group without a limit no number
            limit, used = (int((group / name).read_text()) for name in (names.limit, names.used))
            stat = _facts(group / "memory.stat")
            free = min(free, max(0, limit - used + sum(int(stat[name]) for name in names.cache)))
    return free


def oom_kill_count(root: Path = ROOT) -> int:
    """How many processes of this control group the kernel has killed for memory so far; 0 where it does not say."""
    names, groups = _memory_groups(root)
    for group in groups:
        with suppress(OSError):
            return int(_facts(group / names.events).get("oom_kill", 0))
    return 0


def _memory_groups(root: Path) -> tuple[_Names, list[Path]]:
    """The folder of this process's group and those above it, as far as they are mounted: a limit binds all below it."""
    mount, lines = root / "sys/fs/cgroup", list[str]()
    with suppress(OSError):
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    paths = dict(line.split(":", 2)[1:] for line in lines)
    for controllers, path in paths.items():
        if "memory" in controllers.split(","):
            return _V1, _upwards(mount / "memory", path)
    return _V2, _upwards(mount, paths.get("", "/"))


def _upwards(mount: Path, path: str) -> list[Path]:
    """A container may be told its path on the host, of which it sees the mount alone: that is its own group then."""
    below = PurePosixPath(path.lstrip("/"))
    return [mount / part for part in (below, *below.parents)]


def _facts(path: Path) -> dict[str, str]:
    return dict(line.split() for line in path.read_text().splitlines())
