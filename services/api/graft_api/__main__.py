"""`python -m graft_api`: serve the API on loopback."""

from __future__ import annotations

import argparse
import ipaddress

import uvicorn

from graft_api.app import build_app
from graft_api.settings import ApiSettings
from graft_shared.logs import configure_logging

DEFAULT_PORT = 8000
GRACE_SECONDS = 5  # for answers under way at the end; live event streams would hold it open for ever


class Exposed(Exception):
    """Serving there would let strangers in."""


def check_exposure(host: str) -> None:
    """Raise Exposed unless only this machine can reach the host: there is no authentication yet."""
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise Exposed(
            f"This API has no authentication yet, so it listens on this machine only; '{host}' could be reached from "
            "elsewhere. Use --host 127.0.0.1, and an SSH tunnel or an authenticating proxy on this machine."
        )


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m graft_api", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    arguments = parser.parse_args()
    try:
        check_exposure(arguments.host)
    except Exposed as error:
        parser.error(str(error))
    settings = ApiSettings()
    configure_logging(json_lines=settings.log_json)
    uvicorn.run(
        build_app(settings),
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,  # `Exchanges` writes one line a request, without the query
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
