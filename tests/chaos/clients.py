"""Users: they submit until they are answered, cancel now and then, and remember what they were told."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from graft_shared.clock import boottime
from tests.chaos.service import ServiceInTrouble
from tests.fleet import JSONL

PAUSE_SECONDS = 0.3
STEP_SECONDS = 0.05
SAVE_STEPS = 5
CANCELLED_SHARE = 0.04
TWICE_SHARE = 0.05  # posted again with the same key after it was accepted


@dataclass
class Submitted:
    """What a client knows of a job of its."""

    key: str
    steps: int
    ids: set[str] = field(default_factory=set)  # every id that it was given for this key: one, if all is well
    cancelled_at: float | None = None  # CLOCK_BOOTTIME when it was told that the job is cancelled


@dataclass
class Clients:
    """Keep some jobs waiting until there is nothing more to do, so that every fault has something to hit."""

    service: ServiceInTrouble
    seed: int
    backlog: int
    wanted: int
    go_on: Callable[[], bool]  # whether to submit more than `wanted`
    webhook_url: str | None = None
    submitted: list[Submitted] = field(default_factory=list)
    longest_post_seconds: float = 0.0
    posts_repeated: int = 0
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def start(self) -> None:
        """Begin to submit and to cancel."""
        file_id = self.service.upload(JSONL)
        for target in (lambda: self._submit(file_id), self._cancel):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self) -> None:
        """Wait until the last job has been submitted; then nobody cancels any more."""
        self._threads[0].join()
        self._end.set()
        self._threads[1].join()

    def _submit(self, file_id: str) -> None:
        draw = random.Random(f"{self.seed}-jobs")
        while len(self.submitted) < self.wanted or self.go_on():
            if self._waiting() >= self.backlog:
                time.sleep(PAUSE_SECONDS)
                continue
            job = Submitted(key=f"key-{len(self.submitted)}", steps=draw.randint(40, 200))
            job.ids.add(self._post(job, file_id))
            self.submitted.append(job)
            if draw.random() < TWICE_SHARE:
                job.ids.add(self._post(job, file_id))

    def _waiting(self) -> int:
        counts = self._ask("GET", "/jobs", params={"status": "queued", "limit": 100})
        preparing = self._ask("GET", "/jobs", params={"status": "validating_files", "limit": 100})
        return len(counts.json()["data"]) + len(preparing.json()["data"])

    def _post(self, job: Submitted, file_id: str) -> str:
        metadata = {
            "witness": str(self.service.state_dir),
            "steps": str(job.steps),
            "step_seconds": str(STEP_SECONDS),
            "save_steps": str(SAVE_STEPS),
        }
        spec = {"base_model": "graft/tiny", "dataset": {"file": file_id}, "metadata": metadata}
        spec |= {"webhook_url": self.webhook_url} if self.webhook_url else {}
        began = time.monotonic()
        answer = self._ask("POST", "/jobs", json=spec, headers={"idempotency-key": job.key})
        self.longest_post_seconds = max(self.longest_post_seconds, time.monotonic() - began)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def _cancel(self) -> None:
        draw = random.Random(f"{self.seed}-cancels")
        seen = 0
        while not self._end.wait(PAUSE_SECONDS):
            for job in self.submitted[seen:]:
                seen += 1
                if draw.random() < CANCELLED_SHARE:
                    self._end.wait(draw.uniform(0, 5))
                    self._cancel_one(job)

    def _cancel_one(self, job: Submitted) -> None:
        (job_id, *_) = job.ids
        self._ask("POST", f"/jobs/{job_id}/cancel")
        while not self._end.wait(PAUSE_SECONDS):
            status = self._ask("GET", f"/jobs/{job_id}").json()["status"]
            if status == "cancelled":
                job.cancelled_at = boottime()
            if status in ("cancelled", "succeeded", "failed"):
                return

    def _ask(self, method: str, path: str, **more: Any) -> httpx.Response:
        """Ask until there is an answer that is not about the service's own trouble."""
        while True:
            try:
                answer = self._http.request(method, self.service.url + path, **more)
                if answer.status_code < 500:
                    return answer
            except httpx.TransportError:
                pass
            self.posts_repeated += method == "POST"
            time.sleep(PAUSE_SECONDS)
