"""The bucket's contract, on a directory and on a real S3 server."""

from __future__ import annotations

import itertools
import os
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from graft_shared.artifacts import sha256_of
from graft_shared.buckets import Bucket, fetch, hash_file, read_back
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.buckets.s3 import _CONFIG, S3Bucket
from graft_shared.errors import ArtifactCorrupt, BucketUnavailable, ObjectNotFound
from graft_shared.jobs import StoredObject
from tests.fakes.s3 import FakeS3, fake_s3
from tests.servers import SWIFT_KEY, SWIFT_USER
from tests.waiting import free_port, wait_until

_numbers = itertools.count()


@dataclass(frozen=True)
class S3Server:
    """Where the S3 half of the contract is tried: our Swift, or the server that `make test-s3` names."""

    endpoint_url: str
    access_key: str = SWIFT_USER
    secret_key: str = SWIFT_KEY
    region: str = "us-east-1"
    run: str = field(default_factory=lambda: secrets.token_hex(4))

    def bucket(self, name: str) -> S3Bucket:
        return S3Bucket(
            f"graft-test-{self.run}-{name}",
            endpoint_url=self.endpoint_url,
            region=self.region,
            access_key_id=self.access_key,
            secret_access_key=self.secret_key,
        )

    def remove(self, bucket: S3Bucket) -> None:
        """Remove a bucket behind its back, as an operator might."""
        for key in bucket.list(""):
            bucket.delete(key)
        self.client().delete_bucket(Bucket=self.name_of(bucket))

    def client(self) -> Any:
        keys = {"aws_access_key_id": self.access_key, "aws_secret_access_key": self.secret_key}
        return boto3.client("s3", endpoint_url=self.endpoint_url, region_name=self.region, config=_CONFIG, **keys)

    @staticmethod
    def name_of(bucket: Bucket) -> str:
        return bucket.uri("").removeprefix("s3://").rstrip("/")


@pytest.fixture(scope="module")
def s3(request: pytest.FixtureRequest) -> S3Server:
    named = os.environ.get("GRAFT_TEST_S3_ENDPOINT")
    if not named:
        return S3Server(request.getfixturevalue("swift").endpoint_url)
    keys = (os.environ["GRAFT_TEST_S3_ACCESS_KEY"], os.environ["GRAFT_TEST_S3_SECRET_KEY"])
    return S3Server(named, *keys, os.environ.get("GRAFT_TEST_S3_REGION") or "us-east-1")


@pytest.fixture(params=["directory", "s3"])
def bucket(request: pytest.FixtureRequest, tmp_path: Path) -> Bucket:
    made: dict[str, Callable[[], Bucket]] = {
        "directory": lambda: DirectoryBucket(tmp_path / "bucket"),
        "s3": lambda: request.getfixturevalue("s3").bucket(str(next(_numbers))),
    }
    opened = made[request.param]()
    opened.ping()
    return opened


def test_what_is_put_reads_back_with_its_size_and_sha256(bucket: Bucket, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"graft" * 300_000)
    stored = bucket.put_file("tenants/t/a.bin", path)
    assert (stored.size, stored.sha256) == hash_file(path)
    assert bucket.size("tenants/t/a.bin") == stored.size
    read_back(bucket, stored)
    fetch(bucket, stored, tmp_path / "new" / "copy")
    assert (tmp_path / "new" / "copy").read_bytes() == path.read_bytes()


def test_putting_a_key_again_replaces_the_object_whole(bucket: Bucket) -> None:
    bucket.put_bytes("a/b", b"a long first version")
    stored = bucket.put_bytes("a/b", b"short")
    assert stored.sha256 == sha256_of(b"short")
    assert bucket.open("a/b").read() == b"short"


def test_an_unknown_key_is_not_found(bucket: Bucket) -> None:
    with pytest.raises(ObjectNotFound):
        bucket.open("no/such/key")
    with pytest.raises(ObjectNotFound):
        bucket.size("no/such/key")
    bucket.delete("no/such/key")


def test_keys_are_listed_by_prefix_in_order(bucket: Bucket) -> None:
    for key in ("jobs/b", "jobs/a", "jobs/a2/x", "files/c"):
        bucket.put_bytes(key, b".")
    assert list(bucket.list("jobs/")) == ["jobs/a", "jobs/a2/x", "jobs/b"]
    bucket.delete("jobs/a")
    assert list(bucket.list("jobs/a")) == ["jobs/a2/x"]
    assert list(bucket.list("jobs/a2/")) == ["jobs/a2/x"]
    assert list(bucket.list("no/such/")) == []


def test_what_a_dead_writer_left_is_removed_once_it_is_old_and_objects_are_not(bucket: Bucket, s3: S3Server) -> None:
    bucket.put_bytes("whole", b"object")
    leave_unfinished(bucket, s3)
    assert bucket.remove_unfinished(older_than=timedelta(days=1)) == 0
    wait_until(lambda: bucket.remove_unfinished(older_than=timedelta(0)) == 1, what="its age of some moments")
    assert bucket.remove_unfinished(older_than=timedelta(0)) == 0
    assert list(bucket.list("")) == ["whole"]


