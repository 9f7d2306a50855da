"""How long a job that fits nowhere waits for its refusal: the real API on SQLite, without a network between.

    make bench                                    (or: python tests/bench/refusal.py --out FILE)

Prints, and writes as JSON, the median and the 95th percentile of so many requests in milliseconds: 70B on a fleet up to
24 GB, which has the most to compute (every smaller base is tried for the advice).
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from tests.api_service import make_service, migrated_database

REQUESTS = 100


def main() -> None:
    """Post the same job again and again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    out: Path | None = parser.parse_args().out
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        service = make_service(folder, migrated_database(folder / "template"), classes=["cpu", "16gb", "24gb"])
        spec = service.spec(base_model="meta-llama/Llama-2-70b-hf")
        milliseconds = []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            answer = service.post(spec)
            milliseconds.append(1000 * (time.perf_counter() - began))
            if answer.status_code != 422:
                raise SystemExit(f"expected a refusal, got {answer.status_code}: {answer.text}")
        service.database.close()
    figures = {
        "requests": REQUESTS,
        "first_ms": round(milliseconds[0], 1),
        "median_ms": round(statistics.median(milliseconds), 1),
        "p95_ms": round(sorted(milliseconds)[int(0.95 * REQUESTS)], 1),
    }
    print(f"a 70B job refused on a fleet of up to 24 GB: {json.dumps(figures)}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
