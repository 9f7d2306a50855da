"""`python -m tests.mutants [NAME…]`: break the code in one place after the other, and see whether the tests notice.

Each mutant is a copy of the tree in a folder of its own, two at a time. One that its tests do not kill is a missing
test, and so is one whose tests cannot run: both are an error.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tests.mutants import MUTANTS
from tests.mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
SOURCES = ("shared", "services/api", "services/worker", "services/local", "client")  # as editable installs have them
NEEDED = (*SOURCES, "tests", "deploy", "pyproject.toml")
AT_ONCE = 2
LIMIT_SECONDS = 600
SOME_TESTS_FAILED = 1  # pytest's exit codes; any other but 0 means that it did not get so far

_WHERE = "import graft_api as a, graft_shared as s, graft_worker as w; print(a.__file__, s.__file__, w.__file__)"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What became of a mutant; `killed_by` is the first test that failed."""

    name: str
    breaks: str
    outcome: str  # killed, survived or not tried
    killed_by: str | None
    seconds: float
    said: str = ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Try the mutants of these names, or all; return 1 unless every one was killed."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="which to try; all by default")
    parser.add_argument("--out", type=Path, help="where to write the verdicts as JSON")
    asked = parser.parse_args(arguments)
    unknown = set(asked.names) - {mutant.name for mutant in MUTANTS}
    if unknown:
        parser.error(f"no such mutant: {', '.join(sorted(unknown))}")
    wanted = [mutant for mutant in MUTANTS if not asked.names or mutant.name in asked.names]
    untouched = judge(_nothing(wanted))
    if untouched.outcome != "survived":
        print(f"the tests must hold of the code as it is: {untouched.killed_by or untouched.said}")
        return 1
    with ThreadPoolExecutor(AT_ONCE) as pool:
        verdicts = []
        for verdict in pool.map(judge, wanted):
            verdicts.append(verdict)
            print(
                f"{verdict.outcome:9} {verdict.seconds:6.1f} s  {verdict.name}: {verdict.killed_by or verdict.breaks}"
            )
            if verdict.said:
                print(verdict.said)
    killed = sum(verdict.outcome == "killed" for verdict in verdicts)
    print(f"{killed} of {len(verdicts)} killed")
    if asked.out:
        asked.out.write_text(_report(verdicts, asked.out))
    return 0 if killed == len(verdicts) else 1


def _nothing(mutants: Sequence[Mutant]) -> Mutant:
    """A mutant that changes nothing, and has all the tests of the others to survive."""
    first, tests = mutants[0], dict.fromkeys(test for mutant in mutants for test in mutant.tests)
    return replace(first, name="nothing", breaks="nothing", new=first.old, tests=tuple(tests))


def judge(mutant: Mutant) -> Verdict:
    """Apply a mutant to a copy of the tree and run its tests there."""
    with tempfile.TemporaryDirectory(prefix=f"graft-mutant-{mutant.name}-") as folder:
        root = Path(folder).resolve()
        _copy(root)
        mutant.apply(root)
        began = time.monotonic()
        outcome, killed_by, said = _try(mutant, root)
        seconds = round(time.monotonic() - began, 1)
    facts = {"name": mutant.name, "breaks": mutant.breaks, "outcome": outcome}
    return Verdict(**facts, killed_by=killed_by, seconds=seconds, said=said)


def _try(mutant: Mutant, root: Path) -> tuple[str, str | None, str]:
    found = _python(root, "-c", _WHERE)
    if found.returncode or not all(path.startswith(f"{root}{os.sep}") for path in found.stdout.split()):
        return "not tried", None, found.stdout + found.stderr
    options = ("-x", "-p", "no:cacheprovider", f"--basetemp={root / 'tmp'}")
    try:
        tried = _python(root, "-m", "pytest", *options, *mutant.tests)
    except subprocess.TimeoutExpired:
        return "not tried", None, f"its tests took longer than {LIMIT_SECONDS} s"
    if tried.returncode == 0:
        return "survived", None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", tried.stdout, re.MULTILINE)
    if tried.returncode != SOME_TESTS_FAILED or failed is None:
        return "not tried", None, tried.stdout[-3000:] + tried.stderr[-1000:]
    return "killed", failed[1], ""


def _python(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Python where the copied sources go before those that are installed."""
    path = os.pathsep.join(str(root / source) for source in SOURCES)
    environment = {**os.environ, "PYTHONPATH": path, "HYPOTHESIS_PROFILE": "first"}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False
    )


def _copy(root: Path) -> None:
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.egg-info")
    for name in NEEDED:
        source, target = ROOT / name, root / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=ignored)
        else:
            shutil.copyfile(source, target)


def _report(verdicts: Sequence[Verdict], written: Path) -> str:
    """The verdicts as JSON; those of other mutants stay as they were written before."""
    earlier = json.loads(written.read_text())["verdicts"] if written.exists() else []
    told = {verdict["name"]: verdict for verdict in earlier}
    for verdict in verdicts:
        told[verdict.name] = {name: value for name, value in asdict(verdict).items() if name != "said"}
    kept = [told[mutant.name] for mutant in MUTANTS if mutant.name in told]
    killed = sum(verdict["outcome"] == "killed" for verdict in kept)
    return json.dumps({"mutants": len(kept), "killed": killed, "verdicts": kept}, indent=2) + "\n"


if __name__ == "__main__":
    sys.exit(main())
