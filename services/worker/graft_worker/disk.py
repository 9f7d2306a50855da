"""A disk without room, as the kernel says it and as libraries pass it on."""

from __future__ import annotations

import errno

FULL_DISK_MESSAGE = "The worker's disk is full"
_ERRNOS = (errno.ENOSPC, errno.EDQUOT)
_WORDS = tuple(f"(os error {number})" for number in _ERRNOS)  # how safetensors and tokenizers, in Rust, say it


def is_of_full_disk(error: BaseException) -> bool:
    """Whether it was raised because nothing more could be written."""
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    return any(words in str(error) for words in _WORDS)
