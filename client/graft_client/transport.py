"""One HTTP exchange as the service wants it: repeated when that is safe, its errors translated."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from graft_client.errors import (
    AnswerUnreadable,
    GraftAPIError,
    KeyNotSendable,
    NetworkSettingsWrong,
    ServiceUnreachable,
)

BUSY_STATUSES = frozenset({429, 502, 503, 504})
MAYBE_DONE_STATUSES = frozenset({502, 504})  # a proxy's, that got no answer: the service may have done it all the same
FIRST_PAUSE_SECONDS = 0.25
LONGEST_PAUSE_SECONDS = 8.0
# HTTP_PROXY in the environment must not catch a service on this machine.
_PAST_PROXIES: dict[str, httpx.BaseTransport | None] = {
    "all://127.0.0.1": None,
    "all://localhost": None,
    "all://[::1]": None,
}
_LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})
_NETWORK_SETTINGS = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")  # httpx reads them


class Transport:
    """Sends requests to one service.

    Args:
        patience_seconds: How long one call keeps trying when the service does not answer or is busy.
        transport: Takes the place of the network in tests.
        sleep: Takes the place of waiting in tests.
        clock: The clock that patience is measured on, seconds.

    Raises:
        KeyNotSendable: The key is not printable ASCII, once what is blank around it is gone.
        ServiceUnreachable: `base_url` is no address.
        NetworkSettingsWrong: The environment names a proxy or certificates that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        api_key: str | None,
        timeout: float,
        patience_seconds: float,
        transport: httpx.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.base_url = base_url.rstrip("/")
        try:
            host = httpx.URL(self.base_url).host
        except httpx.InvalidURL as error:
            what = f": {error}" if "@" not in self.base_url else ""  # it quotes what it takes for a port
            raise ServiceUnreachable(self.base_url, f"this is no address{what}") from error
        self.patience_seconds = patience_seconds
        self._headers = _authorization((api_key or "").strip())
        self._http = _http(host, httpx.Timeout(timeout, connect=min(timeout, 5.0)), transport)
        self.sleep = sleep
        self.clock = clock

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def json(self, method: str, path: str, *, patience_seconds: float | None = None, **options: Any) -> Any:
        """Send a request and return the decoded answer; `options` as for `httpx.Client.build_request`.

        Raises:
            GraftAPIError: The service refused.
            ServiceUnreachable: Nothing answered, for as long as patience lasts.
            AnswerUnreadable: What answered is not the service.
        """
        return decoded(self.send(method, path, lambda: options, patience_seconds=patience_seconds))

    def send(
        self, method: str, path: str, options: Callable[[], dict[str, Any]], *, patience_seconds: float | None = None
    ) -> httpx.Response:
        """Send a request, again where that is safe; `options()` makes each try's body anew."""
        patience = self.patience_seconds if patience_seconds is None else patience_seconds
        deadline = self.clock() + patience
        for pause in _pauses():
            request = self._build(method, path, options())
            try:
                response = self._http.send(request)
            except httpx.TransportError as error:
                if not _may_repeat(request, error) or self.clock() + pause > deadline:
                    raise ServiceUnreachable(self.base_url, _reason(error)) from error
                self.sleep(pause)
                continue
            if response.is_success:
                return response
            asked = _asked_pause(request, response, pause)
            if asked is None or self.clock() + asked > deadline:
                raise GraftAPIError.from_response(response)
            self.sleep(asked)
        raise AssertionError("pauses never end")

    def ask(self, method: str, path: str) -> httpx.Response:
        """Send a request once and return whatever is answered, a refusal too; raises ServiceUnreachable."""
        try:
            return self._http.send(self._build(method, path, {}))
        except httpx.TransportError as error:
            raise ServiceUnreachable(self.base_url, _reason(error)) from error

    @contextmanager
    def stream(self, url: str) -> Iterator[httpx.Response]:
        """Open an answer for reading piece by piece.

        A path belongs to the service and carries the key; a full address is a presigned link and must not (an object
        store refuses two kinds of authentication, and the key is none of its business).

        Raises:
            GraftAPIError: The other side refused.
            httpx.TransportError: It did not answer or the connection broke; the caller decides.
        """
        headers = self._headers if url.startswith("/") else {}
        address = self.base_url + url if url.startswith("/") else url
        with self._http.stream("GET", address, headers=headers) as response:
            if not response.is_success:
                response.read()
                raise GraftAPIError.from_response(response)
            yield response

    def put(self, url: str, content: Iterable[bytes], headers: dict[str, str]) -> None:
        """Send bytes through a link, which carries its own permission: the key is none of its business.

        Raises:
            GraftAPIError: The other side refused.
            ServiceUnreachable: It did not answer.
        """
        try:
            response = self._http.put(url, content=content, headers=headers)
        except httpx.TransportError as error:
            raise ServiceUnreachable(url.partition("?")[0], _reason(error)) from error
        if not response.is_success:
            raise GraftAPIError.from_response(response)

    def _build(self, method: str, path: str, options: dict[str, Any]) -> httpx.Request:
        headers = {"headers": self._headers | options.get("headers", {})}
        return self._http.build_request(method, self.base_url + path, **(options | headers))


