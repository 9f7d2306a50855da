"""The child process of a run: a fresh interpreter in its own session, its events, and its end."""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path

from graft_shared.logs import log_event
from graft_worker.device import Device
from graft_worker.protocol import LOG_NAME, SCRATCH_NAME, CheckpointEvent, Event, parse_event

# What a child inherits: enough to find its interpreter, libraries and GPU; no token, no address of a neighbour.
_INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "PYTHONPATH", "OMP_NUM_THREADS", "TZ", "VIRTUAL_ENV")
_INHERITED_PREFIXES = ("CUDA_", "NVIDIA_", "TORCH", "PYTORCH_", "GRAFT_CRASH_", "GRAFT_MEMORY_")
# What transformers and bitsandbytes say of their own insides, by its beginning; users can do nothing about it.
_HARMLESS = (
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning",
    "ignore:Paged optimizers are not supported on CPU:UserWarning",
    "ignore:You passed `quantization_config` or equivalent parameters to `from_pretrained`:UserWarning",
)

logger = logging.getLogger(__name__)


def start_child(module: str, workdir: Path, *, device: Device, cache_dir: Path) -> Child:
    """Start `python -m <module> WORKDIR`."""
    with (workdir / LOG_NAME).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, str(workdir)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            cwd=workdir,
            env=child_environment(workdir, device=device, cache_dir=cache_dir),
            start_new_session=True,
        )
    return heard(process)


def heard(process: subprocess.Popen[bytes]) -> Child:
    """Listen to a process that works at a job; one that cannot be listened to is ended, or nobody would stop it."""
    try:
        return Child(process)
    except BaseException:
        process.kill()
        process.wait()
        raise


class Child:
    """A process that works at a job, seen by its supervisor."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._events: queue.Queue[Event | None] = queue.Queue()
        self._saved_step = 0  # of the newest checkpoint that it told of
        self._process = process
        in_context = copy_context().run  # what it logs is about the same run
        self._reader = threading.Thread(target=in_context, args=(self._read,), name="child-events", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The child's process id; also its process group."""
        return self._process.pid

    def events(self, timeout: float) -> Iterator[Event | None]:
        """Yield events as they come, None whenever `timeout` seconds passed without one; ends when the child has."""
        while True:
            try:
                event = self._events.get(timeout=timeout)
            except queue.Empty:
                yield None
                continue
            if event is None:
                return
            yield event

    def has_saved_after(self, step: int) -> bool:
        """Whether it has told of a checkpoint of a later step."""
        return self._saved_step > step

    def terminate(self) -> None:
        """Ask the child to save what it has and leave."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End the child and all that it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def wait(self) -> int:
        """Return the exit code, or the negative signal number; leaves nothing of its group behind."""
        code = self._process.wait()
        self.kill()
        self._reader.join()
        return code

    def _read(self) -> None:
        stream = self._process.stdout
        if stream is not None:
            for line in stream:
                try:
                    event = parse_event(line.decode())
                except ValueError:
                    log_event(logger, "child_line_not_understood", level=logging.WARNING, line=repr(line[:200]))
                    continue
                if isinstance(event, CheckpointEvent):
                    self._saved_step = event.step
                self._events.put(event)
        self._events.put(None)


def child_environment(home: Path, *, device: Device, cache_dir: Path) -> dict[str, str]:
    """The environment of a child: its own home, its own device, no network for the hub's libraries."""
    scratch = home / SCRATCH_NAME
    scratch.mkdir(exist_ok=True)
    cache_dir.mkdir(parents=True, exist_ok=True)
    inherited = {
        name: value for name, value in os.environ.items() if name in _INHERITED or name.startswith(_INHERITED_PREFIXES)
    }
    return {
        **inherited,
        "HOME": str(home),
        "TMPDIR": str(scratch),
        "CUDA_VISIBLE_DEVICES": device.visible_devices,
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' as well
        "TQDM_DISABLE": "1",
        "PYTHONWARNINGS": ",".join(_HARMLESS),
        "TOKENIZERS_PARALLELISM": "true",
        "TORCHINDUCTOR_CACHE_DIR": str(cache_dir / "inductor"),
        "TRITON_CACHE_DIR": str(cache_dir / "triton"),
        # Threads that spin while they wait starve each other where children share cores: 40 times slower, measured.
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONUNBUFFERED": "1",
        "GRAFT_PARENT_PID": str(os.getpid()),
    }
