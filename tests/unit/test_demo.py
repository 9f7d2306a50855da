"""What `make demo` says where it has to wait, and how one goes on when it has not come to its end."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType

import pytest

from tests.waiting import free_port

DEMO = Path(__file__).parents[2] / "demo"


@pytest.fixture
def demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(DEMO)
    loaded = importlib.import_module("run")
    monkeypatch.setattr(loaded, "BASE", tmp_path / "base")
    yield loaded
    del sys.modules["run"]


def test_a_service_that_lives_is_waited_for_with_a_word_now_and_then(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo, "START_SECONDS", 1.0)
    monkeypatch.setattr(demo, "WORD_SECONDS", 0.0)
    (tmp_path / "log").write_text("api | importing\n")
    lives, dies = "import time; time.sleep(60)", "raise SystemExit(3)"
    for code, how in ((lives, "did not become ready"), (dies, "ended with exit code 3")):
        with subprocess.Popen([sys.executable, "-S", "-c", code]) as service:
            if code == dies:
                service.wait()
            with pytest.raises(SystemExit) as end:
                demo.await_readiness(service, f"http://127.0.0.1:{free_port()}", tmp_path / "log")
            service.kill()
        said = capsys.readouterr().out
        assert end.value.code == 1
        assert f"the service {how}" in said and "api | importing" in said
        assert "the service is still starting" in said or code == dies
        assert said.endswith("Run `make demo` again: the base is kept.\n")


def test_who_interrupts_it_is_told_how_to_go_on(demo: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo.break_off()
    said = capsys.readouterr().out
    assert "`make demo` begins again" in said and "graft up" not in said, "there is nothing to serve"
    demo.BASE.mkdir()
    (demo.BASE / "config.json").touch()
    with pytest.raises(SystemExit) as end:
        demo.break_off()
    assert end.value.code == 130
    assert "graft up --state-dir .graft/demo" in capsys.readouterr().out


def test_its_end_tells_its_own_loss_from_the_jobs_and_the_next_step(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = iter(("loss on the 35 questions: 4.0\n0 of 35", "loss on the 35 questions: 1.0\n9 of 35"))

    def ran(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        loss, right = next(asked).splitlines()
        return subprocess.CompletedProcess(command, 0, f"{loss}\nanswered word for word: {right}\n")

    monkeypatch.setattr(demo.subprocess, "run", ran)
    monkeypatch.setattr(demo, "make_base", lambda: None)
    monkeypatch.setattr(demo, "running_service", nullcontext)
    monkeypatch.setattr(demo, "fine_tune", lambda _: tmp_path / "adapter")
    demo.main()
    said = capsys.readouterr().out
    assert "loss on the 35 questions: 4.000 before, 1.000 after (-75 %)" in said and "held-out" not in said
    assert said.splitlines()[-1].startswith("Next: `.venv/bin/graft up --state-dir .graft/demo`, then docs/tutorial.md")
