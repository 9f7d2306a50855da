"""Where artifacts lie: one contract over a directory and any S3-compatible store."""

from graft_shared.buckets.base import Bucket, UploadLink, fetch, hash_file, read_back
from graft_shared.buckets.choose import open_bucket

__all__ = ["Bucket", "UploadLink", "fetch", "hash_file", "open_bucket", "read_back"]
