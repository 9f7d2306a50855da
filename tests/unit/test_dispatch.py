"""The doorbell where nobody listens, or somebody else does."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from kombu.exceptions import OperationalError

from graft_client.findings import Verdict
from graft_local.doctor import neighbours
from graft_shared.dispatch import CeleryDoorbell
from graft_worker.celery_app import build_app
from graft_worker.settings import WorkerSettings
from tests.servers import RedisServer
from tests.tls import tls_before
from tests.waiting import free_port

SOON_SECONDS = 3.0  # half of what kombu's own retries take; it is done within a tenth of a second


def test_a_bell_that_the_broker_refuses_holds_up_nobody() -> None:
    doorbell = CeleryDoorbell(f"redis://127.0.0.1:{free_port()}/0")
    began = time.monotonic()
    assert not doorbell.ring("ftjob-1", "cpu")
    assert time.monotonic() - began < SOON_SECONDS


def _worker_reaches(url: str) -> bool:
    with build_app(WorkerSettings(broker_url=url)).connection_for_read() as connection:
        try:
            connection.ensure_connection(max_retries=1, timeout=2)
        except OperationalError:
            return False
        return True


def _doctor_finds(url: str) -> bool:
    return [finding.verdict for finding in neighbours.broker(Path(), {"GRAFT_BROKER_URL": url})] == [Verdict.GOOD]


@pytest.mark.parametrize(
    "reaches",
    [lambda url: CeleryDoorbell(url).ping(), _worker_reaches, _doctor_finds],
    ids=["bell", "worker", "doctor"],
)
def test_a_password_is_told_only_to_the_broker_whose_certificate_is_known(
    reaches: Callable[[str], bool], redis_server: RedisServer, tmp_path: Path
) -> None:
    with tls_before(redis_server.port, tmp_path) as front:
        url = f"rediss://:secret@127.0.0.1:{front.port}/0"
        assert not reaches(url) and not front.heard
        assert reaches(f"{url}?ssl_ca_certs={front.certificate}")
        assert b"AUTH" in front.heard and b"secret" in front.heard
        for none in ("none", "CERT_NONE"):
            assert reaches(f"{url}?ssl_cert_reqs={none}"), "who says so is not stopped"
