"""One line of a GiB, by form and by link: it is refused by its number, and the API never holds it.

make hostile-line                             (or: python -m tests.hostile.long_line --bytes 1073741824 --out FILE)
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.hostile.data import FORM, HEAD, ROW, TAIL
from tests.hostile.served import ServedApi, served_api

LIMIT_BYTES = 512 * 1024**2
PIECE = b"x" * 1024**2


def main() -> None:
    """Send it both ways; leaves with 1 if an answer or the memory is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bytes", type=int, default=1024**3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, served_api(Path(name)) as api:
        found = {"line_bytes": asked.bytes, "by_form": by_form(api, asked.bytes), "by_link": by_link(api, asked.bytes)}
        found["peak_rss_bytes"] = api.peak_rss_bytes
    print(json.dumps(found, indent=2))
    if asked.out is not None:
        asked.out.write_text(json.dumps(found, indent=2) + "\n")
    refused = all(found[way]["status"] == 422 and found[way]["line"] == 2 for way in ("by_form", "by_link"))
    sys.exit(0 if refused and found["peak_rss_bytes"] < LIMIT_BYTES else 1)


def by_form(api: ServedApi, size: int) -> dict[str, Any]:
    """As a multipart upload."""

    def body() -> Iterator[bytes]:
        yield HEAD
        yield from file_of(size)
        yield TAIL

    began = time.monotonic()
    return _told(api.http.post("/files", content=body(), headers={"content-type": FORM}), began)


def by_link(api: ServedApi, size: int) -> dict[str, Any]:
    """Sent to the bucket, then completed."""
    digest, length = hashlib.sha256(), 0
    for piece in file_of(size):
        digest.update(piece)
        length += len(piece)
    announced = {"filename": "line.jsonl", "bytes": length, "sha256": digest.hexdigest()}
    began = time.monotonic()
    upload = api.http.post("/files/uploads", json=announced).raise_for_status().json()
    api.http.put(upload["url"], content=file_of(size), headers=upload["headers"]).raise_for_status()
    return _told(api.http.post(f"/files/uploads/{upload['id']}/complete"), began)


def file_of(size: int) -> Iterator[bytes]:
    """A good row, then one line of so many bytes."""
    yield ROW + b'{"text": "'
    for _ in range(size // len(PIECE)):
        yield PIECE
    yield b'"}\n'


def _told(answer: Any, began: float) -> dict[str, Any]:
    error = answer.json()["error"]
    seconds = round(time.monotonic() - began, 1)
    return {"status": answer.status_code, "code": error["code"], "line": error.get("line"), "seconds": seconds}


if __name__ == "__main__":
    main()
