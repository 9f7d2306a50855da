"""The cluster in containers: both Dockerfiles, docker-compose.yml, a job, a killed worker, figures, a backup."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.containers.cluster import ROOT, Cluster
from tests.containers.engine import DockerEngine, DockerFailed
from tests.containers.standins import build_standins, wheels_served
from tests.factories import make_tiny_base
from tests.fleet import a_job
from tests.invariants import assert_history_holds, trainings_go_on_from_the_last_checkpoint
from tests.panels import ON_A_GPU, metrics_of, questions, rules
from tests.waiting import wait_until

# Kept between runs, so that Debian and unchanged images are not made again; short, for its sockets' sake.
ENGINE_DIR = Path(os.environ.get("GRAFT_TEST_ENGINE_DIR", "/var/tmp/graft-engine"))
REPORT = Path(os.environ.get("GRAFT_TEST_REPORT", ENGINE_DIR / "report.json"))


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    engine = DockerEngine(ENGINE_DIR).start()
    made = Cluster(engine, tmp_path_factory.mktemp("cluster"))
    try:
        build_standins(engine, ENGINE_DIR / "cache")
        made.write_env()
        with wheels_served():
            made.build()
        make_tiny_base(made.models_dir / "graft" / "tiny")
        for path in [made.models_dir, *made.models_dir.rglob("*"), *made.folder.parents[:2], made.folder]:
            path.chmod(0o755 if path.is_dir() else 0o644)
        made.down()  # what a run left that was cut off: its volumes have another password
        made.report["up_seconds"] = made.up(worker_cpu=2)
        yield made
        REPORT.write_text(json.dumps(made.report, indent=2) + "\n")
        made.down()
    finally:
        engine.stop()


def test_the_api_image_has_no_torch_and_both_run_as_nobody_on_a_root_that_cannot_be_written(cluster: Cluster) -> None:
    with pytest.raises(DockerFailed, match="No module named 'torch'"):
        cluster.engine.run("run", "--rm", "graft-api", "python", "-c", "import torch")
    with pytest.raises(DockerFailed, match="No module named 'torch'"):
        cluster.engine.run("run", "--rm", "graft-prepare", "python", "-c", "import torch")
    for service in ("api", "worker-cpu", "prepare", "reconciler", "postgres", "redis", "prometheus", "grafana"):
        name = cluster.containers(service)[0]["Name"]
        assert cluster.engine.run("exec", name, "id", "-u").strip() != "0", service
        with pytest.raises(DockerFailed, match="Read-only file system"):
            cluster.engine.run("exec", name, "sh", "-c", "echo > /written")


def test_a_job_goes_from_post_to_an_adapter_behind_a_presigned_link(cluster: Cluster) -> None:
    began = time.monotonic()
    job = cluster.wait(cluster.post(a_job(cluster))["id"])
    cluster.report["job_seconds"] = round(time.monotonic() - began, 1)
    assert job["status"] == "succeeded", job["error"]
    assert_history_holds(cluster.events(job["id"]))
    with cluster.client() as client:
        files = client.get(f"/jobs/{job['id']}/adapter").json()["files"]
    assert {file["url"].split("/")[2] for file in files} == {f"127.0.0.1:{cluster.store_port}"}
    for file in files:
        content = cluster.fetch(file["url"])
        assert (len(content), hashlib.sha256(content).hexdigest()) == (file["size"], file["sha256"])


def test_a_worker_container_killed_in_mid_training_is_replaced_by_the_other(cluster: Cluster) -> None:
    job = cluster.post(a_job(cluster, training={"max_steps": 400, "save_steps": 20}))
    wait_until(lambda: cluster.checkpoints(job["id"]) >= 1, seconds=120, what="a checkpoint", every=0.2)
    victim = [event for event in cluster.events(job["id"]) if event["type"] == "claimed"][-1]["data"]["worker"]
    cluster.engine.run("kill", "--signal", "KILL", cluster.container_of_worker(victim))
    killed_at = time.monotonic()
    ended = cluster.wait(job["id"], seconds=300)
    events = cluster.events(job["id"])
    assert ended["status"] == "succeeded", ended["error"]
    assert_history_holds(events)
    workers = [event["data"]["worker"] for event in events if event["type"] == "claimed"]
    assert workers[-1].endswith("/train")
    assert workers[-1] != victim
    cluster.report["killed_worker_job_ended_after_seconds"] = round(time.monotonic() - killed_at, 1)
    assert ended["attempt"] == 1, "a lost worker costs no attempt"


def test_workers_are_scaled_and_known_to_the_fleet(cluster: Cluster) -> None:
    cluster.report["scale_seconds"] = cluster.up(worker_cpu=3)

    def live_workers() -> int:
        with cluster.client() as client:
            classes = client.get("/capacity").json()["data"]
        return next(int(gpu["live_workers"]) for gpu in classes if gpu["name"] == "cpu")

    wait_until(lambda: live_workers() == 3, seconds=120, what="three live workers", every=0.5)
    ids = [cluster.post(a_job(cluster, training={"max_steps": 5}))["id"] for _ in range(6)]
    assert [cluster.wait(job_id)["status"] for job_id in ids] == ["succeeded"] * 6


def test_the_cluster_survives_a_restart_of_everything_with_its_data(cluster: Cluster) -> None:
    with cluster.client() as client:
        before = [job["id"] for job in client.get("/jobs").json()["data"]]
    cluster.compose("down", "--timeout", "30")
    cluster.report["second_up_seconds"] = cluster.up(worker_cpu=1)
    with cluster.client() as client:
        assert [job["id"] for job in client.get("/jobs").json()["data"]] == before


def test_prometheus_scrapes_every_copy_of_every_process_and_knows_our_rules(cluster: Cluster) -> None:
    services = {
        "graft-api": ["api"],
        "graft-reconciler": ["reconciler"],
        "graft-worker": ["prepare", "merge", "worker-cpu"],
    }
    wanted = {
        (job, f"{address}:9464", "up")
        for job, names in services.items()
        for name in names
        for address in cluster.addresses(name)
    }

    def targets() -> set[tuple[str, str, str]]:
        found = cluster.prometheus("targets", state="active")["activeTargets"]
        return {(target["labels"]["job"], target["labels"]["instance"], target["health"]) for target in found}

    wait_until(lambda: targets() == wanted, seconds=120, what="Prometheus to find every process", every=1)
    (group,) = cluster.prometheus("rules")["groups"]
    assert [(rule["name"], rule["health"]) for rule in group["rules"]] == [(rule["alert"], "ok") for rule in rules()]


def test_every_question_of_the_dashboard_is_answered_and_grafana_is_healthy(cluster: Cluster) -> None:
    began = time.time()
    job = cluster.post(a_job(cluster, training={"max_steps": 20_000}))
    trained = "graft_training_loss and on (worker) graft_training_step"
    wait_until(lambda: cluster.prometheus("query", query=trained)["result"], seconds=180, what="a loss", every=1)
    with cluster.client() as client:
        client.post(f"/jobs/{job['id']}/cancel").raise_for_status()
    assert cluster.wait(job["id"])["status"] == "cancelled"
    known = set(cluster.prometheus("label/__name__/values"))
    silent = []
    for title, expression in questions():
        asked = {"query": expression, "start": began, "end": time.time(), "step": 5}
        answered = cluster.prometheus("query_range", **asked)["result"]
        named = {name for name in metrics_of(expression) if not name.startswith(ON_A_GPU)}
        assert named <= known, title
        if not answered:
            silent.append(title)
    cluster.report["panels_without_data"] = silent
    (grafana,) = cluster.containers("grafana")
    assert grafana["Health"] == "healthy"
    assert httpx.get(f"http://127.0.0.1:{cluster.grafana_port}/api/health", timeout=30).status_code == 200


def test_a_cluster_that_was_destroyed_goes_on_with_its_queue_by_the_commands_of_the_guide(
    cluster: Cluster, tmp_path: Path
) -> None:
    (kept := tmp_path / "monday").mkdir()
    cluster.up(worker_cpu=1)
    finished = cluster.wait(cluster.post(a_job(cluster, training={"max_steps": 5}))["id"])
    running = cluster.post(a_job(cluster, training={"max_steps": 400, "save_steps": 20}))["id"]
    queued = [cluster.post(a_job(cluster, training={"max_steps": 5}))["id"] for _ in range(3)]
    wait_until(lambda: cluster.checkpoints(running) >= 1, seconds=120, what="a checkpoint", every=0.2)
    began = time.monotonic()
    cluster.shell(guide(1, kept, cluster.folder / "env"))
    cluster.report["backup_seconds"] = round(time.monotonic() - began, 1)
    cluster.down()
    shutil.move(kept / "env", cluster.folder / "env")
    began, destroyed_at = time.monotonic(), time.time()
    cluster.shell(guide(2, kept, cluster.folder / "env"))
    cluster.report["restore_seconds"] = round(time.monotonic() - began, 1)
    for job in (running, *queued):
        ended = cluster.wait(job, seconds=300)
        assert ended["status"] == "succeeded", ended["error"]
        assert_history_holds(cluster.events(job))
    assert "requeued" in [event["type"] for event in cluster.events(running)], "it ran when it was dumped"
    trainings_go_on_from_the_last_checkpoint(cluster.events(running))
    for job in queued:
        trained = [event for event in cluster.events(job) if event["type"] == "claimed"][-1]
        assert trained["created_at"] > destroyed_at, "it waited when it was dumped"
    with cluster.client() as client:
        for file in client.get(f"/jobs/{finished['id']}/adapter").json()["files"]:
            assert len(cluster.fetch(file["url"])) == file["size"]


def guide(block: int, kept: Path, env: Path) -> str:
    """Commands of deploy/README.md on backups, with this cluster's folder and .env; its images are built already."""
    section = (ROOT / "deploy" / "README.md").read_text().partition("\n## Backup and restore\n")[2]
    commands: str = re.findall(r"```sh\n(.*?)```", section.partition("\n## ")[0], re.DOTALL)[block]
    return (
        commands.replace("/backups/monday", str(kept))
        .replace(" .env ", f" {env} ")
        .replace("make up", "docker compose up --detach --no-build --wait")
    )
