"""Whose a key is, told without asking the database for each request: live keys are held here for two seconds.

A key that is revoked or has expired is refused by every API within that time; one that is not known is looked for at
once. While the database does not answer, keys that were known hold on for half a minute; then nobody can be told from
a stranger.
"""

from __future__ import annotations

import hmac
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from pydantic import SecretStr
from starlette.concurrency import run_in_threadpool

from graft_api.keys import making
from graft_api.keys.scopes import ALL, Scope
from graft_shared.errors import NeighbourUnavailable
from graft_shared.logs import log_event
from graft_shared.store import Keys, StoredKey

FRESH_SECONDS = 2.0
NEWS_SECONDS = 0.1  # where a key is not known: it may have been made since; strangers cause no more looks than these
STALE_SECONDS = 30.0
USE_NOTED_EVERY = timedelta(minutes=10)  # by each API: when a key was used last is for the operator's eye
DEFAULT_TENANT = "default"
_NOBODYS_DIGEST = "0" * 64  # what a key of an unknown id is compared with, so that it takes as long

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Caller:
    """Who asks, and what the key that was shown allows.

    Args:
        has_key: Not so for whoever is let in because there are no keys.
    """

    tenant: str
    scopes: frozenset[Scope]
    has_key: bool = True


_ANYBODY = Caller(tenant=DEFAULT_TENANT, scopes=ALL, has_key=False)


@dataclass(frozen=True)
class _Held:
    keys: Mapping[str, StoredKey]  # live ones, by their id
    is_closed: bool  # there are keys, or were
    at: float  # when they were read


class KeyRing:
    """All keys of this API: those of the settings, and with a pepper those of the database.

    Args:
        static: Keys of the settings and their tenants; they may do everything.
        open_without_keys: Whether a request without a key is served as long as no key has ever been made; for an API
            that this machine alone can reach.
    """

    def __init__(
        self, stored: Keys, *, static: Mapping[str, str], pepper: SecretStr | None, open_without_keys: bool
    ) -> None:
        self._stored = stored
        self._static = static
        self._pepper = pepper
        self._may_be_open = open_without_keys and not static
        self._held: _Held | None = None
        self._failure: tuple[NeighbourUnavailable, float] | None = None  # of the last look, and when it was
        self._reading = threading.Lock()
        self._used: set[str] = set()

    async def caller(self, key: str | None) -> Caller | None:
        """Who shows this key, or none; None for a stranger.

        Raises:
            StoreUnavailable: The database has not answered for so long that nobody can tell.
        """
        if key is not None and (tenant := _static_tenant(key, self._static)) is not None:
            return Caller(tenant=tenant, scopes=ALL)
        if self._pepper is None:
            return _ANYBODY if self._may_be_open else None
        if key is None and not self._may_be_open:
            return None
        held = await self._not_older_than(FRESH_SECONDS)
        if self._may_be_open and not held.is_closed:
            return _ANYBODY
        if key is None:
            return None
        is_news = (key_id := making.id_of(key)) is not None and key_id not in held.keys
        if is_news and not self._reading.locked():  # no stranger waits for a look with the threads that others need
            held = await self._not_older_than(NEWS_SECONDS)
        return self._known(key, held, self._pepper)

    def _known(self, key: str, held: _Held, pepper: SecretStr) -> Caller | None:
        stored = held.keys.get(making.id_of(key) or "")
        expected = stored.digest if stored is not None else _NOBODYS_DIGEST
        if not hmac.compare_digest(making.digest_of(key, pepper), expected) or stored is None:
            return None
        self._used.add(stored.id)
        return Caller(tenant=stored.tenant, scopes=frozenset(scope for scope in Scope if scope.value in stored.scopes))

    async def _not_older_than(self, seconds: float) -> _Held:
        held = self._held
        if held is not None and time.monotonic() < held.at + seconds:
            return held
        return await run_in_threadpool(self._read, seconds)

    def _read(self, seconds: float) -> _Held:
        """Read the live keys, once for all requests that wait for it."""
        with self._reading:
            held, now = self._held, time.monotonic()
            if held is not None and now < held.at + seconds:
                return held
            if self._failure is None or now > self._failure[1] + FRESH_SECONDS:  # else it was just asked in vain
                try:
                    return self._look(now)
                except NeighbourUnavailable as error:
                    log_event(logger, "keys_not_read", level=logging.WARNING, reason=error.message)
                    self._failure = (error, time.monotonic())
            if held is None or now > held.at + STALE_SECONDS:
                raise self._failure[0]
            return held

    def _look(self, now: float) -> _Held:
        live = self._stored.live()
        held = _Held({key.id: key for key in live}, bool(live) or self._stored.any(), now)
        self._held, self._failure = held, None
        self._note_uses(held)  # last: a database that is slow to write holds up nobody else
        return held

    def _note_uses(self, held: _Held) -> None:
        """Write down when keys were used, for those of which that was written long ago."""
        used, self._used = self._used, set()
        long_ago = datetime.now(UTC) - USE_NOTED_EVERY
        due = [id for id in used if id in held.keys and (held.keys[id].last_used_at or long_ago) <= long_ago]
        if due:
            self._stored.mark_used(due)


def _static_tenant(given: str, keys: Mapping[str, str]) -> str | None:
    """Compare with every key, each in constant time: how long it takes tells nothing."""
    owners = [owner for key, owner in keys.items() if hmac.compare_digest(given.encode(), key.encode())]
    return owners[0] if owners else None
