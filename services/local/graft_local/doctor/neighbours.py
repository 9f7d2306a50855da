"""What the service leans on: database, broker, bucket, hub; and what the database knows of a key."""

from __future__ import annotations

import os
import re
import secrets
import sqlite3
import ssl
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx
import redis
from sqlalchemy.exc import ArgumentError

from graft_client.doctor import judge_skew, skew_of
from graft_client.findings import Finding, fault, good, note, skipped
from graft_local.broker import NoBroker, find_executable, kept_url
from graft_local.launcher import holder_of
from graft_shared.errors import ArtifactCorrupt, BucketUnavailable, GraftError, ObjectNotFound, StoreUnavailable
from graft_shared.settings import SharedSettings
from graft_shared.store.engine import Database, journal_mode, open_database
from graft_shared.store.migrate import MigrationMissing, check_migrations

if TYPE_CHECKING:
    from graft_shared.buckets import Bucket

TRIAL_BYTES = 64 * 1024
HUB_SECONDS = 10.0
BROKER_SECONDS = 5.0
# The last three: a proxy or a certificate that the environment names and httpx cannot use.
_NOT_REACHED = (httpx.HTTPError, httpx.InvalidURL, ImportError, ValueError, OSError)
_KEY = re.compile(r"graft_([A-Za-z0-9]{12})_")
_MIGRATE = "python -m graft_shared.store.migrate"
_NOTHING_YET = "nothing was started in this state folder yet: graft up makes it"


def is_untouched(settings: SharedSettings) -> bool:
    """Whether nothing was started in this state folder: its database would be a file, and is not there."""
    return settings.database.startswith("sqlite") and not Path(settings.database.removeprefix("sqlite:///")).exists()


def database(settings: SharedSettings) -> Iterator[Finding]:
    """It must answer and have this version's tables; and its clock be ours."""
    is_sqlite = settings.database.startswith("sqlite")
    if is_sqlite:
        yield judge_sqlite(sqlite3.sqlite_version_info)
        if is_untouched(settings):
            yield skipped("database", _NOTHING_YET)
            return
    try:
        opened = open_database(settings.database)
    except (ValueError, ArgumentError) as error:
        yield fault(
            "database", f"GRAFT_DATABASE_URL cannot be read: {error}", "postgresql+psycopg://user:password@host/graft"
        )
        return
    try:
        yield _migrations(opened)
        yield judge_skew("clock of the database", (opened.now() - datetime.now(UTC)).total_seconds())
    except StoreUnavailable as error:
        at = urlsplit(settings.database)
        server = f"pg_isready -h {at.hostname} -p {at.port or 5432}; start it (make up), or mend GRAFT_DATABASE_URL"
        yield fault("database", error.message, f"ls -l {settings.state_dir}" if is_sqlite else server)
    finally:
        opened.close()


def judge_sqlite(version: tuple[int, int, int]) -> Finding:
    """Which journal the store chooses for this SQLite: in some versions the faster one loses writes."""
    return good("SQLite", f"{'.'.join(map(str, version))}, journal_mode={journal_mode(version)}")


def _migrations(opened: Database) -> Finding:
    try:
        newest = check_migrations(opened)
    except MigrationMissing as error:
        if error.is_newer:
            return fault("migrations", str(error), "git pull && make setup: this version is older than the database")
        return fault("migrations", str(error), f"{_MIGRATE} (graft up does it by itself)")
    return good("migrations", f"at {newest}, the newest")


def broker(state_dir: Path, environment: Mapping[str, str]) -> Iterator[Finding]:
    """Redis must answer, refuse no bell for want of memory, and write down those that it took."""
    if url := environment.get("GRAFT_BROKER_URL"):
        yield from _redis(url, 'redis-cli -u "$GRAFT_BROKER_URL"')
        return
    try:
        executable = find_executable()
    except NoBroker as error:
        yield fault("broker", str(error), "make setup")
        return
    if holder_of(state_dir) is None:
        yield good("broker", f"graft up will start {executable}")
    elif (url := kept_url(state_dir)) is not None:
        yield from _redis(
            url, f"redis-cli -p {urlsplit(url).port} (password: requirepass in {state_dir}/broker/redis.conf)"
        )


