"""Webhooks: signed so that `openai` and Standard Webhooks know them, and never sent into the operator's network."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import pytest
import standardwebhooks
from sqlalchemy import update

from graft_api.errors import TooManyWebhookTests
from graft_api.webhooks.trials import MOST_AT_ONCE, Trials
from graft_shared import webhooks as module
from graft_shared.store import Outbox
from graft_shared.store.engine import now
from graft_shared.store.outbox import PAUSES
from graft_shared.store.tables import webhooks as table
from graft_shared.webhooks import NotTaken, Postman, TargetRefused, WebhookSender, signing_secret
from tests.api_service import ApiService, error_of, make_service

ROOT = "operators-secret"
BODY = '{"a": 1}'


class Receiver(ThreadingHTTPServer):
    """Remembers what it was sent, and answers as it was told."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.status, self.got = 200, list[tuple[dict[str, str], str]]()
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook?from=graft"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.server.got.append(({name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(self.server.status)
        if self.server.status == 302:
            self.send_header("location", self.server.url)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    server = Receiver()
    yield server
    server.shutdown()
    server.server_close()


def send(url: str, *inside: str) -> int:
    return Postman(root=ROOT, inside=inside).deliver(id="evt_1", tenant="red", url=url, body=BODY)


def test_a_receiver_knows_by_the_signature_whose_it_is(receiver: Receiver) -> None:
    assert send(receiver.url + "/größe?a=ü", "127.0.0.1") == 200
    ((headers, body),) = receiver.got
    assert standardwebhooks.Webhook(signing_secret(ROOT, "red")).verify(body, headers) == {"a": 1}
    assert headers["webhook-id"] == "evt_1"
    for secret in (signing_secret(ROOT, "blue"), signing_secret("another", "red")):
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(secret).verify(body, headers)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://10.1.2.3/hook",
        "https://192.168.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://100.64.0.1/",
        "https://0.0.0.0/",
        "https://[::ffff:127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[fd00::1]/",
        "https://[fec0::1]/",
        "https://192.88.99.1/",
        "https://example.com/\x7f",
        "https://224.0.0.1/",
        "http://example.com/",
        "ftp://example.com/",
        "https://",
        "https://name:password@example.com/",
        "https://example.com:99999/",
        "https://example.com:0/",
    ],
)
def test_a_url_that_cannot_be_sent_to_is_refused_before_anything_is_looked_up(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(TargetRefused):
        Postman(root=ROOT).check(url)


def test_a_name_that_stands_for_a_private_address_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 443))]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(TargetRefused, match="no public address"):
        send("https://localtest.example/")


def test_one_private_address_among_public_ones_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 443)) for address in ("93.184.215.14", "10.0.0.1")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(TargetRefused, match=r"10\.0\.0\.1"):
        send("https://rebound.example/")


def test_the_connection_goes_to_the_address_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, connected = list[str](), list[tuple[str, int]]()

    def resolve(host: str, *_: Any, **__: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("93.184.215.14", 443))]

    def connect(address: tuple[str, int], _timeout: float) -> Any:
        connected.append(address)
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    with pytest.raises(NotTaken):
        send("https://rebound.example/")
    assert (asked, connected) == (["rebound.example"], [("93.184.215.14", 443)])


def test_a_name_that_turns_private_between_two_tries_is_not_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, connected = iter(["93.184.215.14", "127.0.0.1", "93.184.215.14"]), list[str]()

    def resolve(*_: Any, **__: Any) -> list[Any]:
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), 443))]

    def connect(address: tuple[str, int], _timeout: float) -> Any:
        connected.append(address[0])
        raise ConnectionRefusedError

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    monkeypatch.setattr(socket, "create_connection", connect)
    for outcome in (NotTaken, TargetRefused, NotTaken):
        with pytest.raises(outcome):
            send("https://rebound.example/")
    assert connected == ["93.184.215.14"] * 2


@pytest.mark.parametrize("url", ["https://example.com/", "https://example.com:8443/x", "https://b\u00fccher.example/"])
def test_a_public_name_may_be_sent_to(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: pytest.fail("looked up"))
    assert Postman(root=ROOT).check(url).hostname


