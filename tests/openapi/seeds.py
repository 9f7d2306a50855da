"""What is there before the first case: two tenants, each with jobs of every status, files, and an adapter."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from graft_api.compatible.names import fine_tuned_model
from graft_shared.jobs import Job
from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import LLAMA, ApiService
from tests.servers import PostgresServer

KEYS = {"red": "red-key-of-the-openapi-proof", "blue": "blue-key-of-the-openapi-proof"}
SPARE_JOBS = 40  # ended ones, since DELETE is tried too


@contextmanager
def seeded_api(folder: Path, postgres: PostgresServer, name: str) -> Iterator[ApiProcess]:
    """A running API on PostgreSQL; `folder` gets what schemathesis.toml reads."""
    process = ApiProcess(
        folder / "state",
        GRAFT_DATABASE_URL=postgres.new_database(name),
        GRAFT_API_KEYS=",".join(f"{tenant}={key}" for tenant, key in KEYS.items()),
        GRAFT_WEBHOOK_SECRET="of the openapi proof",
    )
    services = {tenant: process.service(key) for tenant, key in KEYS.items()}
    migrate(services["red"].database)
    process.start()
    try:
        jobs, files = [], []
        for tenant, api in services.items():
            jobs += _jobs(tenant, api)
            files += [str(api.upload().json()["id"]) for _ in range(10)]
        adapters = [fine_tuned_model(job) for job in jobs if job.adapter is not None]
        _write(folder / "jobs.txt", [job.id for job in jobs])
        _write(folder / "files.txt", files)
        _write(folder / "bases.txt", [LLAMA, "Qwen/Qwen2.5-0.5B", *adapters])
        _write_peers(folder / "peers.json")
        yield process
    finally:
        process.stop()
        for api in services.values():
            api.database.close()
            api.http.close()


def _jobs(tenant: str, api: ApiService) -> list[Job]:
    """One of each status; whatever a worker has to claim comes before what waits."""
    ids = []
    for succeeds in (True, True, False):
        ids.append(str(api.new_job(metadata={"team": "search"})["id"]))
        if succeeds:
            api.succeed(ids[-1])
        else:
            api.train(ids[-1])
    for _ in range(SPARE_JOBS):
        ids.append(str(api.new_job()["id"]))
        api.http.post(f"/jobs/{ids[-1]}/cancel").raise_for_status()
    ids.append(str(api.new_job()["id"]))
    api.http.post(f"/jobs/{ids[-1]}/pause").raise_for_status()
    ids += [str(api.new_job()["id"]) for _ in range(3)]
    return [api.jobs.get(tenant, job_id) for job_id in ids]


def _write(path: Path, values: list[str]) -> None:
    """A dictionary as libFuzzer writes them."""
    path.write_text("".join(f'"{value}"\n' for value in values))


def _write_peers(path: Path) -> None:
    users = [
        {"name": tenant, "fixedHeaders": [{"name": "Authorization", "value": f"Bearer {key}"}]}
        for tenant, key in KEYS.items()
    ]
    path.write_text(json.dumps({"auth": users}))
