"""What the files of deploy/ start is what the code has: commands, variables, ports, probes, writes and ends."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import os
import socket
import sys
import tempfile
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import uvicorn

from graft_api.__main__ import GRACE_SECONDS
from graft_shared.buckets import open_bucket
from graft_shared.dispatch import CeleryDoorbell
from graft_shared.reconciler import Reconciler
from graft_shared.settings import SharedSettings
from graft_shared.store import Database, Leases, Workers, open_database
from graft_shared.store.migrate import migrate
from graft_worker.settings import WorkerSettings
from graft_worker.supervisor.training_run import CHECKPOINT_PATIENCE_SECONDS
from tests.api_service import make_service
from tests.deployed import SECRET_VALUES, VALUES, Process, image_of, processes_of_chart, processes_of_compose
from tests.fakes.doorbell import FakeDoorbell

READ_ONLY = {"registered_models_dir", "models_dir", "catalogue_path", "capacity_path"}
OF_ONE_MACHINE = {"bucket_dir"}  # no bucket and no database of a file: a test below sees to it


@pytest.fixture(scope="module", params=["compose", *VALUES])
def processes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Process]:
    if request.param == "compose":
        return list(processes_of_compose(tmp_path_factory.mktemp("compose")))
    return list(processes_of_chart(request.param))


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of this machine's settings."""
    for name in [name for name in os.environ if name.startswith("GRAFT_")]:
        monkeypatch.delenv(name)


def main_of(module: str) -> Any:
    """What `python -m` of this module would call."""
    if importlib.util.find_spec(module).submodule_search_locations:  # type: ignore[union-attr]
        module = f"{module}.__main__"
    return importlib.import_module(module).main


def settings_class(module: str) -> type[SharedSettings]:
    """The class that the module's `main` reads its settings with."""
    found = {
        each
        for each in main_of(module).__globals__.values()
        if isinstance(each, type) and issubclass(each, SharedSettings)
    }
    assert len(found) == 1, (module, found)
    return found.pop()


def settings_of(process: Process, monkeypatch: pytest.MonkeyPatch) -> SharedSettings:
    """What the process would read; its variables stay set."""
    for name, value in process.environment.items():
        if name.startswith("GRAFT_"):
            monkeypatch.setenv(name, value)
    return settings_class(process.module)()


def test_there_is_one_of_each_kind(processes: list[Process]) -> None:
    gates = {"graft_shared.store.migrate", "graft_shared.buckets.gate"}
    assert {each.module for each in processes} == {"graft_api", "graft_shared.reconciler", "graft_worker", *gates}
    stages = {each.environment.get("GRAFT_WORKER_STAGE", "train") for each in processes if is_worker(each)}
    assert stages == {"prepare", "train", "merge"}


def is_worker(process: Process) -> bool:
    return process.module == "graft_worker"


def test_every_variable_is_a_setting_of_the_process_that_gets_it(processes: list[Process]) -> None:
    for process in processes:
        known = {f"GRAFT_{name.upper()}" for name in settings_class(process.module).model_fields}
        given = {name for name in process.environment if name.startswith("GRAFT_")}
        assert given <= known, process.where


