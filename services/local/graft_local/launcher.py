"""`graft up`: the whole service as child processes on this machine, and not one of them left when it ends."""

from __future__ import annotations

import fcntl
import http.client
import os
import shlex
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from graft_local.broker import NoBroker, configure_broker, free_port
from graft_local.children import Children, ChildSpec
from graft_local.devices import Gpu, gpus_here
from graft_local.output import Output
from graft_local.secrets import kept_secret

DEFAULT_PORT = 8000
WORKER_GRACE_SECONDS = 60.0  # a running job saves a checkpoint and goes back to the queue
_MIGRATION, _BROKER, _API, _RECONCILER, _WORKER = range(5)  # started in this order, stopped in reverse
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1", "": "127.0.0.1"}  # noqa: S104 - where to knock, not where to listen


class CannotStart(Exception):
    """Something stands in the way, and nothing has been started."""


def up(
    host: Annotated[str, typer.Option(help="Address that the API listens on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port that the API listens on; 0 takes a free one.")] = DEFAULT_PORT,
    state_dir: Annotated[
        Path, typer.Option(envvar="GRAFT_STATE_DIR", help="Where database, bucket and base models are kept.")
    ] = Path(".graft"),
) -> None:
    """Start the whole service on this machine; Ctrl-C stops it."""
    try:
        code = launch(host, port, state_dir.absolute())
    except (CannotStart, NoBroker) as error:
        _refuse(str(error))
    raise typer.Exit(code)


def launch(host: str, port: int, state_dir: Path) -> int:
    """Run the service until a signal comes, and return the exit code.

    Raises:
        CannotStart: The state folder or the port is taken.
        NoBroker: There is no Redis server.
    """
    output = Output(sys.stdout, os.environ)
    with _held(state_dir):
        port = port or free_port(host)
        check_port(host, port)
        specs = service(host, port, state_dir, os.environ, gpus_here(os.environ))
        output.fit(spec.name for spec in specs)
        return Children(specs, say=output.say).run(lambda: _announce(output, specs, host, port))


def service(
    host: str, port: int, state_dir: Path, environment: Mapping[str, str], gpus: tuple[Gpu, ...]
) -> list[ChildSpec]:
    """The processes of the service; a neighbour that the environment names is used, not started."""
    environment = {
        "GRAFT_LOG_FORMAT": "text",
        **environment,
        "GRAFT_STATE_DIR": str(state_dir),
        "PYTHONUNBUFFERED": "1",
    }
    specs = []
    if not environment.get("GRAFT_BROKER_URL"):
        broker = configure_broker(state_dir)
        specs.append(broker.as_child(wave=_BROKER, environment=environment))
        environment["GRAFT_BROKER_URL"] = broker.url
    environment.setdefault("GRAFT_WEBHOOK_SECRET", kept_secret(state_dir / "webhook-secret"))
    here = partial(_module, environment=environment)
    pepper = {"GRAFT_KEY_PEPPER": environment.get("GRAFT_KEY_PEPPER") or kept_secret(state_dir / "key-pepper")}
    api = partial(_module, environment={**environment, **pepper})
    family = [
        here("migrate", "graft_shared.store.migrate", wave=_MIGRATION, once=True),
        *specs,
        api("api", "graft_api", "--host", host, "--port", str(port), wave=_API, ready=partial(_answers, host, port)),
        here("reconciler", "graft_shared.reconciler", wave=_RECONCILER),
        _worker("prepare", "cpu", environment, stage="prepare"),
        _worker("merge", "cpu", environment, stage="merge"),
        _worker("cpu", "cpu", environment),
        *(_worker(f"gpu-{gpu.index}", f"cuda:{gpu.index}", environment) for gpu in gpus),
    ]
    return _with_metrics_ports(family, environment.get("GRAFT_METRICS_PORT"))


def _with_metrics_ports(family: list[ChildSpec], first: str | None) -> list[ChildSpec]:
    """The processes, each with a port of its own for its figures: the API has the one that is set, the rest follow."""
    if not first or not first.isdigit():
        return family
    ports = count(int(first))
    return [
        replace(spec, environment={**spec.environment, "GRAFT_METRICS_PORT": str(next(ports))})
        if spec.wave in (_API, _RECONCILER, _WORKER)
        else spec
        for spec in family
    ]


def check_port(host: str, port: int) -> None:
    """Raise CannotStart when something listens there already, or the address is not ours."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise CannotStart(
            f"Port {port} on {host} cannot be used ({error.strerror or error}). Stop what listens there, or choose "
            f"another: graft up --port {port + 1 if port < 65535 else DEFAULT_PORT}"
        ) from error


def holder_of(state_dir: Path) -> str | None:
    """The process of the `graft up` that runs on this folder; None where none does."""
    try:
        with (state_dir / "up.lock").open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return (state_dir / "up.lock").read_text().strip() or "unknown"
    except OSError:
        return None
    return None


@contextmanager
def _held(state_dir: Path) -> Iterator[None]:
    """Hold the state folder; the kernel lets go of it however we end."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        lock = (state_dir / "up.lock").open("a+")
    except OSError as error:
        raise CannotStart(
            f"Cannot write to {state_dir} ({error.strerror}). Choose another with --state-dir."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "unknown"
            raise CannotStart(
                f"Another `graft up` (process {holder}) runs on {state_dir}. Stop it, or choose another folder with "
                "--state-dir."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def _module(
    name: str,
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    wave: int,
    ready: Callable[[], bool] | None = None,
    once: bool = False,
) -> ChildSpec:
    command = (sys.executable, "-m", module, *arguments)
    return ChildSpec(name=name, command=command, environment=environment, wave=wave, ready=ready, once=once)


def _worker(name: str, device: str, environment: Mapping[str, str], stage: str = "train") -> ChildSpec:
    more = {
        "GRAFT_WORKER_DEVICE": device,
        "GRAFT_WORKER_STAGE": stage,
        "GRAFT_WORKER_NAME": name,
        "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # nvidia-smi's order; CUDA's own default is the fastest card first
    }
    return ChildSpec(
        name=f"worker {name}",
        command=(sys.executable, "-m", "graft_worker"),
        environment={**environment, **more},
        wave=_WORKER,
        grace_seconds=WORKER_GRACE_SECONDS,
    )


def _answers(host: str, port: int) -> bool:
    """Tell whether the API is ready."""
    connection = http.client.HTTPConnection(_EVERYWHERE.get(host, host), port, timeout=2)
    try:
        connection.request("GET", "/readyz")
        return connection.getresponse().status == http.HTTPStatus.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _announce(output: Output, specs: list[ChildSpec], host: str, port: int) -> None:
    address = _EVERYWHERE.get(host, host)
    url = f"http://{f'[{address}]' if ':' in address else address}:{port}"
    workers = ", ".join(spec.name.removeprefix("worker ") for spec in specs if spec.wave == _WORKER)
    prefix = "" if url == f"http://127.0.0.1:{DEFAULT_PORT}" else f"GRAFT_URL={url} "
    graft = shlex.quote(os.path.relpath(sys.argv[0])) if Path(sys.argv[0]).name == "graft" else "graft"
    output.say("graft", f"ready at {url}; workers that are starting: {workers}")
    output.say("graft", f"next, in another terminal: {prefix}{graft} submit SPEC.json --data ROWS.jsonl --watch")
    output.say("graft", "Ctrl-C stops everything")


def _refuse(message: str) -> NoReturn:
    typer.echo(f"error {message}", err=True)
    raise typer.Exit(2)
