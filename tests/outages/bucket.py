"""The bucket goes away in the very moment of a write, at each point where the service writes to it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from graft_shared.artifacts import sha256_of
from graft_shared.buckets import Bucket
from graft_shared.buckets.s3 import S3Bucket
from graft_shared.errors import ObjectNotFound
from graft_shared.jobs import TERMINAL_STATES, Job, JobState, StoredObject
from tests.chaos.clients import SAVE_STEPS
from tests.chaos.judge import gather
from tests.chaos.service import ServiceInTrouble
from tests.faultproxy import FaultProxy, Mode
from tests.outages.stream import post_stubbornly
from tests.outages.wanted import Played, Wanted, come_to_rest, neighbours, running, verdict_of
from tests.servers import SWIFT_KEY, SWIFT_USER, SwiftServer

BUCKET = "graft"
STEPS = 2 * SAVE_STEPS + 2
# By write point: a part of the key. Its first mention in a request is the write; reading comes later.
WRITES = {
    "file": b"/files/",
    "prepared_data": b"/prepared/",
    "checkpoint": b"/checkpoints/",
    "log": b"/trainer.log",
    "adapter_file": b"/adapter/adapter_model",
    "manifest": b"/adapter/manifest.json",
}
REACHED_SECONDS = 300.0
SIDE_BY_SIDE = 2  # services; more would only wait for each other


def away(folder: Path, wanted: Wanted) -> Played:
    """The bucket refuses connections from one write on, for five minutes; one service for each write."""
    swift = SwiftServer(folder / "swift").start()
    try:
        with ThreadPoolExecutor(SIDE_BY_SIDE) as pool:
            points = dict(zip(WRITES, pool.map(lambda point: _at(point, folder, swift, wanted), WRITES), strict=True))
    finally:
        swift.stop()
    return Played(
        figures={"writes": {point: played.figures for point, played in points.items()}},
        violations={
            f"{point}: {promise}": found
            for point, played in points.items()
            for promise, found in played.violations.items()
        },
    )


def _at(point: str, folder: Path, swift: SwiftServer, wanted: Wanted) -> Played:
    with contextlib.ExitStack() as ended:
        redis, postgres = ended.enter_context(neighbours(folder / point, wanted))
        proxy = FaultProxy(swift.port).start()
        ended.callback(proxy.stop)
        service = ServiceInTrouble(
            folder / point / "state",
            redis,
            postgres,
            wanted.lease_seconds,
            1,
            preparers=1,
            environment=_settings(proxy.port),
        )
        ended.enter_context(running(service))
        proxy.trap(WRITES[point], Mode.REFUSE)
        with ThreadPoolExecutor(1) as user:
            posting = user.submit(post_stubbornly, service, steps=STEPS)
            reached = proxy.tripped.wait(REACHED_SECONDS)
            time.sleep(wanted.seconds)
            proxy.switch(Mode.PASS)
            job = posting.result()
        (job_id,) = job.ids
        before = service.get(job_id)
        seconds = come_to_rest(service)
        service.stop()
        bucket = _bucket(swift.port)
        evidence = gather(service, [job], [], bucket, away=True)
    row = evidence.jobs[job_id]
    violations = verdict_of(evidence)
    violations["the write was reached"] = [] if reached else [f"nobody wrote to {WRITES[point]!r}"]
    violations["the job succeeds once the bucket is back"] = [] if row.state is JobState.SUCCEEDED else [f"{row.error}"]
    violations["what the row names is there"] = list(missing_objects(row, bucket))
    return Played(
        figures={
            "status_at_the_end_of_the_outage": before["status"],
            "seconds_from_its_end_to_the_job's": round(seconds, 1),
            "state": row.state.value,
            "claims": sum(event["type"] == "claimed" for event in evidence.events[job_id]),
            "attempt": row.attempt,
            "failures": [e["data"]["reason"] for e in evidence.events[job_id] if e["type"] == "requeued"],
            "waited_for_the_bucket": service.logged("neighbour_waited_for"),
            "logs_not_uploaded": service.logged("log_not_uploaded"),
            "checkpoints_not_stored": service.logged("checkpoint_not_stored"),
        },
        violations=violations,
    )


def missing_objects(job: Job, bucket: Bucket) -> Iterator[str]:
    """What a job's row says of its data and its checkpoint, beside what the bucket holds; data may go when it ended."""
    prepared = [StoredObject(**job.prepared["train"])] if job.prepared else []
    saved = [job.checkpoint.object] if job.checkpoint else []
    for known in prepared + saved:
        try:
            content = bucket.open(known.key).read()
        except ObjectNotFound:
            if known in saved or job.state not in TERMINAL_STATES:
                yield f"{known.key} is missing"
            continue
        if (len(content), sha256_of(content)) != (known.size, known.sha256):
            yield f"{known.key} is not what the row says"


def _settings(port: int) -> dict[str, Any]:
    return {
        "GRAFT_S3_BUCKET": BUCKET,
        "GRAFT_S3_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "GRAFT_S3_ACCESS_KEY_ID": SWIFT_USER,
        "GRAFT_S3_SECRET_ACCESS_KEY": SWIFT_KEY,
    }


def _bucket(port: int) -> S3Bucket:
    return S3Bucket(
        BUCKET,
        endpoint_url=f"http://127.0.0.1:{port}",
        region="us-east-1",
        access_key_id=SWIFT_USER,
        secret_access_key=SWIFT_KEY,
    )
