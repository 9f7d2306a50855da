"""What may be asked without a key: this machine's programs and pages, no page of elsewhere that a browser here shows.

A name that an attacker owns may lead to 127.0.0.1 (DNS rebinding): the browser then takes the API for that name's, and
only the Host tells. A form may be posted to anywhere: what the browser says of its page tells that.

Routes that ask nobody for a key are not held to it: health tells of no tenant, the dashboard's files are everybody's,
and objects need a signature.
"""

from __future__ import annotations

import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers

from graft_api.errors import ForeignCaller

_ONLY_READS = ("GET", "HEAD", "OPTIONS")  # whose answers a browser keeps from the pages of elsewhere


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_own(method: str, headers: Headers) -> None:
    """Let a request without a key pass.

    Raises:
        ForeignCaller: It names another host than this machine, or would change something for a page of another.
    """
    host, origin = headers.get("host", ""), headers.get("origin")
    if not _is_own(f"//{host}"):
        raise ForeignCaller(reason=f"the request was sent to the host '{host}'")
    if method in _ONLY_READS:
        return
    if origin is None and headers.get("sec-fetch-site") == "cross-site":
        raise ForeignCaller(reason="the request was sent by a page of another site")
    if origin is not None and not _is_own(origin):
        raise ForeignCaller(reason=f"the request was sent by a page of '{origin}'")


def _is_own(address: str) -> bool:
    try:
        return is_loopback(urlsplit(address).hostname or "")
    except ValueError:  # a bracket that is not closed
        return False
