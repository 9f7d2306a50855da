"""`make demo`: a small base model, one fine-tune of it through the real service, and what it learnt.

Everything it makes stays under `.graft/demo/`; a base that is there already is used again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from graft_client import GraftClient, GraftClientError
from graft_client.progress import watch
from graft_local.broker import free_port
from graft_local.parentage import dies_with_us

HERE = Path(__file__).parent
STATE = HERE.parent / ".graft" / "demo"
BASE_MODEL = "graft/demo-llama"
BASE = STATE / "models" / BASE_MODEL
START_SECONDS = 600.0  # a busy machine takes minutes for the imports alone
WORD_SECONDS = 15.0  # between two words of a wait
STOP_SECONDS = 90.0  # longer than a worker's grace
_LOSS = re.compile(r"loss on the \d+ questions: (\d+\.\d+)")
_RIGHT = re.compile(r"answered word for word: (\d+ of \d+)")

console = Console(highlight=False, soft_wrap=True)
_began = time.monotonic()


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What a model made of the held-out questions."""

    loss: float  # nats per token of the expected answers
    right: str  # how many answers were the expected ones, as "7 of 35"
    text: str  # all that was printed: the figures and some answers


def main() -> None:
    """Run the demo; exit code 0 only when every step worked and the loss on the questions fell."""
    make_base()
    say("asking the base, before any fine-tuning")
    before = ask(BASE)
    with running_service() as client:
        adapter = fine_tune(client)
    say("asking again, with the adapter")
    after = ask(BASE, adapter)

    say("what it learnt, asked in words that it was not trained on")
    show("before", before.text)
    show("after", after.text)
    change = 100 * (after.loss - before.loss) / before.loss
    losses = f"[bold]{before.loss:.3f}[/bold] before, [bold]{after.loss:.3f}[/bold] after ({change:+.0f} %)"
    console.print(f"\nloss on the {after.right.rpartition(' ')[2]} questions: {losses}")
    console.print(f"questions answered word for word: {before.right} before, [bold]{after.right}[/bold] after")
    console.print("A base of four million parameters knows little English and mixes some answers up.")
    console.print(f"adapter: {adapter}")
    if after.loss >= before.loss:
        give_up("the loss on the questions did not fall")
    say("done")
    console.print("Next: `.venv/bin/graft up --state-dir .graft/demo`, then docs/tutorial.md in another terminal.")


def make_base() -> None:
    """Pre-train the demo's base model, unless it is there from an earlier run."""
    if is_base_made():
        say(f"using the base model at {BASE}")
        return
    say("making a small base model: a Llama of a few million parameters, pre-trained on plain text (a minute or two)")
    scratch = STATE / "base-in-the-making"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run([sys.executable, str(HERE / "make_base.py"), str(scratch)], check=False)
    if made.returncode != 0:
        give_up(f"making the base failed with exit code {made.returncode}")
    BASE.parent.mkdir(parents=True, exist_ok=True)
    scratch.rename(BASE)  # whole or not at all: an interrupted run is not taken for a base


def is_base_made() -> bool:
    """Whether a whole base is there: it appears in one piece."""
    return (BASE / "config.json").exists()


def ask(base: Path, adapter: Path | None = None) -> Answers:
    """Ask every held-out question."""
    command = [sys.executable, str(HERE / "ask.py"), str(base), *([str(adapter)] if adapter else [])]
    asked = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    loss, right = _LOSS.search(asked.stdout), _RIGHT.search(asked.stdout)
    if asked.returncode != 0 or loss is None or right is None:
        give_up(f"asking failed with exit code {asked.returncode}: {asked.stdout.strip() or 'it printed nothing'}")
    return Answers(loss=float(loss[1]), right=right[1], text=asked.stdout)


def fine_tune(client: GraftClient) -> Path:
    """Upload the rows, post the job, watch it, and bring its adapter home."""
    rows = HERE / "graft_qa.jsonl"
    say(f"uploading {rows.name}")
    spec: dict[str, Any] = json.loads((HERE / "job.json").read_text())
    spec["dataset"] = {"file": client.upload(rows)["id"]}
    job = client.submit(spec)
    say(f"job {job['id']} is accepted for GPU class {job.get('gpu_class')}")
    job = watch(client.updates(job["id"]), console)
    if job["status"] != "succeeded":
        give_up(f"the job ended as {job['status']}: {job.get('error')}")
    adapter = client.download(job["id"], STATE / "adapters" / job["id"])
    say(f"the adapter is in {adapter}, every byte checked")
    return adapter


@contextmanager
def running_service() -> Iterator[GraftClient]:
    """`graft up` on a free port, for as long as it is needed."""
    port = free_port()
    url, log = f"http://127.0.0.1:{port}", STATE / "up.log"
    say(f"starting the service on {url} (its log: {log})")
    with log.open("wb") as out:
        service = subprocess.Popen(
            [sys.executable, "-m", "graft_client", "up", "--port", str(port), "--state-dir", str(STATE)],
            stdout=out,
            stderr=out,
            env={name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")},
            start_new_session=True,  # we stop it ourselves, in order
            preexec_fn=dies_with_us(),
        )
    try:
        await_readiness(service, url, log)
        with GraftClient(url) as client:
            yield client
    finally:
        say("stopping the service")
        service.send_signal(signal.SIGTERM)
        try:
            service.wait(timeout=STOP_SECONDS)
        except subprocess.TimeoutExpired:
            service.kill()
            service.wait()


def await_readiness(service: subprocess.Popen[bytes], url: str, log: Path) -> None:
    """Return once the service is ready; leave with its log when it does not get there."""
    no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    started = told = time.monotonic()
    while (now := time.monotonic()) < started + START_SECONDS and service.poll() is None:
        if now > told + WORD_SECONDS:
            told = now
            say(f"the service is still starting, after {now - started:.0f} s of at most {START_SECONDS:.0f} s")
        try:
            with no_proxy.open(f"{url}/readyz", timeout=5) as answer:
                if json.load(answer).get("status") == "ready":
                    return
        except OSError:
            pass  # not yet
        time.sleep(0.2)
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
    how = "did not become ready" if service.poll() is None else f"ended with exit code {service.returncode}"
    give_up(f"the service {how}; the end of its log:\n{tail}\nRun `make demo` again: the base is kept.")


def say(what: str) -> None:
    """Print a step and how long the demo has run."""
    console.print(f"[dim]{time.monotonic() - _began:6.1f} s[/dim]  [bold]{what}[/bold]")


def show(title: str, text: str) -> None:
    """Print what a model said."""
    console.print(f"\n[bold]{title}[/bold]")
    console.print("\n".join("  " + line for line in text.strip().splitlines()), markup=False)


def break_off() -> NoReturn:
    """Leave as an interrupted command does, with the way on."""
    console.print("\n[yellow]interrupted[/yellow]; `make demo` begins again")
    if is_base_made():
        console.print(
            "The base and its jobs are kept; to go on with them: `.venv/bin/graft up --state-dir .graft/demo`"
        )
    sys.exit(128 + signal.SIGINT)


def give_up(reason: str) -> NoReturn:
    """Leave with exit code 1."""
    console.print("[red]the demo failed:[/red]", end=" ")
    console.print(reason, markup=False)
    sys.exit(1)


if __name__ == "__main__":
    try:
        main()
    except GraftClientError as error:
        give_up(str(error))
    except KeyboardInterrupt:
        break_off()