def leave_unfinished(bucket: Bucket, s3: S3Server) -> None:
    """Die in the middle of writing an object."""
    if isinstance(bucket, DirectoryBucket):
        with pytest.raises(ZeroDivisionError), pytest.MonkeyPatch.context() as patched:
            patched.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process tidies nothing up
            bucket._put("half", (bytes([1 // left]) for left in (1, 0)))
    else:
        s3.client().create_multipart_upload(Bucket=s3.name_of(bucket), Key="half")


def test_a_corrupt_object_is_noticed_and_not_kept(bucket: Bucket, tmp_path: Path) -> None:
    stored = bucket.put_bytes("a", b"right")
    meant = StoredObject(key=stored.key, size=stored.size, sha256=sha256_of(b"wrong"))
    with pytest.raises(ArtifactCorrupt):
        read_back(bucket, meant)
    with pytest.raises(ArtifactCorrupt):
        fetch(bucket, meant, tmp_path / "copy")
    assert not (tmp_path / "copy").exists()
    assert list(tmp_path.glob("copy*")) == []


def test_a_bucket_is_created_when_it_is_missing_by_ping_and_by_the_first_write(s3: S3Server) -> None:
    s3.bucket("by-write").put_bytes("a", b"b")
    bucket = s3.bucket("by-ping")
    bucket.ping()
    bucket.ping()
    bucket.put_bytes("a", b"b")


def test_a_bucket_that_was_removed_is_created_again_by_the_write_after_the_one_that_failed(
    s3: S3Server, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"graft")
    for name, write in (("bytes", lambda b: b.put_bytes("a", b"c")), ("file", lambda b: b.put_file("a", path))):
        bucket = s3.bucket(f"removed-{name}")
        write(bucket)
        s3.remove(bucket)
        with pytest.raises(BucketUnavailable):
            write(bucket)
        read_back(bucket, write(bucket))


def test_wrong_keys_are_not_taken_for_keys_that_may_not_look(s3: S3Server) -> None:
    s3.bucket("guarded").ping()
    with pytest.raises(BucketUnavailable):
        replace(s3, secret_key="wrong").bucket("guarded").ping()


def test_keys_that_may_write_and_not_look_are_enough() -> None:
    with fake_s3(FakeS3(head=403)) as fake:
        S3Server(fake.url).bucket("narrow").put_bytes("a", b"b")
        assert fake.objects == {"a": b"b"}
        assert fake.created_with == []


def test_a_bucket_outside_the_home_region_is_made_in_its_region() -> None:
    for region, named in (("eu-central-1", True), ("us-east-1", False)):
        with fake_s3(FakeS3()) as fake:
            S3Server(fake.url, region=region).bucket("far").ping()
            (body,) = fake.created_with
            assert (f"<LocationConstraint>{region}</LocationConstraint>" in body) is named


def test_a_server_that_knows_no_regions_gets_a_bucket_without_one() -> None:
    with fake_s3(FakeS3(creation_errors={True: "InvalidLocationConstraint"})) as fake:
        S3Server(fake.url, region="eu-central-1").bucket("far").ping()
        assert fake.created_with == [""]
    with fake_s3(FakeS3(creation_errors={True: "TooManyBuckets"})) as fake:
        with pytest.raises(BucketUnavailable, match="TooManyBuckets"):
            S3Server(fake.url, region="eu-central-1").bucket("far").ping()
        assert fake.created_with == []


def test_a_presigned_link_of_s3_needs_no_key_and_can_not_be_changed(s3: S3Server) -> None:
    bucket = s3.bucket("links")
    bucket.ping()
    bucket.put_bytes("a/b c", b"hello")
    link = bucket.presign("a/b c", expires=timedelta(minutes=1), base_url="http://unused")
    assert httpx.get(link).content == b"hello"
    assert httpx.get(link.replace("X-Amz-Expires=60", "X-Amz-Expires=6000")).status_code == 403


def test_a_signed_link_of_a_directory_holds_for_one_key_and_for_a_while(tmp_path: Path) -> None:
    bucket = DirectoryBucket(tmp_path)
    link = httpx.URL(bucket.presign("a/b", expires=timedelta(minutes=1), base_url="http://api/"))
    expires, signature = int(link.params["expires"]), link.params["signature"]
    assert link.path == "/objects/a/b"
    assert bucket.is_signed("a/b", expires, signature)
    assert DirectoryBucket(tmp_path).is_signed("a/b", expires, signature)
    assert not bucket.is_signed("a/c", expires, signature)
    assert not bucket.is_signed("a/b", expires + 1, signature)
    past = httpx.URL(bucket.presign("a/b", expires=timedelta(seconds=-1), base_url="http://api"))
    assert int(past.params["expires"]) <= time.time()
    assert not bucket.is_signed("a/b", int(past.params["expires"]), past.params["signature"])


@pytest.mark.parametrize("key", ["../secret", "a/../../secret", "/etc/passwd", "a//b", ""])
def test_no_key_leads_out_of_the_directory(tmp_path: Path, key: str) -> None:
    (tmp_path / "secret").write_text("x")
    with pytest.raises(ObjectNotFound):
        DirectoryBucket(tmp_path / "bucket").open(key)


def test_a_store_that_is_away_is_unavailable_not_wrong() -> None:
    bucket = S3Server(f"http://127.0.0.1:{free_port()}").bucket("away")
    with pytest.raises(BucketUnavailable):
        bucket.put_bytes("a", b"b")
    with pytest.raises(BucketUnavailable):
        bucket.ping()
