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
    tenant: str = "default"
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
    refused_by_quota: int = 0
    _end: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _files: dict[str, str] = field(default_factory=dict)  # of each tenant
    _http: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=30))

    def start(self) -> None:
        """Begin to submit and to cancel."""
        for tenant, key in self.service.keys.items():
            with httpx.Client(base_url=self.service.url, timeout=30, headers=_bearer(key)) as http:
                self._files[tenant] = http.post("/files", files={"file": ("rows.jsonl", JSONL)}).json()["id"]
        for target in (self._submit, self._cancel):
            thread = threading.Thread(target=target, daemon=True)
            thread.start()
            self._threads.append(thread)

    def join(self) -> None:
        """Wait until the last job has been submitted; then nobody cancels any more."""
        self._threads[0].join()
        self._end.set()
        self._threads[1].join()

    def _submit(self) -> None:
        draw = random.Random(f"{self.seed}-jobs")
        while len(self.submitted) < self.wanted or self.go_on():
            if self._waiting() >= self.backlog:
                time.sleep(PAUSE_SECONDS)
                continue
            tenant = draw.choice(list(self.service.keys))
            job = Submitted(key=f"key-{len(self.submitted)}", steps=draw.randint(40, 200), tenant=tenant)
            job.ids.add(self._post(job))
            self.submitted.append(job)
            if draw.random() < TWICE_SHARE:
                job.ids.add(self._post(job))

    def _waiting(self) -> int:
        return sum(
            len(self._ask(tenant, "GET", "/jobs", params={"status": status, "limit": 100}).json()["data"])
            for tenant in self.service.keys
            for status in ("queued", "validating_files")
        )

    def _post(self, job: Submitted) -> str:
        metadata = {
            "witness": str(self.service.state_dir),
            "steps": str(job.steps),
            "step_seconds": str(STEP_SECONDS),
            "save_steps": str(SAVE_STEPS),
        }
        spec = {"base_model": "graft/tiny", "dataset": {"file": self._files[job.tenant]}, "metadata": metadata}
        spec |= {"webhook_url": self.webhook_url + job.tenant} if self.webhook_url else {}
        began = time.monotonic()
        while True:
            answer = self._ask(job.tenant, "POST", "/jobs", json=spec, key=job.key)
            if answer.status_code != 429:
                break
            assert answer.json()["error"]["code"] == "quota_exceeded", answer.text
            self.refused_by_quota += 1
            time.sleep(PAUSE_SECONDS)
            began = time.monotonic()
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
        self._ask(job.tenant, "POST", f"/jobs/{job_id}/cancel")
        while not self._end.wait(PAUSE_SECONDS):
            status = self._ask(job.tenant, "GET", f"/jobs/{job_id}").json()["status"]
            if status == "cancelled":
                job.cancelled_at = boottime()
            if status in ("cancelled", "succeeded", "failed"):
                return

    def _ask(self, tenant: str, method: str, path: str, key: str | None = None, **more: Any) -> httpx.Response:
        """Ask until there is an answer that is not about the service's own trouble; `key` is for idempotency."""
        headers = _bearer(self.service.keys[tenant]) | ({"idempotency-key": key} if key else {})
        while True:
            try:
                answer = self._http.request(method, self.service.url + path, headers=headers, **more)
                if answer.status_code < 500:
                    return answer
            except httpx.TransportError:
                pass
            self.posts_repeated += method == "POST"
            time.sleep(PAUSE_SECONDS)


def _bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}
