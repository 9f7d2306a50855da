"""What the API holds for a moment."""

from __future__ import annotations

import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import pytest

from graft_api.held import Held
from graft_shared.errors import StoreUnavailable

THREADS = 8


def test_many_that_ask_at_once_read_once_and_again_when_it_is_too_old() -> None:
    reads: list[str] = []

    def read(key: str) -> int:
        reads.append(key)
        time.sleep(0.01)
        return len(reads)

    held = Held[str, int](read, 0.3)
    with ThreadPoolExecutor(THREADS) as threads:
        assert set(threads.map(held.get, ["a"] * THREADS)) == {1}
    assert held.get("b") == 2
    time.sleep(0.35)
    assert held.get("a") == 3
    assert reads == ["a", "b", "a"]


def test_all_that_waited_for_a_read_that_failed_fail_with_it_and_who_comes_later_reads_anew() -> None:
    reads = 0
    all_wait = threading.Barrier(THREADS)

    def read(_key: None) -> str:
        nonlocal reads
        reads += 1
        if reads == 1:
            time.sleep(0.5)
            raise StoreUnavailable(reason="it is away")
        return "back"

    held = Held[None, str](read, 60)

    def ask(_number: int) -> None:
        all_wait.wait()
        with pytest.raises(StoreUnavailable):
            held.get(None)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(ask, range(THREADS)))
    assert reads == 1
    assert held.get(None) == "back"


def test_an_error_keeps_nothing_of_those_that_it_was_told() -> None:
    def read(_key: None) -> str:
        time.sleep(0.2)
        raise RuntimeError("away")

    held = Held[None, str](read, 1)

    def ask(_number: int) -> RuntimeError:
        with pytest.raises(RuntimeError, match="away") as raised:
            held.get(None)
        return raised.value

    with ThreadPoolExecutor(THREADS) as threads:
        errors = list(threads.map(ask, range(THREADS)))
    assert len(set(map(id, errors))) == 1
    frames = traceback.extract_tb(errors[0].__traceback__)
    assert len(frames) < THREADS


def test_one_slow_read_is_not_held_for_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 30.0, 41.0, 41.0, 41.0])  # asked, began and read, twice
    monkeypatch.setattr("graft_api.held.monotonic", clock.__next__)
    values = iter("ab")
    held = Held[None, str](lambda _: next(values), 1)
    assert [held.get(None), held.get(None)] == ["a", "b"]


def test_what_took_long_to_read_is_held_longer() -> None:
    reads = 0

    def read(_key: None) -> int:
        nonlocal reads
        time.sleep(0.1)
        reads += 1
        return reads

    held = Held[None, int](read, 0.01)
    assert held.get(None) == 1
    time.sleep(0.3)
    assert held.get(None) == 1
    held.forget(None)
    assert held.get(None) == 2
