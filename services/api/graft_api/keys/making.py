"""What a key of the database looks like, and the digest by which it is known again."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import string

from pydantic import SecretStr

RANDOM_BYTES = 32
SHORTEST_PEPPER = 24  # characters
_ID_CHARACTERS, _ID_LENGTH = string.ascii_letters + string.digits, 12
_KEY = re.compile(rf"graft_([A-Za-z0-9]{{{_ID_LENGTH}}})_[A-Za-z0-9_-]{{43}}")


def new_key() -> tuple[str, str]:
    """Return a fresh key's id and the key, `graft_<key id>_<32 random bytes>`. Nobody can show the key again."""
    key_id = "".join(secrets.choice(_ID_CHARACTERS) for _ in range(_ID_LENGTH))
    return key_id, f"graft_{key_id}_{secrets.token_urlsafe(RANDOM_BYTES)}"


def id_of(text: str) -> str | None:
    """The id that a text names if it has the shape of a key."""
    found = _KEY.fullmatch(text)
    return found[1] if found else None


def digest_of(key: str, pepper: SecretStr) -> str:
    """HMAC-SHA-256 of a key under the pepper: who reads the database can neither use a key nor make one."""
    return hmac.new(pepper.get_secret_value().encode(), key.encode(), hashlib.sha256).hexdigest()


def check_pepper(pepper: SecretStr) -> None:
    """Raise ValueError for a pepper that could be guessed."""
    if len(pepper.get_secret_value()) < SHORTEST_PEPPER:
        raise ValueError(f"it must have {SHORTEST_PEPPER} or more characters: openssl rand -hex 24 makes one")
