"""A TCP proxy on loopback that misbehaves when told: between our processes and Redis, PostgreSQL or an S3 server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections.abc import Coroutine
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from tests.waiting import free_port

CHUNK_BYTES = 64 * 1024
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of no time: closing sends a RST


class Mode(StrEnum):
    """What the proxy does."""

    PASS = "pass"
    REFUSE = "refuse"  # connections are reset and nobody listens
    BLACK_HOLE = "black_hole"  # connections are accepted, and nothing passes; what was sent passes when it ends
    HALF_OPEN = "half_open"  # connections of before neither answer nor end, ever; new ones pass
    DELAY = "delay"  # all that is sent passes later


@dataclass
class FaultProxy:
    """Passes connections on to a port of loopback, from a thread of its own.

    Args:
        target_port: Where connections go.
        delay_seconds: How late a chunk passes in `Mode.DELAY`.
    """

    target_port: int
    port: int = field(default_factory=free_port)
    delay_seconds: float = 0.5
    mode: Mode = Mode.PASS
    accepted: int = 0
    tripped: threading.Event = field(default_factory=threading.Event)
    _trap: tuple[bytes, Mode] | None = None
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)
    _thread: threading.Thread | None = None
    _server: asyncio.Server | None = None
    _links: set[_Link] = field(default_factory=set)
    _passing: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> FaultProxy:
        """Listen."""
        self._thread = threading.Thread(target=self._loop.run_forever, name="faultproxy", daemon=True)
        self._thread.start()
        self._do(self._enter(Mode.PASS))
        return self

    def stop(self) -> None:
        """End all connections, and the thread."""
        if self._thread is not None:
            self._do(self._close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()
            self._thread = None

    def switch(self, mode: Mode) -> None:
        """Do this from now on."""
        self._do(self._enter(mode))

    def trap(self, words: bytes, mode: Mode) -> None:
        """Change to `mode`, and set `tripped`, as soon as a client sends these words; they do not arrive."""
        self.tripped.clear()
        self._trap = (words, mode)

    def _do(self, work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(timeout=10)

    async def _enter(self, mode: Mode) -> None:
        self.mode = mode
        if mode is Mode.BLACK_HOLE:
            self._passing.clear()
        else:
            self._passing.set()
        if mode is Mode.HALF_OPEN:
            for link in self._links:
                link.forgotten = True
        if mode is Mode.REFUSE:
            await self._close()
        elif self._server is None:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None
        here = asyncio.current_task()
        links, self._links = self._links, set()
        for link in links:
            link.reset()
        tasks = [task for link in links if (task := link.task) is not None and task is not here]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link([writer], asyncio.current_task())
        self._links.add(link)
        try:
            await self._passing.wait()
            there_reader, there_writer = await asyncio.open_connection("127.0.0.1", self.target_port)
            link.writers.append(there_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pump(link, reader, there_writer, is_client=True))
                both.create_task(self._pump(link, there_reader, writer, is_client=False))
        except (OSError, ExceptionGroup):
            link.reset()
        except asyncio.CancelledError:
            pass  # reset by whoever cancelled
        finally:
            self._links.discard(link)
            for open_writer in link.writers:
                open_writer.close()

    async def _pump(
        self, link: _Link, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_client: bool
    ) -> None:
        while True:
            chunk = await reader.read(CHUNK_BYTES)
            if is_client and self._trap is not None and self._trap[0] in chunk:
                (_, mode), self._trap = self._trap, None
                self.tripped.set()
                trip = asyncio.ensure_future(self._enter(mode))
                await asyncio.shield(trip)
            if self.mode is Mode.DELAY:
                await asyncio.sleep(self.delay_seconds)
            await self._passing.wait()
            if link.forgotten:
                await asyncio.Event().wait()
            if not chunk:
                with contextlib.suppress(OSError):
                    writer.write_eof()
                return
            writer.write(chunk)
            await writer.drain()


@dataclass(eq=False)
class _Link:
    """A client's connection and ours to the server."""

    writers: list[asyncio.StreamWriter]
    task: asyncio.Task[None] | None
    forgotten: bool = False

    def reset(self) -> None:
        for writer in self.writers:
            link: socket.socket | None = writer.get_extra_info("socket")
            if link is not None:
                with contextlib.suppress(OSError):
                    link.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
            writer.transport.abort()
