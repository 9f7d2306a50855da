"""What admission costs: the CPU of estimates, and how long a job that fits nowhere waits for its refusal.

    make bench                                    (or: python tests/bench/admission.py --out FILE)

The real API on SQLite, without a network between. Estimates are of any base, settings and fleet, placed or refused with
advice, each with nothing remembered of those before it; the CPU is that of the whole application from the request to
its answer. The refusal is that of a 70B on a fleet up to 24 GB, again and again, and a client's own work is in it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import anyio.to_thread

from graft_shared import memory
from graft_shared.defaults import load_capacity, load_catalogue
from tests.api_service import ApiService, make_service, migrated_database
from tests.bench.train_once import command_line

ESTIMATES, FLEETS, REFUSALS = 1000, 8, 100


def main() -> None:
    """Ask, post, tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--estimates", type=int, default=ESTIMATES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        template = migrated_database(Path(name))
        figures = {
            "estimates": estimates(Path(name), template, arguments.estimates, random.Random(arguments.seed)),
            "refusals_70b_24gb": refusals(Path(name), template),
            "command": command_line(),
        }
    print(json.dumps(figures, indent=1))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(figures, indent=1) + "\n")


def estimates(folder: Path, template: Path, count: int, chance: random.Random) -> dict[str, Any]:
    """The CPU that each takes, in milliseconds: those that are placed, those that are refused, and the dearest."""
    taken: dict[bool, list[float]] = {True: [], False: []}
    dearest: dict[str, Any] = {"cpu_ms": 0.0}
    for number in range(FLEETS):
        home = folder / f"fleet-{number}"
        home.mkdir()
        classes = a_fleet(chance)
        service = make_service(home, template, classes=classes)
        file = service.upload().json()["id"]
        for _ in range(count // FLEETS):
            spec = {**a_spec(chance), "dataset": {"file": file}}
            fits, milliseconds = cpu_of(service, spec)
            taken[fits].append(milliseconds)
            dearest = max(
                dearest, {"cpu_ms": round(milliseconds, 1), "classes": classes, **spec}, key=lambda one: one["cpu_ms"]
            )
        service.database.close()
    of_all = taken[True] + taken[False]
    return {
        "placed": summary(taken[True]),
        "refused": summary(taken[False]),
        "share_under_20_ms": round(sum(one < 20 for one in of_all) / len(of_all), 4),
        "dearest": dearest,
    }


def a_fleet(chance: random.Random) -> list[str]:
    """The CPU and some of the classes that the table knows."""
    gpus = [gpu.name for gpu in load_capacity().classes if not gpu.is_cpu]
    chosen = chance.sample(gpus, chance.randint(1, len(gpus)))
    return ["cpu", *(name for name in gpus if name in chosen)]


def a_spec(chance: random.Random) -> dict[str, Any]:
    """Any listed base with any settings that it can be trained with."""
    shape = chance.choice(list(load_catalogue()))
    lengths = [length for length in (8, 64, 512, 2048, 16_384, 131_072) if length <= shape.max_position_embeddings]
    return {
        "base_model": shape.base_model,
        "lora": {"r": chance.choice([8, 16, 64, 256]), "target_modules": chance.choice(["auto", "all-linear"])},
        "quantization": {"load_in_4bit": chance.random() < 0.8},
        "training": {
            "max_length": chance.choice(lengths),
            "per_device_train_batch_size": chance.choice([1, 4, 32, 1024]),
            "gradient_accumulation_steps": chance.choice([1, 4, 16]),
            "optim": chance.choice(["paged_adamw_8bit", "adamw_torch"]),
            "gradient_checkpointing": chance.choice(["auto", "auto", True, False]),
        },
    }


def cpu_of(service: ApiService, spec: dict[str, Any]) -> tuple[bool, float]:
    """Whether it fits, and the CPU of the request, in milliseconds."""
    memory._estimate.cache_clear()
    memory._sizes.cache_clear()
    memory._sharing.cache_clear()
    status, body, milliseconds = asyncio.run(_asked(service.http.app, json.dumps(spec).encode()))
    if status != 200:
        raise SystemExit(f"expected an estimate of {spec}, got {status}: {body.decode()}")
    return json.loads(body)["fits"], milliseconds


async def _asked(app: Any, body: bytes) -> tuple[int, bytes, float]:
    """Ask the application as a server does; the event loop and its threads are there already."""
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": "/jobs/estimate", "raw_path": b"/jobs/estimate", "query_string": b"", "root_path": "",
        "headers": headers, "client": ("127.0.0.1", 1), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    said: list[dict[str, Any]] = []
    to_read = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if not to_read:
            await asyncio.Event().wait()
        return to_read.pop()

    async def send(message: dict[str, Any]) -> None:
        said.append(message)

    await anyio.to_thread.run_sync(int)
    began = time.process_time()
    await app(scope, receive, send)
    milliseconds = 1000 * (time.process_time() - began)
    return said[0]["status"], b"".join(message.get("body", b"") for message in said[1:]), milliseconds


def refusals(folder: Path, template: Path) -> dict[str, Any]:
    """How long each takes, in milliseconds."""
    home = folder / "refusals"
    home.mkdir()
    service = make_service(home, template, classes=["cpu", "16gb", "24gb"])
    spec = service.spec(base_model="meta-llama/Llama-2-70b-hf")
    waited = []
    for _ in range(REFUSALS):
        began = time.perf_counter()
        answer = service.post(spec)
        waited.append(1000 * (time.perf_counter() - began))
        if answer.status_code != 422:
            raise SystemExit(f"expected a refusal, got {answer.status_code}: {answer.text}")
    service.database.close()
    return {"first_ms": round(waited[0], 1), **summary(waited)}


def summary(milliseconds: Sequence[float]) -> dict[str, Any]:
    """How many, half of them, all but one in twenty, and all."""
    ordered = sorted(milliseconds)
    return {
        "requests": len(ordered),
        "median_ms": round(statistics.median(ordered), 1),
        "p95_ms": round(ordered[int(0.95 * len(ordered))], 1),
        "most_ms": round(ordered[-1], 1),
    }


if __name__ == "__main__":
    main()
