"""Keys of the settings: `GRAFT_API_KEYS`."""

from __future__ import annotations

import re

from graft_api.keys.making import id_of

SHORTEST_KEY = 24  # characters
TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")


def read_keys(text: str) -> dict[str, str]:
    """Read `tenant=key,tenant=key` as keys and their tenants; a tenant may have several.

    Raises:
        ValueError: Says which part is wrong, without showing a key; or that a text meant to hold keys holds none.
    """
    keys: dict[str, str] = {}
    for number, part in enumerate((part for part in text.split(",") if part.strip()), start=1):
        tenant, equals, key = part.strip().partition("=")
        if not equals or not TENANT.fullmatch(tenant):
            raise ValueError(f"part {number} is not written as tenant=key")
        if len(key) < SHORTEST_KEY or not key.isascii() or any(char.isspace() for char in key):
            raise ValueError(f"the key of '{tenant}' must have {SHORTEST_KEY} or more characters: openssl rand -hex 24")
        if id_of(key) is not None:
            raise ValueError(f"the key of '{tenant}' looks like one of the database, which could then not be revoked")
        if keys.setdefault(key, tenant) != tenant:
            raise ValueError(f"'{tenant}' and '{keys[key]}' have the same key")
    if text and not keys:
        raise ValueError("it is set and holds no key; write tenant=key, or leave it empty to serve this machine alone")
    return keys
