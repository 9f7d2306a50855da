"""`graft backup` and `graft restore`: a one-machine service in a folder, taken while it runs, every byte proven.

What a row of the database points at must be in the backup, and the service goes on removing what no row needs. So the
bucket is held twice, by hard links, before the database is read and after: an object is missed only if it was made and
removed again in that second. Objects are never written in place, so a link holds what it was made of.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sqlite3
import sys
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
SECRETS_OF_THE_ENVIRONMENT = ("GRAFT_KEY_PEPPER", "GRAFT_WEBHOOK_SECRET")  # where set, they go before those files
JOURNALS = ("-journal", "-wal", "-shm")  # SQLite would write what they hold into whatever lies beside them
MODELS = "models"
LOCK, LINKS = "backup.lock", ".held-by-backup-"  # beside the objects: no hard link leaves its file system
CHUNK_BYTES = 1 << 20

StateDir = Annotated[Path, typer.Option(envvar="GRAFT_STATE_DIR", help="The service's state folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print what was done as JSON.")]


_MAKE_ROOM = "Make room there, or choose a folder on another disk."
_MEND = "Mend that, or run this as the user whose service it is."
_DAMAGED = "The database is damaged: restore an earlier backup, or see sqlite.org/recovery.html."
_REMEDIES = {
    errno.ENOSPC: _MAKE_ROOM,
    errno.EDQUOT: _MAKE_ROOM,
    errno.EXDEV: "A backup holds objects by hard links: let their folder and the one around it be on one file system.",
}
_SQLITE_REMEDIES = {
    sqlite3.SQLITE_FULL: _MAKE_ROOM,
    sqlite3.SQLITE_CORRUPT: _DAMAGED,
    sqlite3.SQLITE_NOTADB: _DAMAGED,
}


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


@contextmanager
def _explained() -> Iterator[None]:
    """Say what stood in the way, where, and what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename2 or error.filename or "The disk"
        remedy = _REMEDIES.get(error.errno or 0, _MEND)
        raise CannotBackUp(f"{where}: {error.strerror or error}. {remedy}") from error
    except sqlite3.Error as error:
        remedy = _SQLITE_REMEDIES.get(error.sqlite_errorcode & 0xFF, _MEND)
        raise CannotBackUp(f"{DATABASE} cannot be copied: {error}. {remedy}") from error


@_explained()
def back_up(state_dir: Path, folder: Path, environment: Mapping[str, str], *, with_models: bool) -> dict[str, Any]:
    """Write the backup and return its list; it appears whole or not at all.

    Raises:
        CannotBackUp: The folder is taken, or the service keeps its data elsewhere.
    """
    _check_is_here(state_dir, environment)
    _check_is_free(folder)
    objects = (state_dir / OBJECTS).resolve()
    with _whole_or_not_at_all(folder) as made, _links_beside(objects) as held:
        _hold(objects, held)
        _copy_database(state_dir / DATABASE, made / DATABASE)
        _hold(objects, held)
        proofs = {DATABASE: _proof(made / DATABASE)}
        proofs |= _copied(held, made / OBJECTS, OBJECTS)
        for name in SECRETS:
            with suppress(FileNotFoundError):
                proofs[name] = _copy(state_dir / name, made / name)
        if with_models:
            models = Path(environment.get("GRAFT_MODELS_DIR") or state_dir / MODELS)
            proofs |= _copied(models, made / MODELS, Path(MODELS))
        made_at = datetime.now(UTC).isoformat(timespec="seconds")
        missing = [name for name in SECRETS_OF_THE_ENVIRONMENT if environment.get(name)]
        listed = {"graft": version("graft-local"), "made_at": made_at, "not_in_it": missing, "files": proofs}
        (made / LIST).write_text(json.dumps(listed, indent=1))
    return listed


@_explained()
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


@contextmanager
def _links_beside(objects: Path) -> Iterator[Path]:
    """A folder for links; those that killed backups left there are removed, once none runs that may need its own."""
    with (objects.parent / LOCK).open("a+") as lock:  # NFS lends a shared lock to readers alone
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in objects.parent.glob(f"{LINKS}*"):
                shutil.rmtree(left)
        fcntl.flock(lock, fcntl.LOCK_SH)
        with tempfile.TemporaryDirectory(dir=objects.parent, prefix=LINKS) as held:
            yield Path(held)


def _hold(objects: Path, held: Path) -> None:
    """Link every object into `held`; one that is removed in this moment was needed no more."""
    for path in _files(objects):
        link = held / path.relative_to(objects)
        if link.exists():
            continue
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.link(path, link)


def _copy_database(source: Path, target: Path) -> None:
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)  # in one step, for which writers wait: in several, each write would begin it anew


def _copied(source: Path, target: Path, name: Path) -> dict[str, list[Any]]:
    """Copy a folder; returns the proof of each file by its name in the backup."""
    found = (path.relative_to(source) for path in _files(source))
    return {str(name / path): _copy(source / path, target / path) for path in found}


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """Every file below, also behind links to folders; one that leads back to where it came from ends there."""
    here, found = folder.resolve(), list[Path]()
    with suppress(FileNotFoundError):  # there is none, or it was removed in this moment
        found = [] if here in above else sorted(folder.iterdir())
    for path in found:
        if path.is_dir():
            yield from _files(path, above | {here})
        elif path.is_file():
            yield path


def _copy(source: Path, target: Path) -> list[Any]:
    """Copy a file with its mode, durably; returns its size and sha256."""
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    try:
        with source.open("rb") as content, target.open("wb") as out:
            shutil.copymode(source, target)
            while chunk := content.read(CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
    except OSError as error:
        error.filename = error.filename or str(target)  # a write names no file
        raise
    return [target.stat().st_size, digest.hexdigest()]


def _proof(path: Path) -> list[Any]:
    with path.open("rb") as content:
        return [path.stat().st_size, hashlib.file_digest(content, "sha256").hexdigest()]


def _told(act: Callable[[], dict[str, Any]], as_json: bool) -> None:
    """Do it, and say what was done or why not; told to end, it removes what it has begun."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, lambda number, _frame: sys.exit(128 + number))
    try:
        listed = act()
    except CannotBackUp as error:
        typer.echo(f"error {error}", err=True)
        raise typer.Exit(2) from error
    sizes, missing = [size for size, _ in listed["files"].values()], listed.get("not_in_it", [])
    if as_json:
        told = {"made_at": listed["made_at"], "files": len(sizes), "bytes": sum(sizes), "not_in_it": missing}
        typer.echo(json.dumps(told))
        return
    typer.echo(f"{len(sizes)} files, {sum(sizes) / 1024**2:.1f} MiB, as of {listed['made_at']}")
    if not any(name.startswith(f"{MODELS}/") for name in listed["files"]):
        kept = "keep models/, or what GRAFT_MODELS_DIR names, yourself"
        typer.echo(f"Registered base models are not in it: {kept}, or back up --with-models.", err=True)
    if missing:
        without = "without them no key is known and no receiver knows a webhook"
        typer.echo(f"Not in it, as the environment had them: {', '.join(missing)}. Keep them: {without}.", err=True)
