"""Stand-ins, built from Debian and PyPI alone and tagged as the real images, for machines that can pull nothing."""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests import servers
from tests.containers import machine
from tests.containers.engine import DockerEngine, DockerFailed
from tests.containers.machine import wheels_served

__all__ = ["STAND_INS", "build_standins", "wheels_served"]

LABEL = "graft.standin.recipe"
ROOT = "graft-standin-root:bookworm"
RECIPES = Path(__file__).parent / "images"
# Tag -> folder of its recipe; each after those that it is built from.
STAND_INS = {
    "graft-standin-debian:bookworm": "debian",
    "python:3.11-slim-bookworm": "python",
    "postgres:18-bookworm": "postgres",
    "redis:8-bookworm": "redis",
    "versity/versitygw:v1.8.0": "versitygw",
    "prom/prometheus:v3.5.0": "prometheus",
    "grafana/grafana:12.1.1": "grafana",
}

_DEBOOTSTRAP = ("--variant=minbase", "--include=ca-certificates,python3,python3-venv,python3-pip", "bookworm")
_NOT_IMPORTED = ("./var/cache/apt/archives/*.deb", "./var/lib/apt/lists/*")
_GATEWAY = {"folder": "/gateway", "user": "root"}
_GATEWAY_PORTS = {"account": 6202, "container": 6201, "object": 6200}

log = logging.getLogger(__name__)


def build_standins(engine: DockerEngine, cache: Path) -> None:
    """Build on this engine whichever stand-ins are missing there or have changed; `cache` keeps Debian's root."""
    hashes = {ROOT: _digest({"debootstrap": " ".join(_DEBOOTSTRAP)})}
    if _recipe_on(engine, ROOT) != hashes[ROOT]:
        with _timed(ROOT):
            _import_root(engine, _debian_root(cache.resolve()), hashes[ROOT])
    with wheels_served():
        for tag, recipe in STAND_INS.items():
            files = _recipe(recipe)
            parent = re.search(r"^FROM (\S+)", files["Dockerfile"], re.MULTILINE)
            assert parent is not None
            hashes[tag] = _digest(files, hashes[parent[1]])
            if _recipe_on(engine, tag) != hashes[tag]:
                with _timed(tag):
                    _build(engine, tag, files, hashes[tag])


def _recipe_on(engine: DockerEngine, tag: str) -> str | None:
    """The recipe that the engine's image of this tag was built from; None without such an image."""
    try:
        return engine.run("image", "inspect", "--format", f'{{{{index .Config.Labels "{LABEL}"}}}}', tag).strip()
    except DockerFailed as failure:
        if "No such image" in str(failure):
            return None
        raise


def _digest(files: dict[str, str], parent: str = "") -> str:
    return hashlib.sha256(repr((parent, sorted(files.items()))).encode()).hexdigest()[:16]


def _debian_root(cache: Path) -> Path:
    root, unfinished = cache / "rootfs", cache / "rootfs.unfinished"
    if root.exists():
        return root
    if unfinished.exists():
        shutil.rmtree(unfinished)
    cache.mkdir(parents=True, exist_ok=True)
    command = ["debootstrap", *_DEBOOTSTRAP, str(unfinished), machine.debian_mirror()]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise DockerFailed(f"{' '.join(command)}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    return unfinished.rename(root)


def _import_root(engine: DockerEngine, root: Path, digest: str) -> None:
    pack = ["tar", "--directory", root, "--create", *(f"--exclude={pattern}" for pattern in _NOT_IMPORTED), "."]
    with tempfile.TemporaryDirectory(dir=root.parent) as folder:
        archive = Path(folder) / "root.tar"
        subprocess.run([*pack, "--file", archive], check=True)
        engine.run("import", "--change", f"LABEL {LABEL}={digest}", archive, ROOT)


def _build(engine: DockerEngine, tag: str, files: dict[str, str], digest: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text)
        engine.run("build", "--network", "host", "--label", f"{LABEL}={digest}", "--tag", tag, folder)


def _recipe(name: str) -> dict[str, str]:
    """The files that an image is built from, as name -> text: those of its folder, and those made here."""
    files = {path.name: path.read_text() for path in (RECIPES / name).iterdir() if path.is_file()}
    if name == "debian":
        files |= {"pip.conf": machine.pip_configuration(), "machine.pem": machine.certificates()}
        files |= {"sources.list": machine.apt_sources(), "apt.conf": machine.apt_configuration()}
    elif name == "versitygw":
        files |= _gateway_configuration()
    return files


def _gateway_configuration() -> dict[str, str]:
    """Swift as the tests run it, but open to other machines and with a credential that comes at the start."""
    proxy = servers._SWIFT_PROXY.format(port=9000, pipeline=servers._SWIFT_PIPELINE, key="KEY", **_GATEWAY)
    for here, there in (("bind_ip = 127.0.0.1", "bind_ip = 0.0.0.0"), ("user_test_tester = KEY .admin", "CREDENTIAL")):
        assert here in proxy
        proxy = proxy.replace(here, there)
    files = {"proxy-server.conf": proxy}
    for kind, port in _GATEWAY_PORTS.items():
        files[f"{kind}-server.conf"] = servers._SWIFT_STORAGE.format(kind=kind, port=port, **_GATEWAY)
    rings = "".join(f"{kind} {port}\n" for kind, port in _GATEWAY_PORTS.items())
    return files | {"rings": rings}


@contextmanager
def _timed(tag: str) -> Iterator[None]:
    start = time.monotonic()
    yield
    log.info("built %s in %.1f s", tag, time.monotonic() - start)
