"""Merged models over HTTP: asked for, followed, brought home, deleted."""

from __future__ import annotations

import io
import tarfile

import pytest

from graft_shared.artifacts import MANIFEST_NAME, AdapterManifest, FileProof, merged_prefix
from graft_shared.jobs import Failure, FailureReason, Job, Stage
from tests.api_service import LLAMA, ApiService, error_of
from tests.store_factories import a_beat


@pytest.fixture
def tuned(api: ApiService) -> str:
    return api.succeed(api.new_job()["id"]).id


def run_of(api: ApiService) -> Job:
    run = api.leases.claim("merger", stage=Stage.MERGE, gpu_classes=())
    assert run is not None
    return run


def made(api: ApiService) -> None:
    """Do what a worker does with the merge that waits."""
    run = run_of(api)
    prefix = merged_prefix(run.tenant, run.id, run.epoch)
    stored = api.bucket.put_bytes(f"{prefix}model.safetensors", b"weights")
    manifest = AdapterManifest(
        job_id=str(run.merges),
        epoch=run.epoch,
        base_model=LLAMA,
        base_revision="abc",
        files=(FileProof(name="model.safetensors", size=stored.size, sha256=stored.sha256),),
        proof={"logits_difference": 0.0},
        versions={"peft": "1"},
    )
    written = api.bucket.put_bytes(prefix + MANIFEST_NAME, manifest.to_bytes())
    proof = {"key": written.key, "size": written.size, "sha256": written.sha256}
    adapter = {"uri": "u", "epoch": run.epoch, "prefix": prefix, "manifest": proof, "bytes": stored.size}
    api.leases.settle_success(run.id, run.epoch, adapter=adapter, metrics={}, memory={})


def test_a_merged_model_is_asked_for_followed_and_brought_home(
    api: ApiService, tuned: str, nothing_is_held: None
) -> None:
    route = f"/jobs/{tuned}/merged"
    assert error_of(api.http.get(route), 404)["code"] == "merged_model_not_found"
    asked = api.http.post(route)
    assert asked.status_code == 202 and asked.json()["status"] == "queued"
    assert (asked.json()["job_id"], asked.json()["files"], asked.json()["links_expire_at"]) == (tuned, [], None)
    assert "No live worker merges" in asked.json()["queue"]["reason"]
    api.let_bells_ring()
    assert api.doorbell.rung == [], "nobody would hear it"
    api.workers.beat(**a_beat(stages=(Stage.MERGE,)))
    assert api.http.get(route).json()["queue"]["reason"] == "Waiting for a worker that merges."
    assert api.http.post(route).json()["created_at"] == asked.json()["created_at"], "asked twice is asked once"
    assert error_of(api.http.get(f"{route}/archive"), 409)["code"] == "adapter_not_ready"
    made(api)
    found = api.http.get(route).json()
    assert found["queue"] is None
    assert (found["status"], found["base_revision"], found["proof"]) == ("succeeded", "abc", {"logits_difference": 0.0})
    (file,) = found["files"]
    assert api.http.get(file["url"].removeprefix("http://localhost")).content == b"weights"
    with tarfile.open(fileobj=io.BytesIO(api.http.get(f"{route}/archive").content)) as tar:
        assert tar.getnames() == [f"{tuned}-merged/model.safetensors", f"{tuned}-merged/{MANIFEST_NAME}"]


def test_it_is_deleted_alone_or_with_its_job_and_not_while_it_is_made(api: ApiService, tuned: str) -> None:
    route = f"/jobs/{tuned}/merged"
    api.http.post(route)
    assert api.http.delete(route).json() == {"job_id": tuned, "object": "merged_model", "deleted": True}
    api.http.post(route)
    run = run_of(api)
    for path in (route, f"/jobs/{tuned}"):
        assert error_of(api.http.delete(path), 409)["code"] == "merged_model_in_use"
    failure = Failure(reason=FailureReason.UNSUPPORTED_BASE_MODEL, message="It is of no kind that can be merged")
    api.leases.settle_failure(run.id, run.epoch, failure)
    assert api.http.get(route).json()["error"]["code"] == "unsupported_base_model"
    assert api.http.delete(f"/jobs/{tuned}").status_code == 200
    assert error_of(api.http.get(route), 404)["code"] == "job_not_found"


def test_a_job_without_an_adapter_has_nothing_to_merge(api: ApiService) -> None:
    job_id = api.new_job()["id"]
    assert error_of(api.http.post(f"/jobs/{job_id}/merged"), 409)["code"] == "adapter_not_ready"
