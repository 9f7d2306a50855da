"""What this machine has: Python, room, memory, limits, a port."""

from __future__ import annotations

import http.client
import os
import resource
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from graft_client.findings import Finding, fault, good, note
from graft_local.devices import gpus_here
from graft_local.launcher import CannotStart, check_port

GIB = 1024**3
LEAST_PYTHON = (3, 11)
LEAST_DISK_BYTES = 2 * GIB  # a tiny base with its job; a 7B base takes 14 GB
LEAST_MEMORY_BYTES = 4 * GIB
LEAST_FILES = 1024  # an API with a few hundred open streams, each with its connection
ANSWER_SECONDS = 5
LEAST_SHARED_MEMORY_BYTES = GIB // 2  # what data loaders and NCCL use; containers get 64 MiB unless asked


def python() -> Iterator[Finding]:
    """The interpreter."""
    yield judge_python(sys.version_info[:3])


def judge_python(version: tuple[int, ...]) -> Finding:
    """Python must be new enough."""
    found, least = ".".join(map(str, version)), ".".join(map(str, LEAST_PYTHON))
    if version[:2] >= LEAST_PYTHON:
        return good("Python", found)
    return fault("Python", f"{found}, at least {least} is needed", f"make clean setup PYTHON=python{least}")


def disk(state_dir: Path) -> Iterator[Finding]:
    """The folders that are written must have room; those on one disk are one finding."""
    seen: set[int] = set()
    for name in ("", "cache", "work"):
        path = state_dir / name
        place = next(folder for folder in (path, *path.parents) if folder.exists())
        if (device := place.stat().st_dev) not in seen:
            seen.add(device)
            yield judge_disk(f"disk of {name}" if name else "disk", place)


def judge_disk(subject: str, place: Path) -> Finding:
    """A folder must be writable and have room."""
    if not os.access(place, os.W_OK):
        return fault(subject, f"{place} cannot be written", f"sudo chown -R $USER {place}, or GRAFT_STATE_DIR=…")
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {place}"
    if free >= LEAST_DISK_BYTES:
        return good(subject, found)
    remedy = f"du -xh --max-depth=2 {place} | sort -h | tail shows what to remove; or lower GRAFT_CACHE_MAX_BYTES"
    return fault(subject, f"{found}, at least {LEAST_DISK_BYTES / GIB:.0f} GiB are needed", remedy)


def memory() -> Iterator[Finding]:
    """The host's memory."""
    yield judge_memory(_available_memory_bytes())


def judge_memory(available: int | None) -> Finding:
    """Little memory is worth a note: a tiny base still trains."""
    if available is None:
        return note("memory", "unknown on this system")
    found = f"{available / GIB:.1f} GiB available"
    if available >= LEAST_MEMORY_BYTES:
        return good("memory", found)
    least = f"under {LEAST_MEMORY_BYTES / GIB:.0f} GiB only tiny bases train"
    return note("memory", f"{found}: {least}", "ps aux --sort=-rss | head shows who holds it")


def limits(environment: Mapping[str, str]) -> Iterator[Finding]:
    """How many files a process may open and, where there is a GPU, how much memory processes may share."""
    yield judge_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    if gpus_here(environment):
        yield judge_shared_memory(shutil.disk_usage("/dev/shm").total)  # noqa: S108 - looked at, not written


def judge_files(most: int) -> Finding:
    """Open files of one process."""
    if most == resource.RLIM_INFINITY or most >= LEAST_FILES:
        return good("open files", "any number" if most == resource.RLIM_INFINITY else f"up to {most}")
    return fault("open files", f"only {most} for a process, {LEAST_FILES} are needed", "ulimit -n 65536")


def judge_shared_memory(size: int) -> Finding:
    """The size of /dev/shm."""
    found = f"{size / GIB:.2f} GiB in /dev/shm"
    if size >= LEAST_SHARED_MEMORY_BYTES:
        return good("shared memory", found)
    remedy = "mount -o remount,size=1g /dev/shm; in a container --shm-size=1g"
    return note("shared memory", f"{found}: little for a GPU worker", remedy)


def port(host: str, number: int) -> Iterator[Finding]:
    """The port must be free, or Graft's own."""
    try:
        check_port(host, number)
    except CannotStart as error:
        who = f"ss -ltnp 'sport = :{number}' shows who has it"
        try:
            is_ours = is_graft(host, number)
        except TimeoutError:
            late = f"something listens at {number} on {host} and did not answer within {ANSWER_SECONDS} s"
            yield note("port", f"{late}: if it is Graft, it is busy", who)
            return
        if is_ours:
            yield good("port", f"{number} on {host} is Graft's own")
        else:
            yield fault("port", str(error), f"{who}; graft up --port {number + 1}")
    else:
        yield good("port", f"{number} on {host} is free")


def is_graft(host: str, number: int) -> bool:
    """Whether the service answers there; raises TimeoutError where who listens says nothing in time."""
    connection = http.client.HTTPConnection(host, number, timeout=ANSWER_SECONDS)
    try:
        connection.request("GET", "/healthz")
        return connection.getresponse().read(100) == b'{"status":"ok"}'
    except TimeoutError:
        raise
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _available_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    facts = dict(line.split(":", 1) for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024
