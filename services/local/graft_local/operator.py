"""`graft keys` and `graft tenants`: the operator's commands of the API, on the service of a state folder."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer

from graft_local.backup import StateDir
from graft_local.secrets import kept_secret

_PASSED_ON: dict[str, Any] = {
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
}

keys = typer.Typer(add_completion=False)
tenants = typer.Typer(add_completion=False)


@keys.command(help="Make, list and revoke the keys of this machine's service: graft keys --help.", **_PASSED_ON)
def _keys(context: typer.Context, state_dir: StateDir = Path(".graft")) -> None:
    _run("graft_api.keys", context.args, state_dir.absolute())


@tenants.command(help="See what tenants have, and change their quotas: graft tenants --help.", **_PASSED_ON)
def _tenants(context: typer.Context, state_dir: StateDir = Path(".graft")) -> None:
    _run("graft_api.tenants", context.args, state_dir.absolute())


def _run(module: str, arguments: list[str], state_dir: Path) -> None:
    """Run the API's command as `graft up` runs the API, with the settings of the state folder."""
    if not state_dir.is_dir():
        typer.echo(
            f"error There is no service in {state_dir}. Start one (graft up), or name it: --state-dir.", err=True
        )
        raise typer.Exit(2)
    typer.echo(f"The service in {state_dir}:", err=True)
    environment = {"GRAFT_LOG_FORMAT": "text", **os.environ, "GRAFT_STATE_DIR": str(state_dir)}
    environment["GRAFT_KEY_PEPPER"] = environment.get("GRAFT_KEY_PEPPER") or kept_secret(state_dir / "key-pepper")
    raise typer.Exit(
        subprocess.run([sys.executable, "-m", module, *arguments], env=environment, check=False).returncode
    )
