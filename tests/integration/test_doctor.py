"""`graft doctor` finds each planted fault, with the remedy; every neighbour is a real one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import redis
from alembic import command
from alembic.config import Config
from pydantic import SecretStr

import graft_shared.store.migrate
from graft_api.keys.__main__ import main as keys_command
from graft_client.doctor import judge_skew, look
from graft_client.findings import Check, Finding, Verdict, examine, good
from graft_local import devices
from graft_local.doctor import libraries, machine, neighbours
from graft_shared.settings import SharedSettings
from graft_shared.store import open_database
from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.servers import SWIFT_KEY, SWIFT_USER, RedisServer, SwiftServer
from tests.tls import tls_before
from tests.waiting import free_port

GRAFT = str(Path(sys.executable).parent / "graft")
PEPPER = "a pepper of the doctor's own tests"
HEALTHY = (Verdict.GOOD, Verdict.SKIPPED)


def faults(findings: Iterator[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.verdict is Verdict.BAD]


def the_fault(findings: Iterator[Finding]) -> tuple[str, str]:
    """What was found to be wrong, and the remedy."""
    (found,) = faults(findings)
    assert found.remedy is not None
    return found.found, found.remedy


@pytest.fixture(scope="module")
def probe() -> libraries.Probe:
    return libraries.Probe()


def test_a_broker_that_is_down_evicts_or_forgets(tmp_path: Path) -> None:
    server = RedisServer(tmp_path / "redis").start()
    environment = {"GRAFT_BROKER_URL": server.url}
    client = redis.Redis.from_url(server.url)
    assert not faults(neighbours.broker(tmp_path, environment))
    client.config_set("maxmemory-policy", "allkeys-lru")
    client.config_set("appendonly", "no")
    evicts, forgets = neighbours.broker(tmp_path, environment)
    assert (evicts.verdict, forgets.verdict) == (Verdict.BAD, Verdict.NOTE)
    for finding in (evicts, forgets):
        assert finding.remedy is not None and server.url not in finding.remedy, "no password is printed"
        client.config_set(*finding.remedy.split(" config set ")[1].split())
    assert [finding.verdict for finding in neighbours.broker(tmp_path, environment)] == [Verdict.GOOD]
    server.stop(signal.SIGKILL)  # a polite end would wait for the append-only file that was just begun
    found, remedy = the_fault(neighbours.broker(tmp_path, environment))
    assert "does not answer" in found and "redis-cli" in remedy


@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_database_that_is_behind_or_ahead(kind: str, request: pytest.FixtureRequest) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    settings = SharedSettings(database_url=url)
    opened = open_database(url)
    config = Config()
    config.set_main_option("script_location", str(Path(graft_shared.store.migrate.__file__).parent / "migrations"))
    with opened.writing() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0010")
    found, remedy = the_fault(neighbours.database(settings))
    assert "is at 0010 and lacks 0012" in found
    subprocess.run(
        [sys.executable, *remedy.split()[1:3]], env={**os.environ, "GRAFT_DATABASE_URL": url}, check=True
    )  # as it is written: `python -m graft_shared.store.migrate`
    assert not faults(neighbours.database(settings))
    with opened.writing() as connection:
        connection.exec_driver_sql("update alembic_version set version_num = '9999'")
    found, remedy = the_fault(neighbours.database(settings))
    assert "at 9999" in found and "git pull" in remedy
    opened.close()


def test_a_database_that_is_away() -> None:
    url = f"postgresql+psycopg://graft@127.0.0.1:{free_port()}/graft"
    found, remedy = the_fault(neighbours.database(SharedSettings(database_url=url)))
    assert "does not answer" in found and "pg_isready" in remedy
    found, remedy = the_fault(neighbours.database(SharedSettings(database_url="nonsense")))
    assert "cannot be read" in found and remedy.startswith("postgresql+psycopg://")


def test_a_bucket_whose_keys_are_wrong_or_whose_store_is_away(swift: SwiftServer) -> None:
    right = {
        "s3_bucket": "doctor",
        "s3_endpoint_url": swift.endpoint_url,
        "s3_access_key_id": SWIFT_USER,
        "s3_secret_access_key": SWIFT_KEY,
    }
    findings = list(neighbours.bucket(SharedSettings.model_validate(right)))
    assert [finding.verdict for finding in findings] == [Verdict.GOOD] * 2, "the bucket, and the store's clock"
    away = f"http://127.0.0.1:{free_port()}"
    for wrong in ({"s3_secret_access_key": "another"}, {"s3_endpoint_url": away}):
        found, remedy = the_fault(neighbours.bucket(SharedSettings.model_validate({**right, **wrong})))
        assert "'doctor' at" in found and "GRAFT_S3_SECRET_ACCESS_KEY" in remedy


def test_a_store_by_tls_is_asked_for_its_time_by_the_ca_that_its_objects_are_stored_by(
    swift: SwiftServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tls_before(swift.port, tmp_path) as front:
        settings = SharedSettings(
            s3_bucket="doctor",
            s3_endpoint_url=f"https://127.0.0.1:{front.port}",
            s3_access_key_id=SWIFT_USER,
            s3_secret_access_key=SecretStr(SWIFT_KEY),
        )
        monkeypatch.setenv("AWS_CA_BUNDLE", str(front.certificate))
        assert [finding.verdict for finding in neighbours.bucket(settings)] == [Verdict.GOOD] * 2
        monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
        stored, clock = neighbours.bucket(settings)
    assert (stored.verdict, clock.verdict) == (Verdict.GOOD, Verdict.NOTE)
    assert "socksio" in clock.found and "curl" in (clock.remedy or "")
    found, _ = the_fault(neighbours.hub(SharedSettings(state_dir=tmp_path), {}))
    assert "socksio" in found


def test_a_bucket_that_takes_no_bytes_and_too_few_open_files(tmp_path: Path) -> None:
    """A limit on what a process may write stands in for a full disk, which takes root: `tests/containers` has one."""
    script = f"ulimit -f 1; ulimit -n 200; {GRAFT} doctor bucket limits --json"
    (tmp_path / "bucket").mkdir()
    environment = {**os.environ, "GRAFT_STATE_DIR": str(tmp_path)}
    ran = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    files, bucket = json.loads(ran.stdout)
    assert (files["verdict"], files["remedy"]) == ("fault", "ulimit -n 65536")
    assert bucket["verdict"] == "fault" and "File too large" in bucket["found"] and "df -h" in bucket["remedy"]


def test_a_bucket_that_is_no_folder_and_a_disk_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bucket").touch()
    found, remedy = the_fault(neighbours.bucket(SharedSettings(state_dir=tmp_path)))
    assert str(tmp_path / "bucket") in found and "ls -ld" in remedy
    assert not faults(machine.disk(tmp_path / "not" / "yet"))
    monkeypatch.setattr(machine, "LEAST_DISK_BYTES", 2**70)
    found, remedy = the_fault(machine.disk(tmp_path))
    assert "GiB free at" in found and "du -xh" in remedy


def test_a_hub_that_is_not_reached_matters_less_where_a_base_is_at_hand(tmp_path: Path) -> None:
    settings, environment = SharedSettings(state_dir=tmp_path), {"HF_ENDPOINT": f"http://127.0.0.1:{free_port()}"}
    found, remedy = the_fault(neighbours.hub(settings, environment))
    assert "is not reached" in found and "HTTPS_PROXY" in remedy
    lock = tmp_path / "cache" / "models--their--base.lock"
    lock.parent.mkdir()
    lock.touch()
    found, _ = the_fault(neighbours.hub(settings, {"HF_HUB_OFFLINE": "1"}))
    assert "no base is at hand" in found, "a lock is none"
    (tmp_path / "models" / "mine" / "base").mkdir(parents=True)
    (tmp_path / "models" / "mine" / "base" / "config.json").touch()
    (finding,) = neighbours.hub(settings, environment)
    assert finding.verdict is Verdict.NOTE and "mine/base" in finding.found
    (finding,) = neighbours.hub(settings, {"HF_HUB_OFFLINE": "1"})
    assert finding.verdict is Verdict.GOOD


@pytest.fixture
def cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """A driver that shows one card, to which torch has no way."""
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\ncase "$1" in -L) echo "GPU 0: NVIDIA L4 (UUID: GPU-aa)";; *) echo 23034;; esac\n')
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    return dict(os.environ)


def test_a_torch_without_cuda_beside_a_card(cards: dict[str, str], probe: libraries.Probe) -> None:
    found, remedy = the_fault(libraries.gpus(probe, cards))
    assert "1 cards" in found and "pip install --force-reinstall torch==" in remedy
    assert "class 24gb" in next(iter(libraries.gpus(probe, cards))).found
    too_new = libraries.judge_cuda(2, "13.0", 0)
    assert too_new.verdict is Verdict.BAD and "update the driver" in (too_new.remedy or "")


def test_a_driver_that_is_wanted_and_missing_or_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: libraries.Probe
) -> None:
    wanted = {"PATH": str(tmp_path), "GRAFT_WORKER_DEVICE": "cuda:0"}
    found, remedy = the_fault(libraries.gpus(probe, wanted))
    assert "asks for cuda:0" in found and "--gpus all" in remedy
    broken = tmp_path / "nvidia-smi"
    broken.write_text("#!/bin/sh\necho Failed to initialize NVML: Driver/library version mismatch; exit 18\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    found, remedy = the_fault(libraries.gpus(probe, wanted))
    assert "version mismatch" in found and "modprobe nvidia" in remedy
    broken.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(devices, "SMI_SECONDS", 0.2)
    found, _ = the_fault(libraries.gpus(probe, wanted))
    assert "nvidia-smi fails: it does not answer within 0.2 s" in found
    assert not faults(machine.limits(wanted)), "which asks for cards, too"


def test_a_card_whose_memory_is_not_told_and_tables_that_cannot_be_read(
    cards: dict[str, str], probe: libraries.Probe, tmp_path: Path
) -> None:
    missing = tmp_path / "none.yaml"
    unknown, _ = libraries.gpus(probe, {**cards, "GRAFT_CAPACITY_PATH": str(missing)})
    assert unknown.verdict is Verdict.SKIPPED and "22.5 GiB" in unknown.found and "doctor tables" in unknown.found
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.write_text(smi.read_text().replace("echo 23034", "echo '[N/A]'"))
    untold, _ = libraries.gpus(probe, cards)
    assert untold.verdict is Verdict.BAD and "[N/A]" in untold.found and "CUDA_VISIBLE_DEVICES" in (untold.remedy or "")
    assert not faults(libraries.tables(None, None))
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text("models: 3\n")
    capacity, catalogue = faults(libraries.tables(missing, wrong))
    assert str(missing) in capacity.found and "GRAFT_CAPACITY_PATH" in (capacity.remedy or "")
    assert "TypeError" in catalogue.found and "GRAFT_CATALOGUE_PATH" in (catalogue.remedy or "")


def test_a_check_that_cannot_end_is_a_fault_of_its_own_and_stops_no_other() -> None:
    def ends_early() -> Iterator[Finding]:
        yield good("disk", "there")
        raise ZeroDivisionError("division by zero")

    checks = [Check(name="disk", look=ends_early), Check(name="port", look=lambda: [good("port", "free")])]
    there, early, free = examine(checks, ())
    assert (there.found, free.found) == ("there", "free")
    assert (early.subject, early.verdict) == ("disk", Verdict.BAD) and "ZeroDivisionError" in early.found


def test_a_wrong_version_of_bitsandbytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, probe: libraries.Probe
) -> None:
    assert not faults(libraries.versions(probe))
    planted = tmp_path / "bitsandbytes-0.42.0.dist-info"
    planted.mkdir()
    (planted / "METADATA").write_text("Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.42.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    found, remedy = the_fault(libraries.versions(probe))
    assert "bitsandbytes 0.42.0" in found and "pip install 'bitsandbytes<0.51,>=0.50'" in remedy


def test_training_libraries_that_do_not_load_or_quantise_wrongly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found, remedy = the_fault(libraries.versions(libraries.Probe()))
    assert "libcudart.so.13" in found and "--force-reinstall" in remedy
    wrong = libraries.judge_quantisation({"cuda": "13.0", "cards": 1, "errors": {"cpu": 0.1, "cuda:0": float("nan")}})
    assert wrong.verdict is Verdict.BAD and "on cuda:0" in wrong.found


def test_training_libraries_that_take_too_long_are_no_fault(
    cards: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(libraries, "PROBE_SECONDS", 0.01)
    slow = libraries.Probe()
    *_, quantisation = libraries.versions(slow)
    *_, cuda = libraries.gpus(slow, cards)
    for finding in (quantisation, cuda):
        assert (finding.verdict, finding.remedy) == (Verdict.NOTE, None)
        assert "not known" in finding.found and "too busy; try again" in finding.found


def test_a_port_that_another_program_has_or_one_that_does_not_answer_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with served(_NotGraft) as url:
        port = int(url.rpartition(":")[2])
        found, remedy = the_fault(machine.port("127.0.0.1", port))
    assert str(port) in found and "ss -ltnp" in remedy and "graft up --port" in remedy
    monkeypatch.setattr(machine, "ANSWER_SECONDS", 0.2)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        (late,) = machine.port("127.0.0.1", taken.getsockname()[1])
    assert late.verdict is Verdict.NOTE and "if it is Graft, it is busy" in late.found
    assert "graft up" not in (late.remedy or "")


def test_an_interpreter_too_old_and_little_memory() -> None:
    assert machine.judge_python((3, 10, 1)).verdict is Verdict.BAD
    assert machine.judge_memory(machine.LEAST_MEMORY_BYTES - 1).verdict is Verdict.NOTE
    assert machine.judge_shared_memory(64 * 1024**2).verdict is Verdict.NOTE
    assert "journal_mode=DELETE" in neighbours.judge_sqlite((3, 40, 1)).found


@pytest.fixture
def api(tmp_path: Path) -> Iterator[ApiProcess]:
    process = ApiProcess(tmp_path, GRAFT_KEY_PEPPER=PEPPER)
    service = process.service()
    migrate(service.database)
    service.database.close()
    yield process.start()
    process.stop(signal.SIGKILL)


def test_a_key_that_is_wrong_revoked_or_too_narrow(
    api: ApiProcess, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in api.own.items():
        monkeypatch.setenv(name, value)
    settings, url = SharedSettings(state_dir=api.state_dir), {"GRAFT_URL": api.url}

    def made(*scopes: str) -> dict[str, str]:
        keys_command(["create", "red", *(part for scope in scopes for part in ("--scope", scope))])
        return {**url, "GRAFT_API_KEY": capsys.readouterr().out.strip()}

    assert [finding.found for finding in look(url) if finding.subject == "key"] == ["none is needed"]
    (unread,) = (finding for finding in look({**url, "GRAFT_API_KEY": "nonsense"}) if finding.subject == "key")
    assert unread.found == "none is needed, and the one that is set is not looked at"
    usual, narrow = made(), made("jobs:read")
    assert not faults(look(usual)) and not faults(neighbours.key(settings, usual))
    (noted,) = (finding for finding in look(narrow) if finding.subject == "key")
    assert noted.verdict is Verdict.NOTE and "it lacks jobs:write, files:read, files:write" in noted.found
    remedy = noted.remedy or ""
    assert remedy.startswith("graft keys create TENANT --scope jobs:read --scope jobs:write")
    found, remedy = the_fault(look(url))
    assert "GRAFT_API_KEY is not set" in found and remedy.startswith("export GRAFT_API_KEY=")
    for wrong in (usual["GRAFT_API_KEY"][:-1] + "!", "nonsense"):
        found, remedy = the_fault(look({**url, "GRAFT_API_KEY": wrong}))
        assert "not in force" in found and "graft keys create" in remedy
    keys_command(["revoke", usual["GRAFT_API_KEY"].split("_")[1]])
    found, remedy = the_fault(neighbours.key(settings, usual))
    assert "of red was revoked at" in found and "graft keys create" in remedy
    notes = [finding for finding in look(narrow) if finding.subject == "its broker"]
    assert [finding.verdict for finding in notes] == [Verdict.NOTE], "no broker runs: jobs are taken all the same"


class _Late(BaseHTTPRequestHandler):
    """Graft's health check with a clock that stands an hour behind; anything else is not there."""

    body = b'{"status":"ok"}'
    fleet = b'{"data": [], "workers": []}'

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        answers = {"/readyz": b'{"checks": {}}', "/openapi.json": b'{"info": {"version": "0.0.9"}}'}
        self.wfile.write(answers.get(self.path, self.fleet if self.path == "/capacity" else self.body))

    def do_POST(self) -> None:
        self.do_GET()

    def do_DELETE(self) -> None:
        self.do_GET()

    def date_time_string(self, timestamp: float | None = None) -> str:
        return super().date_time_string(0)

    def log_message(self, *_: object) -> None:
        pass


