"""What must be so of a base model's folder before anything in it is read, whoever put it there."""

from __future__ import annotations

import os
from pathlib import Path

from graft_shared.errors import UnsupportedBaseModel

LENGTH_BYTES = 8  # at the beginning of a safetensors file: how long its header is
LONGEST_HEADER_BYTES = 100_000_000  # as the safetensors library has it


def check_folder(base_model: str, folder: Path) -> None:
    """Look at names, links and the first bytes of the weights.

    Raises:
        UnsupportedBaseModel: It has no safetensors, and a pickle is never loaded; a file of them cannot be read, or
            has a header longer than itself; or one of the folder's files is a link to somewhere else.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise UnsupportedBaseModel(base_model=base_model, reason="it has no .safetensors weights")
    for path in sorted(folder.iterdir()):
        if path.is_symlink() and not _stays_inside(path, folder.resolve()):
            reason = f"its '{path.name}' is a link that leads out of its folder; put the file itself there"
            raise UnsupportedBaseModel(base_model=base_model, reason=reason)
    for path in weights:
        _check_header(base_model, path)


def _stays_inside(link: Path, folder: Path) -> bool:
    """Whether a link leads to a file of its folder; in the hub's cache, to one of the blobs of its repository."""
    roots = [folder, folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [folder]
    target = Path(os.path.realpath(link))  # Path.resolve() raises over links in a circle
    return any(target.is_relative_to(root) for root in roots)


def _check_header(base_model: str, path: Path) -> None:
    try:
        with path.open("rb") as source:
            length = int.from_bytes(source.read(LENGTH_BYTES), "little")
        size = path.stat().st_size
    except OSError as error:
        reason = f"'{path.name}' cannot be read: {error.strerror}"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason) from error
    most = min(size - LENGTH_BYTES, LONGEST_HEADER_BYTES)
    if length > most:
        reason = f"'{path.name}' is no safetensors file: it says that its header has {length} bytes, of {most} at most"
        raise UnsupportedBaseModel(base_model=base_model, reason=reason)
