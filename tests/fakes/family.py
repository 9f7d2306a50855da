"""`python -m tests.fakes.family FOLDER`: tiny children under the real supervision, in a process of its own.

FOLDER/plan.json: {"members": [{"name", "behaviour", "wave", "grace_seconds"?}], "policy": {…}}.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from graft_local.children import Children, ChildSpec, Policy

MEMBER = Path(__file__).with_name("member.py")


def main() -> int:
    folder = Path(sys.argv[1])
    plan = json.loads((folder / "plan.json").read_text())
    journal = folder / "journal"
    specs = [_spec(journal, **member) for member in plan["members"]]
    family = Children(specs, say=lambda who, line: print(f"{who}: {line}", flush=True), policy=Policy(**plan["policy"]))
    return family.run(lambda: print("all are ready", flush=True))


def _spec(journal: Path, *, name: str, behaviour: str, wave: int, grace_seconds: float = 20.0) -> ChildSpec:
    once = behaviour == "finish" or (behaviour == "die" and wave == 0)
    return ChildSpec(
        name=name,
        command=(sys.executable, "-S", str(MEMBER), str(journal), name, behaviour),
        environment=dict(os.environ),
        wave=wave,
        ready=_ready(journal, name, behaviour),
        once=once,
        grace_seconds=grace_seconds,
    )


def _ready(journal: Path, name: str, behaviour: str) -> Callable[[], bool] | None:
    if behaviour in {"finish", "die"}:
        return None
    return (lambda: False) if behaviour == "never ready" else partial(_has_started, journal, name)


def _has_started(journal: Path, name: str) -> bool:
    return journal.exists() and f"{name} started" in journal.read_text()


if __name__ == "__main__":
    sys.exit(main())
