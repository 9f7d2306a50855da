"""`python -m graft_shared.buckets.gate`: wait until the bucket answers, made when it is missing, or say why not."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable

from graft_shared.buckets.base import Bucket
from graft_shared.buckets.choose import open_bucket
from graft_shared.errors import BucketUnavailable
from graft_shared.logs import configure_logging, log_event
from graft_shared.settings import SharedSettings

PATIENCE_SECONDS = 90.0  # a store beside us starts within seconds; wrong keys or a wrong address never come right
PAUSE_SECONDS = 1.0

logger = logging.getLogger(__name__)


def wait_for_bucket(
    bucket: Bucket,
    *,
    seconds: float = PATIENCE_SECONDS,
    clock: Callable[[], float] = time.monotonic,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """Return once the bucket answers.

    Raises:
        BucketUnavailable: It did not within so many seconds; says what it said last.
    """
    until = clock() + seconds
    while True:
        try:
            return bucket.ping()
        except BucketUnavailable:
            if clock() + PAUSE_SECONDS > until:
                raise
        pause(PAUSE_SECONDS)


def main() -> None:
    """Wait for the configured bucket."""
    settings = SharedSettings()
    configure_logging(settings.log_format)
    bucket = open_bucket(settings)
    name = settings.s3_bucket or settings.bucket_dir
    try:
        wait_for_bucket(bucket)
    except BucketUnavailable as error:
        where = settings.s3_endpoint_url or "AWS"
        sys.exit(
            f"error: the bucket '{name}' at {where} did not answer within {PATIENCE_SECONDS:.0f} s: {error.message}\n"
            "Is the store running, and are S3_ENDPOINT_URL, S3_REGION and the keys right?"
        )
    log_event(logger, "bucket_answered", bucket=str(name))


if __name__ == "__main__":
    main()
