"""Webhooks: told to a receiver by the Standard Webhooks rules, and never to an address inside the operator's network.

A name is resolved once; every address that it stands for must be a public one; the connection goes to an address that
was looked at, under the name that was asked for. Redirects are not followed.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import http.client
import ipaddress
import json
import logging
import re
import socket
import ssl
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatch
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit

import standardwebhooks

from graft_shared.errors import StoreUnavailable
from graft_shared.logs import log_event
from graft_shared.metrics import WEBHOOK_TRIES
from graft_shared.settings import SharedSettings
from graft_shared.store.outbox import Outbox, Webhook

SILENCE_SECONDS = 10.0
WHOLE_SECONDS = 20.0  # of one delivery, however slowly its receiver answers
PER_PASS = 32
AT_ONCE = 8
LOOK_EVERY = timedelta(seconds=1)
_PORTS = {"https": 443, "http": 80}
PUBLIC_PORTS = (443, 8443)  # of hosts that are not inside: a webhook is no way to knock at other services' ports
_PUBLIC_NAME = re.compile(r"([a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?\.)+[a-z0-9-]*[a-z]")
_PRIVATE_ENDINGS = ("localhost", "local", "internal", "intranet", "lan", "arpa")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
_WRITTEN_AS_IT_IS = "/?%:@!$&'()*+,;=[]"  # in a path and a query, what is percent-encoded already included
# Public by their numbers, but made of an address that need not be: NAT64 and 6to4; and the relays of 6to4.
_TRANSLATED = (ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16"))
_RELAYS = ipaddress.ip_network("192.88.99.0/24")

logger = logging.getLogger(__name__)


class TargetRefused(Exception):
    """Nothing is sent there."""


class NotTaken(Exception):
    """The receiver did not take it, this time."""


def signing_secret(root: str, tenant: str) -> str:
    """The secret by which one tenant's webhooks are signed, `whsec_…`: what its receivers are told."""
    key = hmac.new(root.encode(), f"graft webhooks of {tenant}".encode(), hashlib.sha256).digest()
    return "whsec_" + base64.b64encode(key).decode()


@dataclass(frozen=True, kw_only=True)
class Postman:
    """Signs and delivers.

    Args:
        root: The operator's secret, from which every tenant's is made.
        inside: Hosts, as shell patterns, that may be reached though their addresses are not public, and by plain HTTP.
    """

    root: str
    inside: Sequence[str] = ()

    @classmethod
    def of(cls, settings: SharedSettings) -> Postman | None:
        """The one that the settings name; None where the operator has not set webhooks up."""
        secret = settings.webhook_secret
        if secret is None or not secret.get_secret_value():
            return None
        return cls(root=secret.get_secret_value(), inside=settings.webhook_hosts)

    def check(self, url: str) -> SplitResult:
        """Return the parts of a URL that something may be sent to, as far as can be said without looking its host up.

        Raises:
            TargetRefused: Says why it cannot be.
        """
        if _CONTROL.search(url):
            raise TargetRefused("it holds a control character")
        try:
            parts = urlsplit(url)
            port_is_sane = parts.port is None or parts.port > 0
        except ValueError as error:
            raise TargetRefused(f"it cannot be read as a URL: {error}") from error
        if parts.scheme not in _PORTS or not parts.hostname or not port_is_sane:
            raise TargetRefused("it is not written as https://host/path")
        if parts.username is not None or parts.password is not None:
            raise TargetRefused("it holds a name or a password; webhooks are signed instead")
        if not self._is_inside(parts.hostname):
            self._require_public_target(parts)
        return parts

    def deliver(self, *, id: str, tenant: str, url: str, body: str) -> int:
        """Send one message and return the status that its receiver answered, one of 2xx.

        Raises:
            TargetRefused: Nothing was sent: its host is none that may be reached.
            NotTaken: It could not be sent, or was answered otherwise; worth trying again.
        """
        parts = self.check(url)
        sent_at = datetime.now(UTC)
        signature = standardwebhooks.Webhook(signing_secret(self.root, tenant)).sign(id, sent_at, body)
        headers = {
            "content-type": "application/json",
            "user-agent": "graft-webhooks/1",
            "webhook-id": id,
            "webhook-timestamp": str(int(sent_at.timestamp())),
            "webhook-signature": signature,
        }
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        try:
            with _deadline(self._connection(parts)) as connection:
                connection.request("POST", quote(path, safe=_WRITTEN_AS_IT_IS), body=body.encode(), headers=headers)
                status = connection.getresponse().status
        except (OSError, ValueError, http.client.HTTPException) as error:  # ValueError: no host's name
            raise NotTaken(f"{type(error).__name__}: {error}") from error
        if not 200 <= status < 300:
            raise NotTaken(f"it was answered {status}")
        return status

    def _require_public_target(self, parts: SplitResult) -> None:
        if parts.scheme == "http":
            raise TargetRefused("it must begin with https://")
        if parts.port is not None and parts.port not in PUBLIC_PORTS:
            raise TargetRefused(f"its port is {parts.port}, and only {' and '.join(map(str, PUBLIC_PORTS))} are open")
        host = _ascii(str(parts.hostname))
        address = _as_address(host)
        if address is not None:
            self._require_public(host, [address])
        elif not _PUBLIC_NAME.fullmatch(host) or host.rpartition(".")[2] in _PRIVATE_ENDINGS:
            raise TargetRefused(f"'{host}' is no public name")

    def _connection(self, parts: SplitResult) -> _Pinned:
        host = str(parts.hostname)
        port = parts.port or _PORTS[parts.scheme]
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(where[0]).partition("%")[0] for *_, where in found]
        self._require_public(host, [ipaddress.ip_address(address) for address in addresses])
        return _Pinned(host, port, address=addresses[0], is_tls=parts.scheme == "https")

    def _require_public(self, host: str, addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address]) -> None:
        if self._is_inside(host):
            return
        for address in addresses:
            if not _is_public(address):
                raise TargetRefused(f"'{host}' is {address}, which is no public address")

    def _is_inside(self, host: str) -> bool:
        return any(fnmatch(host.lower(), pattern.lower()) for pattern in self.inside)


