"""Every process that the files of deploy/ start: its command, environment, mounts, ports, probes and time to end."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
CHART = ROOT / "deploy" / "helm" / "graft"
VALUES = sorted(path.stem for path in (CHART / "ci").glob("*.yaml"))
SECRET_VALUES = {
    "database-url": "postgresql://graft:x@db.example.com:5432/graft",
    "broker-url": "redis://:x@redis.example.com:6379/0",
    "s3-access-key-id": "graft",
    "s3-secret-access-key": "x",
    "api-keys": "default=0123456789abcdef0123456789abcdef",
    "key-pepper": "0123456789abcdef" * 3,
    "webhook-secret": "0123456789abcdef" * 3,
    "hub-token": "hf_x",
}
_DOCKERFILES = {"graft-api": "api", "graft-prepare": "worker", "graft-worker": "worker"}
_COMPOSE_GRACE_SECONDS = 10.0  # Docker's own


@dataclass(frozen=True, kw_only=True)
class Process:
    """One container as its file describes it, with what its image adds."""

    where: str
    image: str
    command: list[str]
    environment: dict[str, str]
    writable: tuple[str, ...]  # where something is mounted that can be written
    grace_seconds: float
    waits_seconds: float = 0.0  # of these: before the process is told
    is_read_only: bool = True
    ports: tuple[int, ...] = ()
    asked: tuple[tuple[str, int], ...] = ()  # path and port of each HTTP probe
    patience_seconds: tuple[float, ...] = ()  # how long each of these waits for the answer
    probes: tuple[list[str], ...] = ()  # commands of the others
    stop_signal: str | None = None

    @property
    def module(self) -> str:
        """The module that `python -m` runs."""
        assert self.command[:2] == ["python", "-m"], (self.where, self.command)
        return self.command[2]


@dataclass(frozen=True)
class Image:
    """What a Dockerfile says of the containers that are made of it."""

    environment: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)
    ports: tuple[int, ...] = ()
    user: str = ""
    stop_signal: str | None = None


def image_of(dockerfile: str) -> Image:
    """Read the last stage of `deploy/<dockerfile>.Dockerfile`."""
    text = (ROOT / "deploy" / f"{dockerfile}.Dockerfile").read_text().replace("\\\n", " ")
    said = re.findall(r"^([A-Z]+) +(.*)$", text.rpartition("\nFROM ")[2], re.M)
    environment = dict(part.split("=", 1) for word, rest in said if word == "ENV" for part in shlex.split(rest))
    one = dict(said)
    return Image(
        environment=environment,
        command=json.loads(one["CMD"]),  # a shell between would keep signals for itself
        ports=tuple(int(rest) for word, rest in said if word == "EXPOSE"),
        user=one.get("USER", ""),
        stop_signal=one.get("STOPSIGNAL"),
    )


def chart_values(name: str) -> dict[str, Any]:
    """One of the value sets that stand beside the chart."""
    values: dict[str, Any] = yaml.safe_load((CHART / "ci" / f"{name}.yaml").read_text())
    return values


def render(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The manifests of the chart: by the library of Helm 4, or by the command that `HELM` names.

    Raises:
        ValueError: The chart refuses these values; says what it says.
    """
    command = os.environ.get("HELM")
    text = _by_command(command, values) if command else _by_library(values)
    return [manifest for manifest in yaml.safe_load_all(text) if manifest]


def _by_library(values: dict[str, Any]) -> str:
    from helm_python import Chart, HelmError

    try:
        with Chart.load(CHART) as chart:
            chart.validate_schema(values)
            texts = chart.render(values, name="graft", namespace="ml")
    except HelmError as error:
        raise ValueError(str(error)) from error
    return "\n---\n".join(text for path, text in texts.items() if path.endswith(".yaml"))


