"""A running service shows every figure that rules and dashboard ask for, and a job of it is one trace."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span
from prometheus_client.parser import text_string_to_metric_families

from tests.factories import make_tiny_base
from tests.fleet import JSONL, Fleet, a_job
from tests.panels import ON_A_GPU, metrics_asked_for
from tests.waiting import free_ports_in_a_row, wait_until

API, RECONCILER, PREPARE, MERGE, CPU = range(5)  # in the order in which `graft up` gives them their ports


@pytest.fixture(scope="module")
def first_port() -> int:
    return free_ports_in_a_row(5)


class Collector(ThreadingHTTPServer):
    """Takes traces over OTLP/HTTP and keeps them."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Taking)
        self.spans: list[tuple[str, Span]] = []  # with the service that sent each


class _Taking(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, Collector)
        body = self.rfile.read(int(self.headers["content-length"]))
        for sent in ExportTraceServiceRequest.FromString(body).resource_spans:
            (service,) = (pair.value.string_value for pair in sent.resource.attributes if pair.key == "service.name")
            self.server.spans += [(service, span) for scope in sent.scope_spans for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    server = Collector()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, first_port: int, collector: Collector) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("observed") / "state"
    make_tiny_base(state / "models" / "graft" / "tiny")
    environment = {
        "GRAFT_METRICS_PORT": str(first_port),
        "GRAFT_SWEEP_SECONDS": "1",
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
        "GRAFT_REPORT_TO": "tensorboard",
        "GRAFT_TENSORBOARD_DIR": str(state / "boards"),
    }
    running = Fleet(state, environment).start()
    yield running
    running.stop()


def scrape(port: int) -> dict[str, float]:
    """The sum of each sample over its labels, by name."""
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).raise_for_status()
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found[sample.name] = found.get(sample.name, 0.0) + sample.value
    return found


def test_every_metric_that_is_asked_for_is_shown_by_a_service_that_has_worked(fleet: Fleet, first_port: int) -> None:
    job = fleet.post(a_job(fleet, training={"max_steps": 30}))
    wait_until(lambda: "graft_training_step" in scrape(first_port), seconds=120, what="a job that trains")
    wait_until(lambda: fleet.get(job["id"])["progress"].get("step"), seconds=120, what="a first step")
    while_it_trains = scrape(first_port)
    assert while_it_trains["graft_training_last_step"] == 30
    with fleet.client() as client:
        asked = {"base_model": "graft/tiny", "max_length": "32"}
        client.get(f"/files/{fleet.upload(JSONL)}/report", params=asked).raise_for_status()
    assert fleet.wait(job["id"])["status"] == "succeeded"
    wait_until(lambda: scrape(first_port + PREPARE).get("graft_worker_reports_total"), what="a report")
    wait_until(lambda: scrape(first_port + CPU).get("graft_worker_run_duration_seconds_count"), what="a settled run")
    seen = set(while_it_trains)
    for number in range(5):
        seen |= set(scrape(first_port + number))
    missing = {name for name in metrics_asked_for() - seen if not name.startswith(ON_A_GPU)}
    assert not missing


def test_a_job_is_one_trace_over_all_processes(fleet: Fleet, collector: Collector) -> None:
    wait_until(lambda: any(span.name == "run train" for _, span in collector.spans), what="the run's span")
    (trained,) = [span for _, span in collector.spans if span.name == "run train"]
    whole = {(service, span.name) for service, span in collector.spans if span.trace_id == trained.trace_id}
    phases = {("graft-worker", name) for name in ("fetching", "preparing", "training", "proving", "publishing")}
    runs = {("graft-worker", name) for name in ("queued", "run prepare", "run train")}
    assert {("graft-api", "POST /jobs")} | runs | phases <= whole


def test_the_operators_tracker_is_told_of_the_job(fleet: Fleet) -> None:
    boards = fleet.state_dir / "boards" / "default"
    wait_until(lambda: any(b"train/loss" in path.read_bytes() for path in boards.rglob("events.*")), what="its curves")


def test_a_worker_counts_what_both_its_processes_do(fleet: Fleet, first_port: int) -> None:
    trained = scrape(first_port + CPU)
    assert trained["graft_worker_trained_steps_total"] >= 30
    assert trained["graft_worker_trained_tokens_total"] > 500
    assert trained["graft_worker_checkpoints_total"] >= 1
    assert trained["graft_worker_runs_total"] >= 1
    assert trained["graft_worker_disk_free_bytes"] > 0


def test_the_keyed_route_tells_the_same_of_the_store_as_the_port(fleet: Fleet, first_port: int) -> None:
    with fleet.client() as client:
        routed = client.get("/metrics").raise_for_status().text
    names = {family.name for family in text_string_to_metric_families(routed)}
    assert names == {
        family.name
        for family in text_string_to_metric_families(httpx.get(f"http://127.0.0.1:{first_port}/metrics").text)
    }
