"""Graft beside the usual recipes on one GPU, in one process order: a table, a plot and the figures as JSON.

    make bench-gpu                                    (or: python tests/bench/compare.py --set a --out-dir DIR)

Every row is a fresh process on the same base and data; each is run as often as `--repeat` says, and the reference comes
first. Speed is the median of the last half of the steps, in real tokens per second; memory is the allocator's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
GIB = 2**30

# name, script, arguments; the first row of a set is what the others are compared with.
Row = tuple[str, str, list[str]]
SLOW, FAST = ["--steps", "40"], ["--steps", "100"]
LINEAR = ["--all-linear"]
EIGHT = ["--dims", "llama-3.1-8b", "--workload", "b", *LINEAR]
ONE = ["--dims", "llama-3.2-1b"]
A24 = ["--limit-gib", "22.2"]  # what jobs may use of a 24 GB card
SETS: dict[str, list[Row]] = {
    "a": [
        ("Trainer, checkpointing", "reference", [*SLOW, "--gradient-checkpointing"]),
        ("Trainer", "reference", SLOW),
        ("TRL, packing", "reference", [*SLOW, "--trl"]),
        ("Graft, bf16 base", "train_once", [*FAST, "--bf16-base", "--limit-gib", "34"]),
        ("Graft, speed", "train_once", [*FAST, *A24]),
        ("Graft, memory", "train_once", [*FAST, "--mode", "memory"]),
    ],
    "all-linear": [
        ("Trainer, checkpointing", "reference", [*SLOW, *LINEAR, "--gradient-checkpointing"]),
        ("Graft, speed", "train_once", [*FAST, *LINEAR, *A24]),
        ("Graft, memory", "train_once", [*FAST, *LINEAR, "--mode", "memory"]),
    ],
    "8b": [
        ("Trainer, checkpointing", "reference", [*SLOW, *EIGHT, "--gradient-checkpointing"]),
        ("Graft, speed", "train_once", [*FAST, *EIGHT]),
        ("Graft, offloaded", "train_once", [*FAST, *EIGHT, "--limit-gib", "10.05"]),
    ],
    "losses": [  # the same batches in the same order, without dropout: curves that must agree
        ("Trainer, checkpointing", "reference", [*FAST, *ONE, "--gradient-checkpointing", "--dropout", "0"]),
        ("Graft, speed", "train_once", [*FAST, *ONE, "--dropout", "0"]),
    ],
    "tiny": [("Graft", "train_once", ["--dims", "tiny", "--steps", "20"])],
}  # fmt: skip


def main() -> None:
    """Run the rows, write what came out."""
    arguments = _arguments()
    arguments.out_dir.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for turn in range(arguments.repeat):
        for name, script, options in SETS[arguments.set]:
            if arguments.only is None or arguments.only in name:
                print(f"{name}, turn {turn + 1} of {arguments.repeat} …", flush=True)
                rows.append(run(name, script, options, arguments))
                write(rows, arguments)
    print(f"{table(rows)}\nReal tokens per second; memory of the GPU, or of the process where there is none.")
    print(f"Written to {arguments.out_dir}.")


def run(name: str, script: str, options: list[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """One row in a process of its own."""
    out = arguments.out_dir / "row.json"
    out.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{script}.py"), *options, "--workspace", str(arguments.workspace)]
    began = time.monotonic()
    with (arguments.out_dir / "row.log").open("w") as log:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        done = subprocess.run([*command, "--out", str(out)], stdout=log, stderr=log, env=environment, check=False)
    facts: dict[str, Any] = {"row": name, "wall_seconds": round(time.monotonic() - began, 1)}
    if done.returncode != 0:
        last = (arguments.out_dir / "row.log").read_text().strip().splitlines()[-1:]
        print(f"{name}: failed: {last}", flush=True)
        return {**facts, "error": last}
    result = json.loads(out.read_text())
    print(f"{name}: {result['tokens_per_second']:,.0f} tokens/s in {facts['wall_seconds']} s", flush=True)
    return {**facts, **result}


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    """The figures so far, the table, and the plot where matplotlib is installed."""
    stem = arguments.out_dir / f"compare-{arguments.set}"
    stem.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n")
    stem.with_suffix(".md").write_text(table(rows))
    try:
        import matplotlib as mpl
    except ImportError:
        return
    mpl.use("Agg")
    plot(rows, stem.with_suffix(".png"))


def table(rows: list[dict[str, Any]]) -> str:
    """One line per row, with the ratio to the first row of the same turn."""
    lines = [
        "| row | tokens/s | × the first row | allocated GiB | peak GiB | × the first row |",
        "|---|---|---|---|---|---|",
    ]
    first: dict[str, Any] | None = None
    for row in rows:
        if "error" in row:
            lines.append(f"| {row['row']} | failed | | | | |")
            continue
        if first is None or (row["row"] == first["row"] and len({found["row"] for found in rows}) > 1):
            first = row
        memory, speed = row["memory"], row["tokens_per_second"]
        reserved, reference = _reserved(row), _reserved(first)
        lines.append(
            f"| {row['row']} | {speed:,.0f} | {speed / first['tokens_per_second']:.2f} "
            f"| {memory.get('allocated_peak_bytes', 0) / GIB:.2f} | {reserved / GIB:.2f} | {reserved / reference:.2f} |"
        )
    return "\n".join(lines) + "\n"


def _reserved(row: dict[str, Any]) -> int:
    """The allocator's peak; where there is no GPU, the process's."""
    memory: dict[str, int] = row["memory"]
    return memory.get("reserved_peak_bytes", memory.get("measured_peak_bytes", 0))


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Speed against memory, and the losses by step."""
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2))
    done = [row for row in rows if "error" not in row]
    names = list(dict.fromkeys(row["row"] for row in done))
    for number, name in enumerate(names):
        mine = [row for row in done if row["row"] == name]
        memory = [_reserved(row) / GIB for row in mine]
        left.scatter(memory, [row["tokens_per_second"] for row in mine], color=f"C{number}", label=name)
        right.plot(range(1, len(mine[0]["losses"]) + 1), mine[0]["losses"], color=f"C{number}", linewidth=1, label=name)
    left.set(xlabel="reserved GiB", ylabel="real tokens per second", xlim=(0, None), ylim=(0, None))
    right.set(xlabel="optimizer step", ylabel="training loss, nats per token")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=sorted(SETS), default="a")
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--only", help="rows whose name holds this")
    parser.add_argument("--out-dir", type=Path, required=True)
    parser.add_argument("--workspace", type=Path, default=Path("/tmp/graft-bench"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
