"""How a run that raised has ended: the failure that its supervisor hears, and the exit code."""

from __future__ import annotations

import traceback
from typing import Any

import torch

from graft_shared.errors import InvalidParameter, UnsupportedBaseModel
from graft_shared.jobs import FailureReason
from graft_worker.disk import FULL_DISK_MESSAGE, is_of_full_disk
from graft_worker.protocol import ExitCode, FailureEvent
from graft_worker.training.checkpoint import CheckpointMismatch
from graft_worker.training.figures import NotFinite
from graft_worker.training.proof import NotProven
from graft_worker.training.recipe import NothingToLearn

_HOST_FULL_WORDS = "can't allocate memory"  # torch's CPU allocator raises a plain RuntimeError
_GPU_FULL_WORDS = "out of memory"  # a CUDA error outside the caching allocator: no room for a context or a paged buffer


def ending_of(error: Exception, plan: dict[str, Any]) -> tuple[ExitCode, FailureEvent]:
    """Name what went wrong."""
    words = str(error)
    match error:
        case NotFinite():
            return ExitCode.USER_ERROR, _failure(FailureReason.LOSS_NOT_FINITE, words)
        case NothingToLearn():
            message = "The prepared data holds no token to learn"
            return ExitCode.USER_ERROR, _failure(FailureReason.NO_TRAINABLE_TOKENS, message, param="dataset")
        case InvalidParameter():
            return ExitCode.USER_ERROR, _failure(FailureReason.INVALID_PARAMETER, words, param=error.param)
        case UnsupportedBaseModel():
            return ExitCode.USER_ERROR, _failure(FailureReason.UNSUPPORTED_BASE_MODEL, words, param="base_model")
        case NotProven():
            return ExitCode.CRASHED, _failure(FailureReason.ADAPTER_NOT_PROVEN, words)
        case CheckpointMismatch():
            return ExitCode.CRASHED, _failure(FailureReason.ARTIFACT_CORRUPT, words)
    if _is_gpu_full(error):
        message = f"The GPU ran out of memory: {words.splitlines()[0]}"
        failure = _failure(FailureReason.CUDA_OUT_OF_MEMORY, message, facts={"plan": plan, **_gpu_facts()})
        return ExitCode.CUDA_OUT_OF_MEMORY, failure
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _HOST_FULL_WORDS in words):
        return ExitCode.CRASHED, _failure(FailureReason.HOST_OUT_OF_MEMORY, "The machine ran out of memory")
    if is_of_full_disk(error):
        return ExitCode.CRASHED, _failure(FailureReason.DISK_FULL, FULL_DISK_MESSAGE)
    last = traceback.format_exception_only(error)[-1].strip()
    return ExitCode.CRASHED, _failure(FailureReason.CRASH, f"Training crashed: {last}")


def _failure(reason: FailureReason, message: str, **more: Any) -> FailureEvent:
    return FailureEvent(reason=reason, message=message[:1].upper() + message[1:], **more)


def _is_gpu_full(error: Exception) -> bool:
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and "CUDA" in str(error) and _GPU_FULL_WORDS in str(error)


def _gpu_facts() -> dict[str, int]:
    return {
        "allocated_peak_bytes": torch.cuda.max_memory_allocated(),
        "reserved_peak_bytes": torch.cuda.max_memory_reserved(),
    }
