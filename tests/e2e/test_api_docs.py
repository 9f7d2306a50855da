"""What docs/api.md tells a platform to write does what it says: each of its Python blocks is run against a real API."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from http.server import HTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from graft_shared.store.migrate import migrate
from tests.api_process import ApiProcess
from tests.api_service import LLAMA, ROWS

KEY = "a-key-of-the-documentation"
DOCS = Path(__file__).parents[2] / "docs" / "api.md"


@pytest.fixture
def url(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(ROWS)
    process = ApiProcess(
        tmp_path,
        GRAFT_API_KEYS=f"red={KEY}",
        GRAFT_WEBHOOK_SECRET="of the documentation",
        GRAFT_WEBHOOK_HOSTS="127.0.0.1",
    )
    service = process.service()
    migrate(service.database)
    service.database.close()
    yield process.start().url
    process.stop(signal.SIGKILL)


def test_what_the_documentation_writes_works(url: str) -> None:
    said: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", DOCS.read_text(), re.DOTALL):
        exec(block.replace("https://graft.example.com", url).replace("KEY", KEY), said)
    file_id = said["upload"]("rows.jsonl")
    job, again = (said["submit"](file_id, "order-1", base_model=LLAMA, metadata={"order": "1"}) for _ in range(2))
    assert again["id"] == job["id"]
    assert [one["id"] for one in said["jobs"](**{"metadata[order]": "1"})] == [job["id"]]
    assert len(list(said["jobs"](status="validating_files"))) == 2
    assert said["graft"].get(f"/v1/fine_tuning/jobs/{said['job'].id}").json()["status"] == "validating_files"
    said["graft"].post(f"/jobs/{job['id']}/cancel").raise_for_status()
    assert [event["type"] for event in said["events"](job["id"])] == ["submitted", "cancelled"]
    assert _told(said["Receiver"], said["graft"])


def _told(receiver: Any, graft: httpx.Client) -> set[str]:
    """Have a message sent to the documented receiver, and one that is signed with another secret; returns the first."""
    server = HTTPServer(("127.0.0.1", 0), receiver)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hook = {"url": f"http://127.0.0.1:{server.server_port}/"}
    receiver.secret = "whsec_" + "A" * 44
    assert graft.post("/webhooks/test", json=hook).json() == {"delivered": False, "reason": "it was answered 401"}
    receiver.secret = graft.get("/webhooks/secret").json()["secret"]
    assert graft.post("/webhooks/test", json=hook).json() == {"delivered": True, "reason": None}
    server.shutdown()
    server.server_close()
    assert len(receiver.seen) == 1
    return set(receiver.seen)
