"""Any S3-compatible store as bucket, by endpoint and keys."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, cast

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from graft_shared.artifacts import sha256_of
from graft_shared.buckets.base import UploadLink, hash_file
from graft_shared.errors import BucketUnavailable, ObjectNotFound
from graft_shared.jobs import StoredObject

# Stores other than AWS reject or ignore the newer checksum headers; our own sha256 stands in row and manifest.
_CONFIG = Config(
    request_checksum_calculation="when_required",
    response_checksum_validation="when_required",
    signature_version="s3v4",
    s3={"addressing_style": "path"},
    connect_timeout=5,
    read_timeout=60,
    retries={"max_attempts": 4, "mode": "standard"},
)
# Who asks whether an API is ready waits ten seconds for all of its neighbours; one that says nothing is away.
_PING = _CONFIG.merge(Config(connect_timeout=3, read_timeout=3, retries={"total_max_attempts": 1}))
_MOST_UNFINISHED = 1000  # uploads that are looked at in one go
_HOME_REGION = "us-east-1"  # the one region of AWS where a bucket is made by leaving its region out
# What servers that know no regions say to a bucket's region.
_REGION_REFUSED = (
    "IllegalLocationConstraintException",
    "InvalidArgument",
    "InvalidLocationConstraint",
    "InvalidRequest",
    "MalformedXML",
    "NotImplemented",
)


class S3Bucket:
    """Objects in one bucket of an S3-compatible store."""

    def __init__(
        self,
        name: str,
        *,
        endpoint_url: str | None,
        public_endpoint_url: str | None = None,
        region: str,
        access_key_id: str | None,
        secret_access_key: str | None,
    ) -> None:
        self._name = name
        self._region = region

        def client(endpoint: str | None, config: Config = _CONFIG) -> Any:
            return boto3.client(
                "s3",
                endpoint_url=endpoint,
                region_name=region,
                aws_access_key_id=access_key_id,
                aws_secret_access_key=secret_access_key,
                config=config,
            )

        self._is_there = False
        self._client = client(endpoint_url)
        self._quick_client = cache(lambda: client(endpoint_url, _PING))  # most processes never ask
        self._public = client(public_endpoint_url) if public_endpoint_url else self._client

    def put_file(self, key: str, path: Path) -> StoredObject:
        """Upload a file, in parts where it is large."""
        size, sha256 = hash_file(path)
        with self._writing(key):
            self._client.upload_file(str(path), self._name, key, ExtraArgs={"Metadata": {"sha256": sha256}})
        return StoredObject(key=key, size=size, sha256=sha256)

    def put_bytes(self, key: str, data: bytes) -> StoredObject:
        """Upload a few bytes."""
        sha256 = sha256_of(data)
        with self._writing(key):
            self._client.put_object(Bucket=self._name, Key=key, Body=data, Metadata={"sha256": sha256})
        return StoredObject(key=key, size=len(data), sha256=sha256)

    def open(self, key: str) -> BinaryIO:
        """Open an object for reading, as a stream."""
        with _translated(key):
            body = self._client.get_object(Bucket=self._name, Key=key)["Body"]
        return cast(BinaryIO, _TranslatedStream(body, key))

    def size(self, key: str) -> int:
        """The size of an object in bytes."""
        with _translated(key):
            return int(self._client.head_object(Bucket=self._name, Key=key)["ContentLength"])

    def list(self, prefix: str) -> Iterator[str]:
        """All keys that begin with `prefix`, in order."""
        with _translated(prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._name, Prefix=prefix)
            for page in pages:
                yield from (item["Key"] for item in page.get("Contents", []))

    def delete(self, key: str) -> None:
        """Remove an object."""
        with _translated(key):
            self._client.delete_object(Bucket=self._name, Key=key)

    def remove_unfinished(self, *, older_than: timedelta) -> int:
        """Abort uploads in parts that nobody completed; their parts are listed nowhere, and paid for."""
        began_before, removed = datetime.now(UTC) - older_than, 0
        with _translated(self._name):
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=self._name, PaginationConfig={"MaxItems": _MOST_UNFINISHED}
            )
            for upload in [upload for page in pages for upload in page.get("Uploads", [])]:
                if upload["Initiated"] < began_before:
                    ids = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                    with suppress(self._client.exceptions.NoSuchUpload):  # another sweeper was first
                        self._client.abort_multipart_upload(Bucket=self._name, **ids)
                        removed += 1
        return removed

    def presign(self, key: str, *, expires: timedelta, base_url: str) -> str:
        """A presigned link on the public endpoint; the API's own address is not needed."""
        target = {"Bucket": self._name, "Key": key}
        return str(
            self._public.generate_presigned_url("get_object", Params=target, ExpiresIn=int(expires.total_seconds()))
        )

    def presign_upload(self, object: StoredObject, *, expires: timedelta, base_url: str) -> UploadLink:
        """A presigned link on the public endpoint; length and checksum are signed: no other bytes go with it."""
        self._ensure()
        checksum = base64.b64encode(bytes.fromhex(object.sha256)).decode()
        target = {"Bucket": self._name, "Key": object.key, "ContentLength": object.size, "ChecksumSHA256": checksum}
        url = self._public.generate_presigned_url("put_object", Params=target, ExpiresIn=int(expires.total_seconds()))
        return UploadLink(url=str(url), headers={"content-length": str(object.size), "x-amz-checksum-sha256": checksum})

    def ping(self) -> None:
        """Look at the bucket; create it when it is missing."""
        self._is_there = False
        self._ensure(self._quick_client())

    def uri(self, key: str) -> str:
        """`s3://bucket/key`."""
        return f"s3://{self._name}/{key}"

    @contextmanager
    def _writing(self, key: str) -> Iterator[None]:
        self._ensure()
        try:
            with _translated(key):
                yield
        except BucketUnavailable as error:
            if _code_of(error) == "NoSuchBucket":
                self._is_there = False  # it has been removed since: the next try creates it again
            raise

    def _ensure(self, client: Any = None) -> None:
        """Create the bucket when it is missing; looked at once, before the first write."""
        if self._is_there:
            return
        try:
            with _translated(self._name):
                (client or self._client).head_bucket(Bucket=self._name)
        except ObjectNotFound:
            self._create()
        except BucketUnavailable as error:
            if _code_of(error) != "403":
                raise
            self._check_refusal()
        self._is_there = True

    def _check_refusal(self) -> None:
        """Tell keys that may not look at the bucket, which is fine, from wrong ones: an answer to HEAD has no body."""
        try:
            with _translated(self._name):
                self._client.list_objects_v2(Bucket=self._name, MaxKeys=1)
        except BucketUnavailable as error:
            if _code_of(error) != "AccessDenied":
                raise

    def _create(self) -> None:
        """Create the bucket in its region; where the server knows no regions, without one."""
        if self._region != _HOME_REGION:
            try:
                return self._create_with({"CreateBucketConfiguration": {"LocationConstraint": self._region}})
            except BucketUnavailable as error:
                if _code_of(error) not in _REGION_REFUSED:
                    raise
        return self._create_with({})

    def _create_with(self, more: dict[str, Any]) -> None:
        with _translated(self._name), suppress(self._client.exceptions.BucketAlreadyOwnedByYou):
            self._client.create_bucket(Bucket=self._name, **more)  # another process may be doing the same


class _TranslatedStream:
    """A streaming body whose network errors leave as BucketUnavailable."""

    def __init__(self, body: Any, key: str) -> None:
        self._body = body
        self._key = key

    def read(self, size: int | None = None) -> bytes:
        with _translated(self._key):
            return bytes(self._body.read(size))

    def __enter__(self) -> _TranslatedStream:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.close()

    def close(self) -> None:
        self._body.close()


@contextmanager
def _translated(key: str) -> Iterator[None]:
    try:
        yield
    except ClientError as error:
        if _code_of(error) in ("404", "NoSuchKey", "NotFound"):
            raise ObjectNotFound(key=key) from error
        raise BucketUnavailable(reason=str(error)) from error
    except (BotoCoreError, boto3.exceptions.Boto3Error, OSError) as error:
        raise BucketUnavailable(reason=str(error)) from error


def _code_of(error: BaseException | None) -> str:
    """The server's word for what went wrong, from an error or from what it was raised from; empty without one."""
    while error is not None and not isinstance(error, ClientError):
        error = error.__cause__ or error.__context__
    return "" if error is None else str(error.response.get("Error", {}).get("Code", ""))
