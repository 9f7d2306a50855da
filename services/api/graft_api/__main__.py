"""`python -m graft_api`: serve the API, on loopback unless there are keys."""

from __future__ import annotations

import argparse
import asyncio
import gc
import logging

import uvicorn

from graft_api.app import build_app
from graft_api.keys.static import read_keys
from graft_api.loopback import is_loopback
from graft_api.metrics import figures_of
from graft_api.settings import ApiSettings
from graft_shared.errors import StoreUnavailable
from graft_shared.logs import configure_logging
from graft_shared.metrics import serve_metrics
from graft_shared.store import Keys, open_database

DEFAULT_PORT = 8000
GRACE_SECONDS = 5  # for answers under way at the end; live event streams would hold it open for ever


class Exposed(Exception):
    """Serving there would let strangers in, or nobody."""


def check_exposure(host: str, settings: ApiSettings) -> None:
    """Raise Exposed if strangers can reach the host and there is no key in force, of the settings or the database."""
    if is_loopback(host) or settings.api_keys.get_secret_value():
        return
    listening = f"The API listens on this machine only: '{host}' could be reached from elsewhere, and it has no key"
    if settings.key_pepper is None:
        raise Exposed(
            f"{listening}. Use --host 127.0.0.1; or set GRAFT_KEY_PEPPER (openssl rand -hex 24 makes one) and make a "
            "key with: python -m graft_api.keys create TENANT; or set GRAFT_API_KEYS=tenant=key."
        )
    database = open_database(settings.database)
    try:
        if not Keys(database).live():
            raise Exposed(f"{listening}. Make one: python -m graft_api.keys create TENANT")
    except StoreUnavailable as error:
        raise Exposed(f"Whether there is a key cannot be told: {error.message}") from error
    finally:
        database.close()


def is_no_cut(record: logging.LogRecord) -> bool:
    """Whether a line of the server tells of anything but an answer that our own end cut, as it does event streams."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, asyncio.CancelledError) or "graceful shutdown exceeded" in record.getMessage())


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser(prog="python -m graft_api", description=__doc__)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    arguments = parser.parse_args()
    settings = ApiSettings()
    configure_logging(settings.log_format)
    logging.getLogger("uvicorn.error").addFilter(is_no_cut)
    try:
        read_keys(settings.api_keys.get_secret_value())
    except ValueError as error:
        parser.error(f"GRAFT_API_KEYS: {error}")
    try:
        check_exposure(arguments.host, settings)
        app = build_app(settings, open_without_keys=is_loopback(arguments.host))
    except (Exposed, ValueError) as error:
        parser.error(str(error))
    serve_metrics(settings, figures_of(app.state.neighbours))
    gc.collect()
    gc.freeze()  # what is here now stays: to look through all of it again and again held requests up by 0.2 s each time
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