def test_every_value_is_one_that_the_setting_may_have(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    for process in processes:
        with monkeypatch.context() as context:
            settings = settings_of(process, context)
        assert settings.s3_bucket, process.where
        database = open_database(settings.database)
        assert database.engine.name == "postgresql", process.where
        database.close()


def test_the_api_listens_where_its_port_and_its_probes_are(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = listened(processes, monkeypatch)
    for process, (host, port) in bound.items():
        assert host == "0.0.0.0", process
        assert port in image_of("api").ports
    for process in processes:
        figures = process.environment.get("GRAFT_METRICS_PORT")
        ports = [port for port in process.ports if str(port) != figures]
        if process.where in bound:
            assert ports == [bound[process.where][1]]
            assert process.asked
            assert {port for _, port in process.asked} == set(ports), process.where
        else:
            assert not ports and not process.asked, process.where


def listened(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, int]]:
    """Host and port that each API binds: its own `main` is run up to the moment when it would listen."""
    bound: dict[str, tuple[str, int]] = {}
    for process in (each for each in processes if each.module == "graft_api"):
        heard: list[tuple[str, int]] = []
        with monkeypatch.context() as context:
            settings_of(process, context)
            context.setattr(sys, "argv", ["graft_api", *process.command[3:]])
            context.setattr(uvicorn, "run", lambda app, *, host, port, heard=heard, **_: heard.append((host, port)))
            for slow in ("build_app", "configure_logging", "serve_metrics", "figures_of"):
                context.setattr(f"graft_api.__main__.{slow}", MagicMock())
            context.setattr("graft_api.__main__.gc", garbage := MagicMock())
            main_of("graft_api")()
            assert [name for name, *_ in garbage.method_calls] == ["collect", "freeze"]
        (bound[process.where],) = heard
    return bound


def test_commands_without_arguments_are_modules_that_run(processes: list[Process]) -> None:
    for process in processes:
        for command in [process.command, *process.probes]:
            assert command[0] == "python", process.where
            if command[1] == "-c":
                compile(command[2], process.where, "exec")
                assert len(command) == 3
                continue
            assert command[1] == "-m"
            assert callable(main_of(command[2]))
            assert command[2] == "graft_api" or len(command) == 3, f"{command[2]} takes no arguments"


def test_every_address_that_a_probe_asks_answers_200_without_a_key(
    processes: list[Process], tmp_path: Path, template: Path
) -> None:
    service = make_service(tmp_path, template, api_keys=SECRET_VALUES["api-keys"])
    assert service.http.get("/jobs").status_code == 401
    for path in {path for process in processes for path, _ in process.asked}:
        assert service.http.get(path).status_code == 200, path
    service.database.close()


def test_an_api_whose_broker_and_store_say_nothing_is_ready_within_the_patience_of_its_probes(
    tmp_path: Path, template: Path
) -> None:
    every = [*processes_of_compose(tmp_path), *(each for name in VALUES for each in processes_of_chart(name))]
    asked = [pair for each in every for pair in zip(each.asked, each.patience_seconds, strict=True)]
    least = min(seconds for (path, _), seconds in asked if path == "/readyz")
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        port = silent.getsockname()[1]
        service = make_service(tmp_path, template)
        settings = SharedSettings(
            s3_bucket="b", s3_endpoint_url=f"http://127.0.0.1:{port}", s3_access_key_id="a", s3_secret_access_key="b"
        )
        here = service.http.app.state.neighbours
        others = {"bucket": open_bucket(settings), "doorbell": CeleryDoorbell(f"redis://127.0.0.1:{port}/0")}
        service.http.app.state.neighbours = dataclasses.replace(here, **others)
        began = time.monotonic()
        answer = service.http.get("/readyz")
        took = time.monotonic() - began
    service.database.close()
    assert (answer.status_code, answer.json()["status"]) == (200, "degraded")
    assert [name for name, check in answer.json()["checks"].items() if not check["ok"]] == ["broker", "bucket"]
    assert took < least, "or no API would be ready while jobs can be taken"


def test_the_reconcilers_probes_see_passes_and_none_starts_it_anew_because_its_database_is_away(
    processes: list[Process], tmp_path: Path
) -> None:
    passed = tmp_path / "passed"
    database = open_database(f"sqlite:///{tmp_path / 'graft.db'}")
    for process in (each for each in processes if each.module == "graft_shared.reconciler"):
        path = process.environment["GRAFT_RECONCILER_PASSED_PATH"]
        ready, *alive = (command[2].replace(path, str(passed)) for command in process.probes)
        assert {ready, *alive}.isdisjoint(command[2] for command in process.probes)
        for probe in (ready, *alive):
            with pytest.raises(FileNotFoundError):
                exec(probe, {})
        reconcile_once(database, passed)
        with pytest.raises(FileNotFoundError):
            exec(ready, {})
        for probe in alive:
            exec(probe, {})
        migrate(database)
        reconcile_once(database, passed)
        exec(ready, {})
    database.close()


def reconcile_once(database: Database, passed: Path) -> None:
    """One pass; before the tables are made it is postponed."""
    stop = MagicMock(spec=threading.Event)
    stop.wait.side_effect = [False, True]
    leases, second = Leases(database, timedelta(seconds=60)), timedelta(seconds=1)
    reconciler = Reconciler(leases=leases, workers=Workers(database), doorbell=FakeDoorbell(), bell_again=second)
    reconciler.run(second, stop, passed)


def test_every_worker_is_asked_by_its_own_name(processes: list[Process]) -> None:
    for process in filter(is_worker, processes):
        assert all(probe == ["python", "-m", "graft_worker.health"] for probe in process.probes) and process.probes
    names = [each.environment["GRAFT_WORKER_NAME"] for each in processes if "GRAFT_WORKER_NAME" in each.environment]
    assert all(WorkerSettings(worker_name=name) for name in names)


def test_no_process_writes_where_nothing_is_mounted(processes: list[Process], monkeypatch: pytest.MonkeyPatch) -> None:
    for process in processes:
        assert process.is_read_only, process.where
        with monkeypatch.context() as context:
            settings = settings_of(process, context)
        for path in written(process, settings):
            assert any(path.is_relative_to(mount) for mount in process.writable), (process.where, path)


def written(process: Process, settings: SharedSettings) -> list[Path]:
    """Every path that the settings let a process write, and what Python and its libraries write on their own."""
    kinds = type(settings)
    ours = [each for each in kinds.__mro__ if issubclass(each, SharedSettings)]
    own = {name for each in ours for name in vars(each) if isinstance(vars(each)[name], property)}
    names = ({*own, *kinds.model_fields} if kinds is not SharedSettings else {"reconciler_passed_path"}) - READ_ONLY
    paths = [getattr(settings, name) for name in sorted(names - OF_ONE_MACHINE)]
    found = [path for path in paths if isinstance(path, Path)]
    assert len(found) == {"graft_api": 3, "graft_worker": 5, "graft_shared.reconciler": 1}.get(process.module, 0)
    if is_worker(process):
        found += [Path(process.environment["HOME"])]
        if process.environment.get("GRAFT_WORKER_DEVICE", "").startswith("cuda"):
            found += [Path("/dev/shm")]
    assert process.environment["PYTHONDONTWRITEBYTECODE"] == "1"
    assert "TMPDIR" not in process.environment
    return [*found, Path("/tmp")]


def test_temporary_files_lie_in_tmp_where_nothing_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TMPDIR", "TEMP", "TMP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tempfile, "tempdir", None)
    assert tempfile.gettempdir() == "/tmp"


def test_every_process_has_the_time_that_it_takes_to_end(
    processes: list[Process], monkeypatch: pytest.MonkeyPatch
) -> None:
    for process in processes:
        left = process.grace_seconds - process.waits_seconds
        if process.module == "graft_api":
            assert left > GRACE_SECONDS, process.where
        if is_worker(process):
            with monkeypatch.context() as context:
                settings = settings_of(process, context)
            assert isinstance(settings, WorkerSettings)
            save = settings.orders_seconds + settings.stop_grace_seconds + CHECKPOINT_PATIENCE_SECONDS
            assert left >= save, (process.where, left, save)


def test_every_process_is_told_to_end_by_sigterm(processes: list[Process]) -> None:
    for process in processes:
        assert process.stop_signal in (None, "SIGTERM"), process.where
        assert "REMAP_SIGTERM" not in process.environment, "Celery would end a running job"


def test_the_images_start_as_a_user_that_is_nobody_elses() -> None:
    for dockerfile in ("api", "worker"):
        assert image_of(dockerfile).user == "10001:10001"
