"""`graft doctor` from the user's side: whether the service answers, what it says of itself, and what the key may."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from typing import Annotated

import httpx
import typer

from graft_client.client import DEFAULT_URL
from graft_client.errors import KeyNotSendable, NetworkSettingsWrong, ServiceUnreachable, without_userinfo
from graft_client.findings import Check, Finding, UnknownCheck, examine, fault, good, note, show, skipped
from graft_client.transport import Transport

TIMEOUT_SECONDS = 10.0
MOST_SKEW_SECONDS = 60.0  # receivers of webhooks allow five minutes, S3 fifteen; what drifts does not stop at one

# For each scope a request that only a key with it gets past, and that changes nothing: what it names does not exist.
_PROBES = {
    "jobs:read": ("GET", "/jobs?limit=1"),
    "jobs:write": ("POST", "/jobs/ftjob-of-the-doctor/cancel"),
    "files:read": ("GET", "/files?limit=1"),
    "files:write": ("DELETE", "/files/file-of-the-doctor"),
    "webhooks": ("GET", "/webhooks/secret"),
    "metrics": ("GET", "/metrics"),
}
_NEEDED = ("jobs:read", "jobs:write", "files:read", "files:write")  # to bring data, train and take home
_UNREAD = "none is needed, and the one that is set is not looked at"
_OTHER_STAGES = {
    "prepare": "jobs stay in validating_files, and no GPU gets one",
    "merge": "merged models that are asked for wait",
}
_MORE_WORKERS = "graft up, or deploy/README.md"

Only = Annotated[list[str] | None, typer.Argument(metavar="[CHECK]…", help="Make these checks alone.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")]


def doctor(only: Only = None, as_json: AsJson = False) -> None:
    """Check the way to the service; exit code 1 when something does not work."""
    elsewhere = Check(name="machine", look=lambda: [skipped("machine", "checked where the service runs: graft doctor")])
    conclude([Check(name="service", look=lambda: look(os.environ)), elsewhere], only, as_json=as_json)


def conclude(checks: list[Check], only: list[str] | None, *, as_json: bool) -> None:
    """Make the checks, show what they find, and leave with the exit code."""
    try:
        findings = examine(checks, only or ())
    except UnknownCheck as error:
        typer.echo(f"error {error}", err=True)
        raise typer.Exit(2) from error
    raise typer.Exit(show(findings, as_json=as_json))


def look(environment: Mapping[str, str]) -> Iterator[Finding]:
    """Everything that a URL and a key let one see."""
    url, key = environment.get("GRAFT_URL") or DEFAULT_URL, environment.get("GRAFT_API_KEY") or None
    address = without_userinfo(url)
    try:
        transport = Transport(url, api_key=key, timeout=TIMEOUT_SECONDS, patience_seconds=0.0)
        answer = transport.ask("GET", "/healthz")
        if not _is_graft(answer):
            yield fault(
                "service", f"what answers at {address} is not Graft", "export GRAFT_URL=https://… (its address)"
            )
            return
        yield good("service", f"answers at {address}")
        yield judge_skew("clock of the service", skew_of(answer))
        yield from _readiness(transport)
        yield _version(transport)
        is_unread = key is not None and _is_open(url)
        yield good("key", _UNREAD) if is_unread else _key(transport, is_given=key is not None)
        yield from _workers(transport)
        transport.close()
    except KeyNotSendable as error:
        yield fault("key", str(error), "export GRAFT_API_KEY=graft_…")
    except NetworkSettingsWrong as error:
        yield fault("service", error.reason, error.remedy)
    except ServiceUnreachable as error:
        yield _no_answer(address, error)


def _no_answer(address: str, error: ServiceUnreachable) -> Finding:
    """Only where nothing listens is a service to be started."""
    if error.is_late:
        found = f"something listens at {address} and did not answer within {TIMEOUT_SECONDS:.0f} s"
        return fault("service", f"{found}: if it is Graft, it is busy", "graft doctor service, a minute later")
    way = "export GRAFT_URL=https://… (its address)"
    remedy = f"graft up, with the --state-dir that it had; or {way}" if error.is_refused else way
    return fault("service", f"no answer from {address} ({error.reason})", remedy)


def _is_graft(answer: httpx.Response) -> bool:
    return answer.is_success and answer.text.strip() == '{"status":"ok"}'


def judge_skew(subject: str, seconds: float | None) -> Finding:
    """How far another clock is from ours, in seconds; positive when it is ahead."""
    if seconds is None:
        return skipped(subject, "it does not tell the time")
    if abs(seconds) <= MOST_SKEW_SECONDS:
        return good(subject, f"within {max(1, round(abs(seconds)))} s of this machine's")
    way = "ahead of" if seconds > 0 else "behind"
    found = f"{abs(seconds):.0f} s {way} this machine's: links and signatures seem to have ended, or not begun"
    return fault(subject, found, "sudo timedatectl set-ntp true, on both machines")


def skew_of(answer: httpx.Response) -> float | None:
    """How far the clock behind an answer is ahead of ours, by its `Date`."""
    try:
        told = parsedate_to_datetime(answer.headers["date"])
    except (KeyError, ValueError):
        return None
    return (told - datetime.now(UTC)).total_seconds()


def _readiness(transport: Transport) -> Iterator[Finding]:
    checks = transport.ask("GET", "/readyz").json()["checks"]
    for name, check in checks.items():
        if not check["ok"]:
            found, remedy = f"the service says: {check['reason']}", f"graft doctor {name}, where the service runs"
            # Without broker or bucket jobs are taken all the same.
            yield fault(f"its {name}", found, remedy) if name == "database" else note(f"its {name}", found, remedy)
    if all(check["ok"] for check in checks.values()):
        yield good("readiness", f"{', '.join(checks)} answer")


def _version(transport: Transport) -> Finding:
    theirs = str(transport.ask("GET", "/openapi.json").json()["info"]["version"])
    ours = version("graft-client")
    if theirs == ours:
        return good("version", f"{ours}, the service's own")
    return note("version", f"this client is {ours}, the service {theirs}", "git pull && make setup, on the older side")


def _is_open(url: str) -> bool:
    """Whether a request without a key is answered: a service that has no keys takes any, and looks at none."""
    nobody = Transport(url, api_key=None, timeout=TIMEOUT_SECONDS, patience_seconds=0.0)
    try:
        return nobody.ask(*_PROBES["jobs:read"]).is_success
    finally:
        nobody.close()


def _key(transport: Transport, *, is_given: bool) -> Finding:
    """Whether the key is in force, and which scopes it has; no route tells, so each is tried."""
    statuses = {scope: transport.ask(method, path).status_code for scope, (method, path) in _PROBES.items()}
    if 401 in statuses.values():
        if not is_given:
            return fault(
                "key", "the service asks for one, and GRAFT_API_KEY is not set", "export GRAFT_API_KEY=graft_…"
            )
        found = "not in force here: it is wrong, has been revoked, or has expired"
        return fault("key", found, "ask the operator for another (graft keys create TENANT); export GRAFT_API_KEY=…")
    if not is_given:
        return good("key", "none is needed")
    held = [scope for scope, status in statuses.items() if status != 403]
    said = f"in force for {', '.join(held) or 'nothing'}"
    if missing := [scope for scope in _NEEDED if scope not in held]:
        scopes = " ".join(f"--scope {scope}" for scope in _PROBES if scope in held or scope in missing)
        return note("key", f"{said}; it lacks {', '.join(missing)}", f"graft keys create TENANT {scopes}")
    return good("key", said)


def _workers(transport: Transport) -> Iterator[Finding]:
    answer = transport.ask("GET", "/capacity")
    if not answer.is_success:
        yield skipped("workers", f"the service does not tell ({answer.status_code})")
        return
    fleet = answer.json()
    alive = {stage for worker in fleet["workers"] for stage in worker["stages"]}
    if classes := [row["name"] for row in fleet["data"] if row["live_workers"]]:
        yield good("workers", f"alive for {', '.join(classes)}")
    else:
        yield note("workers", "none that trains is alive: jobs are accepted, and wait", _MORE_WORKERS)
    for stage, without_any in _OTHER_STAGES.items():
        if stage not in alive:
            yield note("workers", f"none that {stage}s is alive: {without_any}", _MORE_WORKERS)
