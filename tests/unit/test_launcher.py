"""What `graft up` promises about processes, shown with tiny children; and what it decides before it starts any."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr

from graft_api.keys import making
from graft_local.broker import configure_broker
from graft_local.devices import parse_listing, visible
from graft_local.launcher import CannotStart, check_port, launch, service
from graft_local.output import Output
from graft_shared.store import Keys, open_database
from graft_shared.store.migrate import migrate
from tests.waiting import free_port, wait_until

ROOT = Path(__file__).parents[2]
QUICK = {"first_pause_seconds": 0.01, "longest_pause_seconds": 0.02, "ready_seconds": 20.0}


class Family:
    """A running family of fake members."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process: subprocess.Popen[str] | None = None

    def start(self, *members: dict[str, Any], **policy: float) -> Family:
        (self.folder / "plan.json").write_text(json.dumps({"members": members, "policy": QUICK | policy}))
        with (self.folder / "output").open("w") as output:
            command = [sys.executable, "-m", "tests.fakes.family", str(self.folder)]
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, text=True)
        return self

    def start_ready(self, *members: dict[str, Any], **policy: float) -> Family:
        self.start(*members, **policy)
        wait_until(lambda: "all are ready" in self.output, seconds=20, what="the family")
        return self

    @property
    def journal(self) -> list[str]:
        path = self.folder / "journal"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def output(self) -> str:
        return (self.folder / "output").read_text()

    def notes(self) -> list[str]:
        """The journal without process numbers."""
        return [" ".join(line.split()[:2]) for line in self.journal]

    def pids(self, name: str, verb: str = "started") -> list[int]:
        return [int(line.split()[2]) for line in self.journal if line.startswith(f"{name} {verb}")]

    def everyone(self) -> list[int]:
        return [int(line.split()[2]) for line in self.journal if len(line.split()) == 3]

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def end(self) -> int:
        assert self.process is not None
        return self.process.wait(timeout=20)


@pytest.fixture
def family(tmp_path: Path) -> Iterator[Family]:
    family = Family(tmp_path)
    yield family
    if family.process is not None:
        family.process.kill()
        family.process.wait()


def member(name: str, wave: int, behaviour: str = "leave", **more: Any) -> dict[str, Any]:
    return {"name": name, "wave": wave, "behaviour": behaviour, **more}


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_children_start_in_order_and_stop_in_reverse(family: Family) -> None:
    family.start_ready(member("api", 2), member("migrate", 0, "finish"), member("broker", 1), member("worker", 3))
    family.signal(signal.SIGTERM)
    assert family.end() == 0
    started = ["migrate started", "broker started", "api started", "worker started"]
    assert family.notes() == [*started, "worker left", "api left", "broker left"]
    assert not any(map(alive, family.everyone()))
    assert "api: api says hello" in family.output


def test_a_killed_child_is_started_again(family: Family) -> None:
    family.start_ready(member("broker", 0), member("api", 1))
    os.kill(family.pids("broker")[0], signal.SIGKILL)
    wait_until(lambda: len(family.pids("broker")) == 2, seconds=20, what="a second broker")
    assert "broker ended unexpectedly (killed by SIGKILL)" in family.output
    family.signal(signal.SIGINT)
    assert family.end() == 0
    assert not any(map(alive, family.everyone()))


def test_a_child_that_keeps_dying_stops_everything_with_exit_code_1(family: Family) -> None:
    family.start(member("broker", 0), member("api", 1, "die"))
    assert family.end() == 1
    assert len(family.pids("api")) == 5
    assert "api ended 5 times in a row soon after its start (exit code 3)" in family.output
    assert family.notes()[-1] == "broker left"
    assert not any(map(alive, family.everyone()))


def test_when_migration_fails_nothing_else_is_started(family: Family) -> None:
    family.start(member("migrate", 0, "die"), member("broker", 1))
    assert family.end() == 1
    assert family.notes() == ["migrate started"]
    assert "migrate failed (exit code 3)" in family.output


def test_a_stubborn_child_is_killed_after_its_grace(family: Family) -> None:
    family.start_ready(member("worker", 0, "refuse", grace_seconds=0.3))
    family.signal(signal.SIGTERM)
    assert family.end() == 0
    assert family.notes() == ["worker started", "worker refused"]
    assert not alive(family.pids("worker")[0])


def test_a_second_ctrl_c_kills_at_once(family: Family) -> None:
    family.start_ready(member("worker", 0, "refuse", grace_seconds=1000))
    family.signal(signal.SIGINT)
    wait_until(lambda: "worker refused" in family.notes(), seconds=20, what="the worker's refusal")

    def ended_after_another() -> bool:
        family.signal(signal.SIGINT)
        return family.process is not None and family.process.poll() is not None

    wait_until(ended_after_another, seconds=20, what="the end", every=0.1)
    assert not alive(family.pids("worker")[0])


