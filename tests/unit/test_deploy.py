"""The files of deploy/: pins that agree, an env file that is complete, secrets that are fresh."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(name).stem, ROOT / "deploy" / name)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("image", ["api", "prepare", "worker"])
def test_the_pins_of_an_image_are_what_it_needs(image: str) -> None:
    pins = (ROOT / "deploy" / "constraints" / f"{image}.txt").read_text()
    assert pins == script("constraints/pin.py").pins_of(image), "run: make pins"
    assert ("torch==" in pins) == (image == "worker")


def test_every_variable_of_the_compose_file_that_has_no_default_is_in_the_example() -> None:
    compose = (ROOT / "docker-compose.yml").read_text()
    required = set(re.findall(r"\$\{([A-Z0-9_]+):\?", compose))
    example = set(re.findall(r"^([A-Z0-9_]+)=", (ROOT / "deploy" / "env.example").read_text(), re.MULTILINE))
    assert required <= example
    used = set(re.findall(r"\$\{([A-Z0-9_]+)[:}]", compose)) | {"COMPOSE_PROFILES"}
    assert example <= used, "a variable that nothing reads"


def test_every_service_is_hardened_and_every_worker_drains_before_it_is_killed() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name, service in services.items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        if "worker" in name or name == "prepare":
            assert service["stop_grace_period"] == "90s", name


@pytest.mark.parametrize(("gpus", "profiles"), [(0, "cpu"), (2, "gpu0,gpu1")])
def test_the_env_file_gets_fresh_secrets_and_this_machines_workers(gpus: int, profiles: str) -> None:
    example = (ROOT / "deploy" / "env.example").read_text()
    env_text = script("make_env.py").env_text
    first, second = env_text(example, gpus), env_text(example, gpus)
    assert f"COMPOSE_PROFILES={profiles}\n" in first
    for name in ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY", "API_KEYS"):
        values = [re.search(rf"^{name}=(.+)$", text, re.MULTILINE) for text in (first, second)]
        assert values[0] and values[1] and values[0][1] != values[1][1], name
