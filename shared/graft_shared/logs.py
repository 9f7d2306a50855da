"""Logs: one JSON line per event, past tense, facts as fields; or a short human line on a terminal.

What is said while a request is answered or a run is carried out bears its id, whoever says it: `about`.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

_about: ContextVar[Mapping[str, Any]] = ContextVar("graft_log_about", default={})  # noqa: B039 (never changed in place)


def configure_logging(shape: str, level: str = "INFO") -> None:
    """Send every log record of this process to stderr, in the shape `json` or `text`."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonFormatter() if shape == "json" else _HumanFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for noisy in ("botocore", "urllib3", "httpx", "httpcore", "alembic", "filelock", "celery", "kombu", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def log_event(logger: logging.Logger, event: str, *, level: int = logging.INFO, **facts: Any) -> None:
    """Log one event: a past-tense name and its facts."""
    logger.log(level, event, extra={"facts": facts})


@contextmanager
def about(**facts: Any) -> Iterator[None]:
    """Add these facts to whatever is logged meanwhile, by any library; a thread begun in a copy of the context, too."""
    token = _about.set({**_about.get(), **facts})
    try:
        yield
    finally:
        _about.reset(token)


def _facts_of(record: logging.LogRecord) -> dict[str, Any]:
    return {**_about.get(), **getattr(record, "facts", {})}


class _JsonFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **_facts_of(record),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class _HumanFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{key}={value}" for key, value in _facts_of(record).items())
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname} "
        line = f"{moment} {mark}{record.getMessage()} {facts}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line
