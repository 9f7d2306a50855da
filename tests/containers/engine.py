"""A Docker engine of the tests' own: its data, its socket and its containers lie in one folder and end with it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests.waiting import wait_until

PROGRAMS = ("dockerd", "debootstrap", "iptables", "aws")
PACKAGES = ("docker.io", "debootstrap", "iptables", "awscli")
STOP_SECONDS = 90.0


class DockerFailed(Exception):
    """A `docker` command, or the engine itself, failed; carries what it said."""


@dataclass
class DockerEngine:
    """`dockerd` as root, from Debian's docker.io; keep `folder` short, for its sockets' paths are limited."""

    folder: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def socket(self) -> Path:
        return self.folder.resolve() / "docker.sock"

    @property
    def environment(self) -> dict[str, str]:
        """For children that run `docker`: this engine, and first on the PATH a client that can build."""
        path = os.pathsep.join([str(self.folder.resolve() / "bin"), *os.get_exec_path()])
        return {**os.environ, "PATH": path, "DOCKER_HOST": f"unix://{self.socket}", "DOCKER_BUILDKIT": "1"}

    def start(self) -> DockerEngine:
        install_missing()
        folder = self.folder.resolve()
        (folder / "bin").mkdir(parents=True, exist_ok=True)
        for pidfile in (folder / "docker.pid", folder / "exec" / "containerd" / "containerd.pid"):
            _forget_if_ended(pidfile, folder)
        (folder / "bin" / "docker").unlink(missing_ok=True)
        (folder / "bin" / "docker").symlink_to(building_client())
        serve = ["dockerd", "--data-root", folder / "data", "--exec-root", folder / "exec"]
        serve += ["--host", f"unix://{self.socket}", "--pidfile", folder / "docker.pid"]
        with (folder / "dockerd.log").open("ab") as log:
            self.process = subprocess.Popen(serve, stdout=log, stderr=log, start_new_session=True)
        try:
            wait_until(self._answers, what="dockerd")
        except BaseException:
            self.stop()
            raise
        return self

    def stop(self) -> None:
        """End the engine, its containers with it, and undo the mounts that it leaves."""
        if self.process is None:
            return
        process, self.process = self.process, None
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_SECONDS)
        finally:
            for mount in reversed(_mounts_below(self.folder.resolve())):
                subprocess.run(["umount", "--lazy", mount], check=False)

    def run(self, *arguments: str | Path) -> str:
        """Run `docker …` against this engine and return what it printed."""
        done = subprocess.run(
            ["docker", *arguments], env=self.environment, capture_output=True, text=True, errors="replace", check=False
        )
        if done.returncode != 0:
            said = (done.stdout + done.stderr).strip()
            raise DockerFailed(f"docker {' '.join(map(str, arguments))}: exit status {done.returncode}\n{said}")
        return done.stdout

    def _answers(self) -> bool:
        if self.process is None or self.process.poll() is not None:
            raise DockerFailed((self.folder / "dockerd.log").read_text(errors="replace")[-4000:])
        try:
            return bool(self.run("info", "--format", "{{.ID}}"))
        except DockerFailed:
            return False


def install_missing() -> None:
    """Install what is not there yet from Debian: Docker and debootstrap, and the `aws` of the operators' guide."""
    if all(map(shutil.which, PROGRAMS)):
        return
    quietly = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run(["apt-get", *step], env=quietly, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise DockerFailed(f"apt-get {' '.join(step)}:\n{done.stdout}{done.stderr}")


def building_client() -> Path:
    """The first `docker` on the PATH that can build with BuildKit: newer ones need the buildx plugin for it."""
    clients = [Path(folder) / "docker" for folder in os.get_exec_path()]
    for client in clients:
        if os.access(client, os.X_OK) and _can_build(client):
            return client.resolve()
    raise DockerFailed("no docker client on the PATH builds with BuildKit: install docker.io or docker-buildx")


def _can_build(client: Path) -> bool:
    said = subprocess.run([client, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"version (\d+)\.", said)
    if version and int(version[1]) < 23:
        return True
    return subprocess.run([client, "buildx", "version"], capture_output=True, check=False).returncode == 0


def _forget_if_ended(pidfile: Path, folder: Path) -> None:
    """Remove a killed engine's pidfile: dockerd takes any process of that id, even a zombie, for a running one."""
    if pidfile.exists():
        commandline = Path("/proc") / pidfile.read_text().strip() / "cmdline"
        if not commandline.exists() or str(folder) not in commandline.read_text():
            pidfile.unlink()


def _mounts_below(folder: Path) -> list[str]:
    """Where something is still mounted below this folder, outermost first."""
    table = Path("/proc/self/mountinfo").read_text().splitlines()
    return [target for line in table if (target := line.split()[4]).startswith(f"{folder}/")]
