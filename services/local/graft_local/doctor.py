"""`graft doctor`: what this machine has, what is missing, and what to do about it."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from graft_local.broker import NoBroker, find_executable
from graft_local.devices import gpus_here
from graft_local.launcher import DEFAULT_PORT, CannotStart, check_port

GIB = 1024**3
LEAST_PYTHON = (3, 11)
LEAST_TORCH = (2, 10)  # varlen_attn, and no known hole in reading weights
LEAST_DISK_BYTES = 2 * GIB  # a tiny base with its job; a 7B base takes 14 GB
LEAST_MEMORY_BYTES = 4 * GIB
_IMPORT_SECONDS = 180  # torch from a cold disk
_VERSIONS = """
import json, bitsandbytes, peft, torch, transformers
print(json.dumps({m.__name__: m.__version__ for m in (torch, transformers, peft, bitsandbytes)}))
"""


class Verdict(StrEnum):
    """How much a finding matters."""

    GOOD = "ok"
    NOTE = "note"
    BAD = "missing"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing looked at."""

    subject: str
    verdict: Verdict
    found: str


def doctor(
    host: Annotated[str, typer.Option(help="Address that the API would listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the API would listen on.")] = DEFAULT_PORT,
    state_dir: Annotated[Path, typer.Option(envvar="GRAFT_STATE_DIR", help="The state folder to look at.")] = Path(
        ".graft"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Check this machine; exit code 1 when something essential is missing."""
    findings = list(examine(host, port, state_dir.absolute(), os.environ))
    if as_json:
        typer.echo(json.dumps([{"subject": f.subject, "verdict": f.verdict, "found": f.found} for f in findings]))
    else:
        _draw(findings)
    raise typer.Exit(1 if any(finding.verdict is Verdict.BAD for finding in findings) else 0)


def examine(host: str, port: int, state_dir: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Look at everything that `graft up` needs, one Finding each."""
    yield judge_python(sys.version_info[:3])
    yield judge_libraries(_library_versions())
    yield from _gpus(environment)
    yield judge_disk(state_dir)
    yield judge_memory(_available_memory_bytes())
    yield judge_port(host, port)
    yield judge_sqlite(sqlite3.sqlite_version_info)
    yield judge_broker(environment)


def judge_python(version: tuple[int, ...]) -> Finding:
    """Python must be new enough."""
    good = version[:2] >= LEAST_PYTHON
    least = ".".join(map(str, LEAST_PYTHON))
    found = ".".join(map(str, version)) + ("" if good else f": at least {least} is needed")
    return Finding(subject="Python", verdict=Verdict.GOOD if good else Verdict.BAD, found=found)


def judge_libraries(versions: dict[str, str] | str) -> Finding:
    """The training libraries must import; a string is the reason why they do not."""
    subject = "training libraries"
    if isinstance(versions, str):
        return Finding(subject=subject, verdict=Verdict.BAD, found=f"{versions}. Run `make setup`.")
    found = ", ".join(f"{name} {version}" for name, version in versions.items())
    numbers = tuple(int(part) for part in versions["torch"].split("+")[0].split(".")[:2])
    if numbers < LEAST_TORCH:
        found += f": torch {'.'.join(map(str, LEAST_TORCH))} or newer is needed"
    return Finding(subject=subject, verdict=Verdict.GOOD if numbers >= LEAST_TORCH else Verdict.BAD, found=found)


def judge_disk(state_dir: Path) -> Finding:
    """The state folder must be writable and have room."""
    place = next(folder for folder in (state_dir, *state_dir.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / GIB:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Finding(subject="state folder", verdict=Verdict.BAD, found=f"{place} is not writable")
    if free < LEAST_DISK_BYTES:
        found += f": at least {LEAST_DISK_BYTES / GIB:.0f} GiB are needed"
    verdict = Verdict.GOOD if free >= LEAST_DISK_BYTES else Verdict.BAD
    return Finding(subject="state folder", verdict=verdict, found=found)


def judge_memory(available: int | None) -> Finding:
    """Little memory is worth a note: a tiny base still trains."""
    if available is None:
        return Finding(subject="memory", verdict=Verdict.NOTE, found="unknown on this system")
    enough = available >= LEAST_MEMORY_BYTES
    found = f"{available / GIB:.1f} GiB available"
    found += "" if enough else f": under {LEAST_MEMORY_BYTES / GIB:.0f} GiB only tiny bases train"
    return Finding(subject="memory", verdict=Verdict.GOOD if enough else Verdict.NOTE, found=found)


def judge_port(host: str, port: int) -> Finding:
    """A taken port may be Graft itself, so it is a note."""
    try:
        check_port(host, port)
    except CannotStart as error:
        return Finding(subject="port", verdict=Verdict.NOTE, found=f"{error} (or Graft is running already)")
    return Finding(subject="port", verdict=Verdict.GOOD, found=f"{port} on {host} is free")


def judge_sqlite(version: tuple[int, int, int]) -> Finding:
    """Which journal the store will choose for this SQLite."""
    from graft_shared.store.engine import journal_mode  # here, so that `graft --help` need not load SQLAlchemy

    found = f"{'.'.join(map(str, version))}, journal_mode={journal_mode(version)}"
    return Finding(subject="SQLite", verdict=Verdict.GOOD, found=found)


def judge_broker(environment: Mapping[str, str]) -> Finding:
    """There must be a Redis server, ours or the user's."""
    if environment.get("GRAFT_BROKER_URL"):
        return Finding(subject="broker", verdict=Verdict.GOOD, found="your own, by GRAFT_BROKER_URL")
    try:
        return Finding(subject="broker", verdict=Verdict.GOOD, found=find_executable())
    except NoBroker as error:
        return Finding(subject="broker", verdict=Verdict.BAD, found=str(error))


def _gpus(environment: Mapping[str, str]) -> Iterator[Finding]:
    gpus = gpus_here(environment)
    if not gpus:
        yield Finding(subject="GPU", verdict=Verdict.NOTE, found="none: tiny bases train on the CPU, slowly")
        return
    from graft_shared.defaults import load_capacity  # here, so that `graft --help` need not load pydantic

    capacity_path = environment.get("GRAFT_CAPACITY_PATH")
    table = load_capacity(Path(capacity_path) if capacity_path else None)
    for gpu in gpus:
        memory = _gpu_memory_bytes(gpu.index)
        gpu_class = table.class_for_memory(memory)
        verdict = Verdict.NOTE if gpu_class is None else Verdict.GOOD
        place = "below every class of the capacity table" if gpu_class is None else f"class {gpu_class.name}"
        yield Finding(subject=f"GPU {gpu.index}", verdict=verdict, found=f"{gpu.name}, {memory / GIB:.1f} GiB: {place}")


def _gpu_memory_bytes(index: int) -> int:
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    answer = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    return int(answer.stdout.strip()) * 1024**2


def _library_versions() -> dict[str, str] | str:
    """Import the libraries in a process of its own: that is the only proof that they work, and it takes seconds."""
    try:
        command = [sys.executable, "-c", _VERSIONS]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"the import took more than {_IMPORT_SECONDS} s"
    if answer.returncode != 0:
        return (answer.stderr.strip().splitlines() or [f"the import ended with {answer.returncode}"])[-1]
    versions: dict[str, str] = json.loads(answer.stdout.strip().splitlines()[-1])
    return versions


def _available_memory_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    facts = dict(line.split(":", 1) for line in lines)
    return int(facts["MemAvailable"].split()[0]) * 1024


def _draw(findings: list[Finding]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Column, Table

    colours = {Verdict.GOOD: "green", Verdict.NOTE: "yellow", Verdict.BAD: "red"}
    table = Table("", "", Column(overflow="fold"), box=None, pad_edge=False, show_header=False)
    for finding in findings:
        colour = colours[finding.verdict]
        table.add_row(f"[{colour}]{finding.verdict}[/{colour}]", finding.subject, escape(finding.found))
    Console().print(table)