def test_one_ctrl_c_that_arrives_twice_is_not_a_second_one(family: Family) -> None:
    family.start_ready(member("worker", 0))
    os.kill(family.pids("worker")[0], signal.SIGSTOP)  # it cannot leave before both have arrived
    family.signal(signal.SIGINT)
    family.signal(signal.SIGTERM)
    wait_until(lambda: "stopping worker" in family.output, seconds=20, what="the stop")
    os.kill(family.pids("worker")[0], signal.SIGCONT)
    assert family.end() == 0
    assert family.notes()[-1] == "worker left"


def test_a_launcher_killed_with_kill_9_leaves_no_process(family: Family) -> None:
    family.start_ready(member("broker", 0), member("worker", 1, "refuse"))
    family.signal(signal.SIGKILL)
    wait_until(lambda: not any(map(alive, family.everyone())), seconds=20, what="the end of the children")


def test_a_grandchild_in_a_session_of_its_own_does_not_stay(family: Family) -> None:
    family.start_ready(member("worker", 0, "parent"))
    orphan = family.pids("worker", "bore")[0]
    assert alive(orphan)
    family.signal(signal.SIGTERM)
    assert family.end() == 0
    assert not alive(orphan)


def test_a_child_that_never_gets_ready_ends_the_start(family: Family) -> None:
    family.start(member("broker", 0), member("api", 1, "never ready"), member("worker", 2), ready_seconds=0.5)
    assert family.end() == 1
    assert "api did not become ready within 0.5 s" in family.output
    assert family.notes()[-2:] == ["api left", "broker left"]
    assert not any(line.startswith("worker") for line in family.notes())


