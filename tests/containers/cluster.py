"""The cluster of docker-compose.yml as an operator starts it, on an engine of the tests' own."""

from __future__ import annotations

import json
import re
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from tests.containers.engine import DockerEngine
from tests.fleet import Service
from tests.waiting import free_port

ROOT = Path(__file__).parents[2]
PROJECT = "graft-test"
STORE_USER = "graft:graft"
COMPOSE = Path(sys.executable).parent / "docker-compose"


class ComposeFailed(Exception):
    """A `docker-compose` command failed; carries what it said."""


@dataclass
class Cluster(Service):
    """One compose project; what happened and how long it took is kept in `report`."""

    engine: DockerEngine
    folder: Path
    port: int = field(default_factory=free_port)
    store_port: int = field(default_factory=free_port)
    prometheus_port: int = field(default_factory=free_port)
    grafana_port: int = field(default_factory=free_port)
    api_key: str = field(default_factory=lambda: secrets.token_hex(24))
    store_key: str = field(default_factory=lambda: secrets.token_hex(24))
    report: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def models_dir(self) -> Path:
        return self.folder / "models"

    def write_env(self) -> None:
        """deploy/env.example, filled in as an operator would."""
        self.models_dir.mkdir(parents=True, exist_ok=True)
        values = {
            "POSTGRES_PASSWORD": secrets.token_hex(24),
            "REDIS_PASSWORD": secrets.token_hex(24),
            "S3_SECRET_ACCESS_KEY": self.store_key,
            "S3_PUBLIC_ENDPOINT_URL": f"http://127.0.0.1:{self.store_port}",
            "API_KEYS": f"default={self.api_key}",
            "COMPOSE_PROFILES": "cpu,observe",
            "HOST_NAME": "tests",
            "PORT": str(self.port),
            "S3_PORT": str(self.store_port),
            "PROMETHEUS_PORT": str(self.prometheus_port),
            "GRAFANA_PORT": str(self.grafana_port),
            "MODELS_DIR": str(self.models_dir),
        }
        text = (ROOT / "deploy" / "env.example").read_text()
        for name, value in values.items():
            text, found = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
            assert found == 1, name
        text += f"S3_ACCESS_KEY_ID={STORE_USER}\n"  # the stand-in's way to write an account and a user
        (self.folder / "env").write_text(text)

    def build(self) -> None:
        """Build every image as the compose file says, each once, like `make up`.

        Not by `docker-compose build`: that needs the buildx plugin, which Debian's engine comes without.
        """
        services = json.loads(self.compose("--profile", "images", "config", "--format", "json"))["services"]
        for service in services.values():
            if "build" not in service:
                continue
            image, build = service["image"], service["build"]
            began = time.monotonic()
            arguments = ["build", "--network", "host", "--tag", image]
            arguments += ["--file", str(Path(build["context"], build["dockerfile"]))]
            for name, value in build["args"].items():
                arguments += ["--build-arg", f"{name}={value}"]
            self.engine.run(*arguments, build["context"])
            size = int(self.engine.run("image", "inspect", "--format", "{{.Size}}", image))
            base = int(self.engine.run("image", "inspect", "--format", "{{.Size}}", "python:3.11-slim-bookworm"))
            facts = {
                "build_seconds": round(time.monotonic() - began, 1),
                "bytes": size,
                "bytes_above_base": size - base,
            }
            self.report.setdefault("images", {})[image] = facts

    def compose(self, *arguments: str) -> str:
        """Run `docker-compose …` on this project and return what it printed."""
        command = [str(COMPOSE), "--project-name", PROJECT, "--env-file", str(self.folder / "env"), *arguments]
        done = subprocess.run(
            command, cwd=ROOT, env=self.engine.environment, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ComposeFailed(f"docker-compose {' '.join(arguments)}\n{done.stdout[-4000:]}{done.stderr[-8000:]}")
        return done.stdout

    def up(self, **scale: int) -> float:
        """Start all and wait until it is healthy; returns the seconds that it took."""
        began = time.monotonic()
        scales = [part for name, count in scale.items() for part in ("--scale", f"{name.replace('_', '-')}={count}")]
        self.compose("up", "--detach", "--no-build", "--wait", "--wait-timeout", "600", *scales)
        return round(time.monotonic() - began, 1)

    def down(self) -> None:
        self.compose("down", "--volumes", "--timeout", "20")

    def shell(self, commands: str) -> None:
        """Run commands of deploy/README.md as an operator of this cluster would."""
        plugin = self.folder / "docker" / "cli-plugins" / "docker-compose"
        plugin.parent.mkdir(parents=True, exist_ok=True)
        if not plugin.exists():
            plugin.symlink_to(COMPOSE)
        environment = {
            **self.engine.environment,
            "DOCKER_CONFIG": str(plugin.parents[1]),
            "COMPOSE_PROJECT_NAME": PROJECT,
            "COMPOSE_ENV_FILES": str(self.folder / "env"),
            "S3": f"http://127.0.0.1:{self.store_port}",
            "AWS_ACCESS_KEY_ID": STORE_USER,
            "AWS_SECRET_ACCESS_KEY": self.store_key,
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        strictly = ["bash", "-euo", "pipefail", "-c", commands]
        done = subprocess.run(strictly, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise ComposeFailed(f"{commands}\n{done.stdout[-4000:]}{done.stderr[-8000:]}")

    def containers(self, service: str) -> list[dict[str, Any]]:
        """The running containers of a service."""
        lines = self.compose("ps", "--format", "json", service).splitlines()
        return [json.loads(line) for line in lines if line.strip()]

    def addresses(self, service: str) -> set[str]:
        """Where the copies of a service are in the cluster's network."""
        template = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        names = [container["Name"] for container in self.containers(service)]
        return set(self.engine.run("inspect", "--format", template, *names).split())

    def prometheus(self, path: str, **asked: str | float) -> Any:
        """What the cluster's Prometheus answers."""
        answer = httpx.get(f"http://127.0.0.1:{self.prometheus_port}/api/v1/{path}", params=asked, timeout=30)
        return answer.raise_for_status().json()["data"]

    def container_of_worker(self, name: str) -> str:
        """The container whose host name a worker took as its own."""
        return name.partition("/")[0]
