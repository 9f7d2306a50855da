"""What a host keeps between jobs: proven, shared, and never more than it may."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.errors import ArtifactCorrupt
from graft_shared.jobs import StoredObject
from graft_worker.supervisor import bases
from graft_worker.supervisor.bases import BaseModels
from graft_worker.supervisor.cache import HostCache
from graft_worker.supervisor.hashes import known_hashes, remember_hashes
from tests.factories import EMPTY_WEIGHTS
from tests.fakes.forked import forked_process
from tests.waiting import free_port

SCANDIR = os.scandir
COMMIT = "c0ffee" * 6 + "c0ff"
WEIGHTS = EMPTY_WEIGHTS + b"weights" * 1000
WEIGHTS_SHA256 = hashlib.sha256(WEIGHTS).hexdigest()


class CountingBucket(DirectoryBucket):
    """Counts what is read from it."""

    reads = 0

    def open(self, key: str):  # type: ignore[no-untyped-def]
        self.reads += 1
        return super().open(key)


@pytest.fixture
def bucket(tmp_path: Path) -> CountingBucket:
    return CountingBucket(tmp_path / "bucket")


def cache_of(tmp_path: Path, max_bytes: int = 10**9) -> HostCache:
    return HostCache(folder=tmp_path / "cache", max_bytes=max_bytes)


@pytest.fixture
def hub_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{free_port()}")


def hub_repository(cache: HostCache, base_model: str, *, used_at: float, content: bytes = WEIGHTS) -> Path:
    """A repository as `huggingface_hub` leaves it: blobs by their hash, snapshots of links."""
    folder = cache.hub_dir / f"models--{base_model.replace('/', '--')}"
    (folder / "blobs").mkdir(parents=True)
    snapshot = folder / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name, blob, data in (("model.safetensors", WEIGHTS_SHA256, content), ("config.json", "0" * 40, b"{}")):
        (folder / "blobs" / blob).write_bytes(data)
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    with cache.borrowed(base_model):
        pass
    os.utime(cache.folder / "in-use" / f"{folder.name}.lock", (used_at, used_at))
    return snapshot


def test_an_object_is_fetched_once_for_all_jobs_of_a_host(bucket: CountingBucket, tmp_path: Path) -> None:
    stored = bucket.put_bytes("rows", b"tokens")
    for job in ("a", "b"):
        cache_of(tmp_path).fetch(bucket, stored, tmp_path / job / "rows")
        assert (tmp_path / job / "rows").read_bytes() == b"tokens"
    assert bucket.reads == 1


def test_a_fetch_that_is_repeated_finds_its_way(bucket: CountingBucket, tmp_path: Path) -> None:
    stored = bucket.put_bytes("rows", b"tokens")
    cache = cache_of(tmp_path)
    for _ in range(2):
        cache.fetch(bucket, stored, tmp_path / "rows")
    assert (tmp_path / "rows").read_bytes() == b"tokens"
    assert [path.name for path in (cache.folder / "objects").iterdir()] == [stored.sha256]


def test_workers_whose_process_ids_are_alike_do_not_write_to_the_same_name(
    bucket: CountingBucket, tmp_path: Path
) -> None:
    stored = bucket.put_bytes("rows", b"tokens")
    cache = cache_of(tmp_path)
    theirs = cache.folder / "objects" / f"{stored.sha256}.{os.getpid()}"
    theirs.parent.mkdir(parents=True)
    theirs.write_bytes(b"half")
    cache.fetch(bucket, stored, tmp_path / "rows")
    assert theirs.read_bytes() == b"half"
    assert (theirs.parent / stored.sha256).read_bytes() == b"tokens"


def test_what_two_learn_of_a_hosts_files_is_remembered_of_both(tmp_path: Path) -> None:
    memory = tmp_path / "base-hashes.json"
    theirs = memory.with_suffix(f".{os.getpid()}")
    theirs.write_text("half")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: remember_hashes(memory, {f"file-{n}": f"{n}"}), range(64)))
    assert known_hashes(memory) == {f"file-{n}": f"{n}" for n in range(64)}
    assert theirs.read_text() == "half"
    assert {path.name for path in tmp_path.iterdir()} == {memory.name, theirs.name, "base-hashes.lock"}


@pytest.mark.parametrize("content", [b'{"half', b"[]", b"\xff"])
def test_hashes_that_cannot_be_read_are_learnt_anew(content: bytes, tmp_path: Path) -> None:
    base = tmp_path / "models" / "org" / "base"
    base.mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (base / name).write_bytes(WEIGHTS)
    cache = cache_of(tmp_path)
    cache.folder.mkdir()
    (cache.folder / "base-hashes.json").write_bytes(content)
    models = BaseModels(registered_dir=tmp_path / "models", cache=cache, hub_token=None)
    with models.whole("org/base", "main") as whole:
        assert whole.revision.startswith("sha256-")
    assert set(known_hashes(cache.folder / "base-hashes.json").values()) == {WEIGHTS_SHA256}


def test_a_kept_object_that_the_disk_has_spoilt_is_fetched_again(bucket: CountingBucket, tmp_path: Path) -> None:
    stored = bucket.put_bytes("rows", b"tokens")
    cache = cache_of(tmp_path)
    cache.fetch(bucket, stored, tmp_path / "a")
    (tmp_path / "a").unlink()
    (cache.folder / "objects" / stored.sha256).write_bytes(b"tokenz")
    cache.fetch(bucket, stored, tmp_path / "b")
    assert (tmp_path / "b").read_bytes() == b"tokens"
    assert bucket.reads == 2


def test_an_object_of_wrong_bytes_is_refused_and_not_kept(bucket: CountingBucket, tmp_path: Path) -> None:
    stored = bucket.put_bytes("rows", b"tokens")
    meant = StoredObject(key="rows", size=stored.size, sha256="0" * 64)
    with pytest.raises(ArtifactCorrupt):
        cache_of(tmp_path).fetch(bucket, meant, tmp_path / "a")
    assert not (tmp_path / "cache" / "objects").exists()


def test_the_least_recently_used_goes_first_and_a_job_keeps_what_it_has(bucket: CountingBucket, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, max_bytes=250)
    stored = [bucket.put_bytes(f"{n}", bytes([n]) * 100) for n in range(3)]
    for n in (0, 1):
        cache.fetch(bucket, stored[n], tmp_path / f"job-{n}")
        os.utime(cache.folder / "objects" / stored[n].sha256, (n, n))
    cache.fetch(bucket, stored[0], tmp_path / "again")
    cache.fetch(bucket, stored[2], tmp_path / "job-2")
    kept = {path.name for path in (cache.folder / "objects").iterdir()}
    assert kept == {stored[0].sha256, stored[2].sha256}
    assert (tmp_path / "job-1").read_bytes() == bytes([1]) * 100


def test_a_base_in_use_is_never_evicted_and_an_older_one_goes_whole(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, max_bytes=len(WEIGHTS))
    used = hub_repository(cache, "org/used", used_at=1)
    idle = hub_repository(cache, "org/idle", used_at=2)
    with cache.borrowed("org/used"):
        os.utime(cache.folder / "in-use" / "models--org--used.lock", (1, 1))
        cache.make_room()
        assert (used / "model.safetensors").read_bytes() == WEIGHTS
        assert not idle.parents[1].exists()
    cache.make_room()
    assert not used.parents[1].exists()


class Listing:
    """What `os.scandir` found, and what another worker did before anybody could look closer."""

    def __init__(self, path: Path, meanwhile: Callable[[Path], None]) -> None:
        with SCANDIR(path) as found:
            self._entries = iter(list(found))
        meanwhile(Path(path))

    def __enter__(self) -> Listing:
        return self

    def __exit__(self, *_exc: object) -> None:
        pass

    def __iter__(self) -> Listing:
        return self

    def __next__(self) -> os.DirEntry[str]:
        return next(self._entries)


@pytest.mark.parametrize("vanishing", ["blobs", f"blobs/{WEIGHTS_SHA256}", f"snapshots/{COMMIT}", "."])
def test_what_vanishes_while_room_is_made_does_no_harm(
    vanishing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = cache_of(tmp_path)
    gone = hub_repository(cache, "org/base", used_at=1).parents[1] / vanishing
    (cache.folder / "in-use" / "models--org--base.lock").unlink()

    def evict(listed: Path) -> None:
        if listed == gone.parent and gone.exists():
            gone.rename(tmp_path / "gone")

    monkeypatch.setattr(os, "scandir", lambda path: Listing(path, evict))
    monkeypatch.setattr(os, "listdir", lambda path: [entry.name for entry in Listing(path, evict)])
    cache.make_room()
    assert not gone.exists()
    assert caplog.messages == []


def test_what_cannot_be_evicted_fails_no_run_and_keeps_nothing_else(bucket: CountingBucket, tmp_path: Path) -> None:
    cache = cache_of(tmp_path, max_bytes=0)
    stubborn = cache.folder / "objects" / "a-folder"
    stubborn.mkdir(parents=True)
    os.utime(stubborn, (1, 1))
    cache.fetch(bucket, bucket.put_bytes("rows", b"tokens"), tmp_path / "rows")
    assert (tmp_path / "rows").read_bytes() == b"tokens"
    assert [path.name for path in stubborn.parent.iterdir()] == ["a-folder"]


def test_a_cache_that_cannot_be_written_fails_no_run(bucket: CountingBucket, tmp_path: Path) -> None:
    cache = cache_of(tmp_path)
    cache.folder.mkdir()
    (cache.folder / "objects").symlink_to("/proc/self")
    cache.fetch(bucket, bucket.put_bytes("rows", b"tokens"), tmp_path / "rows")
    assert (tmp_path / "rows").read_bytes() == b"tokens"


def test_a_base_is_given_back_though_a_process_forked_meanwhile_lives_on(tmp_path: Path) -> None:
    cache = cache_of(tmp_path, max_bytes=0)
    snapshot = hub_repository(cache, "org/base", used_at=1)
    with cache.borrowed("org/base"):
        forked = forked_process()
    with forked:
        cache.make_room()
    assert not snapshot.exists()


@pytest.mark.usefixtures("hub_is_away")
def test_weights_that_are_not_the_hubs_are_refused_and_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = cache_of(tmp_path)
    snapshot = hub_repository(cache, "org/base", used_at=1, content=WEIGHTS + b"!")
    monkeypatch.setattr(bases, "snapshot_download", lambda *_, **__: str(snapshot))
    models = BaseModels(registered_dir=tmp_path / "models", cache=cache, hub_token=None)
    with pytest.raises(ArtifactCorrupt), models.whole("org/base", "main"):
        raise AssertionError("unreachable")
    blob = snapshot.parents[1] / "blobs" / WEIGHTS_SHA256
    assert not blob.exists()
    blob.write_bytes(WEIGHTS)
    with models.whole("org/base", "main") as base:
        assert base.revision == COMMIT


@pytest.mark.usefixtures("hub_is_away")
def test_training_takes_the_weights_of_the_commit_whose_tokenizer_prepared_the_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cache_of(tmp_path)
    snapshot = hub_repository(cache, "org/base", used_at=1)
    asked: list[str] = []
    monkeypatch.setattr(bases, "snapshot_download", lambda *_, revision, **__: asked.append(revision) or str(snapshot))
    models = BaseModels(registered_dir=tmp_path / "models", cache=cache, hub_token=None)
    with models.tokenizer("org/base", "main") as tokenizer:
        assert tokenizer.commit == COMMIT
    with models.whole("org/base", str(tokenizer.commit)):
        assert asked == ["main", COMMIT]
