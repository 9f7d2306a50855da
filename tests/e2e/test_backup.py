"""A running service is backed up, destroyed and restored, and goes on with its queue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psycopg
import pytest

from tests.factories import make_tiny_base
from tests.fleet import Fleet, a_job
from tests.invariants import assert_history_holds, steps_redone
from tests.servers import PostgresServer
from tests.waiting import wait_until

GRAFT = str(Path(sys.executable).parent / "graft")
QUICK = {
    "GRAFT_HEARTBEAT_SECONDS": "1",
    "GRAFT_LEASE_SECONDS": "8",
    "GRAFT_LOOK_SECONDS": "2",
    "GRAFT_SWEEP_SECONDS": "1",
}


class Backups:
    """How a one-machine service is kept, and made of what was kept."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment: dict[str, str] = {}

    def back_up(self, fleet: Fleet, running: str) -> None:
        self._graft("backup", fleet.state_dir, "--with-models")

    def restore(self, state_dir: Path) -> None:
        self._graft("restore", state_dir)

    def _graft(self, verb: str, state_dir: Path, *more: str) -> None:
        command = [GRAFT, verb, str(self.folder), "--state-dir", str(state_dir), "--json", *more]
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        assert ran.returncode == 0, ran.stderr
        assert json.loads(ran.stdout)["files"] > 5


class PostgresBackups(Backups):
    """What deploy/README.md tells of a cluster: pg_dump, then a copy of the bucket, while no reconciler runs."""

    def __init__(self, folder: Path, server: PostgresServer) -> None:
        super().__init__(folder)
        self.server = server
        self.environment = {"GRAFT_DATABASE_URL": server.new_database("kept")}

    def back_up(self, fleet: Fleet, running: str) -> None:
        (reconciler,) = fleet.processes("graft_shared.reconciler")
        wait_until(lambda: self._stands_still(reconciler), what="the reconciler between two transactions")
        self.folder.joinpath("graft.dump").write_bytes(self.server.run("pg_dump", "--format=custom", "kept"))
        dumped = fleet.checkpoints(running)
        self._wait_for_checkpoints(fleet, running, dumped + 1)  # then nothing but the dump needs the one before
        self._ask("update jobs set sweep_at = 0 returning id")
        self._wait_for_checkpoints(fleet, running, dumped + 3)
        self._sync(fleet.state_dir, self.folder)
        os.kill(reconciler, signal.SIGCONT)

    def restore(self, state_dir: Path) -> None:
        self.environment["GRAFT_DATABASE_URL"] = self.server.new_database("restored")
        self._sync(self.folder, state_dir)
        dump = self.folder.joinpath("graft.dump").read_bytes()
        self.server.run("pg_restore", "--exit-on-error", "--dbname=restored", stdin=dump)
        for (checkpoint,) in self._ask("select checkpoint from jobs where checkpoint is not null"):
            assert (state_dir / "bucket" / "objects" / checkpoint["object"]["key"]).is_file(), "the dump names it"

    def _wait_for_checkpoints(self, fleet: Fleet, job_id: str, number: int) -> None:
        wait_until(lambda: fleet.checkpoints(job_id) >= number, seconds=120, what="checkpoints", every=0.1)

    def _stands_still(self, reconciler: int) -> bool:
        """Stop it as its container would be, where `graft up` would start another; unless it stopped with rows held."""
        os.kill(reconciler, signal.SIGSTOP)
        self._ask("select pg_sleep(0.5)")
        begun = "state = 'idle in transaction' and state_change < now() - interval '0.4 s'"
        if not self._ask(f"select 1 from pg_stat_activity where {begun}"):
            return True
        os.kill(reconciler, signal.SIGCONT)
        return False

    def _ask(self, sql: str) -> list[Any]:
        with psycopg.connect(self.environment["GRAFT_DATABASE_URL"].replace("+psycopg", "")) as connection:
            return connection.execute(sql.encode()).fetchall()

    def _sync(self, source: Path, target: Path) -> None:
        for part in ("bucket", "models"):
            (target / part).parent.mkdir(parents=True, exist_ok=True)
            copy = ["cp", "--recursive", "--update", "--no-target-directory", source / part, target / part]
            subprocess.run(copy, check=False)  # what is swept meanwhile cannot be copied, and is needed no more


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_service_that_was_destroyed_goes_on_with_its_queue(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    (kept := tmp_path / "kept").mkdir()
    backups = Backups(kept) if kind == "sqlite" else PostgresBackups(kept, request.getfixturevalue("postgres"))
    make_tiny_base(tmp_path / "first" / "models" / "graft" / "tiny")
    fleet = Fleet(tmp_path / "first", {**QUICK, **backups.environment}).start()
    second: Fleet | None = None
    try:
        finished = fleet.wait(fleet.post(a_job(fleet, training={"max_steps": 3}))["id"])
        assert finished["status"] == "succeeded", finished["error"]
        running = fleet.post(a_job(fleet, training={"max_steps": 200, "save_steps": 10}))
        queued = fleet.post(a_job(fleet, training={"max_steps": 3}))
        wait_until(lambda: fleet.checkpoints(running["id"]) >= 1, seconds=120, what="a checkpoint", every=0.1)
        backups.back_up(fleet, running["id"])
        _destroy(fleet)
        backups.restore(tmp_path / "second")
        second = Fleet(tmp_path / "second", {**QUICK, **backups.environment}).start()
        for job in (running, queued):
            ended = second.wait(job["id"])
            assert ended["status"] == "succeeded", ended["error"]
            assert_history_holds(second.events(job["id"]))
        events = second.events(running["id"])
        assert "requeued" in [event["type"] for event in events], "it ran when it was backed up"
        assert steps_redone(events) <= 2 * 10, "it went on from its last checkpoint"
        with second.client() as client:
            for file in client.get(f"/jobs/{finished['id']}/adapter").json()["files"]:
                assert len(second.fetch(file["url"])) == file["size"]
    finally:
        for one in (fleet, second):
            if one is not None and one.process is not None:
                one.stop()


def _destroy(fleet: Fleet) -> None:
    assert fleet.process is not None
    fleet.process.send_signal(signal.SIGKILL)
    fleet.process.wait()
    fleet.process = None
    wait_until(lambda: fleet.processes() == [], seconds=60, what="the end of every process")
    shutil.rmtree(fleet.state_dir)
