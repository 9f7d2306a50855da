"""The SDK: one method per route of the service."""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self
from urllib.parse import quote

import httpx

from graft_client.download import download_adapter
from graft_client.errors import GraftAPIError, NotJson, WaitedTooLong
from graft_client.job import TERMINAL_STATUSES, Job
from graft_client.transport import Transport, decoded

DEFAULT_URL = "http://127.0.0.1:8000"
UPLOAD_TIMEOUT_SECONDS = 600.0  # the service reads and checks every row before it answers
CHUNK_BYTES = 1024 * 1024  # read from a file at once
MOST_FILES_LOOKED_AT = 1000  # for one that is there already: ten pages, and no more waiting than an upload's
REPORT_POLL_SECONDS = 1.0
WATCH_PATIENCE_SECONDS = 60.0  # a watcher outlives a restart of the service

Document = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a watcher sees at one moment: the job, and the events since the last look."""

    job: Job
    events: tuple[Document, ...]

    @property
    def is_last(self) -> bool:
        """Whether the job has ended."""
        return self.job["status"] in TERMINAL_STATUSES


class GraftClient:
    """Talks to one Graft service; answers are the HTTP contract's documents, as dicts; a Job knows its service.

    Every method raises GraftAPIError when the service refuses and ServiceUnreachable when nothing answers.

    Args:
        base_url: Where the service listens.
        api_key: Sent as a bearer token.
        timeout: Seconds for one exchange.
        patience_seconds: How long one call keeps trying when the service does not answer or is busy.
        transport: A ready Transport instead of one made from the other arguments.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        api_key: str | None = None,
        *,
        timeout: float = 60.0,
        patience_seconds: float = 30.0,
        transport: Transport | None = None,
    ) -> None:
        self._transport = transport or Transport(
            base_url, api_key=api_key, timeout=timeout, patience_seconds=patience_seconds
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections."""
        self._transport.close()

    @property
    def base_url(self) -> str:
        """Where the service listens."""
        return self._transport.base_url

    def submit(self, spec: Mapping[str, Any], *, idempotency_key: str | None = None) -> Job:
        """Post a job and return it.

        Safe to repeat: the same key and body give the same job. Without a key one is made for this call, so its own
        tries over a bad connection cannot post twice.
        """
        key = idempotency_key or f"graft-{uuid.uuid4()}"
        answer: Document = self._transport.json(
            "POST", "/jobs", json=_sendable(spec), headers={"idempotency-key": key, "accept": "application/json"}
        )
        return Job(answer, self)

    def get(self, job_id: str) -> Job:
        """Return the job."""
        return Job(self._get(f"/jobs/{_part(job_id)}"), self)

    def list(
        self,
        *,
        status: str | None = None,
        base_model: str | None = None,
        metadata: Mapping[str, str] | None = None,
        page_size: int = 50,
    ) -> Iterator[Job]:
        """Go through jobs, newest first, page by page as they are needed."""
        filters: dict[str, str | int] = {"limit": page_size}
        if status is not None:
            filters["status"] = status
        if base_model is not None:
            filters["base_model"] = base_model
        filters |= {f"metadata[{key}]": value for key, value in (metadata or {}).items()}
        yield from (Job(document, self) for document in self._pages("/jobs", filters))

    def cancel(self, job_id: str) -> Job:
        """Ask for the end of a job and return it; GraftAPIError `job_finished` when it has ended already."""
        return Job(self._transport.json("POST", f"/jobs/{_part(job_id)}/cancel"), self)

    def pause(self, job_id: str) -> Job:
        """Stop a job for a while and return it: a running one is `pausing` until it is saved, then `paused`.

        GraftAPIError `job_finished` or `job_cancelling` when it is too late.
        """
        return Job(self._transport.json("POST", f"/jobs/{_part(job_id)}/pause"), self)

    def resume(self, job_id: str) -> Job:
        """Let a paused job go on, in its old place, and return it; GraftAPIError as of `pause`."""
        return Job(self._transport.json("POST", f"/jobs/{_part(job_id)}/resume"), self)

    def delete(self, job_id: str) -> None:
        """Remove a job that has ended, with its history and its artifacts; GraftAPIError `job_not_ended` before."""
        self._transport.json("DELETE", f"/jobs/{_part(job_id)}")

    def events(self, job_id: str, *, after: int | str | None = None, page_size: int = 200) -> Iterator[Document]:
        """Go through a job's events, oldest first, starting behind the event `after`."""
        yield from self._events(job_id, after, page_size=page_size)

    def checkpoints(self, job_id: str, *, page_size: int = 50) -> Iterator[Document]:
        """Go through the checkpoints that a job committed, newest first."""
        yield from self._pages(f"/jobs/{_part(job_id)}/checkpoints", {"limit": page_size})

    def metrics(self, job_id: str) -> Document:
        """Return a job's series by step: losses, gradient norms, learning rates, speeds."""
        return self._get(f"/jobs/{_part(job_id)}/metrics")

    def logs(self, job_id: str) -> str:
        """Return the log of a job's last run, also while it runs."""
        return self._logs(job_id)

    def follow_logs(self, job_id: str, *, poll_seconds: float = 1.0) -> Iterator[str]:
        """Go through a job's log until the job has ended, in pieces as they come; a new run's log begins anew."""
        shown = ""
        for update in self.updates(job_id, poll_seconds=poll_seconds):
            try:
                log = self._logs(job_id, patience_seconds=WATCH_PATIENCE_SECONDS)
            except GraftAPIError as error:
                if error.status != 404:
                    raise
                if update.is_last:
                    return
                continue  # nothing has run yet
            if new := log.removeprefix(shown):
                yield new
            shown = log

    def measures(self, job_id: str, *, poll_seconds: float = 1.0) -> Iterator[Document]:
        """Go through what was measured of a job, one logged step at a time (`step`, `loss` …), until it has ended."""
        for update in self.updates(job_id, poll_seconds=poll_seconds):
            yield from (event["data"] for event in update.events if event["type"] == "metrics")

    def webhooks(self, job_id: str) -> Iterator[Document]:
        """Go through what was sent about a job's end, and how far it has come."""
        yield from self._get(f"/jobs/{_part(job_id)}/webhooks")["data"]

    def webhook_secret(self) -> str:
        """Return what this tenant's webhooks are signed with, `whsec_…`, for the receiver to verify."""
        return str(self._get("/webhooks/secret")["secret"])

    def test_webhook(self, url: str) -> Document:
        """Send a message that is about nothing; returns whether it was taken, and why not."""
        answer: Document = self._transport.json("POST", "/webhooks/test", json={"url": url})
        return answer

    def adapter(self, job_id: str) -> Document:
        """Return the manifest of a succeeded job's adapter, with a link per file."""
        return self._get(f"/jobs/{_part(job_id)}/adapter")

    def download(self, job_id: str, to: str | Path) -> Path:
        """Bring a succeeded job's adapter into the folder `to`, every byte checked against the manifest.

        The folder appears whole or not at all.

        Raises:
            TargetNotEmpty: `to` exists and holds something.
            DownloadCorrupt: Bytes arrived, twice, that are not the promised ones.
        """
        return download_adapter(self._transport, f"/jobs/{_part(job_id)}/adapter", Path(to))

    def merge(self, job_id: str) -> Document:
        """Ask for a job's merged model and return it: its base in full precision, with the adapter in its weights.

        Asking twice is asking once. GraftAPIError `adapter_not_ready` until the job has succeeded.
        """
        answer: Document = self._transport.json("POST", f"/jobs/{_part(job_id)}/merged")
        return answer

    def merged(self, job_id: str) -> Document:
        """Return how far a job's merged model is and, once it is made, a link per file."""
        return self._get(f"/jobs/{_part(job_id)}/merged")

    def wait_merged(self, job_id: str, *, timeout_seconds: float | None = None, poll_seconds: float = 1.0) -> Document:
        """Return a job's merged model once it is made, or could not be.

        Raises:
            WaitedTooLong: It is not made within `timeout_seconds`.
        """
        return self._ended(f"/jobs/{_part(job_id)}/merged", job_id, timeout_seconds, poll_seconds)

    def download_merged(self, job_id: str, to: str | Path) -> Path:
        """Bring a job's merged model into the folder `to`; as `download`."""
        return download_adapter(self._transport, f"/jobs/{_part(job_id)}/merged", Path(to))

    def delete_merged(self, job_id: str) -> None:
        """Remove a job's merged model; the adapter stays."""
        self._transport.json("DELETE", f"/jobs/{_part(job_id)}/merged")

    def estimate(self, spec: Mapping[str, Any]) -> Document:
        """Return what `submit` would decide for this spec, without a job."""
        answer: Document = self._transport.json("POST", "/jobs/estimate", json=_sendable(spec))
        return answer

    def capacity(self) -> Document:
        """Return the VRAM-capacity table and the live workers."""
        return self._get("/capacity")

    def models(self) -> Document:
        """Return the catalogue of base models."""
        return self._get("/models")

    def model(self, base_model: str) -> Document:
        """Return one base model of the catalogue."""
        return self._get("/models/" + "/".join(_part(part) for part in base_model.split("/")))

    def upload(self, path: str | Path) -> Document:
        """Send a JSONL file and return its description; the service checks every row first."""
        path = Path(path)
        with path.open("rb") as content:

            def options() -> dict[str, Any]:
                content.seek(0)
                return {
                    "files": {"file": (path.name, content, "application/jsonl")},
                    "timeout": httpx.Timeout(UPLOAD_TIMEOUT_SECONDS, connect=5.0),
                }

            answer: Document = decoded(self._transport.send("POST", "/files", options))
        return answer

    def files(self, *, page_size: int = 50) -> Iterator[Document]:
        """Go through the uploaded files, newest first."""
        yield from self._pages("/files", {"limit": page_size})

    def uploaded(self, path: str | Path) -> Document | None:
        """Return the description of these very bytes where they were uploaded before; only the newest are looked at."""
        with Path(path).open("rb") as content:
            proof = _proof_of(content)
        newest = islice(self.files(page_size=100), MOST_FILES_LOOKED_AT)
        return next((file for file in newest if proof.items() <= file.items()), None)

    def delete_file(self, file_id: str) -> None:
        """Remove a file; GraftAPIError `file_in_use` while a job has not prepared its data from it."""
        self._transport.json("DELETE", f"/files/{_part(file_id)}")

    def upload_directly(self, path: str | Path) -> Document:
        """Send a JSONL file past the service to its bucket, and return its description once it is checked.

        The service gives a link for exactly these bytes. Right for large files: what the service itself takes in may be
        limited by whatever stands before it.
        """
        path = Path(path)
        with path.open("rb") as content:
            announced = {"filename": path.name, **_proof_of(content)}
            upload = self._transport.json("POST", "/files/uploads", json=announced)
            content.seek(0)
            self._transport.put(upload["url"], iter(lambda: content.read(CHUNK_BYTES), b""), upload["headers"])

        def options() -> dict[str, Any]:
            # Safe to repeat: an upload that is completed twice is the same file.
            return {
                "headers": {"idempotency-key": upload["id"]},
                "timeout": httpx.Timeout(UPLOAD_TIMEOUT_SECONDS, connect=5.0),
            }

        completed = self._transport.send("POST", f"/files/uploads/{upload['id']}/complete", options)
        answer: Document = decoded(completed)
        return answer

    def report(
        self, file_id: str, *, base_model: str, timeout_seconds: float | None = None, **settings: Any
    ) -> Document:
        """Return what a job on this base would learn from a file; waits while a worker makes the report.

        Args:
            settings: As the route's parameters: `max_length`, `validation_split`, `validation_file`, …

        Raises:
            WaitedTooLong: It is not made within `timeout_seconds`.
        """
        path, clock = f"/files/{_part(file_id)}/report", self._transport.clock
        started = clock()
        query = {"base_model": base_model, **{name: value for name, value in settings.items() if value is not None}}
        while True:
            answer: Document = self._transport.json("GET", path, params=query)
            if answer["status"] == "ready":
                return answer
            if timeout_seconds is not None and clock() - started >= timeout_seconds:
                raise WaitedTooLong(f"The report is still '{answer['status']}' after {timeout_seconds:g} s.")
            self._transport.sleep(REPORT_POLL_SECONDS)

    def job_report(self, job_id: str) -> Document:
        """Return the report on a job's data; GraftAPIError `report_not_ready` until it is prepared."""
        return self._get(f"/jobs/{_part(job_id)}/report")

    def file(self, file_id: str) -> Document:
        """Return the description of an uploaded file."""
        return self._get(f"/files/{_part(file_id)}")

    def updates(self, job_id: str, *, poll_seconds: float = 1.0) -> Iterator[Update]:
        """Follow a job to its end, one Update a look; outlives a restart of the service, and any pause."""
        cursor: int | str | None = None
        patience: float | None = None
        while True:
            job = Job(self._get(f"/jobs/{_part(job_id)}", patience_seconds=patience), self)
            patience = WATCH_PATIENCE_SECONDS
            events = tuple(self._events(job_id, cursor, patience_seconds=patience))
            cursor = events[-1]["id"] if events else cursor
            update = Update(job=job, events=events)
            yield update
            if update.is_last:
                return
            self._transport.sleep(poll_seconds)

    def wait(self, job_id: str, *, timeout_seconds: float | None = None, poll_seconds: float = 1.0) -> Job:
        """Return the job once it has ended; a paused one is waited for.

        Raises:
            WaitedTooLong: It has not ended within `timeout_seconds`.
        """
        return Job(self._ended(f"/jobs/{_part(job_id)}", job_id, timeout_seconds, poll_seconds), self)

    def _ended(self, path: str, job_id: str, timeout_seconds: float | None, poll_seconds: float) -> Document:
        """What stands at `path`, once its status is an end."""
        clock = self._transport.clock
        started = clock()
        patience: float | None = None
        while True:
            found = self._get(path, patience_seconds=patience)
            patience = WATCH_PATIENCE_SECONDS
            if found["status"] in TERMINAL_STATUSES:
                return found
            if timeout_seconds is not None and clock() - started >= timeout_seconds:
                raise WaitedTooLong(f"Job {job_id} is still '{found['status']}' after {timeout_seconds:g} s.")
            self._transport.sleep(poll_seconds)

    def _events(
        self, job_id: str, after: int | str | None, *, page_size: int = 200, patience_seconds: float | None = None
    ) -> Iterator[Document]:
        filters: dict[str, str | int] = {"limit": page_size}
        if after is not None:
            filters["after"] = after
        return self._pages(f"/jobs/{_part(job_id)}/events", filters, patience_seconds=patience_seconds)

    def _logs(self, job_id: str, *, patience_seconds: float | None = None) -> str:
        return self._transport.send("GET", f"/jobs/{_part(job_id)}/logs", dict, patience_seconds=patience_seconds).text

    def _get(self, path: str, *, patience_seconds: float | None = None) -> Document:
        answer: Document = self._transport.json("GET", path, patience_seconds=patience_seconds)
        return answer

    def _pages(
        self, path: str, filters: dict[str, str | int], *, patience_seconds: float | None = None
    ) -> Iterator[Document]:
        while True:
            page = self._transport.json("GET", path, params=filters, patience_seconds=patience_seconds)
            yield from page["data"]
            if not page.get("has_more") or not page["data"]:
                return
            filters = filters | {"after": page.get("last_id") or page["data"][-1]["id"]}


def _sendable(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The spec as a plain dict; raises NotJson for what cannot be written in JSON."""
    try:
        json.dumps(dict(spec), allow_nan=False, ensure_ascii=False).encode()
    except (ValueError, TypeError, RecursionError) as error:
        raise NotJson(
            f"The spec cannot be written in JSON ({error}), which has no NaN or Infinity, and no bytes."
        ) from error
    return dict(spec)


def _proof_of(content: BinaryIO) -> Document:
    """What tells these bytes from any others, as the service names it."""
    digest, size = hashlib.sha256(), 0
    while chunk := content.read(CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
    return {"bytes": size, "sha256": digest.hexdigest()}


def _part(text: str) -> str:
    """One part of a path: whatever a user typed stays inside it."""
    return quote(text, safe="")
