"""An earlier adapter on its way to a worker: a bucket that fails half way costs another try, and no run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, cast

import pytest

from graft_shared.artifacts import adapter_prefix
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.errors import ArtifactCorrupt, BucketUnavailable, InvalidParameter
from graft_worker.supervisor.adapters import fetch_adapter
from graft_worker.supervisor.neighbours import Neighbours
from tests.api_service import ADAPTER, ApiService, make_service, migrated_database


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiService]:
    template = migrated_database(tmp_path / "template")
    service = make_service(tmp_path, template)
    yield service
    service.database.close()


class Interrupted:
    """A bucket that is away when it is asked for the `at`-th time."""

    def __init__(self, bucket: Any, at: int) -> None:
        self._bucket, self._left = bucket, at

    def open(self, key: str) -> BinaryIO:
        self._left -= 1
        if self._left == 0:
            raise BucketUnavailable(reason="it restarts")
        return cast(DirectoryBucket, self._bucket).open(key)


def neighbours(api: ApiService, bucket: Any) -> Neighbours:
    return cast(Neighbours, SimpleNamespace(leases=api.leases, bucket=bucket))


@pytest.mark.parametrize("at", [1, 2, 3])
def test_what_was_broken_off_is_fetched_whole_by_the_next_try(api: ApiService, tmp_path: Path, at: int) -> None:
    job = api.succeed(api.new_job()["id"])
    folder, here = tmp_path / "adapter", neighbours(api, Interrupted(api.bucket, at))
    with pytest.raises(BucketUnavailable):
        fetch_adapter("default", job.id, folder, here)
    fetch_adapter("default", job.id, folder, here)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == ADAPTER


def test_another_tenants_or_a_spoilt_adapter_is_not_fetched(api: ApiService, tmp_path: Path) -> None:
    job = api.succeed(api.new_job()["id"])
    with pytest.raises(InvalidParameter, match="gone"):
        fetch_adapter("other", job.id, tmp_path / "foreign", neighbours(api, api.bucket))
    api.bucket.put_bytes(adapter_prefix("default", job.id, job.epoch) + next(iter(ADAPTER)), b"spoilt")
    with pytest.raises(ArtifactCorrupt):
        fetch_adapter("default", job.id, tmp_path / "spoilt", neighbours(api, api.bucket))
