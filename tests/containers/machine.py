"""What a container must know of this machine to install packages: its pip and apt settings and its CA bundle."""

from __future__ import annotations

import ast
import os
import re
import shutil
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import IO
from urllib.parse import quote, unquote, urlsplit

# Written into the stand-ins' /etc/pip.conf, hence fixed; below the ports that the kernel hands out.
WHEELS_PORT = 18573

_PLACES = ("index-url", "extra-index-url", "find-links")
_CARRIED = (*_PLACES, "trusted-host", "proxy", "timeout", "default-timeout")
_CA_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_SUITES = ("bookworm", "bookworm-updates")


def pip_configuration() -> str:
    """An /etc/pip.conf like this machine's, where folders of this machine's disk are those of `wheels_served`."""
    lines = ["[global]", f"cert = {_CA_BUNDLE}", "disable-pip-version-check = true", "root-user-action = ignore"]
    for key, values in sorted(_pip_settings().items()):
        if key in _CARRIED:
            reachable = [_served_url(value) if key in _PLACES else value for value in values]
            lines.append(f"{key} = " + "\n    ".join(reachable))
    return "\n".join(lines) + "\n"


@contextmanager
def wheels_served() -> Iterator[str]:
    """Serve the local folders that pip uses, at their own paths, on loopback; builds need `--network host`."""
    handler = partial(_Wheels, directory="/", roots=_local_roots())
    with ThreadingHTTPServer(("127.0.0.1", WHEELS_PORT), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{WHEELS_PORT}"
        finally:
            server.shutdown()
            thread.join()


def debian_mirror(name: str = "debian") -> str:
    """The archive of this name (`debian` or `debian-security`) that this machine's apt uses."""
    for file in sorted([Path("/etc/apt/sources.list"), *Path("/etc/apt/sources.list.d").glob("*")]):
        for line in file.read_text().splitlines() if file.is_file() else []:
            found = re.search(rf"https?://\S+/{name}/?(?=\s|$)", line.partition("#")[0])
            if found:
                return found[0].rstrip("/")
    raise LookupError(f"this machine's apt has no source '{name}': the stand-ins are made from Debian's archive")


def apt_sources() -> str:
    lines = [f"deb {debian_mirror()} {suite} main" for suite in _SUITES]
    return "\n".join([*lines, f"deb {debian_mirror('debian-security')} bookworm-security main", ""])


def apt_configuration() -> str:
    """The proxies of this machine's apt, and nothing else of it: its hooks are its own."""
    if shutil.which("apt-config") is None:
        return ""
    dump = subprocess.run(["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True).stdout
    return "".join(f"{line}\n" for line in dump.splitlines() if re.match(r"Acquire::https?::Proxy\b.*[^\"]\";", line))


def certificates() -> str:
    """The CA bundle that this machine trusts, as PEM."""
    named = [os.environ.get(name) for name in ("PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")]
    named += [*_pip_settings().get("cert", []), _CA_BUNDLE, ssl.get_default_verify_paths().cafile]
    return next((Path(name).read_text() for name in named if name and Path(name).is_file()), "")


class _Wheels(SimpleHTTPRequestHandler):
    def __init__(self, *arguments: object, roots: list[Path], **more: object) -> None:
        self.roots = roots
        super().__init__(*arguments, **more)

    def send_head(self) -> IO[bytes] | None:
        wanted = Path(self.translate_path(self.path))
        if any(wanted.is_relative_to(root) for root in self.roots):
            return super().send_head()
        self.send_error(404)
        return None

    def log_message(self, format: str, *arguments: object) -> None:
        pass


def _pip_settings() -> dict[str, list[str]]:
    """What pip is told on this machine: files first, then what concerns `install`, then the environment."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    pairs = [line.partition("=")[::2] for line in listed.stdout.splitlines() if "=" in line]
    settings = {}
    for section in ("global.", "install.", ":env:."):
        mine = [(key.removeprefix(section), value) for key, value in pairs if key.startswith(section)]
        settings.update({key: str(ast.literal_eval(value)).split() for key, value in mine})
    return settings


def _local_path(value: str) -> Path | None:
    """The folder of this machine that a find-links or index value means, if it means one."""
    path = Path(unquote(urlsplit(value).path)) if value.startswith("file:") else Path(value)
    return path.resolve() if path.is_dir() else None


def _served_url(value: str) -> str:
    path = _local_path(value)
    return value if path is None else f"http://127.0.0.1:{WHEELS_PORT}{quote(str(path))}/"


def _local_roots() -> list[Path]:
    """The folders to serve; an index is served with its neighbours, since its pages point to files beside it."""
    settings = _pip_settings()
    found = [(key, _local_path(value)) for key in _PLACES for value in settings.get(key, [])]
    return [path if key == "find-links" else path.parent for key, path in found if path is not None]