def _ascii(host: str) -> str:
    """The name as it is looked up: in lower case, other scripts encoded, and what looks like a digit made one."""
    try:
        return host.encode("ascii" if host.isascii() else "idna").decode().lower().rstrip(".")
    except UnicodeError as error:
        raise TargetRefused(f"its host cannot be read as a name: {error}") from error


def _as_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The address that a host is written as, in any way that a resolver would take: 127.1, 0x7f000001, 2130706433."""
    with suppress(ValueError):
        return ipaddress.ip_address(host)
    with suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def _is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            address = address.ipv4_mapped
        elif address.is_site_local or any(address in network for network in _TRANSLATED):
            return False
    if address in _RELAYS:
        return False
    return address.is_global and not address.is_multicast and not address.is_reserved


class _Pinned(http.client.HTTPConnection):
    """A connection to one address, under the name that it was found by."""

    def __init__(self, host: str, port: int, *, address: str, is_tls: bool) -> None:
        super().__init__(host, port, timeout=SILENCE_SECONDS)
        self._address, self._is_tls = address, is_tls
        self.default_port = _PORTS["https" if is_tls else "http"]

    def connect(self) -> None:
        self.sock = socket.create_connection((self._address, self.port), self.timeout)
        if self._is_tls:
            self.sock = ssl.create_default_context().wrap_socket(self.sock, server_hostname=self.host)


@contextmanager
def _deadline(connection: _Pinned) -> Iterator[_Pinned]:
    """A connection that is cut after a while, though its receiver answers a byte now and then."""

    def cut() -> None:
        if connection.sock is not None:
            with suppress(OSError):
                connection.sock.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(WHOLE_SECONDS, cut)
    timer.daemon = True
    timer.start()
    try:
        yield connection
    finally:
        timer.cancel()
        connection.close()


def body_of(webhook: Webhook) -> str:
    """What is sent, in the shape of OpenAI's events: which job has ended and how; whoever wants more asks the API."""
    created_at = int(webhook.created_at.timestamp())
    return json.dumps(
        {
            "id": webhook.id,
            "object": "event",
            "type": webhook.type,
            "created_at": created_at,
            "data": {"id": webhook.job_id},
        }
    )


@dataclass(frozen=True, kw_only=True)
class WebhookSender:
    """Empties the outbox, beside any number of others. What is sent twice has the same id twice."""

    outbox: Outbox
    postman: Postman

    def send_due(self) -> int:
        """Deliver what is due, several at once; return how many were tried.

        Raises:
            StoreUnavailable: The database does not answer; what was taken is due again after a while.
        """
        due = self.outbox.take(limit=PER_PASS)
        if due:
            with ThreadPoolExecutor(AT_ONCE) as threads:
                list(threads.map(self._send, due))
        return len(due)

    def run(self, stop: threading.Event) -> None:
        """Send until `stop`; a database that is away is waited for."""
        while not stop.wait(LOOK_EVERY.total_seconds()):
            try:
                self.send_due()
            except StoreUnavailable as error:
                log_event(logger, "webhooks_postponed", level=logging.WARNING, reason=error.message)

    def _send(self, webhook: Webhook) -> None:
        facts: dict[str, Any] = {"webhook_id": webhook.id, "job_id": webhook.job_id, "tries": webhook.tries}
        try:
            self.postman.deliver(id=webhook.id, tenant=webhook.tenant, url=webhook.url, body=body_of(webhook))
        except TargetRefused as error:
            self.outbox.failed(webhook, f"nothing was sent: {error}", finally_=True)
            WEBHOOK_TRIES.labels("refused").inc()
            log_event(logger, "webhook_refused", level=logging.WARNING, reason=str(error), **facts)
        except NotTaken as error:
            self.outbox.failed(webhook, str(error))
            WEBHOOK_TRIES.labels("not_taken").inc()
            log_event(logger, "webhook_not_taken", level=logging.WARNING, reason=str(error), **facts)
        else:
            self.outbox.delivered(webhook)
            WEBHOOK_TRIES.labels("taken").inc()
            log_event(logger, "webhook_delivered", **facts)
