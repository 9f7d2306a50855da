"""What is installed for training, whether it runs, and whether it fits the driver and its cards."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from packaging.requirements import Requirement

from graft_client.findings import Finding, fault, good, note, skipped
from graft_local.devices import Gpu, ask_driver, gpus_here

if TYPE_CHECKING:
    from graft_shared.capacity import CapacityTable

GIB = 1024**3
OURS = ("graft-shared", "graft-api", "graft-worker", "graft-client", "graft-local")
WORST_ERROR = 0.2  # of NF4 on [-1, 1]: half of its widest gap, 0.15, and what double quantisation adds
PROBE_SECONDS = 180  # torch from a cold disk
_TOO_BUSY = f"not known: the training libraries took more than {PROBE_SECONDS} s, the machine is too busy; try again"
_PROBE = """
import json, torch, transformers, peft, accelerate
import bitsandbytes.functional as bnb
cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
errors = {}
for device in ("cpu", *(f"cuda:{number}" for number in range(cards))):
    weights = torch.linspace(-1, 1, 64 * 64, device=device).reshape(64, 64)
    packed, state = bnb.quantize_4bit(weights, quant_type="nf4", compress_statistics=True)
    errors[device] = float((bnb.dequantize_4bit(packed, state) - weights).abs().max())
print(json.dumps({"cuda": torch.version.cuda, "cards": cards, "errors": errors}))
"""
_Table = TypeVar("_Table")
_PIP = f"{sys.executable} -m pip install"


class Probe:
    """The training libraries at work, once for all that ask: only an import proves one, and it takes seconds."""

    @cached_property
    def answer(self) -> dict[str, Any] | str | None:
        """What they did; a string is the reason why they did not, None that the machine was too busy to tell."""
        try:
            command = [sys.executable, "-c", _PROBE]
            answer = subprocess.run(command, capture_output=True, text=True, timeout=PROBE_SECONDS, check=False)
        except subprocess.TimeoutExpired:
            return None
        if answer.returncode != 0:
            return (answer.stderr.strip().splitlines() or [f"they ended with {answer.returncode}"])[-1]
        facts: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
        return facts


def versions(probe: Probe) -> Iterator[Finding]:
    """Every package that ours name must be there, in a version that they name; and the training ones must work."""
    wrong = [judge_version(need, _installed(need.name)) for need in _needs()]
    faults = [finding for finding in wrong if finding is not None]
    yield from faults
    if not faults:
        yield good("library versions", f"{len(wrong)} packages are what Graft asks for")
    yield judge_quantisation(probe.answer)


def judge_version(need: Requirement, installed: str | None) -> Finding | None:
    """None where the installed version is one of those that are asked for."""
    if installed is not None and need.specifier.contains(installed, prereleases=True):
        return None
    found = f"{need.name} {installed or 'is missing'}, Graft needs {need.specifier or 'any version'}"
    return fault("library versions", found, f"{_PIP} '{need.name}{need.specifier}'")


def judge_quantisation(answer: dict[str, Any] | str | None) -> Finding:
    """Bitsandbytes must pack a matrix into NF4 and back, on the CPU and on every card."""
    subject, remedy = "4-bit weights", f"{_PIP} --force-reinstall -c deploy/constraints/all.txt torch bitsandbytes"
    if answer is None:
        return note(subject, _TOO_BUSY)
    if isinstance(answer, str):
        return fault(subject, f"the training libraries do not work: {answer}", remedy)
    if bad := [device for device, error in answer["errors"].items() if not error < WORST_ERROR]:
        return fault(subject, f"bitsandbytes quantises wrongly on {', '.join(bad)}", remedy)
    return good(subject, f"bitsandbytes quantises on {', '.join(answer['errors'])}")


def gpus(probe: Probe, environment: Mapping[str, str]) -> Iterator[Finding]:
    """The driver and its cards, their classes, and a torch that can use them."""
    from graft_shared.defaults import load_capacity

    if trouble := _driver_trouble(environment):
        yield fault("GPU driver", *trouble)
        return
    cards = gpus_here(environment)
    if not cards:
        yield note("GPU", "none: tiny bases train on the CPU, slowly")
        return
    path = environment.get("GRAFT_CAPACITY_PATH")
    table = _read(load_capacity, Path(path) if path else None)
    yield from (_judge_class(card, table) for card in cards)
    if probe.answer is None:
        yield note("torch and CUDA", _TOO_BUSY)
    elif isinstance(probe.answer, str):
        yield skipped("torch and CUDA", "the training libraries do not work: graft doctor libraries")
    else:
        yield judge_cuda(len(cards), probe.answer["cuda"], probe.answer["cards"])


def judge_cuda(cards: int, built_for: str | None, usable: int) -> Finding:
    """Whether torch can use the cards that the driver shows."""
    subject, torch = "torch and CUDA", f"torch=={(_installed('torch') or '').partition('+')[0]}"
    if built_for is None:
        found = f"torch is built without CUDA, and there are {cards} cards"
        return fault(subject, found, f"{_PIP} --force-reinstall {torch} (the default wheel has CUDA)")
    if usable < cards:
        found = (
            f"torch, built for CUDA {built_for}, can use {usable} of {cards} cards: the driver may be too old for it"
        )
        older = f"{_PIP} --force-reinstall {torch} --index-url https://download.pytorch.org/whl/cu126"
        return fault(subject, found, f"nvidia-smi shows the driver's CUDA: update the driver, or {older}")
    return good(subject, f"built for CUDA {built_for}, uses {usable} of {cards} cards")


def _needs() -> Iterator[Requirement]:
    """What our packages that are installed ask for, those of training included."""
    for ours in OURS:
        try:
            texts = requires(ours) or []
        except PackageNotFoundError:
            continue  # one side may be installed alone
        for need in map(Requirement, texts):
            if need.name not in OURS and (need.marker is None or need.marker.evaluate({"extra": "train"})):
                yield need


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_trouble(environment: Mapping[str, str]) -> tuple[str, str] | None:
    """What keeps a GPU that is wanted, or a driver that is installed, from being used; and the remedy."""
    if shutil.which("nvidia-smi", path=environment.get("PATH")) is None:
        wanted = environment.get("GRAFT_WORKER_DEVICE", "")
        if not wanted.startswith("cuda"):
            return None
        remedy = "sudo apt-get install nvidia-driver; in a container docker run --gpus all"
        return f"GRAFT_WORKER_DEVICE asks for {wanted}, and there is no nvidia-smi", remedy
    listing = ask_driver("-L")
    if listing.returncode == 0:
        return None
    said = (listing.stdout + listing.stderr).strip().splitlines() or [f"it ended with {listing.returncode}"]
    return f"nvidia-smi fails: {said[0]}", "sudo modprobe nvidia && nvidia-smi; after an update of the driver: reboot"


def _judge_class(gpu: Gpu, table: CapacityTable | str) -> Finding:
    told = ask_driver(f"--id={gpu.index}", "--query-gpu=memory.total", "--format=csv,noheader,nounits")
    said = (told.stdout + told.stderr).strip()
    if not said.isdecimal():
        found = f"{gpu.name}: nvidia-smi does not tell its memory ({said}), and a worker needs it to know its class"
        return fault(f"GPU {gpu.index}", found, "update the driver; or export CUDA_VISIBLE_DEVICES= without this card")
    memory = int(said) * 1024**2
    found = f"{gpu.name}, {memory / GIB:.1f} GiB"
    if isinstance(table, str):
        return skipped(f"GPU {gpu.index}", f"{found}: the capacity table cannot be read: graft doctor tables")
    gpu_class = table.class_for_memory(memory)
    if gpu_class is None:
        return note(f"GPU {gpu.index}", f"{found}: below every class", "add one to the file of GRAFT_CAPACITY_PATH")
    return good(f"GPU {gpu.index}", f"{found}: class {gpu_class.name}")


def tables(capacity_path: Path | None, catalogue_path: Path | None) -> Iterator[Finding]:
    """The files that say what there is to train, and on what: nothing starts without them."""
    from graft_shared.defaults import load_capacity, load_catalogue

    yield _judge_table("capacity table", _read(load_capacity, capacity_path), "GRAFT_CAPACITY_PATH")
    yield _judge_table("catalogue", _read(load_catalogue, catalogue_path), "GRAFT_CATALOGUE_PATH")


def _judge_table(subject: str, read: object, variable: str) -> Finding:
    if isinstance(read, str):
        return fault(subject, f"{variable} names a file that cannot be read: {read}", f"mend it, or unset {variable}")
    return good(subject, "can be read")


def _read(load: Callable[[Path | None], _Table], path: Path | None) -> _Table | str:
    """What a file says; a string is the reason why it says nothing."""
    try:
        return load(path)
    except Exception as error:  # noqa: BLE001 (an operator's file may hold anything)
        return f"{type(error).__name__}: {' '.join(str(error).split())}"
