"""A family of child processes: started in order, kept alive, stopped in reverse order, none left behind."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

from graft_local.parentage import adopt_orphans, children_of, dies_with_us

Say = Callable[[str, str], None]  # (who, line)

SAME_PRESS_SECONDS = 0.5  # a terminal, make and a process manager may pass one Ctrl-C on several times
_PROBE_SECONDS = 0.1
_TURN_SECONDS = 0.5
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class ChildSpec:
    """One process of the family.

    `wave`: lower ones start first and stop last. `ready`: what must hold before the next wave starts. `once`: it does
    its work and ends; the next wave starts after it. `grace_seconds`: from SIGTERM to SIGKILL.
    """

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    wave: int
    ready: Callable[[], bool] | None = None
    once: bool = False
    grace_seconds: float = 10.0


@dataclass(frozen=True, kw_only=True)
class Policy:
    """When to try again and when to give up."""

    first_pause_seconds: float = 0.5
    longest_pause_seconds: float = 15.0
    fast_death_seconds: float = 30.0
    fast_deaths_in_a_row: int = 5
    ready_seconds: float = 90.0  # a cold disk takes 30 s for the imports alone

    def pause_seconds(self, fast_deaths: int) -> float:
        """How long to wait before the next start, after so many fast deaths in a row."""
        return float(min(self.first_pause_seconds * 2 ** max(fast_deaths - 1, 0), self.longest_pause_seconds))


@dataclass(kw_only=True)
class _Child:
    spec: ChildSpec
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    fast_deaths: int = 0
    start_again_at: float | None = None
    done: bool = False
    unfinished_line: bytes = b""
    output: int = field(default=-1)


class Children:
    """Supervises the family from one thread: `Popen` with `preexec_fn`, and parent-death signals, need that."""

    def __init__(self, specs: Iterable[ChildSpec], *, say: Say, policy: Policy | None = None) -> None:
        self._children = [_Child(spec=spec) for spec in sorted(specs, key=lambda spec: spec.wave)]
        self._say = say
        self._policy = policy or Policy()
        self._selector = selectors.DefaultSelector()
        self._exit_code: int | None = None
        self._told_at: float | None = None
        self._in_a_hurry = False

    def run(self, on_ready: Callable[[], None]) -> int:
        """Start all, call `on_ready`, keep all alive; return 0 after a signal, 1 when a child cannot be kept alive.

        The calling process must have no other children: at the end every descendant is killed.
        """
        adopt_orphans()
        with self._signals():
            try:
                self._start_all()
                if self._exit_code is None:
                    on_ready()
                while self._exit_code is None:
                    self._turn()
            finally:
                self._stop_all()
        return self._exit_code or 0

    def _start_all(self) -> None:
        for wave in sorted({child.spec.wave for child in self._children}):
            group = [child for child in self._children if child.spec.wave == wave]
            for child in group:
                self._start(child)
            self._await_readiness(group)
            if self._exit_code is not None:
                return

    def _await_readiness(self, group: list[_Child]) -> None:
        deadline = time.monotonic() + self._policy.ready_seconds
        waiting = list(group)
        while self._exit_code is None and (waiting := [child for child in waiting if not _is_ready(child)]):
            if time.monotonic() > deadline:
                names = ", ".join(child.spec.name for child in waiting)
                self._give_up(
                    f"{names} did not become ready within {self._policy.ready_seconds:g} s; see the log above"
                )
                return
            self._turn(_PROBE_SECONDS)

    def _start(self, child: _Child) -> None:
        child.process = subprocess.Popen(
            child.spec.command,
            env=dict(child.spec.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # the terminal's Ctrl-C reaches only us
            preexec_fn=dies_with_us(),
        )
        child.started_at, child.start_again_at = time.monotonic(), None
        stream = child.process.stdout
        if stream is not None:
            child.output = stream.fileno()
            os.set_blocking(child.output, False)
            self._selector.register(child.output, selectors.EVENT_READ, child)

    def _turn(self, longest: float = _TURN_SECONDS) -> None:
        """Pass on output, notice deaths, start again what is due."""
        due = [child.start_again_at for child in self._children if child.start_again_at is not None]
        until_due = min(due) - time.monotonic() if due and self._exit_code is None else longest
        for key, _ in self._selector.select(min(max(until_due, 0.0), longest)):
            if isinstance(key.data, _Child):
                self._pass_on_output(key.data)
            else:
                _drain(key.fd)
        self._notice_deaths()
        if self._exit_code is None:
            for child in self._children:
                if child.start_again_at is not None and child.start_again_at <= time.monotonic():
                    self._start(child)

    def _notice_deaths(self) -> None:
        """Reap every process that has ended, our own children and adopted orphans."""
        by_pid = {child.process.pid: child for child in self._children if child.process is not None}
        while (dead := _next_dead()) is not None:
            child = by_pid.pop(dead, None)
            if child is None:
                os.waitpid(dead, 0)
                continue
            code = self._bury(child)
            if self._exit_code is None:
                self._decide_after_death(child, code)

    def _bury(self, child: _Child) -> int:
        """Take the exit code of a dead child; what it started in its session goes with it."""
        process = child.process
        if process is None:
            raise AssertionError("only a started child can die")
        _signal_group(process.pid, signal.SIGKILL)  # before reaping: until then nobody else can get this number
        code = process.wait()
        self._pass_on_output(child)
        if child.output >= 0:
            self._close_output(child)
        child.process = None
        return code

    def _decide_after_death(self, child: _Child, code: int) -> None:
        name = child.spec.name
        if child.spec.once:
            child.done = code == 0
            if code != 0:
                self._give_up(f"{name} failed ({_how(code)}); see the log above")
            return
        lived = time.monotonic() - child.started_at
        child.fast_deaths = child.fast_deaths + 1 if lived < self._policy.fast_death_seconds else 0
        if child.fast_deaths >= self._policy.fast_deaths_in_a_row:
            self._give_up(f"{name} ended {child.fast_deaths} times in a row soon after its start ({_how(code)})")
            return
        pause = self._policy.pause_seconds(child.fast_deaths)
        child.start_again_at = time.monotonic() + pause
        self._say("graft", f"{name} ended unexpectedly ({_how(code)}); starting it again in {pause:g} s")

    def _give_up(self, reason: str) -> None:
        self._say("graft", f"{reason}. Stopping everything.")
        self._exit_code = 1

    def _stop_all(self) -> None:
        if self._exit_code is None:
            self._exit_code = 1  # an exception is on its way: start nothing again
        for wave in sorted({child.spec.wave for child in self._children}, reverse=True):
            self._stop([child for child in self._children if child.spec.wave == wave and child.process is not None])
        while orphans := children_of(os.getpid()):
            for pid in orphans:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self._turn(_PROBE_SECONDS)

    def _stop(self, group: list[_Child]) -> None:
        """Ask, wait as long as each may take, then kill."""
        asked_at = time.monotonic()
        for child in group:
            if child.process is not None:
                self._say("graft", f"stopping {child.spec.name}")
                os.kill(child.process.pid, signal.SIGTERM)
        while alive := [child for child in group if child.process is not None]:
            for child in alive:
                overdue = time.monotonic() - asked_at > child.spec.grace_seconds
                if child.process is not None and (overdue or self._in_a_hurry):
                    _signal_group(child.process.pid, signal.SIGKILL)
            self._turn(_PROBE_SECONDS)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turn signals into flags, and wake the selector when one comes."""
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        os.set_blocking(writer, False)
        before: dict[signal.Signals, Any] = {}
        for number in (*_STOP_SIGNALS, signal.SIGCHLD):
            if signal.getsignal(number) is not signal.SIG_IGN or number == signal.SIGCHLD:  # nohup ignores SIGHUP
                before[number] = signal.signal(number, self._on_signal)
        old_fd = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        self._selector.register(reader, selectors.EVENT_READ, None)
        try:
            yield
        finally:
            signal.set_wakeup_fd(old_fd)
            for caught, handler in before.items():
                signal.signal(caught, handler)
            self._selector.unregister(reader)
            os.close(reader)
            os.close(writer)

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGCHLD:
            return
        now = time.monotonic()
        if self._told_at is None:
            self._told_at = now
            self._in_a_hurry = self._exit_code is not None
            self._exit_code = self._exit_code if self._exit_code is not None else 0
        elif now - self._told_at > SAME_PRESS_SECONDS:
            self._in_a_hurry = True

    def _pass_on_output(self, child: _Child) -> None:
        while child.output >= 0:
            try:
                piece = os.read(child.output, 1 << 16)
            except BlockingIOError:
                return
            *lines, child.unfinished_line = (child.unfinished_line + piece).split(b"\n")
            for line in lines:
                self._say(child.spec.name, line.decode(errors="replace"))
            if not piece:
                self._close_output(child)

    def _close_output(self, child: _Child) -> None:
        if child.unfinished_line:
            self._say(child.spec.name, child.unfinished_line.decode(errors="replace"))
        child.unfinished_line = b""
        self._selector.unregister(child.output)
        child.output = -1
        if child.process is not None and child.process.stdout is not None:
            child.process.stdout.close()


def _is_ready(child: _Child) -> bool:
    if child.spec.once:
        return child.done
    return child.process is not None and (child.spec.ready is None or child.spec.ready())


def _next_dead() -> int | None:
    """The number of some ended child, left unreaped; None while all live or there are none."""
    try:
        result = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return None
    return result.si_pid if result is not None else None


def _signal_group(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _drain(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        while os.read(fd, 4096):
            pass


def _how(code: int) -> str:
    return f"exit code {code}" if code >= 0 else f"killed by {signal.Signals(-code).name}"
