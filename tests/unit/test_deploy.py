"""The files of deploy/: pins that agree, an env file that is complete, secrets that are fresh."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from graft_shared.capacity import CLASS_TOLERANCE
from graft_shared.defaults import load_capacity
from graft_shared.settings import SharedSettings
from graft_shared.store import Quotas
from graft_worker.settings import WorkerSettings
from tests.deployed import ROOT, compose_config, example_lines


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "deploy" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their annotations
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("image", ["api", "prepare", "worker"])
def test_the_pins_of_an_image_are_what_it_needs(image: str) -> None:
    pins = (ROOT / "deploy" / "constraints" / f"{image}.txt").read_text()
    assert pins == script("constraints/pin.py").pins_of(image), "run: make pins"
    assert ("torch==" in pins) == (image == "worker")


def compose_text() -> str:
    return "".join((ROOT / name).read_text() for name in ("docker-compose.yml", "deploy/hosts.yml"))


def test_the_example_lists_the_variables_that_the_compose_files_use_and_no_other() -> None:
    used = set(re.findall(r"\$\{([A-Z0-9_]+)[:}]", compose_text())) | {"COMPOSE_PROFILES", "COMPOSE_FILE"}
    assert set(example_lines()) == used


def test_what_the_example_shows_as_default_is_the_default() -> None:
    text = compose_text()
    for name, (is_commented_out, value) in example_lines().items():
        if f"${{{name}:-" in text and (is_commented_out or value):
            assert f"${{{name}:-{value}}}" in text, name


def test_what_must_be_set_is_said_by_name(tmp_path: Path) -> None:
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY", "HOST_NAME"):
        with pytest.raises(ValueError, match=name):
            compose_config(tmp_path, **{name: ""})


def test_every_process_that_claims_or_counts_is_told_the_same_quotas(tmp_path: Path) -> None:
    changes = {"QUOTA_RUNNING_JOBS": "3", "QUOTA_GPU_HOURS": "100"}
    services = compose_config(tmp_path, COMPOSE_PROFILES="*", **changes)["services"]
    for name, service in services.items():
        if name in ("api", "prepare") or name.startswith("worker"):
            told = {key: value for key, value in service["environment"].items() if key.startswith("GRAFT_QUOTA_")}
            assert told == {
                "GRAFT_QUOTA_QUEUED_JOBS": "1000",
                "GRAFT_QUOTA_RUNNING_JOBS": "3",
                "GRAFT_QUOTA_GPU_HOURS": "100",
                "GRAFT_QUOTA_STORED_BYTES": "",
            }, name
    assert services["api"]["environment"]["GRAFT_REQUESTS_PER_MINUTE"] == "600"


def test_an_empty_quota_is_no_limit_and_zero_is_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("QUEUED_JOBS", "7"), ("RUNNING_JOBS", ""), ("GPU_HOURS", ""), ("STORED_BYTES", "0")):
        monkeypatch.setenv(f"GRAFT_QUOTA_{name}", value)
    assert Quotas.of(SharedSettings()) == Quotas(queued_jobs=7, stored_bytes=0)


def test_each_image_is_built_by_one_service_and_the_others_never_pull_it(tmp_path: Path) -> None:
    services = compose_config(tmp_path, COMPOSE_PROFILES="*")["services"]
    built = [service["image"] for service in services.values() if "build" in service]
    assert sorted(built) == ["graft-api", "graft-prepare", "graft-worker"]
    for name, service in services.items():
        if service["image"] in built and name != "train-image":
            assert service["pull_policy"] == "never", name
    always = compose_config(tmp_path, COMPOSE_PROFILES="images")["services"]
    assert sorted(service["image"] for service in always.values() if "build" in service) == sorted(built), "make up"
    assert "train-image" not in compose_config(tmp_path, COMPOSE_PROFILES="cpu,gpu0")["services"]


def test_everything_waits_for_the_tables_and_for_a_bucket_that_answers(tmp_path: Path) -> None:
    services = compose_config(tmp_path, COMPOSE_PROFILES="cpu,gpu0")["services"]
    for name in ("api", "reconciler", "prepare", "merge", "worker-cpu", "worker-gpu-0"):
        for gate in ("migrate", "bucket"):
            assert services[name]["depends_on"][gate]["condition"] == "service_completed_successfully", name


def test_the_hubs_token_is_given_to_those_alone_that_ask_the_hub(tmp_path: Path) -> None:
    services = compose_config(tmp_path, COMPOSE_PROFILES="cpu,gpu0", HUB_TOKEN="hf_secret")["services"]
    told = {name for name, service in services.items() if "hf_secret" in json.dumps(service)}
    assert told == {"api", "prepare", "merge", "worker-cpu", "worker-gpu-0"}


def test_who_workers_are_for_mlflow_is_told_to_workers_alone(tmp_path: Path) -> None:
    secrets = {f"MLFLOW_TRACKING_{name}": f"secret-{name}" for name in ("USERNAME", "PASSWORD", "TOKEN")}
    services = compose_config(tmp_path, COMPOSE_PROFILES="cpu,gpu0", **secrets)["services"]
    told = {name for name, service in services.items() if secrets.items() <= service.get("environment", {}).items()}
    assert told == {"prepare", "merge", "worker-cpu", "worker-gpu-0"}
    assert told == {name for name, service in services.items() if "secret-" in json.dumps(service)}


def test_a_workers_cache_can_be_set(tmp_path: Path) -> None:
    services = compose_config(tmp_path, COMPOSE_PROFILES="cpu,gpu0", CACHE_MAX_BYTES="1000")["services"]
    for name in ("prepare", "merge", "worker-cpu", "worker-gpu-0"):
        assert services[name]["environment"]["GRAFT_CACHE_MAX_BYTES"] == "1000"
    default = compose_config(tmp_path)["services"]["prepare"]["environment"]["GRAFT_CACHE_MAX_BYTES"]
    assert int(default) == WorkerSettings().cache_max_bytes


def test_an_operator_can_do_without_a_spare_trainer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for value, wanted in (("", None), ("false", False)):
        services = compose_config(tmp_path, COMPOSE_PROFILES="gpu0", SPARE_TRAINER=value)["services"]
        monkeypatch.setenv("GRAFT_SPARE_TRAINER", services["worker-gpu-0"]["environment"]["GRAFT_SPARE_TRAINER"])
        assert WorkerSettings().spare_trainer is wanted


def test_a_second_host_reaches_the_first_ones_neighbours_under_a_name_of_its_own(tmp_path: Path) -> None:
    first = compose_config(tmp_path, "deploy/hosts.yml", CLUSTER_BIND="10.0.0.1", HOST_NAME="one")["services"]
    published = {name: (port["host_ip"], port["published"]) for name in first for port in first[name].get("ports", [])}
    assert published["postgres"] == ("10.0.0.1", "5432")
    assert published["redis"] == ("10.0.0.1", "6379")
    alone = compose_config(tmp_path)["services"]
    assert not any(alone[name].get("ports") for name in ("postgres", "redis"))

    urls = {
        "DATABASE_URL": "postgresql+psycopg://graft:${POSTGRES_PASSWORD}@10.0.0.1/graft",
        "BROKER_URL": "redis://:${REDIS_PASSWORD}@10.0.0.1:6379/0",
        "S3_ENDPOINT_URL": "http://10.0.0.1:9000",
    }
    second = compose_config(tmp_path, COMPOSE_PROFILES="gpu0", HOST_NAME="two", **urls)["services"]["worker-gpu-0"][
        "environment"
    ]
    assert second["GRAFT_DATABASE_URL"] == "postgresql+psycopg://graft:x@10.0.0.1/graft"
    assert second["GRAFT_BROKER_URL"] == "redis://:x@10.0.0.1:6379/0"
    assert second["GRAFT_S3_ENDPOINT_URL"] == "http://10.0.0.1:9000"
    assert second["GRAFT_WORKER_NAME"] == "two-gpu-0"
    assert second["GRAFT_WORKER_DEVICE"] == "cuda:0"


def test_every_service_is_hardened_and_every_worker_drains_before_it_is_killed() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "worker" in name or name in ("prepare", "merge"):
            assert service["stop_grace_period"] == "90s", name


def test_the_env_file_gets_fresh_secrets_and_this_hosts_name_and_workers() -> None:
    example = (ROOT / "deploy" / "env.example").read_text()
    env_text = script("make_env.py").env_text
    first, second = (env_text(example, "gpu0,gpu1", "host-1") for _ in range(2))
    assert "COMPOSE_PROFILES=gpu0,gpu1\n" in first
    assert "HOST_NAME=host-1\n" in first
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY", "API_KEYS", "KEY_PEPPER"):
        values = [re.search(rf"^{name}=(.+)$", text, re.MULTILINE) for text in (first, second)]
        assert values[0] and values[1] and values[0][1] != values[1][1], name


T4, A10, GT710 = "Tesla T4, 15360", "NVIDIA A10G, 23028", "GeForce GT 710, 2048"


@pytest.mark.parametrize(
    ("listing", "profiles", "said"),
    [
        ("", "cpu", "the CPU"),
        (f"0, {T4}\n1, {A10}\n", "gpu0,gpu1", "Tesla T4, 15.0 GiB"),
        (f"0, {GT710}\n1, {T4}\n", "gpu1", "GPU 0 (GeForce GT 710) has no worker: it has 2.0 GiB"),
        (f"0, {GT710}\n", "cpu", "the smallest class of deploy/capacity.yaml has 14.7 GiB"),
        ("0, NVIDIA H100 MIG, [N/A]\n", "cpu", "an unknown amount"),
        (f"8, {T4}\n", "cpu", "ends with GPU 7"),
    ],
)
def test_a_card_has_a_worker_if_the_capacity_table_has_a_class_for_it(listing: str, profiles: str, said: str) -> None:
    make_env = script("make_env.py")
    smallest = make_env.smallest_gib((ROOT / "deploy" / "capacity.yaml").read_text())
    chosen, reasons = make_env.choose_profiles(make_env.gpus_of(listing), smallest)
    assert chosen == profiles
    assert any(said in reason for reason in reasons), reasons


def test_the_env_file_measures_cards_as_workers_do() -> None:
    make_env, table = script("make_env.py"), load_capacity(ROOT / "deploy" / "capacity.yaml")
    assert make_env.CLASS_TOLERANCE == CLASS_TOLERANCE
    smallest = make_env.smallest_gib((ROOT / "deploy" / "capacity.yaml").read_text())
    for mib in (2048, 12288, 13998, 13999, 14000, 15360, 81559):
        listing = f"0, card, {mib}\n"
        has_class = table.class_for_memory(mib * 1024**2) is not None
        assert (make_env.choose_profiles(make_env.gpus_of(listing), smallest)[0] == "gpu0") is has_class, mib


def test_a_capacity_table_may_be_written_in_blocks_or_have_no_gpu() -> None:
    smallest_gib = script("make_env.py").smallest_gib
    blocks = "classes:\n  small:  # memory_gib: 1\n    memory_gib: 8\n    cpu: true\n  big:\n    memory_gib: 40\n"
    assert smallest_gib(blocks) == 40
    assert smallest_gib("classes:\n  cpu: {memory_gib: 8, cpu: true}\n") is None


@pytest.mark.parametrize(
    ("name", "written"), [("gpu-1.example.com", "gpu-1.example.com"), ("my host", "my-host"), ("", "host")]
)
def test_a_hosts_name_is_written_as_a_workers_may_be(name: str, written: str) -> None:
    assert script("make_env.py").worker_name(name) == written


def fake_nvidia_smi(folder: Path, script: str) -> str:
    """A folder to be put on the PATH."""
    folder.mkdir()
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return os.pathsep.join([str(folder), *os.get_exec_path()])


@pytest.fixture
def make_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, for a copy of deploy/."""
    shutil.copytree(ROOT / "deploy", tmp_path / "root" / "deploy")
    module = script("make_env.py")
    monkeypatch.setattr(module, "ROOT", tmp_path / "root")
    return module


def test_make_up_says_what_it_chose_and_why(
    make_env: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", f"echo '0, {GT710}'; echo '1, {T4}'"))
    make_env.main()
    said = capsys.readouterr().out
    assert "nvidia-smi lists 2 GPUs" in said and "GPU 0 (GeForce GT 710) has no worker" in said
    written = tmp_path / "root" / ".env"
    assert "COMPOSE_PROFILES=gpu1\n" in written.read_text()
    assert written.stat().st_mode & 0o777 == 0o600
    make_env.main()
    assert capsys.readouterr().out == "", "one that exists is left as it is"


@pytest.mark.parametrize(
    ("answer", "said"),
    [("exec sleep 60", "did not answer within"), ("echo 'No devices were found'; exit 6", "No devices")],
)
def test_a_driver_in_trouble_keeps_nobody_waiting(
    answer: str,
    said: str,
    make_env: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", fake_nvidia_smi(tmp_path / "bin", answer))
    monkeypatch.setattr(make_env, "SMI_SECONDS", 0.3)
    make_env.main()
    assert said in capsys.readouterr().out
    assert "COMPOSE_PROFILES=cpu\n" in (tmp_path / "root" / ".env").read_text()
