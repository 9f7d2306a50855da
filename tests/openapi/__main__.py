"""`make test-openapi [CASES=…] [SEED=…] [OUT=…]`: requests drawn from the OpenAPI document, every answer held to it."""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from tests.openapi.seeds import seeded_api
from tests.servers import postgres_url

CONFIG = Path(__file__).parent / "schemathesis.toml"
PHASES = "examples,coverage,fuzzing,stateful"


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """What a run is.

    Args:
        cases: About so many drawn at random, shared among the operations; the phase of coverage adds its own.
        phases: Schemathesis' own: examples, coverage, fuzzing, stateful.
    """

    cases: int = 20_000
    seed: int = 1
    phases: str = PHASES
    spare_jobs: int = 40


def main() -> None:
    """Run and report; exit code 1 if an answer was not as the document says."""
    parser = argparse.ArgumentParser(prog="python -m tests.openapi", description=__doc__)
    parser.add_argument("--cases", type=int, default=Wanted.cases)
    parser.add_argument("--seed", type=int, default=Wanted.seed)
    parser.add_argument("--phases", default=Wanted.phases)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="graft-openapi-"))
    wanted = Wanted(cases=arguments.cases, seed=arguments.seed, phases=arguments.phases)
    with postgres_url(folder, "openapi") as url:
        report = run(folder, wanted, url)
    print(json.dumps({name: value for name, value in report.items() if name != "operations"}, indent=2))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(report, indent=2) + "\n")
    if not report["holds"]:
        sys.exit(f"the API is not as its document says; all of it is in {folder}")
    shutil.rmtree(folder, ignore_errors=True)


def run(folder: Path, wanted: Wanted, database_url: str) -> dict[str, Any]:
    """One run in this folder; returns its report."""
    began = time.monotonic()
    with seeded_api(folder, database_url, spare_jobs=wanted.spare_jobs) as api:
        shutil.copy(CONFIG, folder)
        said = _schemathesis(folder, api.url, wanted)
        alive = api.child.poll() is None
    found = _counted(folder / "cases.ndjson")
    summary = json.loads((folder / "summary.json").read_text())
    return {
        "command": f"python -m tests.openapi --cases {wanted.cases} --seed {wanted.seed}",
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.platform()}",
        "schemathesis": version("schemathesis"),
        "seconds": round(time.monotonic() - began),
        "holds": said.returncode == 0 and alive and not summary["failures"] and not summary["errors"],
        "cases": sum(found["cases"].values()),
        "server_errors": sum(
            count for counts in found["statuses"].values() for status, count in counts.items() if status >= "500"
        ),
        "checks": dict(sorted(found["checks"].items())),
        "failures": summary["failures"],
        "errors": summary["errors"],
        "said": "" if said.returncode == 0 else said.stdout[-20_000:],
        "operations": {
            label: {"cases": count, "statuses": dict(sorted(found["statuses"][label].items()))}
            for label, count in sorted(found["cases"].items())
            if set(found["statuses"][label]) != {"405"}
        },
        "methods_that_no_path_takes": sum(set(counts) == {"405"} for counts in found["statuses"].values()),
    }


def _schemathesis(folder: Path, url: str, wanted: Wanted) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "schemathesis"), "--config-file", CONFIG.name, "run"]
    command += [f"{url}/openapi.json", "--phases", wanted.phases, "--generation-database", "none"]
    command += ["--seed", str(wanted.seed), "--max-examples", str(_examples(url, wanted.cases)), "--no-color"]
    command += ["--report", "ndjson,json", "--report-ndjson-path", "cases.ndjson", "--report-json-path", "summary.json"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def _examples(url: str, cases: int) -> int:
    """How many of them each operation gets, of those that take anything: there is one request of the others."""
    paths = httpx.get(f"{url}/openapi.json").raise_for_status().json()["paths"]
    operations = [operation for operations in paths.values() for operation in operations.values()]
    return math.ceil(cases / sum("parameters" in each or "requestBody" in each for each in operations))


def _counted(path: Path) -> dict[str, Any]:
    """Cases and statuses by operation, and how often each check was made."""
    cases: Counter[str] = Counter()
    checks: Counter[str] = Counter()
    statuses: dict[str, Counter[str]] = defaultdict(Counter)
    for recorder in _recorders(path):
        labels = {id: "{method} {path}".format(**case["value"]) for id, case in recorder.get("cases", {}).items()}
        cases.update(labels.values())
        for id, exchange in recorder.get("interactions", {}).items():
            if exchange["response"] is not None:
                statuses[labels.get(id, "probes")][str(exchange["response"]["status_code"])] += 1
        for made in recorder.get("checks", {}).values():
            checks.update(check["name"] for check in made)
    return {"cases": cases, "statuses": statuses, "checks": checks}


def _recorders(path: Path) -> Iterator[dict[str, Any]]:
    with path.open() as lines:
        for line in lines:
            finished = json.loads(line).get("ScenarioFinished")
            if finished is not None:
                yield finished["recorder"]


if __name__ == "__main__":
    main()
