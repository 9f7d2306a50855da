"""`python -m graft_api`: serve the API, on loopback unless there are keys."""

from __future__ import annotations

import argparse
import ipaddress

import uvicorn

from graft_api.app import build_app
from graft_api.auth import read_keys
from graft_api.settings import ApiSettings
from graft_shared.logs import configure_logging

DEFAULT_PORT = 8000
GRACE_SECONDS = 5  # for answers under way at the end; live event streams would hold it open for ever


class Exposed(Exception):
    """Serving there would let strangers in."""


def check_exposure(host: str) -> None:
    """Raise Exposed unless only this machine can reach the host: what has no keys must not be reached by strangers."""
    if host == "localhost":
        return
    try:
        is_loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback:
        raise Exposed(
            f"GRAFT_API_KEYS is not set, so the API listens on this machine only; '{host}' could be reached from "
            "elsewhere. Use --host 127.0.0.1, or set GRAFT_API_KEYS=tenant=key (openssl rand -hex 24 makes a key)."
        )


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m graft_api", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    arguments = parser.parse_args()
    settings = ApiSettings()
    configure_logging(json_lines=settings.log_json)
    try:
        keys = read_keys(settings.api_keys.get_secret_value())
    except ValueError as error:
        parser.error(f"GRAFT_API_KEYS: {error}")
    try:
        if not keys:
            check_exposure(arguments.host)
        app = build_app(settings)
    except (Exposed, ValueError) as error:
        parser.error(str(error))
    uvicorn.run(
        app,
        host=arguments.host,
        port=arguments.port,
        log_config=None,
        access_log=False,  # `Exchanges` writes one line a request, without the query
        server_header=False,
        timeout_graceful_shutdown=GRACE_SECONDS,
    )


if __name__ == "__main__":
    main()
