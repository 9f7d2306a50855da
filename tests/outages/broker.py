"""Redis is killed again and again, is away, or holds connections that nobody answers."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.clients import Submitted
from tests.chaos.judge import Evidence, gather
from tests.chaos.service import ServiceInTrouble
from tests.faultproxy import FaultProxy, Mode
from tests.fleet import JSONL
from tests.outages.stream import TimedPosts, under_a_stream
from tests.outages.wanted import Played, Wanted, come_to_rest, neighbours, running, spread, verdict_of, waits

KILL_EVERY_SECONDS = 10.0
POST_EVERY_SECONDS = 5.0
AFTERWARDS_SECONDS = 60.0  # posted on when the outage is over: nobody may be deaf for good
TRAINERS = 2
DOWN_START_SECONDS = 15.0  # a look every 10 s, and what a claim takes
HALF_OPEN_START_SECONDS = 45.0  # and what a bell that nobody takes holds up whoever rings it


def killed(folder: Path, wanted: Wanted) -> Played:
    """Redis flushed and killed every ten seconds under a stream of jobs."""

    def fault(service: ServiceInTrouble) -> None:
        service.redis.flush()
        service.redis.stop(signal.SIGKILL)
        service.redis.start()

    return under_a_stream(folder, wanted, every_seconds=KILL_EVERY_SECONDS, fault=fault)


def down(folder: Path, wanted: Wanted) -> Played:
    """Redis killed, and started again only after the outage."""
    with neighbours(folder, wanted) as (redis, postgres):
        service = ServiceInTrouble(folder / "state", redis, postgres, wanted.lease_seconds, TRAINERS)
        with running(service):
            posts = TimedPosts(service, service.upload(JSONL))
            redis.stop(signal.SIGKILL)
            during = posts.post_for(wanted.seconds, every_seconds=POST_EVERY_SECONDS)
            redis.start()
            after = posts.post_for(min(AFTERWARDS_SECONDS, wanted.seconds), every_seconds=POST_EVERY_SECONDS)
            come_to_rest(service)
            service.stop()
            evidence = gather(service, posts.submitted, [])
    return _played(evidence, posts, {"away": during, "back": after}, DOWN_START_SECONDS)


def half_open(folder: Path, wanted: Wanted) -> Played:
    """Connections to Redis are neither answered nor closed; then new ones work, and the old never again."""
    with contextlib.ExitStack() as ended:
        redis, postgres = ended.enter_context(neighbours(folder, wanted))
        proxy = FaultProxy(redis.port).start()
        ended.callback(proxy.stop)
        broker = {"GRAFT_BROKER_URL": redis.url.replace(str(redis.port), str(proxy.port))}
        service = ServiceInTrouble(
            folder / "state", redis, postgres, wanted.lease_seconds, TRAINERS, environment=broker
        )
        ended.enter_context(running(service))
        posts = TimedPosts(service, service.upload(JSONL))
        proxy.switch(Mode.BLACK_HOLE)
        during = posts.post_for(wanted.seconds, every_seconds=POST_EVERY_SECONDS)
        proxy.switch(Mode.HALF_OPEN)
        after = posts.post_for(min(AFTERWARDS_SECONDS, wanted.seconds), every_seconds=POST_EVERY_SECONDS)
        come_to_rest(service)
        service.stop()
        evidence = gather(service, posts.submitted, [])
    return _played(evidence, posts, {"nobody_answers": during, "new_ones_pass": after}, HALF_OPEN_START_SECONDS)


def _played(
    evidence: Evidence, posts: TimedPosts, phases: dict[str, Sequence[Submitted]], within_seconds: float
) -> Played:
    violations = verdict_of(evidence)
    violations["every POST answers 202"] = posts.refused
    by_phase = {phase: waits(evidence, submitted) for phase, submitted in phases.items()}
    violations[f"jobs start within {within_seconds:g} s"] = [
        f"{phase}, {wait}: {seconds:.1f} s"
        for phase, found in by_phase.items()
        for wait, all_seconds in found.items()
        for seconds in all_seconds
        if seconds > within_seconds
    ]
    return Played(
        figures={
            "posts": posts.figures(),
            "waited_seconds": {
                phase: {wait: spread(seconds) for wait, seconds in found.items()} for phase, found in by_phase.items()
            },
        },
        violations=violations,
    )
