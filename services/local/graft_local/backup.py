"""`graft backup` and `graft restore`: a one-machine service in a folder, taken while it runs, every byte proven.

What a row of the database points at must be in the backup, and the service goes on removing what no row needs. So the
bucket is held twice, by hard links, before the database is read and after: an object is missed only if it was made and
removed again in that second. Objects are never written in place, so a link holds what it was made of.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from graft_local.launcher import holder_of

DATABASE, OBJECTS, LIST = "graft.db", Path("bucket", "objects"), "backup.json"
SECRETS = ("key-pepper", "webhook-secret", "bucket/link-secret")  # without them no key is known and no link holds
JOURNALS = ("-journal", "-wal", "-shm")  # SQLite would write what they hold into whatever lies beside them
MODELS = "models"
CHUNK_BYTES = 1 << 20

StateDir = Annotated[Path, typer.Option(envvar="GRAFT_STATE_DIR", help="The service's state folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


class CannotBackUp(Exception):
    """Nothing was written; the message says what to do."""


def backup(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder for the backup.")],
    state_dir: StateDir = Path(".graft"),
    with_models: Annotated[bool, typer.Option(help="Registered base models too, which may be large.")] = False,
    as_json: AsJson = False,
) -> None:
    """Copy the service of this machine, also while it runs: database, objects, secrets."""
    _told(lambda: back_up(state_dir.absolute(), folder.absolute(), os.environ, with_models=with_models), as_json)


def restore(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that graft backup made.")],
    state_dir: StateDir = Path(".graft"),
    as_json: AsJson = False,
) -> None:
    """Make a state folder of a backup, every byte checked; graft up goes on with its queue."""
    _told(lambda: bring_back(folder.absolute(), state_dir.absolute()), as_json)


def back_up(state_dir: Path, folder: Path, environment: Mapping[str, str], *, with_models: bool) -> dict[str, Any]:
    """Write the backup and return its list; it appears whole or not at all.

    Raises:
        CannotBackUp: The folder is taken, or the service keeps its data elsewhere.
    """
    _check_is_here(state_dir, environment)
    _check_is_free(folder)
    with _whole_or_not_at_all(folder) as made, tempfile.TemporaryDirectory(dir=state_dir, prefix="backup-") as scratch:
        held = Path(scratch)
        _hold(state_dir / OBJECTS, held)
        _copy_database(state_dir / DATABASE, made / DATABASE)
        _hold(state_dir / OBJECTS, held)
        proofs = {DATABASE: _proof(made / DATABASE)}
        proofs |= _copied(held, made / OBJECTS, OBJECTS)
        for name in SECRETS:
            with suppress(FileNotFoundError):
                proofs[name] = _copy(state_dir / name, made / name)
        if with_models:
            proofs |= _copied(state_dir / MODELS, made / MODELS, Path(MODELS))
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        listed = {"graft": version("graft-local"), "made_at": made_at, "files": proofs}
        (made / LIST).write_text(json.dumps(listed, indent=1))
    return listed


def bring_back(folder: Path, state_dir: Path) -> dict[str, Any]:
    """Write a state folder from a backup and return the backup's list.

    Raises:
        CannotBackUp: There is a service in the state folder, or the backup is not whole.
    """
    if (holder := holder_of(state_dir)) is not None:
        raise CannotBackUp(f"`graft up` (process {holder}) runs on {state_dir}. Stop it first.")
    for name in (DATABASE, *(DATABASE + suffix for suffix in JOURNALS)):
        if (state_dir / name).exists():
            raise CannotBackUp(
                f"{state_dir} holds a service already: {name}. Move it away, or choose another with --state-dir."
            )
    try:
        listed: dict[str, Any] = json.loads((folder / LIST).read_text())
    except (OSError, ValueError) as error:
        raise CannotBackUp(f"{folder} is no backup: its {LIST} cannot be read ({error}).") from error
    state_dir.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=state_dir, prefix="restore-") as scratch:
        for name, proof in listed["files"].items():
            if not (folder / name).is_file() or _copy(folder / name, Path(scratch, name)) != proof:
                raise CannotBackUp(
                    f"{name} is missing from {folder}, or is not what was backed up. Nothing was restored."
                )
        for name in sorted(
            listed["files"], key=lambda name: name == DATABASE
        ):  # last: it makes a service of the folder
            (state_dir / name).parent.mkdir(parents=True, exist_ok=True)
            Path(scratch, name).replace(state_dir / name)
    return listed


def _check_is_here(state_dir: Path, environment: Mapping[str, str]) -> None:
    for name in ("GRAFT_DATABASE_URL", "GRAFT_S3_BUCKET"):
        if environment.get(name):
            raise CannotBackUp(
                f"{name} is set: this service keeps its data elsewhere, and that is backed up by its own tools. "
                "deploy/README.md tells how, under 'Backup and restore'."
            )
    if not (state_dir / DATABASE).exists():
        raise CannotBackUp(f"There is no service in {state_dir}. Choose its state folder with --state-dir.")


def _check_is_free(folder: Path) -> None:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CannotBackUp(f"{folder} exists already and is not an empty folder. Choose another one.")


@contextmanager
def _whole_or_not_at_all(folder: Path) -> Iterator[Path]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        made = Path(scratch, "backup")
        made.mkdir(mode=0o700)  # it holds secrets
        yield made
        made.replace(folder)


def _hold(objects: Path, held: Path) -> None:
    """Link every object into `held`; one that is removed in this moment was needed no more."""
    for path in objects.rglob("*"):
        link = held / path.relative_to(objects)
        if link.exists() or not path.is_file():
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.link(path, link)


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)  # in one step, for which writers wait: in several, each write would begin it anew


def _copied(source: Path, target: Path, name: Path) -> dict[str, list[Any]]:
    """Copy a folder; returns the proof of each file by its name in the backup."""
    paths = sorted(path for path in source.rglob("*") if path.is_file())
    return {str(name / path.relative_to(source)): _copy(path, target / path.relative_to(source)) for path in paths}


def _copy(source: Path, target: Path) -> list[Any]:
    """Copy a file with its mode, durably; returns its size and sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as content, target.open("wb") as out:
        shutil.copymode(source, target)
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
            out.write(chunk)
        out.flush()
        os.fsync(out.fileno())
    return [target.stat().st_size, digest.hexdigest()]


def _proof(path: Path) -> list[Any]:
    with path.open("rb") as content:
        return [path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]


def _told(act: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do it, and say what was done or why not."""
    try:
        listed = act()
    except CannotBackUp as error:
        typer.echo(f"error {error}", err=True)
        raise typer.Exit(2) from error
    sizes = [size for size, _ in listed["files"].values()]
    if as_json:
        typer.echo(json.dumps({"made_at": listed["made_at"], "files": len(sizes), "bytes": sum(sizes)}))
        return
    typer.echo(f"{len(sizes)} files, {sum(sizes) / 1024**2:.1f} MiB, as of {listed['made_at']}")
    if not any(name.startswith(f"{MODELS}/") for name in listed["files"]):
        typer.echo("Registered base models are not in it: keep models/ yourself, or back up --with-models.", err=True)