@pytest.mark.parametrize("host", [".example.com", "a..example.com", "x" * 64 + ".example.com"])
def test_a_host_that_cannot_be_looked_up_ends_its_delivery_and_no_sender(host: str) -> None:
    with pytest.raises(TargetRefused):
        send(f"https://{host}/")
    with pytest.raises(NotTaken):
        send(f"http://{host}/", "*")


@pytest.mark.parametrize("status", [302, 404, 500])
def test_what_is_not_taken_is_not_followed_elsewhere(receiver: Receiver, status: int) -> None:
    receiver.status = status
    with pytest.raises(NotTaken, match=str(status)):
        send(receiver.url, "127.0.0.1")
    assert len(receiver.got) == 1


def test_a_receiver_that_drips_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WHOLE_SECONDS", 1.0)
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        peer, _ = listener.accept()
        try:
            while True:
                peer.sendall(b"H")
                time.sleep(0.1)
        except OSError:
            return

    threading.Thread(target=drip, daemon=True).start()
    began = time.monotonic()
    with pytest.raises(NotTaken):
        send(f"http://127.0.0.1:{listener.getsockname()[1]}/", "127.*")
    assert time.monotonic() - began < 5
    listener.close()


@pytest.fixture
def api(tmp_path: Path, template: Path) -> Iterator[ApiService]:
    service = make_service(tmp_path, template, webhook_secret=ROOT, webhook_hosts="127.0.0.1")
    yield service
    service.database.close()


def sender_of(api: ApiService) -> WebhookSender:
    return WebhookSender(outbox=Outbox(api.database), postman=Postman(root=ROOT, inside=["127.0.0.1"]))


def cancelled(api: ApiService, url: str) -> str:
    job_id = str(api.new_job(webhook_url=url)["id"])
    assert api.http.post(f"/jobs/{job_id}/cancel").json()["status"] == "cancelled"
    return job_id


def due_now(api: ApiService) -> None:
    with api.database.writing() as connection:
        connection.execute(update(table).where(table.c.next_try_at.is_not(None)).values(next_try_at=now()))


def test_a_jobs_end_is_told_once_and_signed(api: ApiService, receiver: Receiver) -> None:
    job_id = cancelled(api, receiver.url)
    assert sender_of(api).send_due() == 1
    assert sender_of(api).send_due() == 0
    ((headers, body),) = receiver.got
    secret = api.http.get("/webhooks/secret").json()["secret"]
    told = standardwebhooks.Webhook(secret).verify(body, headers)
    assert (told["type"], told["data"]) == ("fine_tuning.job.cancelled", {"id": job_id})
    event = openai.OpenAI(api_key="unused").webhooks.unwrap(body, headers, secret=secret)
    assert (event.type, event.data.id) == ("fine_tuning.job.cancelled", job_id)
    (known,) = api.http.get(f"/jobs/{job_id}/webhooks").json()["data"]
    assert known["id"] == headers["webhook-id"] == told["id"]
    assert (known["tries"], known["next_try_at"], known["error"]) == (1, None, None)
    assert known["delivered_at"] is not None


def test_what_is_not_taken_is_sent_again_under_the_same_id_and_given_up_in_the_end(
    api: ApiService, receiver: Receiver
) -> None:
    receiver.status = 503
    job_id = cancelled(api, receiver.url)
    for tries in range(1, len(PAUSES) + 2):
        assert sender_of(api).send_due() == 1
        assert sender_of(api).send_due() == 0, "it waits"
        (known,) = api.http.get(f"/jobs/{job_id}/webhooks").json()["data"]
        assert (known["tries"], known["delivered_at"], known["error"]) == (tries, None, "it was answered 503")
        assert (known["next_try_at"] is None) == (tries == len(PAUSES) + 1)
        due_now(api)
    assert sender_of(api).send_due() == 0
    assert len({headers["webhook-id"] for headers, _ in receiver.got}) == 1


