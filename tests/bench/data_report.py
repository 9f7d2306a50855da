"""How long a report on a large file takes, and how much memory: the preparing child on chats of natural lengths.

    make bench-data                               (or: python tests/bench/data_report.py --rows 200000 --out FILE)

Chats of 100 to 300 tokens are made with a fixed seed, of words whose frequencies fall as those of a language do, and a
byte-level BPE of 32,000 tokens is trained on them, which cuts words as Llama 3's does and has a chat template: both are
real in all that costs time. Every hundredth row stands in the file before. The child is the one that workers start.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from graft_shared.specs import ReportSpec
from graft_worker.protocol import REQUEST_NAME, PreparedEvent, ReportRequest, parse_event

ROWS = 200_000
VOCABULARY = 32_000
LIMIT_SECONDS = 60.0
LIMIT_BYTES = 512 * 1024**2
LOOK_SECONDS = 0.1
REPEAT_EVERY = 100
SEED = 1
WORDS = 60_000
MAX_LENGTH = 256
VALIDATION = 0.05

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORD = (  # what Llama 3 takes for one
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_SYLLABLES = [
    start + middle + end
    for start in ["b", "c", "d", "f", "g", "h", "l", "m", "n", "p", "r", "s", "t", "v", "w", "st", "tr", "pl"]
    for middle in ["a", "e", "i", "o", "u", "ea", "ou"]
    for end in ("", "n", "r", "s", "t", "l")
]


def main() -> None:
    """Measure once; leaves with 1 when a limit is passed or a figure of the report is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        found = measure(Path(name), rows=asked.rows)
    print(json.dumps(found, indent=2))
    if asked.out is not None:
        asked.out.parent.mkdir(parents=True, exist_ok=True)
        asked.out.write_text(json.dumps(found, indent=2) + "\n")
    sys.exit(1 if found["violations"] else 0)


def measure(folder: Path, *, rows: int, vocabulary: int = VOCABULARY) -> dict[str, Any]:
    """Make the data, run the child, and hold what it says against what is known."""
    make(folder, rows=rows, vocabulary=vocabulary)
    return judge(folder, rows=rows, vocabulary=vocabulary)


def make(folder: Path, *, rows: int, vocabulary: int) -> None:
    """Leave rows, a tokenizer and the request in the folder."""
    texts = Texts()
    make_tokenizer(folder / "tokenizer", texts, vocabulary)
    data = folder / "rows.jsonl"
    with data.open("w") as out:
        out.writelines(chats(rows, texts))
    spec = ReportSpec.model_validate(
        {"base_model": "bench/base", "max_length": MAX_LENGTH, "validation": {"split": VALIDATION}}
    )
    request = ReportRequest(
        spec=spec.model_dump(mode="json"),
        tokenizer_path=str(folder / "tokenizer"),
        train_file=str(data),
        validation_file=None,
    )
    (folder / REQUEST_NAME).write_text(request.model_dump_json())


