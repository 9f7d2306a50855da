"""Which device a worker drives, what it listens to for that, and that the store gives it exactly those jobs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import pytest

from graft_api.jobs.fleet import workers_for
from graft_shared.capacity import CapacityTable
from graft_shared.defaults import load_capacity
from graft_shared.dispatch import queue_for
from graft_shared.jobs import Stage
from graft_shared.store import Database, Jobs, Leases, Workers, open_database
from graft_shared.store.migrate import migrate
from graft_worker.celery_app import worker_arguments
from graft_worker.device import Device, NoSuchDevice, find_device
from graft_worker.host import free_memory_bytes, oom_kill_count
from graft_worker.settings import WorkerSettings
from tests.store_factories import a_beat, a_new_job

TABLE = load_capacity(None)
CLASSES = [gpu.name for gpu in TABLE.classes]
MIB = {"16gb": 15_360, "24gb": 24_564, "40gb": 40_960, "48gb": 46_068, "80gb": 81_559, "141gb": 143_771}

Install = Callable[..., None]


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Put an `nvidia-smi` on PATH, and nothing else, that lists cards of these MiB."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    def install(*cards: int, code: int = 0) -> None:
        (tmp_path / "bin").mkdir(exist_ok=True)
        lines = "".join(f'echo "NVIDIA Card, {mib}"\n' for mib in cards)
        (tmp_path / "bin" / "nvidia-smi").write_text(f"#!/bin/sh\n{lines}exit {code}\n")
        (tmp_path / "bin" / "nvidia-smi").chmod(0o755)

    return install


def a_group(folder: Path, *, version: int, limit: str, used: int = 0, cache: int = 0, kills: int = 0) -> None:
    """What the kernel tells of a control group's memory, by either version's names."""
    total = "total_" if version == 1 else ""
    told = {
        ("memory.limit_in_bytes", "memory.max"): limit,
        ("memory.usage_in_bytes", "memory.current"): used,
        ("memory.stat", "memory.stat"): f"inactive_anon 7\n{total}inactive_file {cache}\n{total}active_file 0",
        ("memory.oom_control", "memory.events"): f"oom 9\noom_kill {kills}",
    }
    folder.mkdir(parents=True, exist_ok=True)
    for names, content in told.items():
        (folder / names[version - 1]).write_text(f"{content}\n")


def a_machine(root: Path, *, group: str) -> Path:
    """One with 8000 kB left on which this process is in that group; returns where groups are mounted."""
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text("MemTotal:  9000 kB\nMemAvailable:  8000 kB\n")
    (root / "proc" / "self" / "cgroup").write_text(group)
    return root / "sys" / "fs" / "cgroup"


V1_JOB = "5:devices:/job\n4:cpu,memory:/slurm/job/step\n1:name=systemd:/job\n0::/job\n"


@pytest.mark.parametrize(
    ("version", "group", "mount", "above", "own"),
    [
        (2, "0::/user.slice/graft.service\n", "", "user.slice", "user.slice/graft.service"),
        (2, "0::/graft\n", "", ".", "graft"),
        (1, V1_JOB, "memory", "slurm/job", "slurm/job/step"),
    ],
)
def test_free_memory_is_the_machines_or_what_the_control_groups_leave(
    tmp_path: Path, version: int, group: str, mount: str, above: str, own: str
) -> None:
    groups = a_machine(tmp_path, group=group) / mount
    assert (free_memory_bytes(tmp_path), oom_kill_count(tmp_path)) == (8000 * 1024, 0)
    unlimited = "max" if version == 2 else "9223372036854771712"
    for limit, free in {unlimited: 8000 * 1024, "1000000": 600_000, "300000": 0, "99000000": 8000 * 1024}.items():
        a_group(groups / above, version=version, limit=unlimited, kills=5)
        a_group(groups / own, version=version, limit=limit, used=700_000, cache=300_000, kills=2)
        assert (free_memory_bytes(tmp_path), oom_kill_count(tmp_path)) == (free, 2)
    a_group(groups / above, version=version, limit="800000", used=500_000, kills=5)
    a_group(groups / own, version=version, limit="1000000", used=100_000, kills=2)
    assert (free_memory_bytes(tmp_path), oom_kill_count(tmp_path)) == (300_000, 2)


@pytest.mark.parametrize(
    ("version", "group", "mount"),
    [(2, "0::/\n", ""), (2, "0::/docker/1f\n", ""), (1, "4:memory:/docker/1f\n0::/\n", "memory")],
)
def test_in_a_container_the_mount_is_this_process_own_group(
    tmp_path: Path, version: int, group: str, mount: str
) -> None:
    folder = a_machine(tmp_path, group=group) / mount
    a_group(folder, version=version, limit="1000000", used=400_000, kills=3)
    assert (free_memory_bytes(tmp_path), oom_kill_count(tmp_path)) == (600_000, 3)


@pytest.mark.parametrize(
    ("mib", "takes"),
    [
        (81_559, ("80gb", "48gb", "40gb", "24gb", "16gb", "cpu")),  # H100
        (23_028, ("24gb", "16gb", "cpu")),  # A10G
        (15_109, ("16gb", "cpu")),  # T4 with ECC
    ],
)
def test_a_gpu_takes_its_own_class_first_and_then_smaller_ones_the_largest_first(
    mib: int, takes: tuple[str, ...], nvidia_smi: Install
) -> None:
    nvidia_smi(mib)
    device = find_device("auto", Stage.TRAIN, TABLE)
    assert (device.kind, device.name, device.gpu_class) == ("cuda", "NVIDIA Card", takes[0])
    assert device.takes_classes == takes
    assert device.visible_devices == "0"


def test_a_gpu_is_meant_by_the_drivers_index(nvidia_smi: Install) -> None:
    nvidia_smi(MIB["80gb"], MIB["24gb"])
    device = find_device("cuda:1", Stage.TRAIN, TABLE)
    assert (device.gpu_class, device.visible_devices) == ("24gb", "1")


def test_a_gpu_below_every_class_is_refused_with_its_size(nvidia_smi: Install) -> None:
    nvidia_smi(8_192)
    with pytest.raises(NoSuchDevice, match=r"NVIDIA Card\) has 8\.0 GiB: below every class"):
        find_device("auto", Stage.TRAIN, TABLE)


def test_an_index_beyond_the_cards_is_refused_with_their_number(nvidia_smi: Install) -> None:
    nvidia_smi(MIB["24gb"], MIB["24gb"])
    with pytest.raises(NoSuchDevice, match="GRAFT_WORKER_DEVICE is cuda:2, but nvidia-smi lists 2 GPUs"):
        find_device("cuda:2", Stage.TRAIN, TABLE)


@pytest.mark.parametrize("driver", ["none", "no cards", "broken"])
def test_without_gpus_auto_is_the_cpu(driver: str, nvidia_smi: Install) -> None:
    if driver != "none":
        nvidia_smi(code=0 if driver == "no cards" else 9)
    device = find_device("auto", Stage.TRAIN, TABLE)
    assert (device.kind, device.gpu_class, device.takes_classes) == ("cpu", "cpu", ("cpu",))
    assert device.visible_devices == ""


def test_preparing_is_done_on_the_cpu_whatever_there_is(nvidia_smi: Install) -> None:
    nvidia_smi(MIB["80gb"])
    assert find_device("auto", Stage.PREPARE, TABLE).kind == "cpu"
    assert find_device("cuda:7", Stage.PREPARE, TABLE).kind == "cpu"


def test_a_table_without_a_class_for_cpus_is_told_to_a_worker_without_gpu(nvidia_smi: Install) -> None:
    with pytest.raises(NoSuchDevice, match="no class for CPUs"):
        find_device("auto", Stage.TRAIN, TABLE.restricted_to(["24gb"]))


def test_a_cpus_class_has_the_name_that_the_table_gives_it(nvidia_smi: Install) -> None:
    table = CapacityTable.from_dict({"classes": {"host": {"memory_gib": 8, "cpu": True}}})
    assert find_device("auto", Stage.TRAIN, table).gpu_class == "host"


@pytest.fixture
def store(sqlite_url: str) -> Iterator[Database]:
    database = open_database(sqlite_url)
    migrate(database)
    yield database
    database.close()


def queues_of(device: Device) -> list[str]:
    """The queues that Celery is told to listen to."""
    (argument,) = [
        word for word in worker_arguments(WorkerSettings(worker_name="w"), device) if word.startswith("--queues=")
    ]
    return argument.removeprefix("--queues=").split(",")


@pytest.mark.parametrize("own", CLASSES)
def test_a_worker_hears_the_bells_of_exactly_those_jobs_that_the_store_gives_it(
    own: str, store: Database, nvidia_smi: Install
) -> None:
    nvidia_smi(*([] if own == "cpu" else [MIB[own]]))
    device = find_device("auto", Stage.TRAIN, TABLE)
    assert device.gpu_class == own
    jobs, leases, workers = Jobs(store), Leases(store, timedelta(seconds=60)), Workers(store)
    facts = {"gpu_class": device.gpu_class, "stages": (device.stage,), "takes_classes": device.takes_classes}
    workers.beat(**a_beat("w", **facts))
    for asked in CLASSES:
        job, _ = jobs.submit(a_new_job(gpu_class=asked))
        prepared = leases.claim("p", stage=Stage.PREPARE, gpu_classes=[])
        assert prepared is not None
        leases.hand_to_training(job.id, prepared.epoch, {"report": {}})
        heard = queue_for(Stage.TRAIN, asked) in queues_of(device)
        told = bool(workers_for(Stage.TRAIN, asked, workers.alive(), TABLE))
        rung = bool(leases.take_lost_bells(timedelta(0), workers.idle()))
        claimed = leases.claim("w", stage=device.stage, gpu_classes=device.takes_classes)
        assert (asked, heard, told, rung) == (asked, *[claimed is not None] * 3)
        jobs.cancel("default", job.id)
        if claimed is not None:
            leases.settle_cancelled(job.id, claimed.epoch)


def test_a_worker_that_prepares_hears_of_every_class_and_trains_nothing(store: Database) -> None:
    device = find_device("auto", Stage.PREPARE, TABLE)
    assert queues_of(device) == [queue_for(Stage.PREPARE, asked) for asked in CLASSES[:1]]
    jobs, leases = Jobs(store), Leases(store, timedelta(seconds=60))
    for asked in CLASSES:
        jobs.submit(a_new_job(gpu_class=asked))
        claimed = leases.claim("p", stage=device.stage, gpu_classes=device.takes_classes)
        assert claimed is not None
        leases.hand_to_training(claimed.id, claimed.epoch, {"report": {}})
        assert leases.claim("p", stage=device.stage, gpu_classes=device.takes_classes) is None
