"""`python -m graft_api.keys`: make, list and revoke keys, as the operator. It works on the database directly."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from datetime import datetime, timedelta

from pydantic import SecretStr, ValidationError

from graft_api.keys.making import digest_of, new_key
from graft_api.keys.scopes import USUAL, Scope
from graft_api.keys.static import TENANT
from graft_api.settings import ApiSettings
from graft_api.texts import in_columns
from graft_shared.errors import GraftError
from graft_shared.logs import configure_logging, log_event
from graft_shared.store import Keys, StoredKey, open_database

_COLUMNS = ("key_id", "tenant", "state", "expires", "last_used", "scopes", "name")
NO_PEPPER = "GRAFT_KEY_PEPPER is not set: keys of the database are hashed under it (openssl rand -hex 24 makes one)"

logger = logging.getLogger("graft_api.keys")


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what was asked, and say what came of it."""
    parser = _parser()
    asked = parser.parse_args(arguments)
    try:
        settings = ApiSettings()
    except ValidationError as error:
        parser.error("; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()))
    configure_logging(settings.log_format)
    if settings.key_pepper is None:
        parser.error(NO_PEPPER)
    database = open_database(settings.database)
    try:
        sys.stdout.write(_done(asked, Keys(database), settings.key_pepper))
    except GraftError as error:
        parser.error(error.message)
    finally:
        database.close()


def _done(asked: argparse.Namespace, keys: Keys, pepper: SecretStr) -> str:
    if asked.command == "create":
        return _create(asked, keys, pepper)
    if asked.command == "revoke":
        revoked = keys.revoke(asked.key_id)
        log_event(logger, "key_revoked", key_id=revoked.id, tenant=revoked.tenant)
        return f"{revoked.id} of {revoked.tenant} is revoked; every API refuses it within seconds\n"
    if asked.as_json:
        return json.dumps([dict(zip(_COLUMNS, _row(key), strict=True)) for key in keys.list()], indent=2) + "\n"
    return in_columns([column.replace("_", " ") for column in _COLUMNS], map(_row, keys.list()))


def _create(asked: argparse.Namespace, keys: Keys, pepper: SecretStr) -> str:
    key_id, key = new_key()
    scopes = sorted(set(asked.scopes or (scope.value for scope in USUAL)))
    life = timedelta(days=asked.days) if asked.days is not None else None
    keys.add(
        id=key_id, tenant=asked.tenant, digest=digest_of(key, pepper), scopes=scopes, name=asked.name or "", life=life
    )
    log_event(logger, "key_created", key_id=key_id, tenant=asked.tenant, scopes=scopes)
    return f"{key}\n"  # and nothing else, so that a script can keep it; it is never shown again


def _row(key: StoredKey) -> tuple[str, ...]:
    now = datetime.now(key.created_at.tzinfo)
    expired = key.expires_at is not None and key.expires_at <= now
    state = "revoked" if key.revoked_at else "expired" if expired else "live"
    return (key.id, key.tenant, state, _day(key.expires_at), _day(key.last_used_at), ",".join(key.scopes), key.name)


def _day(moment: datetime | None) -> str:
    return f"{moment:%Y-%m-%d %H:%M}" if moment is not None else "never"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m graft_api.keys", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    create = commands.add_parser("create", help="make a key and print it, this once")
    create.add_argument("tenant", type=_tenant, help="letters, digits, - and _")
    create.add_argument(
        "--scope", action="append", choices=[scope.value for scope in Scope], dest="scopes", metavar="SCOPE",
        help=f"what it may do (repeatable): {', '.join(Scope)}; all but metrics by default",
    )  # fmt: skip
    create.add_argument("--days", type=_days, help="how long it holds; for ever by default")
    create.add_argument("--name", type=_name, help="what it is for, to be found in the list")
    listed = commands.add_parser("list", help="list all keys, revoked and expired ones too")
    listed.add_argument("--json", action="store_true", dest="as_json", help="as a JSON document")
    revoke = commands.add_parser("revoke", help="end a key for good, within seconds")
    revoke.add_argument("key_id", metavar="KEY_ID", help="as the list shows it: the part between graft_ and the next _")
    return parser


def _tenant(text: str) -> str:
    if not TENANT.fullmatch(text):
        raise argparse.ArgumentTypeError("a tenant's name has up to 64 letters, digits, - and _")
    return text


def _days(text: str) -> float:
    try:
        days = float(text)
    except ValueError:
        days = 0.0
    if not 0 < days <= 36_500:
        raise argparse.ArgumentTypeError("a number of days, above 0 and up to 36500")
    return days


def _name(text: str) -> str:
    if len(text) > 100:
        raise argparse.ArgumentTypeError("at most 100 characters")
    return text


if __name__ == "__main__":
    main()