def _by_command(command: str, values: dict[str, Any]) -> str:
    arguments = [command, "template", "graft", CHART, "--namespace", "ml", "--kube-version", "1.30.0", "--values", "-"]
    done = subprocess.run(arguments, input=json.dumps(values), capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ValueError(done.stderr)
    return done.stdout


def processes_of_chart(name: str) -> Iterator[Process]:
    """Those of one value set."""
    for manifest in render(chart_values(name)):
        if manifest["kind"] in ("Deployment", "Job"):
            pod = manifest["spec"]["template"]["spec"]
            for container in [*pod.get("initContainers", []), *pod["containers"]]:
                yield _of_pod(f"chart, {name}: {manifest['metadata']['name']}/{container['name']}", pod, container)


def _of_pod(where: str, pod: dict[str, Any], container: dict[str, Any]) -> Process:
    image = image_of(_DOCKERFILES[container["image"].rpartition("/")[2].partition(":")[0]])
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    ports = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    probes = [container[name] for name in ("startupProbe", "readinessProbe", "livenessProbe") if name in container]
    asked = [probe["httpGet"] for probe in probes if "httpGet" in probe]
    waits = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", ["sleep", "0"])
    assert waits[0] == "sleep", waits
    return Process(
        where=where,
        image=container["image"],
        command=container["command"],
        environment={**image.environment, **dict(map(_variable, container["env"]))},
        writable=tuple(
            mount["mountPath"]
            for mount in container["volumeMounts"]
            if not mount.get("readOnly") and "configMap" not in volumes[mount["name"]]
        ),
        grace_seconds=pod.get("terminationGracePeriodSeconds", 30),
        waits_seconds=float(waits[1]),
        is_read_only=container["securityContext"]["readOnlyRootFilesystem"],
        ports=tuple(ports.values()),
        asked=tuple((http["path"], ports[http["port"]]) for http in asked),
        patience_seconds=tuple(probe["timeoutSeconds"] for probe in probes if "httpGet" in probe),
        probes=tuple(probe["exec"]["command"] for probe in probes if "exec" in probe),
        stop_signal=image.stop_signal,
    )


def _variable(said: dict[str, Any]) -> tuple[str, str]:
    if "value" in said:
        return said["name"], said["value"]
    source = said["valueFrom"]
    if "fieldRef" in source:
        assert source["fieldRef"]["fieldPath"] == "metadata.name"
        return said["name"], "graft-worker-24gb-5d5f8d7c9b-x2x4z"
    return said["name"], SECRET_VALUES[source["secretKeyRef"]["key"]]


def processes_of_compose(folder: Path) -> Iterator[Process]:
    """Those of docker-compose.yml that are made of our images; `folder` is for its variables."""
    read = compose_config(folder, COMPOSE_PROFILES="*", API_KEYS=SECRET_VALUES["api-keys"])
    for name, service in read["services"].items():
        if service["image"] in _DOCKERFILES and name != "train-image":
            yield _of_service(name, service)


def _of_service(name: str, service: dict[str, Any]) -> Process:
    image = image_of(_DOCKERFILES[service["image"]])
    mounts = [mount["target"] for mount in service.get("volumes", []) if not mount.get("read_only")]
    shm = ["/dev/shm"] if "shm_size" in service else []
    grace = re.fullmatch(r"(?:(\d+)m)?(\d+)s", service.get("stop_grace_period", f"{_COMPOSE_GRACE_SECONDS:.0f}s"))
    assert grace is not None
    probe = service.get("healthcheck", {}).get("test", [])
    asked = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)', timeout=(\d+)\)", " ".join(probe))
    assert not probe or probe[0] == "CMD"
    return Process(
        where=f"compose: {name}",
        image=service["image"],
        command=service.get("command") or image.command,
        environment={**image.environment, **service["environment"]},
        writable=(*mounts, *service.get("tmpfs", []), *shm),
        grace_seconds=60 * int(grace[1] or 0) + int(grace[2]),
        is_read_only=service["read_only"],
        ports=tuple(port["target"] for port in service.get("ports", [])),
        asked=tuple((path, int(port)) for port, path, _ in asked),
        patience_seconds=tuple(float(seconds) for *_, seconds in asked),
        probes=(probe[1:],) if probe else (),
        stop_signal=service.get("stop_signal", image.stop_signal),
    )


def example_lines() -> dict[str, tuple[bool, str]]:
    """Each variable of env.example: whether its line is commented out, and its value."""
    text = (ROOT / "deploy" / "env.example").read_text()
    return {name: (bool(hash), value) for hash, name, value in re.findall(r"^(#?)([A-Z0-9_]+)=(.*)$", text, re.M)}


def compose_config(folder: Path, *files: str, **changes: str) -> dict[str, Any]:
    """What docker-compose makes of the compose file and an .env like the example with these lines changed.

    Raises:
        ValueError: It refuses them; says what it says.
    """
    secret = ("PASSWORD", "SECRET_ACCESS_KEY", "API_KEYS", "HOST_NAME")
    values = {
        name: "x" if name.endswith(secret) else value for name, (off, value) in example_lines().items() if not off
    }
    (folder / "env").write_text("".join(f"{name}={value}\n" for name, value in {**values, **changes}.items()))
    command: list[str | Path] = [Path(sys.executable).parent / "docker-compose", "--env-file", folder / "env"]
    for file in ("docker-compose.yml", *files):
        command += ["--file", file]
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    done = subprocess.run(
        [*command, "config", "--format", "json"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ValueError(done.stderr)
    read: dict[str, Any] = json.loads(done.stdout)
    return read
