"""A hub that is away, in each of the ways in which one can be: who fetches from it is told within seconds."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory, get_session, set_client_factory

from graft_shared.clock import boottime
from graft_shared.errors import BaseModelUnavailable, UnknownBaseModel
from graft_worker import celery_app, hub
from graft_worker.device import NoSuchDevice
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from tests.fakes.loopback import OnLoopback
from tests.waiting import free_port

COMMIT = "c0ffee" * 6 + "c0ff"
AWAY = ["refuses", "swallows", "is silent", "is busy", "is out of order"]  # that `a_hub_that` knows


class Answering(OnLoopback):
    """Answers whatever is asked with one status; in a minute, it says, it may be otherwise."""

    def __init__(self, status: int) -> None:
        self.status = status

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        status = self.status

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(status)
                self.send_header("Retry-After", "60")
                self.send_header("X-Error-Code", "RepoNotFound" if status == 404 else "")
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                """Say nothing."""

        return Handler


@contextmanager
def a_hub_that(does: str) -> Iterator[str]:
    """The address of a hub that refuses connections, leaves who asks for one waiting, is silent, or answers."""
    with ExitStack() as kept:
        match does:
            case "refuses":
                yield f"http://127.0.0.1:{free_port()}"
            case "swallows" | "is silent":
                server = kept.enter_context(
                    socket.create_server(("127.0.0.1", 0), backlog=0 if does == "swallows" else 9)
                )
                while does == "swallows":  # until the kernel keeps no more of them, and answers none
                    try:
                        kept.enter_context(socket.create_connection(server.getsockname(), timeout=0.2))
                    except TimeoutError:
                        break
                yield f"http://127.0.0.1:{server.getsockname()[1]}"
            case _:
                yield kept.enter_context(
                    Answering({"is busy": 429, "is out of order": 503, "knows none": 404}[does])
                ).url


def bases_of(folder: Path) -> BaseModels:
    cache = HostCache(folder=folder / "cache", max_bytes=10**9)
    return BaseModels(registered_dir=folder / "models", cache=cache, hub_token=None)


@pytest.fixture
def bounded(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The requests of this process, as those of a worker are once it has begun; this one gets no further."""

    def find_none(*_: object) -> None:
        raise NoSuchDevice("there is none")

    monkeypatch.setattr(hub, "SILENCE_SECONDS", 0.2)
    monkeypatch.setattr(celery_app, "configure_logging", str)
    monkeypatch.setattr(celery_app, "this_device", find_none)
    with pytest.raises(SystemExit, match="there is none"):
        celery_app.main()
    yield
    set_client_factory(default_client_factory)


@pytest.mark.parametrize("revision", ["main", COMMIT])
@pytest.mark.parametrize("does", AWAY)
def test_a_fetch_from_a_hub_that_is_away_is_given_up_within_seconds(
    does: str, revision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
    began = boottime()
    with a_hub_that(does) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with (
            pytest.raises(BaseModelUnavailable, match="for 'org/base'"),
            bases_of(tmp_path).tokenizer("org/base", revision),
        ):
            raise AssertionError("unreachable")
    assert boottime() - began < 20  # the library alone takes 29 where connections are refused


@pytest.mark.parametrize("does", AWAY)
def test_what_was_fetched_before_serves_while_the_hub_is_away(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "ANSWER_SECONDS", 0.5)
    models = bases_of(tmp_path)
    snapshot = models.cache.hub_dir / "models--org--base" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    with a_hub_that(does) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with models.tokenizer("org/base", COMMIT) as tokenizer:
            assert tokenizer.path == snapshot


def test_a_hub_that_refuses_is_not_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with a_hub_that("knows none") as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        with pytest.raises(UnknownBaseModel), bases_of(tmp_path).tokenizer("org/base", "main"):
            raise AssertionError("unreachable")


@pytest.mark.usefixtures("bounded")
def test_a_hub_that_falls_silent_later_is_not_waited_for_without_end() -> None:
    with a_hub_that("is silent") as address, pytest.raises(hub.HubHTTPError, match="timed out"):
        get_session().get(address, timeout=None)


@pytest.mark.usefixtures("bounded")
@pytest.mark.parametrize("does", ["is busy", "is out of order"])
def test_a_hub_that_says_when_to_come_back_is_not_slept_for(
    does: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client would: each try to list the files of a commit waits for a minute, and there are six."""
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", pytest.fail)
    with a_hub_that(does) as address, pytest.raises((HfHubHTTPError, OSError), match="Error"):
        snapshot_download("org/base", revision=COMMIT, cache_dir=tmp_path, endpoint=address)