def _redis(url: str, cli: str) -> Iterator[Finding]:
    # Celery's word for it, CERT_REQUIRED, is required to redis-py.
    url = re.sub(r"(?<=ssl_cert_reqs=)CERT_\w+", lambda word: word[0].removeprefix("CERT_").lower(), url)
    try:
        server = redis.Redis.from_url(url, socket_timeout=BROKER_SECONDS, socket_connect_timeout=BROKER_SECONDS)
        server.ping()
    except (redis.RedisError, ValueError, OSError) as error:
        place = urlsplit(url).hostname
        yield fault("broker", f"Redis at {place} does not answer: {error}", f"{cli} ping; then start it (make up)")
        return
    try:
        wanted = {"maxmemory-policy": "noeviction", "appendonly": "yes"}
        found = {name: server.config_get(name)[name] for name in wanted}
    except redis.ResponseError:
        yield note("broker", "answers, and does not show its settings: they should be noeviction and appendonly")
        return
    finally:
        server.close()
    if found["maxmemory-policy"] != wanted["maxmemory-policy"]:
        what = f"maxmemory-policy is {found['maxmemory-policy']}: bells may be dropped when memory is short"
        yield fault("broker", what, f"{cli} config set maxmemory-policy noeviction")
    if found["appendonly"] != wanted["appendonly"]:
        what = "appendonly is off: a restart forgets bells, and jobs wait until they are rung again"
        yield note("broker", what, f"{cli} config set appendonly yes")
    if found == wanted:
        yield good("broker", "answers; noeviction, appendonly")


def bucket(settings: SharedSettings) -> Iterator[Finding]:
    """An object must come back as it went in, and go."""
    from graft_shared.buckets import open_bucket  # an S3 one takes half a second to import

    has_begun = settings.state_dir.exists() and not is_untouched(settings)
    if settings.s3_bucket is None and not has_begun and not settings.bucket_dir.exists():  # a trial would make it
        yield skipped("bucket", _NOTHING_YET)
        return
    place = (
        f"'{settings.s3_bucket}' at {settings.s3_endpoint_url or 'AWS'}" if settings.s3_bucket else settings.bucket_dir
    )
    try:
        _try_out(open_bucket(settings))
    except (BucketUnavailable, ArtifactCorrupt, ObjectNotFound, OSError, ValueError) as error:
        said = error.message if isinstance(error, GraftError) else str(error)
        yield fault("bucket", f"{place}: {said}", _bucket_remedy(settings))
        return
    yield good("bucket", f"{place}: an object was written, read back with its sha256, and removed")
    if settings.s3_endpoint_url:
        yield _clock_of(settings.s3_endpoint_url)


def _clock_of(store_url: str) -> Finding:
    subject, bundle = "clock of the object store", os.environ.get("AWS_CA_BUNDLE")  # which boto trusts, and httpx not
    try:
        trusted = ssl.create_default_context(cafile=bundle)
        return judge_skew(subject, skew_of(httpx.get(store_url, timeout=HUB_SECONDS, verify=trusted)))
    except _NOT_REACHED as error:
        return note(subject, f"not known ({error or type(error).__name__})", f"curl -sI {store_url} | grep -i ^date")


def _try_out(store: Bucket) -> None:
    from graft_shared.buckets import read_back

    trial = store.put_bytes(f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(TRIAL_BYTES))
    try:
        read_back(store, trial)
    finally:
        store.delete(trial.key)