def _http(host: str, timeout: httpx.Timeout, transport: httpx.BaseTransport | None) -> httpx.Client:
    """A client by the environment's proxies and certificates; those that cannot be used do not matter on loopback."""
    try:
        return httpx.Client(timeout=timeout, transport=transport, mounts=_PAST_PROXIES)
    except (ImportError, ValueError, OSError, httpx.InvalidURL) as error:
        if host in _LOOPBACK:
            return httpx.Client(timeout=timeout, transport=transport, trust_env=False)
        names = [name for name in _NETWORK_SETTINGS if name in os.environ or name.lower() in os.environ]
        # An address that cannot be read is quoted with the password in it.
        said = "this is no address" if isinstance(error, httpx.InvalidURL) else str(error)
        raise NetworkSettingsWrong(said, f"mend or unset {', '.join(names)}") from error


def decoded(response: httpx.Response) -> Any:
    """What an answer says in JSON; raises AnswerUnreadable."""
    try:
        return response.json()
    except ValueError as error:
        raise AnswerUnreadable(response) from error


def _authorization(api_key: str) -> dict[str, str]:
    """The header that carries a key; none where there is no key."""
    if not (api_key.isascii() and api_key.isprintable()):
        raise KeyNotSendable("The API key (GRAFT_API_KEY) holds something other than printable ASCII: copy it anew.")
    return {"authorization": f"Bearer {api_key}"} if api_key else {}


def _pauses() -> Iterator[float]:
    """Exponential, with jitter so that many clients do not come back at once."""
    pause = FIRST_PAUSE_SECONDS
    while True:
        yield pause * random.uniform(0.8, 1.2)  # noqa: S311 - jitter, not a secret
        pause = min(pause * 2, LONGEST_PAUSE_SECONDS)


def _may_repeat(request: httpx.Request, error: httpx.TransportError) -> bool:
    """Whether trying again cannot do the same thing twice."""
    never_arrived = isinstance(error, httpx.ConnectError | httpx.ConnectTimeout | httpx.PoolTimeout)
    return never_arrived or _does_once(request)


def _does_once(request: httpx.Request) -> bool:
    """Whether a request that arrives twice does no more than one."""
    return request.method == "GET" or "idempotency-key" in request.headers


def _asked_pause(request: httpx.Request, response: httpx.Response, pause: float) -> float | None:
    """How long to wait before the next try, in seconds; None where trying again is pointless, or might do it twice."""
    if response.headers.get("x-should-retry") == "false":
        return None
    if response.status_code in MAYBE_DONE_STATUSES and not _does_once(request):
        return None
    retry_after = response.headers.get("retry-after", "")
    if retry_after.isdigit() and (response.status_code in BUSY_STATUSES or response.status_code == 409):
        return float(retry_after)
    return pause if response.status_code in BUSY_STATUSES else None


def _reason(error: httpx.TransportError) -> str:
    return str(error) or type(error).__name__
