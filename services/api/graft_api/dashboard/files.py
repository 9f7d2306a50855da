"""The dashboard's files, read once: what is not among them has no address."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "static"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, kw_only=True)
class StaticFile:
    """One file as it is sent; its tag changes with its bytes."""

    content: bytes
    media_type: str
    etag: str


@functools.cache
def static_files() -> Mapping[str, StaticFile]:
    """Every file by its path below the folder."""
    return {path.relative_to(FOLDER).as_posix(): _read(path) for path in FOLDER.rglob("*.*") if path.is_file()}


def _read(path: Path) -> StaticFile:
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()[:32]
    return StaticFile(content=content, media_type=MEDIA_TYPES[path.suffix], etag=f'"{digest}"')