class _Unprepared(_Late):
    fleet = (
        b'{"data": [{"name": "24gb", "live_workers": 1}], "workers": [{"stages": ["train"]}, {"stages": ["merge"]}]}'
    )


class _NotGraft(_Late):
    body = b"<html>It works!</html>"


@contextmanager
def served(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    server = HTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_clock_that_differs_another_version_no_worker_and_what_is_not_graft() -> None:
    with served(_Late) as url:
        findings = {finding.subject: finding for finding in look({"GRAFT_URL": url})}
    skewed = findings["clock of the service"]
    assert skewed.verdict is Verdict.BAD and "behind" in skewed.found and "set-ntp" in (skewed.remedy or "")
    assert [findings[name].verdict for name in ("version", "workers")] == [Verdict.NOTE] * 2
    assert judge_skew("clock", 59.0).verdict is Verdict.GOOD
    with served(_Unprepared) as url:
        trains, prepares = (finding for finding in look({"GRAFT_URL": url}) if finding.subject == "workers")
    assert (trains.verdict, prepares.verdict) == (Verdict.GOOD, Verdict.NOTE)
    assert "none that prepares is alive: jobs stay in validating_files" in prepares.found
    with served(_NotGraft) as url:
        found, remedy = the_fault(look({"GRAFT_URL": url}))
    assert "is not Graft" in found and "GRAFT_URL" in remedy


def test_a_user_is_told_of_the_way_to_the_service_and_an_operator_of_more(tmp_path: Path) -> None:
    def run(*arguments: str, url: str) -> subprocess.CompletedProcess[str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
        environment = {**clean, "GRAFT_URL": url}
        return subprocess.run(
            [GRAFT, "doctor", *arguments], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    users = run("--json", url="http://graft.invalid")
    assert users.returncode == 1
    rows = json.loads(users.stdout)
    assert [(row["subject"], row["verdict"]) for row in rows] == [("service", "fault"), ("machine", "skipped")]
    operators = run("python", "database", "bucket", url=f"http://127.0.0.1:{free_port()}")
    assert operators.returncode == 0 and "nothing was started in this state folder yet" in " ".join(
        operators.stdout.split()
    )
    assert not (tmp_path / ".graft").exists()
    with served(_Late) as url:
        other = run("database", "bucket", "hub", "--port", url.rpartition(":")[2], "--json", url=url)
    rows = json.loads(other.stdout)
    assert other.returncode == 0
    assert [(row["subject"], row["verdict"]) for row in rows][1:] == [("bucket", "skipped"), ("hub", "skipped")]
    assert rows[0]["verdict"] == "note" and "has another state folder than" in rows[0]["found"]
    unknown = run("nonsense", url="http://127.0.0.1:1")
    assert unknown.returncode == 2 and "There is no check 'nonsense'. There are: python, libraries" in unknown.stderr