def test_a_taken_port_is_named_before_anything_is_started(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(CannotStart, match=rf"Port {port} on 127.0.0.1 cannot be used .*graft up --port"):
            launch("127.0.0.1", port, tmp_path / "state")
    assert [path.name for path in (tmp_path / "state").iterdir()] == ["up.lock"]
    check_port("127.0.0.1", port)


def test_two_launchers_cannot_share_a_state_folder(tmp_path: Path) -> None:
    with (tmp_path / "up.lock").open("w") as lock:
        lock.write("4711")
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(CannotStart, match="process 4711"):
            launch("127.0.0.1", free_port(), tmp_path)


def test_the_service_prepares_and_has_one_worker_per_gpu_and_one_for_the_cpu(tmp_path: Path) -> None:
    gpus = parse_listing("GPU 0: NVIDIA L4 (UUID: GPU-aa)\nGPU 1: NVIDIA L4 (UUID: GPU-bb)\n")
    specs = service("127.0.0.1", 8000, tmp_path, {"PATH": "/bin"}, gpus)
    workers = {spec.name.removeprefix("worker "): spec.environment for spec in specs if "worker" in spec.name}
    does = {name: (facts["GRAFT_WORKER_STAGE"], facts["GRAFT_WORKER_DEVICE"]) for name, facts in workers.items()}
    assert does == {
        "prepare": ("prepare", "cpu"),
        "merge": ("merge", "cpu"),
        "cpu": ("train", "cpu"),
        "gpu-0": ("train", "cuda:0"),
        "gpu-1": ("train", "cuda:1"),
    }
    order = [spec.name for spec in sorted(specs, key=lambda spec: spec.wave)]
    assert order[:4] == ["migrate", "broker", "api", "reconciler"]
    assert len({spec.environment["GRAFT_BROKER_URL"] for spec in specs if spec.name not in {"migrate", "broker"}}) == 1
    assert all(spec.environment["GRAFT_STATE_DIR"] == str(tmp_path) for spec in specs)


def test_each_process_shows_its_figures_on_a_port_of_its_own_if_any_does(tmp_path: Path) -> None:
    specs = service("127.0.0.1", 8000, tmp_path, {"GRAFT_METRICS_PORT": "9000"}, ())
    ports = {
        spec.name: spec.environment["GRAFT_METRICS_PORT"] for spec in specs if spec.name not in ("migrate", "broker")
    }
    workers = {"worker prepare": "9002", "worker merge": "9003", "worker cpu": "9004"}
    assert ports == {"api": "9000", "reconciler": "9001", **workers}
    assert not any("GRAFT_METRICS_PORT" in spec.environment for spec in service("::1", 1, tmp_path, {}, ()))


def test_webhooks_are_signed_with_one_secret_for_ever_that_only_its_owner_may_read(tmp_path: Path) -> None:
    for _ in range(2):
        specs = service("127.0.0.1", 8000, tmp_path, {}, ())
        secrets = {spec.environment["GRAFT_WEBHOOK_SECRET"] for spec in specs if spec.name in ("api", "reconciler")}
        assert secrets == {(tmp_path / "webhook-secret").read_text()}
    assert (tmp_path / "webhook-secret").stat().st_mode & 0o077 == 0
    given = service("127.0.0.1", 8000, tmp_path, {"GRAFT_WEBHOOK_SECRET": "mine"}, ())
    assert {spec.environment["GRAFT_WEBHOOK_SECRET"] for spec in given} == {"mine"}


def test_keys_are_hashed_under_one_pepper_for_ever_that_the_api_alone_is_told(tmp_path: Path) -> None:
    for _ in range(2):
        told = {spec.name: spec.environment.get("GRAFT_KEY_PEPPER") for spec in service("::1", 1, tmp_path, {}, ())}
        assert told.pop("api") == (tmp_path / "key-pepper").read_text()
        assert set(told.values()) == {None}
    assert (tmp_path / "key-pepper").stat().st_mode & 0o077 == 0


def test_the_operators_commands_work_on_the_service_of_a_state_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graft = Path(sys.executable).parent / "graft"

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        environment["GRAFT_STATE_DIR"] = str(tmp_path / "state")
        return subprocess.run([graft, *arguments], env=environment, capture_output=True, text=True, check=False)

    assert "There is no service in" in run("keys", "list").stderr
    database = open_database(f"sqlite:///{tmp_path / 'state' / 'graft.db'}")
    migrate(database)
    made = run("keys", "create", "red", "--scope", "jobs:read")
    assert made.returncode == 0 and making.id_of(made.stdout.strip()), made.stderr
    pepper = SecretStr((tmp_path / "state" / "key-pepper").read_text())
    (stored,) = Keys(database).list()
    assert stored.digest == making.digest_of(made.stdout.strip(), pepper)
    assert f"The service in {tmp_path / 'state'}" in made.stderr
    elsewhere = run("keys", "list", "--state-dir", str(tmp_path / "nothing"))
    assert elsewhere.returncode == 2 and f"no service in {tmp_path / 'nothing'}" in elsewhere.stderr
    (row,) = json.loads(run("keys", "list", "--json").stdout)
    assert (row["key_id"], row["state"], row["scopes"]) == (stored.id, "live", "jobs:read")
    (tmp_path / "beside").symlink_to(tmp_path / "state")
    named = run("tenants", "--state-dir", str(tmp_path / "beside"), "list")
    assert named.returncode == 0 and f"The service in {tmp_path / 'beside'}" in named.stderr, named.stderr
    listed = run("tenants", "set", "red", "--gpu-hours", "12", "--share", "2")
    assert listed.returncode == 0 and "0.00 of 12" in listed.stdout, listed.stderr
    assert run("tenants", "set", "red", "--gpu-hours", "many").returncode == 2
    database.close()


def test_a_broker_that_the_user_names_is_used_and_none_is_started(tmp_path: Path) -> None:
    specs = service("127.0.0.1", 8000, tmp_path, {"GRAFT_BROKER_URL": "redis://mine:6379/0"}, ())
    assert "broker" not in {spec.name for spec in specs}
    assert {spec.environment["GRAFT_BROKER_URL"] for spec in specs} == {"redis://mine:6379/0"}


def test_the_bundled_broker_takes_only_its_password_and_keeps_its_data_over_a_restart(tmp_path: Path) -> None:
    broker = configure_broker(tmp_path / "a folder")
    command = broker.as_child(wave=0, environment={}).command
    assert not any(broker.password in part for part in command)
    assert stat.S_IMODE(broker.configuration.stat().st_mode) == 0o600
    assert not broker.answers()
    for expected in (b"$-1\r\n", b"$4\r\n"):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        try:
            wait_until(broker.answers, seconds=20, what="the broker")
            with socket.create_connection(("127.0.0.1", broker.port), timeout=5) as stranger:
                stranger.sendall(b"PING\r\n")
                assert stranger.recv(100).startswith(b"-NOAUTH")
            with socket.create_connection(("127.0.0.1", broker.port), timeout=5) as friend:
                friend.sendall(f"AUTH {broker.password}\r\nGET bell\r\nSET bell rung\r\n".encode())
                lines = friend.makefile("rb")
                assert lines.readline() == b"+OK\r\n"
                assert lines.readline() == expected
                while lines.readline() != b"+OK\r\n":
                    pass
        finally:
            process.terminate()
            process.wait(timeout=20)


def test_cuda_visible_devices_chooses_the_cards_as_cuda_reads_it() -> None:
    listing = (
        "GPU 0: NVIDIA H200 (UUID: GPU-aa11)\n"
        "GPU 1: NVIDIA H200 (UUID: GPU-bb22)\n"
        "  MIG 1g.18gb     Device  0: (UUID: MIG-cc33)\n"
    )
    gpus = parse_listing(listing)
    assert [(gpu.index, gpu.name) for gpu in gpus] == [(0, "NVIDIA H200"), (1, "NVIDIA H200")]
    chosen = {
        wanted: [gpu.index for gpu in visible(gpus, wanted)] for wanted in ("1", "GPU-bb", "1,0", "", "-1", "0,7,1")
    }
    assert chosen == {"1": [1], "GPU-bb": [1], "1,0": [1, 0], "": [], "-1": [], "0,7,1": [0]}
    assert visible(gpus, None) == gpus


def test_log_lines_stand_under_the_name_of_their_process() -> None:
    stream = io.StringIO()
    output = Output(stream, {})
    output.fit(["api", "worker cpu"])
    output.say("api", "listening")
    output.say("worker cpu", "idle")
    assert stream.getvalue() == "api        | listening\nworker cpu | idle\n"