def test_what_a_sender_died_over_is_sent_by_another(api: ApiService, receiver: Receiver) -> None:
    cancelled(api, receiver.url)
    assert len(Outbox(api.database).take(limit=5)) == 1, "and nothing more is heard of this sender"
    assert sender_of(api).send_due() == 0
    due_now(api)
    assert sender_of(api).send_due() == 1
    assert len(receiver.got) == 1


def test_a_late_sender_does_not_undo_what_another_has_delivered(api: ApiService, receiver: Receiver) -> None:
    job_id = cancelled(api, receiver.url)
    outbox = Outbox(api.database)
    (late,) = outbox.take(limit=5)
    due_now(api)
    sender_of(api).send_due()
    outbox.failed(late, "too slow")
    (known,) = api.http.get(f"/jobs/{job_id}/webhooks").json()["data"]
    assert known["delivered_at"] is not None
    assert known["next_try_at"] is None


def test_jobs_without_a_webhook_leave_nothing_in_the_outbox(api: ApiService) -> None:
    job_id = str(api.new_job()["id"])
    api.http.post(f"/jobs/{job_id}/cancel")
    assert api.http.get(f"/jobs/{job_id}/webhooks").json()["data"] == []
    assert sender_of(api).send_due() == 0


def test_a_webhook_that_cannot_be_sent_is_refused_with_the_job(api: ApiService) -> None:
    answer = api.post(api.spec(webhook_url="https://169.254.169.254/latest"))
    error = error_of(answer, 422)
    assert (error["code"], error["param"]) == ("invalid_parameter", "webhook_url")
    assert "no public address" in error["message"]


def test_a_service_without_a_secret_says_so(tmp_path: Path, template: Path) -> None:
    service = make_service(tmp_path, template)
    error = error_of(service.post(service.spec(webhook_url="https://example.com/")), 422)
    assert "GRAFT_WEBHOOK_SECRET" in error["message"]
    assert "GRAFT_WEBHOOK_SECRET" in error_of(service.http.get("/webhooks/secret"), 404)["message"]
    service.database.close()


def test_receivers_that_never_answer_hold_few_threads_and_one_of_each_tenant() -> None:
    trials = Trials()
    with ExitStack() as under_way:
        under_way.enter_context(trials.one_of("a"))
        with pytest.raises(TooManyWebhookTests):
            under_way.enter_context(trials.one_of("a"))
        for number in range(MOST_AT_ONCE - 1):
            under_way.enter_context(trials.one_of(f"b{number}"))
        with pytest.raises(TooManyWebhookTests):
            under_way.enter_context(trials.one_of("c"))
    with trials.one_of("c"):
        pass


def test_a_try_beside_another_of_the_tenant_is_told_when_to_come_again(api: ApiService, receiver: Receiver) -> None:
    here = api.http.app.state.neighbours
    with here.trials.one_of("default"):
        answer = api.http.post("/webhooks/test", json={"url": receiver.url})
    assert error_of(answer, 429)["code"] == "too_many_webhook_tests" and answer.headers["retry-after"] == "10"
    assert api.http.post("/webhooks/test", json={"url": receiver.url}).json()["delivered"] is True


def test_a_try_tells_what_came_of_it(api: ApiService, receiver: Receiver) -> None:
    assert api.http.post("/webhooks/test", json={"url": receiver.url}).json() == {"delivered": True, "reason": None}
    ((headers, body),) = receiver.got
    assert json.loads(body)["type"] == "graft.webhook.test"
    assert headers["webhook-id"] == json.loads(body)["id"]
    receiver.status = 500
    answer = api.http.post("/webhooks/test", json={"url": receiver.url}).json()
    assert answer == {"delivered": False, "reason": "it was answered 500"}
    answer = api.http.post("/webhooks/test", json={"url": "https://10.0.0.1/"}).json()
    assert answer["delivered"] is False
    assert error_of(api.http.post("/webhooks/test", json={"uri": "x"}), 400)["code"] == "unknown_parameter"
    assert error_of(api.http.post("/webhooks/test", json={"url": 5}), 422)["param"] == "url"