def judge(folder: Path, *, rows: int, vocabulary: int) -> dict[str, Any]:
    """Run the child, and say what it cost and what is wrong."""
    report, cost = run(folder)
    shares = report["lengths"]["percentiles"]
    violations = [
        f"{what}: {found}, not {wanted}"
        for what, found, wanted in (
            ("rows", report["rows"], rows),
            ("duplicate rows", report["duplicate_rows"], (rows - 1) // REPEAT_EVERY),
            ("rows on both sides", report["train"]["rows"] + report["validation"]["rows"], rows),
            ("rows in the histogram", sum(report["lengths"]["histogram"]["counts"]), rows),
        )
        if found != wanted
    ]
    if cost["seconds"] > LIMIT_SECONDS:
        violations.append(f"{cost['seconds']} s, over {LIMIT_SECONDS:.0f}")
    if cost["peak_rss_bytes"] > LIMIT_BYTES:
        violations.append(f"{cost['peak_rss_bytes']} bytes, over {LIMIT_BYTES}")
    tokens = report["train"]["tokens"] + report["validation"]["tokens"]
    return {
        "rows": rows,
        "file_bytes": (folder / "rows.jsonl").stat().st_size,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "tokens_per_second": round(tokens / cost["seconds"]),
        "length_percentiles": shares,
        **cost,
        "limits": {"seconds": LIMIT_SECONDS, "peak_rss_bytes": LIMIT_BYTES},
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "report": {name: value for name, value in report.items() if name not in ("first_rows", "lengths")},
        "violations": violations,
    }


def run(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The report, and what it cost."""
    load_before, began = os.getloadavg()[0], time.monotonic()
    environment = {**os.environ, "GRAFT_PARENT_PID": str(os.getpid()), "TOKENIZERS_PARALLELISM": "true"}
    with (folder / "child.log").open("wb") as log:
        child = subprocess.Popen(
            [sys.executable, "-m", "graft_worker.preparing", str(folder)],
            stdout=subprocess.PIPE,
            stderr=log,
            env=environment,
        )
    peaks = [0]
    watching = threading.Thread(target=_watch_memory, args=[child, peaks])
    watching.start()
    assert child.stdout is not None
    with child.stdout as lines:
        events = [parse_event(line.decode()) for line in lines]
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - began
    watching.join()
    prepared = next((event for event in events if isinstance(event, PreparedEvent)), None)
    if prepared is None:
        raise SystemExit(f"the child left with {child.returncode}: {events} {(folder / 'child.log').read_text()}")
    cost = {
        "seconds": round(seconds, 2),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "peak_rss_bytes": max(peaks),
        "load_before": round(load_before, 2),
    }
    return prepared.report, cost


def _watch_memory(child: subprocess.Popen[bytes], peaks: list[int]) -> None:
    """Note the kernel's account of the child's peak; `ru_maxrss` begins with what this process holds at the fork."""
    while child.returncode is None:
        try:
            status = Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            return
        if "VmHWM:" in status:
            peaks.append(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
        time.sleep(LOOK_SECONDS)


class Texts:
    """Sentences without end."""

    def __init__(self) -> None:
        rng = random.Random(SEED)
        self._words = ["".join(rng.choices(_SYLLABLES, k=rng.choice((1, 1, 2, 2, 3)))) for _ in range(WORDS)]
        weights = 1 / np.arange(3, WORDS + 3)
        self._shares = np.cumsum(weights / weights.sum())
        self._rng = np.random.default_rng(SEED)

    def text(self, low: int, high: int) -> str:
        """So many words at least, and at most."""
        drawn = np.searchsorted(self._shares, self._rng.random(int(self._rng.integers(low, high))))
        return " ".join([self._words[min(index, WORDS - 1)] for index in drawn]).capitalize() + "."

    def chance(self, share: float) -> bool:
        """True so often."""
        return bool(self._rng.random() < share)


def chats(rows: int, texts: Texts) -> Iterator[str]:
    """JSON lines: a question and an answer, some with a system turn, some with a second round."""
    earlier = ""
    for number in range(rows):
        if number and number % REPEAT_EVERY == 0:
            yield earlier
            continue
        turns = [("system", "You are a helpful assistant.")] if texts.chance(0.3) else []
        turns += [("user", texts.text(20, 45)), ("assistant", texts.text(60, 100))]
        if texts.chance(0.25):
            turns += [("user", texts.text(10, 30)), ("assistant", texts.text(20, 60))]
        line = json.dumps({"messages": [{"role": role, "content": content} for role, content in turns]}) + "\n"
        if number % REPEAT_EVERY == 1:
            earlier = line
        yield line


def make_tokenizer(folder: Path, texts: Texts, vocabulary: int) -> None:
    """A byte-level BPE trained on such texts, with a chat template."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(WORD), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((texts.text(60, 120) for _ in range(vocabulary)), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    main()
