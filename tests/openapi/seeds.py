"""What is there before the first case: two tenants, each with jobs of every status, files, and an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft_api.compatible.names import fine_tuned_model
from graft_shared.artifacts import log_key
from graft_shared.jobs import Job
from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import LLAMA, ApiService, register_base

KEYS = {"red": "red-key-of-the-openapi-proof", "blue": "blue-key-of-the-openapi-proof"}
TINY = "tiny"  # without a slash, which no segment of a path may hold
TINY_CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 512,
}


@contextmanager
def seeded_api(folder: Path, database_url: str, *, spare_jobs: int = 40) -> Iterator[ApiProcess]:
    """A running API on PostgreSQL; `folder` gets what schemathesis.toml reads.

    Args:
        spare_jobs: Ended jobs of each tenant, since DELETE is tried too.
    """
    process = ApiProcess(
        folder / "state",
        GRAFT_DATABASE_URL=database_url,
        GRAFT_API_KEYS=",".join(f"{tenant}={key}" for tenant, key in KEYS.items()),
        GRAFT_WEBHOOK_SECRET="of the openapi proof",
    )
    services = {tenant: process.service(key) for tenant, key in KEYS.items()}
    migrate(services["red"].database)
    register_base(process.state_dir / "models" / TINY, TINY_CONFIG)
    process.start()
    try:
        jobs, files = [], []
        for tenant, api in services.items():
            jobs += _claimed_jobs(tenant, api)  # of every tenant before anybody's wait: a claim takes the fairest
        for api in services.values():
            jobs += _other_jobs(api, spare_jobs)
            files += [str(api.upload().json()["id"]) for _ in range(10)]
        adapters = [fine_tuned_model(job) for job in jobs if job.adapter is not None]
        _write(folder / "jobs.txt", [job.id for job in jobs])
        _write(folder / "files.txt", files)
        _write(folder / "bases.txt", [LLAMA, TINY])
        _write(folder / "models.txt", [TINY, *adapters])
        _write_peers(folder / "peers.json")
        yield process
    finally:
        process.stop()
        for api in services.values():
            api.database.close()
            api.http.close()


def _claimed_jobs(tenant: str, api: ApiService) -> list[Job]:
    """Two that have succeeded, and one in training."""
    jobs = []
    for succeeds in (True, True, False):
        job_id = str(api.new_job(base_model=TINY, metadata={"team": "search"})["id"])
        job = api.succeed(job_id) if succeeds else api.train(job_id)
        api.bucket.put_bytes(log_key(tenant, job.id, job.epoch), b"step 1: loss 3.0\n")
        jobs.append(api.jobs.get(tenant, job_id))
    return jobs


def _other_jobs(api: ApiService, spare: int) -> list[Job]:
    """Those that were cancelled, one that is paused, and some that wait."""
    ids = []
    for _ in range(spare):
        ids.append(str(api.new_job(base_model=TINY)["id"]))
        api.http.post(f"/jobs/{ids[-1]}/cancel").raise_for_status()
    ids.append(str(api.new_job(base_model=TINY)["id"]))
    api.http.post(f"/jobs/{ids[-1]}/pause").raise_for_status()
    ids += [str(api.new_job(base_model=TINY)["id"]) for _ in range(3)]
    return [job for job_id in ids if (job := api.leases.read(job_id)) is not None]


def _write(path: Path, values: list[str]) -> None:
    """A dictionary as libFuzzer writes them."""
    path.write_text("".join(f'"{value}"\n' for value in values))


def _write_peers(path: Path) -> None:
    users = [
        {"name": tenant, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
        for tenant, key in KEYS.items()
    ]
    path.write_text(json.dumps({"auth": users}))
