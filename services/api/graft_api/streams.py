"""Objects of the bucket on their way to a client, chunk by chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from graft_shared.buckets.base import CHUNK_BYTES


def chunks_of(source: BinaryIO) -> Iterator[bytes]:
    """Read an opened object to its end and close it."""
    with source:
        while chunk := source.read(CHUNK_BYTES):
            yield chunk
