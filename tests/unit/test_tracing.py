"""A job is one trace, from the request that made it to the end of its last run; without a collector there is none."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode
from starlette.testclient import TestClient

from graft_api.app import create_app
from graft_shared.jobs import FailureReason, Job, Phase
from graft_shared.tracing import ENDPOINT, Tracing, open_tracing
from graft_worker.protocol import CheckpointEvent, ProgressEvent
from graft_worker.spans import RunSpans
from graft_worker.supervisor.audience import DONE
from tests.api_service import ApiService, make_service, migrated_database

CALLER = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Traced:
    """An API and a worker that keep their spans here."""

    def __init__(self, api: ApiService) -> None:
        self._kept = InMemorySpanExporter()
        self.tracing = Tracing("tests", SimpleSpanProcessor(self._kept))
        app = create_app(replace(api.http.app.state.neighbours, tracing=self.tracing))
        self.api = replace(api, http=TestClient(app, "http://localhost", raise_server_exceptions=False))

    def spans(self) -> dict[str, ReadableSpan]:
        return {span.name: span for span in self._kept.get_finished_spans()}


@pytest.fixture
def traced(tmp_path: Path) -> Iterator[Traced]:
    api = make_service(tmp_path, migrated_database(tmp_path))
    yield Traced(api)
    api.database.close()


def run(job: Job, tracing: Tracing, outcome: str) -> None:
    """What a supervisor tells of a run."""
    spans = RunSpans(job, tracing)
    spans.began(Phase.FETCHING)
    spans.began(Phase.TRAINING)
    figures = {"loss": 1.5, "grad_norm": 1.0, "learning_rate": 1e-4, "tokens_per_second": 10.0, "epoch": 0.5}
    spans.heard(ProgressEvent(step=7, total_steps=20, tokens_seen=700, **figures))
    spans.heard(CheckpointEvent(step=7, path="/nowhere"))
    spans.ended(outcome)


def test_a_job_is_one_trace_from_the_callers_request_to_its_end(traced: Traced) -> None:
    answer = traced.api.http.post("/jobs", json=traced.api.spec(), headers={"traceparent": CALLER})
    job = traced.api.claim(answer.json()["id"])
    run(job, traced.tracing, DONE)
    spans = traced.spans()
    post, waited, whole, training = (spans[name] for name in ("POST /jobs", "queued", "run prepare", "training"))
    ids = {span.context.trace_id for span in (post, waited, whole, training) if span.context is not None}
    assert ids == {int(CALLER.split("-")[1], 16)}
    assert post.parent is not None and post.parent.span_id == int(CALLER.split("-")[2], 16)
    for span, parent in ((waited, post), (whole, post), (training, whole), (spans["fetching"], whole)):
        assert span.parent is not None and parent.context is not None
        assert span.parent.span_id == parent.context.span_id, span.name
    assert dict(post.attributes or {})["http.response.status_code"] == 202
    assert (whole.attributes or {})["graft.job.id"] == job.id
    assert (whole.attributes or {})["graft.step"] == 7
    assert [event.name for event in whole.events] == ["checkpoint", "settled"]
    assert waited.end_time == whole.start_time, "the run begins where the waiting ends"


def test_a_later_run_goes_on_in_the_same_trace_and_its_failure_is_seen(traced: Traced) -> None:
    job = traced.api.train(traced.api.new_job()["id"])
    assert job.epoch == 2
    run(job, traced.tracing, FailureReason.CRASH.value)
    spans = traced.spans()
    assert "queued" not in spans, "only the first run tells of the time before it"
    whole, post = spans["run train"], spans["POST /jobs"]
    assert whole.context is not None and post.context is not None
    assert whole.context.trace_id == post.context.trace_id
    assert (whole.status.status_code, whole.status.description) == (StatusCode.ERROR, "crash")


def test_requests_are_named_by_their_route_and_health_is_not_traced(traced: Traced) -> None:
    for path in ("/jobs/ftjob-1", "/nowhere", "/healthz"):
        traced.api.http.get(path)
    assert set(traced.spans()) == {"GET /jobs/{job_id}", "GET none"}


def test_a_malformed_traceparent_begins_a_trace_of_our_own(traced: Traced) -> None:
    traced.api.http.get("/jobs", headers={"traceparent": "00-nothing"})
    assert traced.spans()["GET /jobs"].parent is None


def test_without_a_collector_nothing_that_makes_or_sends_spans_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENDPOINT, raising=False)
    assert open_tracing("tests") is None
    program = (
        "import sys, graft_api.app, graft_worker.celery_app, graft_shared.reconciler\n"
        "from graft_shared.tracing import open_tracing\n"
        "assert open_tracing('tests') is None\n"
        "print([name for name in sys.modules if name.startswith(('opentelemetry.sdk', 'opentelemetry.exporter'))])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
