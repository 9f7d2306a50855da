"""Bringing an adapter home: by its links or by the archive, checked, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import tarfile
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, Any

import httpx

from graft_client.errors import DownloadCorrupt, GraftAPIError, TargetNotEmpty
from graft_client.transport import Transport

TRIES_PER_FILE = 3  # links live for minutes: a long download may outlive one, and gets a fresh one
_CHUNK_BYTES = 1 << 20
_LINK_GONE = frozenset({401, 403, 404, 410})


def download_adapter(transport: Transport, route: str, target: Path) -> Path:
    """Write every file of the manifest at `route` into the new folder `target` and return it."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise TargetNotEmpty(f"{target} exists already and is not an empty folder. Choose another one.")
    manifest = transport.json("GET", route)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as scratch:
        folder = Path(scratch, "adapter")
        folder.mkdir()
        try:
            _fetch_by_links(transport, route, manifest, folder)
        except _NoLinks:
            _fetch_archive(transport, route, manifest, folder)
        (folder / "manifest.json").write_text(json.dumps(_without_links(manifest), indent=1, sort_keys=True))
        folder.replace(target)
    return target


class _NoLinks(Exception):
    """The links lead nowhere from here: the archive goes through the service itself."""


def _fetch_by_links(transport: Transport, route: str, manifest: dict[str, Any], folder: Path) -> None:
    for proof in manifest["files"]:
        path = _inside(folder, proof["name"])
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch_file(transport, route, proof, path)


def _fetch_file(transport: Transport, route: str, proof: dict[str, Any], path: Path) -> None:
    name = proof["name"]
    for remaining in reversed(range(TRIES_PER_FILE)):
        link = proof.get("url")
        if link is None:
            raise _NoLinks
        try:
            with transport.stream(link) as response, path.open("wb") as out:
                _copy(response.iter_bytes(_CHUNK_BYTES), out, proof)
            return
        except DownloadCorrupt:
            if remaining == 0:
                raise
        except GraftAPIError as error:
            if error.status not in _LINK_GONE or remaining == 0:
                raise _NoLinks from error
        except httpx.TransportError as error:
            if remaining == 0:
                raise _NoLinks from error
        fresh = transport.json("GET", route)["files"]
        proof = next(entry for entry in fresh if entry["name"] == name)


def _fetch_archive(transport: Transport, route: str, manifest: dict[str, Any], folder: Path) -> None:
    """Take the files of the manifest out of the archive, and nothing else."""
    tar = folder.parent / "adapter.tar"
    try:
        with transport.stream(f"{route}/archive") as response, tar.open("wb") as out:
            for chunk in response.iter_bytes(_CHUNK_BYTES):
                out.write(chunk)
        with tarfile.open(tar) as archive:
            members = {member.name: member for member in archive if member.isfile()}
            for proof in manifest["files"]:
                _extract(archive, members, proof, folder)
    except (httpx.TransportError, tarfile.TarError) as error:
        raise DownloadCorrupt(f"The archive broke off ({error or type(error).__name__}). Try again.") from error


def _extract(
    archive: tarfile.TarFile, members: dict[str, tarfile.TarInfo], proof: dict[str, Any], folder: Path
) -> None:
    member = _member(members, proof["name"])
    content = archive.extractfile(member) if member else None
    if content is None:
        raise DownloadCorrupt(f"The archive lacks {proof['name']}.")
    path = _inside(folder, proof["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    with content, path.open("wb") as out:
        _copy(iter(partial(content.read, _CHUNK_BYTES), b""), out, proof)


def _member(members: dict[str, tarfile.TarInfo], name: str) -> tarfile.TarInfo | None:
    """The archive's member for a manifest's name; the archive may put everything under one top folder."""
    for found, member in members.items():
        if found == name or PurePosixPath(*PurePosixPath(found).parts[1:]) == PurePosixPath(name):
            return member
    return None


def _copy(chunks: Iterator[bytes], out: IO[bytes], proof: dict[str, Any]) -> None:
    """Write chunks and check length and hash on the way; raises DownloadCorrupt as soon as they cannot match."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        size += len(chunk)
        if size > proof["size"]:
            break
        digest.update(chunk)
        out.write(chunk)
    if size != proof["size"]:
        raise DownloadCorrupt(f"{proof['name']}: {size} bytes arrived, the manifest promises {proof['size']}.")
    if digest.hexdigest() != proof["sha256"]:
        raise DownloadCorrupt(
            f"{proof['name']}: sha256 is {digest.hexdigest()}, the manifest promises {proof['sha256']}."
        )


def _inside(folder: Path, name: str) -> Path:
    """The path of a manifest's file under `folder`; a name that leads out of it is refused."""
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise DownloadCorrupt(f"The manifest names a file outside its folder: {name!r}.")
    return folder.joinpath(*parts)


def _without_links(manifest: dict[str, Any]) -> dict[str, Any]:
    files = [{key: value for key, value in proof.items() if key != "url"} for proof in manifest["files"]]
    return manifest | {"files": files}
