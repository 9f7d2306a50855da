"""Who asks: the one place that turns a request into a tenant."""

from __future__ import annotations

import hmac
import re
from collections.abc import Mapping
from typing import Annotated

from fastapi import Depends, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from graft_api.deps import Here
from graft_api.errors import Unauthenticated

SHORTEST_KEY = 24  # characters
_TENANT = re.compile(r"[A-Za-z0-9_-]{1,64}")
_bearer = HTTPBearer(auto_error=False, description="A key of GRAFT_API_KEYS. A service without keys is loopback's own.")


def read_keys(text: str) -> dict[str, str]:
    """Read `tenant=key,tenant=key` as keys and their tenants; a tenant may have several.

    Raises:
        ValueError: Says which part is wrong, without showing a key; or that a text meant to hold keys holds none.
    """
    keys: dict[str, str] = {}
    for number, part in enumerate((part for part in text.split(",") if part.strip()), start=1):
        tenant, equals, key = part.strip().partition("=")
        if not equals or not _TENANT.fullmatch(tenant):
            raise ValueError(f"part {number} is not written as tenant=key")
        if len(key) < SHORTEST_KEY or not key.isascii() or any(char.isspace() for char in key):
            raise ValueError(f"the key of '{tenant}' must have {SHORTEST_KEY} or more characters: openssl rand -hex 24")
        if keys.setdefault(key, tenant) != tenant:
            raise ValueError(f"'{tenant}' and '{keys[key]}' have the same key")
    if text and not keys:
        raise ValueError("it is set and holds no key; write tenant=key, or leave it empty to serve this machine alone")
    return keys


async def tenant(
    here: Here, credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None
) -> str:
    """The tenant of this request: the key's, or `default` in a service without keys.

    Raises:
        Unauthenticated: There are keys, and the request brings none of them.
    """
    if not here.keys:
        return "default"
    found = _tenant_of(credentials.credentials, here.keys) if credentials is not None else None
    if found is None:
        raise Unauthenticated
    return found


def _tenant_of(given: str, keys: Mapping[str, str]) -> str | None:
    """Compare with every key, each in constant time: how long it takes tells nothing."""
    owners = [owner for key, owner in keys.items() if hmac.compare_digest(given.encode(), key.encode())]
    return owners[0] if owners else None


Tenant = Annotated[str, Depends(tenant)]
