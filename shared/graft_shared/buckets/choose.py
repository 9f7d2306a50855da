"""Which bucket the settings ask for."""

from __future__ import annotations

from graft_shared.buckets.base import Bucket
from graft_shared.buckets.directory import DirectoryBucket
from graft_shared.settings import SharedSettings


def open_bucket(settings: SharedSettings) -> Bucket:
    """Return the S3 bucket that the settings name, else the directory under `state_dir`."""
    if settings.s3_bucket is None:
        return DirectoryBucket(settings.bucket_dir)
    from graft_shared.buckets.s3 import S3Bucket  # boto3 takes half a second to import

    secret = settings.s3_secret_access_key
    return S3Bucket(
        settings.s3_bucket,
        endpoint_url=settings.s3_endpoint_url,
        public_endpoint_url=settings.s3_public_endpoint_url,
        region=settings.s3_region,
        access_key_id=settings.s3_access_key_id,
        secret_access_key=secret.get_secret_value() if secret else None,
    )