def _bucket_remedy(settings: SharedSettings) -> str:
    if settings.s3_bucket is None:
        return f"df -h {settings.bucket_dir}; ls -ld {settings.bucket_dir}: a folder with room, to be written"
    where = f" --endpoint-url {settings.s3_endpoint_url}" if settings.s3_endpoint_url else ""
    return (
        f"aws{where} s3 ls s3://{settings.s3_bucket}, with the keys of GRAFT_S3_ACCESS_KEY_ID and "
        "GRAFT_S3_SECRET_ACCESS_KEY: is the store running, and may they write there?"
    )


def hub(settings: SharedSettings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The hub must be reachable, or bases be at hand without it."""
    at_hand = _bases_at_hand(settings)
    shown = f"{len(at_hand)} bases are at hand: {', '.join(at_hand[:3])}{' …' if len(at_hand) > 3 else ''}"
    url = environment.get("HF_ENDPOINT") or "https://huggingface.co"
    by_hand = f"put a base's folder at {settings.registered_models_dir}/<org>/<name>"
    if environment.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        if at_hand:
            yield good("hub", f"HF_HUB_OFFLINE is set, and {shown}")
        else:
            yield fault("hub", "HF_HUB_OFFLINE is set, and no base is at hand", f"unset HF_HUB_OFFLINE, or {by_hand}")
        return
    try:
        httpx.get(url, timeout=HUB_SECONDS, follow_redirects=False)
    except _NOT_REACHED as error:
        found = f"{url} is not reached ({error or type(error).__name__})"
        remedy = f"export HTTPS_PROXY=… or HF_ENDPOINT=… (a mirror); or {by_hand}"
        yield note("hub", f"{found}; {shown}", remedy) if at_hand else fault("hub", found, remedy)
        return
    yield good("hub", f"{url} is reached")


def _bases_at_hand(settings: SharedSettings) -> list[str]:
    """Registered bases, and those that a worker of this host has fetched."""
    registered = settings.registered_models_dir
    names = [path.parent.relative_to(registered).as_posix() for path in registered.glob("**/config.json")]
    fetched = (settings.state_dir / "cache").glob("**/models--*")  # files of that name are locks
    cached = [path.name.removeprefix("models--") for path in fetched if path.is_dir()]
    return sorted({*names, *(name.replace("--", "/") for name in cached)})


def key(settings: SharedSettings, environment: Mapping[str, str]) -> Iterator[Finding]:
    """What became of the key that is set here, as the database knows it; the API only says that it is not in force."""
    from graft_shared.store import Keys

    given = _KEY.match(environment.get("GRAFT_API_KEY") or "")
    if given is None:
        yield skipped("key in the database", "GRAFT_API_KEY is none of the database's")
        return
    if is_untouched(settings):
        yield skipped("key in the database", _NOTHING_YET)
        return
    try:
        opened = open_database(settings.database)
    except (ValueError, ArgumentError):
        yield skipped("key in the database", "the database's address cannot be read")
        return
    try:
        known = {stored.id: stored for stored in Keys(opened).list()}
        present = opened.now()
    except GraftError as error:
        yield skipped("key in the database", error.message)
        return
    finally:
        opened.close()
    stored = known.get(given[1])
    another = "graft keys create TENANT; export GRAFT_API_KEY=…"
    if stored is None:
        yield fault("key in the database", f"there is no key {given[1]} in this database", another)
    elif stored.revoked_at is not None:
        at = f"{stored.revoked_at:%Y-%m-%d %H:%M} UTC"
        yield fault("key in the database", f"{stored.id} of {stored.tenant} was revoked at {at}", another)
    elif stored.expires_at is not None and stored.expires_at <= present:
        at = f"{stored.expires_at:%Y-%m-%d %H:%M} UTC"
        yield fault("key in the database", f"{stored.id} of {stored.tenant} expired at {at}", another)
    else:
        yield good("key in the database", f"{stored.id} of {stored.tenant}: {', '.join(stored.scopes)}")
