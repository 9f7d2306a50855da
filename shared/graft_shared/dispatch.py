"""The doorbell: a Celery message holding a job id, sent to the queue of a GPU class. It wakes; it decides nothing."""

from __future__ import annotations

import logging
import ssl
from typing import Any, Protocol
from urllib.parse import urlsplit

from celery import Celery
from kombu.exceptions import OperationalError

from graft_shared.jobs import Stage
from graft_shared.logs import log_event

RING_TASK = "graft.ring"

# Redis answers within milliseconds; a black hole must not hold up a POST.
BROKER_TRANSPORT_OPTIONS: dict[str, Any] = {
    "socket_timeout": 10,
    "socket_connect_timeout": 5,
    "socket_keepalive": True,
    "health_check_interval": 25,
}
# A bell is rung once: kombu would try to connect for six seconds more, and whoever rings between two jobs waits.
_RING_ONCE = {"max_retries": 1, "interval_start": 0, "interval_step": 0.1}
# Who asks whether an API is ready waits ten seconds for all of its neighbours; kombu asks one that says nothing twice.
_PING = {"socket_timeout": 1.5, "socket_connect_timeout": 1.5}

logger = logging.getLogger(__name__)


class Doorbell(Protocol):
    """Whatever can wake a worker."""

    def ring(self, job_id: str, queue: str) -> bool:
        """Wake a worker of this queue; tell whether the message left. Never raises: a lost bell is rung again."""

    def ping(self) -> bool:
        """Tell whether the broker answers."""


def queue_for(stage: Stage, gpu_class: str) -> str:
    """The queue that the next claim of a job is rung on."""
    return gpu_class if stage is Stage.TRAIN else stage.value


def broker_tls(broker_url: str) -> dict[str, Any] | None:
    """What TLS asks of the broker where its URL does not say: kombu would tell the password to whoever answers."""
    return {"ssl_cert_reqs": ssl.CERT_REQUIRED} if urlsplit(broker_url).scheme == "rediss" else None


class CeleryDoorbell:
    """Rings through Celery's broker."""

    def __init__(self, broker_url: str) -> None:
        self._app = Celery("graft-doorbell", broker=broker_url, set_as_current=False)
        self._app.conf.update(
            task_serializer="json",
            task_ignore_result=True,
            broker_use_ssl=broker_tls(broker_url),
            broker_transport_options={**BROKER_TRANSPORT_OPTIONS, **_RING_ONCE},
            broker_connection_timeout=5,
        )

    def ring(self, job_id: str, queue: str) -> bool:
        """Send one message, without retries."""
        try:
            self._app.send_task(RING_TASK, args=[job_id], queue=queue, retry=False, ignore_result=True)
        except (OperationalError, OSError) as error:
            log_event(logger, "bell_lost", level=logging.WARNING, job_id=job_id, queue=queue, reason=str(error))
            return False
        return True

    def ping(self) -> bool:
        """Open a connection and close it again."""
        try:
            with self._app.connection_for_write(transport_options=_PING) as connection:
                connection.ensure_connection(max_retries=1, timeout=2)
        except (OperationalError, OSError):
            return False
        return True
