"""`graft doctor` on the operator's side: this machine, what is installed, the service's neighbours, its face."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

import typer
from pydantic import ValidationError

from graft_client.client import DEFAULT_URL
from graft_client.doctor import AsJson, Only, conclude, look
from graft_client.findings import Check, fault, note, skipped
from graft_local.launcher import DEFAULT_PORT

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_OF_A_SERVICE = ("GRAFT_DATABASE_URL", "GRAFT_BROKER_URL", "GRAFT_S3_BUCKET")


def doctor(
    only: Only = None,
    host: Annotated[str, typer.Option(help="Address that the API would listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the API would listen on.")] = DEFAULT_PORT,
    state_dir: Annotated[Path, typer.Option(envvar="GRAFT_STATE_DIR", help="The state folder to look at.")] = Path(
        ".graft"
    ),
    as_json: AsJson = False,
) -> None:
    """Check this machine, its service and the way to it; exit code 1 when something does not work."""
    face = Check(name="service", look=lambda: look(os.environ))
    state_dir = state_dir.absolute()
    if is_elsewhere(state_dir, os.environ):
        why = "GRAFT_URL names a service elsewhere: its operator runs graft doctor there"
        conclude([face, Check(name="machine", look=lambda: [skipped("machine", why)])], only, as_json=as_json)
    conclude([*_operators(host, port, state_dir, os.environ), face], only, as_json=as_json)


def is_elsewhere(state_dir: Path, environment: Mapping[str, str]) -> bool:
    """Whether the service is another machine's, as far as one can tell from here."""
    host = urlsplit(environment.get("GRAFT_URL") or DEFAULT_URL).hostname
    is_ours = state_dir.exists() or any(environment.get(name) for name in _OF_A_SERVICE)
    return host not in _LOOPBACK and not is_ours


def _serves(host: str, port: int) -> bool:
    from graft_local.doctor.machine import is_graft

    try:
        return is_graft(host, port)
    except TimeoutError:
        return False  # the check of the port tells of it


def _operators(host: str, port: int, state_dir: Path, environment: Mapping[str, str]) -> list[Check]:
    """The checks of whoever runs the service; in the order in which one thing needs another."""
    # Here, so that `graft --help` need not load SQLAlchemy and pydantic's settings.
    from graft_local.doctor import libraries, machine, neighbours
    from graft_shared.settings import SharedSettings

    probe = libraries.Probe()
    of_the_machine = [
        Check(name="python", look=machine.python),
        Check(name="libraries", look=lambda: libraries.versions(probe)),
        Check(name="gpu", look=lambda: libraries.gpus(probe, environment)),
        Check(name="disk", look=lambda: machine.disk(state_dir)),
        Check(name="memory", look=machine.memory),
        Check(name="limits", look=lambda: machine.limits(environment)),
        Check(name="port", look=lambda: machine.port(host, port)),
    ]
    try:
        settings = SharedSettings(state_dir=state_dir)
    except ValidationError as error:
        said = "; ".join(f"GRAFT_{'_'.join(map(str, each['loc'])).upper()}: {each['msg']}" for each in error.errors())
        wrong = fault("settings", said, "unset or mend these variables")
        return [*of_the_machine, Check(name="settings", look=lambda: [wrong])]
    of_the_machine.append(
        Check(name="tables", look=lambda: libraries.tables(settings.capacity_path, settings.catalogue_path))
    )
    if neighbours.is_untouched(settings) and _serves(host, port):
        other = note(
            "database", f"the service on {port} has another state folder than {state_dir}: give its --state-dir"
        )
        rest = (skipped(name, "not looked at in this folder") for name in ("broker", "bucket", "hub", "key"))
        return [*of_the_machine, *(Check(name=each.subject, look=partial(iter, [each])) for each in (other, *rest))]
    return [
        *of_the_machine,
        Check(name="database", look=lambda: neighbours.database(settings)),
        Check(name="broker", look=lambda: neighbours.broker(state_dir, environment)),
        Check(name="bucket", look=lambda: neighbours.bucket(settings)),
        Check(name="hub", look=lambda: neighbours.hub(settings, environment)),
        Check(name="key", look=lambda: neighbours.key(settings, environment)),
    ]
