"""A newcomer's way: the commands of docs/tutorial.md as they are written, and the SDK's lines of docs/client.md."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.factories import make_tiny_base
from tests.fleet import JSONL, Fleet

ROOT = Path(__file__).parents[2]
BY_HAND = ("make demo", "source ", "graft up")  # what the fixture has done: the demo has a test of its own


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    state = tmp_path_factory.mktemp("newcomer") / ".graft" / "demo"
    make_tiny_base(state / "models" / "graft" / "demo-llama")
    running = Fleet(state, {"GRAFT_LOOK_SECONDS": "2"}).start()
    yield running
    running.stop()


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / "docs" / document).read_text(), re.DOTALL)


def test_every_command_of_the_tutorial_works_as_it_is_written(fleet: Fleet) -> None:
    lines = "".join(blocks("tutorial.md", "sh")).splitlines()
    script = "\n".join(line for line in lines if not line.startswith(BY_HAND))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GRAFT_")}
    environment |= {"GRAFT_URL": fleet.url, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    folder = fleet.state_dir.parents[1]
    command = ["bash", "-euo", "pipefail", "-c", script]
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "Did you mean 'learning_rate'?" in ran.stderr
    assert ran.stdout.count("refused, with exit code 2") == 2
    assert re.search(r"training\.max_length +32768 +20480", ran.stderr), "the advice that the tutorial follows"
    assert re.search(r"adapter saved, reloaded and proven after step 200, loss \d", ran.stdout), "the log's last line"
    assert "Fits GPU class 16gb" in ran.stdout
    assert ran.stdout.splitlines()[-1].startswith("What does the owl say?")


def test_the_sdk_does_what_its_page_says(
    fleet: Fleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_bytes(JSONL)
    (block,) = blocks("client.md", "python")
    said: dict[str, object] = {}
    exec(block.replace("https://graft.example.com", fleet.url).replace('"KEY"', "None"), said)
    shown = capsys.readouterr().out
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    assert re.search(r"^5 \d", shown, re.MULTILINE), "the last step's loss"
    assert "Did you mean" in shown
