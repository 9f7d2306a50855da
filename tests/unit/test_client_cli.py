"""What the `graft` command shows, and with which exit code it leaves."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from graft_client import GraftClient, Job, Update, cli, doctor
from graft_client.doctor import look
from graft_client.findings import note, show
from graft_client.progress import duration, sparkline, watch
from graft_client.reports import masked
from graft_client.tables import job_table, jobs_table, money, print_whole
from graft_client.transport import Transport
from tests.fakes.service import FakeService, error

RUNNING: dict[str, Any] = {
    "id": "ftjob-1",
    "status": "running",
    "phase": "training",
    "progress": {"step": 3, "total_steps": 10, "tokens_per_second": 1234.5, "eta_seconds": 189},
    "metrics": {"train_loss": 1.25, "eval_loss": None},
}


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> FakeService:
    service = FakeService()

    @contextmanager
    def client() -> Iterator[GraftClient]:
        transport = httpx.MockTransport(service)
        yield GraftClient(
            transport=Transport(
                "http://graft.test",
                api_key=None,
                timeout=5,
                patience_seconds=0,
                transport=transport,
                sleep=lambda _: service.jobs[0].update(status=service.jobs[0].get("next", "succeeded")),
            )
        )

    monkeypatch.setattr(cli, "_client", client)
    return service


def graft(
    *arguments: str, monkeypatch: pytest.MonkeyPatch, stdin: str = "", columns: str = "200"
) -> tuple[int, str, str]:
    """Run the command as a shell does; returns exit code, standard output, standard error."""
    outcome: list[int] = []

    def run() -> None:
        try:
            cli.main()
        except SystemExit as end:
            outcome.append(end.code if isinstance(end.code, int) else 1)

    out, err = io.StringIO(), io.StringIO()
    with monkeypatch.context() as patch:
        patch.setattr("sys.argv", ["graft", *arguments])
        patch.setattr("sys.stdin", io.StringIO(stdin))
        patch.setattr("sys.stdout", out)
        patch.setattr("sys.stderr", err)
        patch.setenv("COLUMNS", columns)
        run()
    return outcome[0], out.getvalue(), err.getvalue()


def test_submit_uploads_the_data_applies_overrides_and_prints_the_job(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, spec = tmp_path / "rows.jsonl", tmp_path / "spec.json"
    rows.write_text('{"text": "x"}\n')
    spec.write_text(json.dumps({"base_model": "a/b", "training": {"max_steps": 5, "packing": True}}))
    service.answers["POST /files"] = [httpx.Response(200, json={"id": "file-7"})]
    overrides = ["--set", "training.max_steps=9", "--set", "gpu.class=24gb", "--set", "name=my bot"]
    overrides += ["--set", "lora.target_modules=[q_proj, v_proj]", "--set", "training.learning_rate=2e-4"]
    overrides += ["--set", "metadata={rate: 2e-4, note: no}"]
    code, out, _ = graft("submit", str(spec), "--data", str(rows), *overrides, "--json", monkeypatch=monkeypatch)
    assert code == 0
    assert json.loads(out)["id"] == "ftjob-1"
    assert json.loads(service.heard("POST", "/jobs")[0].content) == {
        "base_model": "a/b",
        "training": {"max_steps": 9, "packing": True, "learning_rate": 2e-4},
        "gpu": {"class": "24gb"},
        "name": "my bot",
        "lora": {"target_modules": ["q_proj", "v_proj"]},
        "metadata": {"rate": 2e-4, "note": "no"},
        "dataset": {"file": "file-7"},
    }


def test_the_same_bytes_are_uploaded_once(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    proof = {"bytes": rows.stat().st_size, "sha256": hashlib.sha256(rows.read_bytes()).hexdigest()}
    others = [{"id": f"file-{n}", "bytes": proof["bytes"], "sha256": f"{n:064}"} for n in range(150)]
    service.uploads = [*others, {"id": "file-same", **proof}]
    code, _, err = graft("submit", "-", "--data", str(rows), monkeypatch=monkeypatch, stdin="{}")
    assert (code, "rows.jsonl was uploaded before: file-same" in err) == (0, True)
    assert json.loads(service.heard("POST", "/jobs")[0].content)["dataset"] == {"file": "file-same"}
    assert not service.heard("POST", "/files"), "and none would have been answered"
    service.answers["GET /files"] = [error(403, "scope_missing", "The key may not read files.")]
    service.answers["POST /files"] = [httpx.Response(200, json={"id": "file-new"}) for _ in range(2)]
    code, _, err = graft("submit", "-", "--data", str(rows), monkeypatch=monkeypatch, stdin="{}")
    assert (code, "rows.jsonl is uploaded: file-new" in err) == (0, True)
    service.uploads[:0] = [{**others[0], "id": f"file-newer-{n}"} for n in range(1000)]
    before = len(service.heard("GET", "/files"))
    assert graft("submit", "-", "--data", str(rows), monkeypatch=monkeypatch, stdin="{}")[0] == 0
    assert len(service.heard("GET", "/files")) - before == 10, "the look ends"


@pytest.mark.parametrize("follow", [[], ["--watch"]])
def test_submit_says_what_the_job_will_wait_for(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, follow: list[str]
) -> None:
    reason = "Waiting for data preparation. Once prepared, it waits for a worker of class 16gb: none is alive."
    waiting = {"id": "ftjob-1", "status": "validating_files", "queue": {"position": 1, "reason": reason}}
    service.jobs = [waiting]
    service.answers["POST /jobs"] = [httpx.Response(202, json=waiting)]
    code, out, _ = graft("submit", "-", *follow, monkeypatch=monkeypatch, stdin="{}")
    assert code == 0
    assert reason in out


@pytest.mark.parametrize(("status", "code"), [("succeeded", 0), ("failed", 1), ("cancelled", 3)])
def test_watch_leaves_with_the_jobs_fate(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    service.jobs = [RUNNING | {"next": status}]
    service.events = [{"id": 1, "type": "claimed", "level": "info", "message": "Claimed by gpu-0."}]
    found, out, _ = graft("watch", "ftjob-1", monkeypatch=monkeypatch)
    assert found == code
    assert "running (training)  step 3/10  loss 1.2500  1,234 tokens/s  ETA 3m09s" in out
    assert out.count("Claimed by gpu-0.") == 1
    assert status in out


@pytest.mark.parametrize("verb", ["cancel", "pause", "resume"])
def test_a_job_is_cancelled_paused_and_resumed_by_its_verb(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    service.answers[f"POST /jobs/ftjob-1/{verb}"] = [
        httpx.Response(200, json=RUNNING | {"status": "pausing"}),
        error(409, "job_finished", "The job 'ftjob-1' has already ended as 'failed'."),
    ]
    code, out, _ = graft(verb, "ftjob-1", monkeypatch=monkeypatch)
    assert (code, "pausing (training)" in out) == (0, True)
    code, _, err = graft(verb, "ftjob-1", monkeypatch=monkeypatch)
    assert (code, "has already ended" in err) == (2, True)


def test_watch_waits_for_a_paused_job_and_says_that_it_does(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    reason = "Paused: once it is resumed it goes on, in its old place."
    service.jobs = [RUNNING | {"status": "paused", "phase": None, "queue": {"position": None, "reason": reason}}]
    service.jobs[0]["next"] = "succeeded"
    code, out, _ = graft("watch", "ftjob-1", monkeypatch=monkeypatch)
    (line,) = (line for line in out.splitlines() if line.startswith("paused"))
    assert (code, reason in line, "ETA" in line) == (0, True, False)


def test_a_refusal_shows_bytes_by_component_and_the_changes_that_would_fit(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answers["POST /jobs/estimate"] = [
        error(
            422,
            "vram_capacity_exceeded",
            "13B at 8192 tokens needs 31.0 GiB, the largest class has 22.0 GiB.",
            needed={"base_weights": 7 * 1024**3, "activations": 24 * 1024**3},
            available={"usable": 22 * 1024**3},
            needed_bytes=33 * 1024**3,
            changes=[
                {"param": "training.max_length", "from": 8192, "to": 3840, "needed_bytes": 1024**3, "gpu_class": "24gb"}
            ],
            fits_here=["small/base"],
        )
    ]
    code, out, err = graft("estimate", "-", monkeypatch=monkeypatch, stdin='{"base_model": "a/b"}')
    assert (code, out) == (2, "")
    for expected in ("vram_capacity_exceeded", "24.00 GiB", "training.max_length", "3840", "small/base", "33.00 GiB"):
        assert expected in err
    assert re.search(r"margin of the forecast +2\.00 GiB", err), "what stands above it makes 31"
    assert err.index("activations") < err.index("base weights")


def test_an_error_says_nothing_twice_and_nothing_empty(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    hint = "GET /models lists what this service trains."
    facts = {"param": "base_model", "base_model": "a/b", "hint": hint, "suggestions": []}
    message = f"Unknown base model 'a/b'. {hint}"
    service.answers["POST /jobs"] = [
        error(422, "unknown_base_model", message, **facts),
        error(422, "unknown_base_model", message, **facts | {"suggestions": ["a/bb", "a/bc"]}),
    ]
    _, _, err = graft("submit", "-", monkeypatch=monkeypatch, stdin="{}")
    assert err == f"error unknown_base_model: {message} (at 'base_model')\n"
    _, _, err = graft("submit", "-", monkeypatch=monkeypatch, stdin="{}")
    assert err.endswith("  suggestions: a/bb, a/bc\n")


def test_a_job_without_data_is_told_how_data_is_given(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "'dataset' is not valid: field required."
    for command, route in (("submit", "POST /jobs"), ("estimate", "POST /jobs/estimate")):
        for stdin, told in (("{}", True), ('{"dataset": {"file": "file-7"}}', False)):
            service.answers[route] = [error(422, "invalid_parameter", said, param="dataset")]
            code, _, err = graft(command, "-", monkeypatch=monkeypatch, stdin=stdin)
            assert (code, said in err, "Give --data ROWS.jsonl" in err) == (2, True, told)


def test_an_estimate_is_made_of_what_submit_would_post(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "x"}\n')
    fits = {"fits": True, "gpu_class": "cpu", "plan": {}, "memory": {}, "live_workers": 0}
    service.answers["POST /files"] = [httpx.Response(200, json={"id": "file-7"})]
    service.answers["POST /jobs/estimate"] = [httpx.Response(200, json=fits) for _ in range(2)]
    stdin = '{"base_model": "a/b", "dataset": {"file": "file-filled-in-later"}}'
    code, out, err = graft("estimate", "-", "--data", str(rows), monkeypatch=monkeypatch, stdin=stdin)
    assert (code, "rows.jsonl is uploaded: file-7" in err) == (0, True)
    assert "note: no live worker of class cpu" in out
    assert "time: not forecast for this class; graft watch shows it" in out
    assert graft("estimate", "-", "--data", "file-7", monkeypatch=monkeypatch, stdin=stdin)[0] == 0
    for request in service.heard("POST", "/jobs/estimate"):
        assert json.loads(request.content) == {"base_model": "a/b", "dataset": {"file": "file-7"}}
    code, _, err = graft("estimate", "-", "--data", "no-rows.jsonl", monkeypatch=monkeypatch, stdin=stdin)
    assert (code, err) == (2, "error There is no file no-rows.jsonl.\n")


def test_an_estimate_shows_speed_duration_and_cost(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    def span(low: float, expected: float, high: float) -> dict[str, float]:
        return {"low": low, "expected": expected, "high": high}

    speed = {"tokens_per_second": span(9000, 10000, 11000), "calibrated": False, "steps": 1200}
    speed |= {"duration_seconds": span(3600, 7500, 9000), "cost": span(1, 2.5, 3)}
    found = {"object": "estimate", "fits": True, "gpu_class": "24gb", "plan": {}, "memory": {}, "speed": speed}
    service.answers["POST /jobs/estimate"] = [httpx.Response(200, json=found)]
    code, out, _ = graft("estimate", "-", monkeypatch=monkeypatch, stdin='{"base_model": "a/b"}')
    assert code == 0
    for expected in ("10,000 tokens/s", "by the card's data sheet", "1,200 steps in 2h05m (1h00m to 2h30m)", "2.50"):
        assert expected in out


def test_an_estimate_that_does_not_fit_is_shown_as_the_refusal_that_a_post_would_be(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    change = {"param": "lora.r", "from": 64, "to": 8, "needed_bytes": 1024**3, "gpu_class": "24gb"}
    refusal = {"object": "estimate", "fits": False, "spec": {"name": "a"}, "code": "vram_capacity_exceeded"}
    refusal |= {"message": "70B needs 41.0 GiB.", "needed": {"base_weights": 7 * 1024**3}, "changes": [change]}
    service.answers["POST /jobs/estimate"] = [httpx.Response(200, json=refusal) for _ in range(2)]
    code, out, err = graft("estimate", "-", monkeypatch=monkeypatch, stdin='{"base_model": "a/b"}')
    assert (code, out) == (2, "")
    for expected in ("vram_capacity_exceeded", "70B needs 41.0 GiB.", "7.00 GiB", "lora.r"):
        assert expected in err
    code, out, _ = graft("estimate", "-", "--json", monkeypatch=monkeypatch, stdin='{"base_model": "a/b"}')
    assert (code, json.loads(out)) == (2, refusal)


def test_what_the_user_can_mend_leaves_with_2_and_what_the_service_must_with_4(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answers["GET /models"] = [error(500, "graft_error", "Something went wrong.")]
    code, _, err = graft("models", monkeypatch=monkeypatch)
    assert code == 4
    assert "req-1" in err
    assert graft("get", "ftjob-9", monkeypatch=monkeypatch)[0] == 2
    code, _, err = graft("submit", "-", monkeypatch=monkeypatch, stdin="{broken")
    assert code == 2
    assert "neither JSON nor YAML" in err
    assert graft("submit", "-", "--set", "nonsense", monkeypatch=monkeypatch, stdin="{}")[0] == 2
    code, _, err = graft("submit", "-", "--set", "lora.target_modules=[q_proj", monkeypatch=monkeypatch, stdin="{}")
    assert (code, "--set lora.target_modules=[q_proj is neither JSON nor YAML" in err) == (2, True)
    assert graft("submit", "/no/such/file.json", monkeypatch=monkeypatch)[0] == 2


def test_a_service_that_is_not_there_is_said_to_be_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFT_URL", "http://127.0.0.1:1")
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 0.0)
    code, out, err = graft("list", monkeypatch=monkeypatch)
    assert (code, out) == (4, "")
    assert "http://127.0.0.1:1" in err
    assert "Start it with `graft up`, and with the --state-dir that it had." in err


def test_only_where_nothing_listens_the_doctor_offers_to_start_a_service(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "TIMEOUT_SECONDS", 0.2)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}"
        (refused,) = look({"GRAFT_URL": url})
        held.listen()
        (late,) = look({"GRAFT_URL": url})
    assert (refused.remedy or "").startswith("graft up, with the --state-dir that it had; or export GRAFT_URL")
    assert "something listens" in late.found and "if it is Graft, it is busy" in late.found
    assert "graft up" not in (late.remedy or "")


@pytest.mark.parametrize("url", ["http://me:hunter2@127.0.0.1:1", "me:hunter2@127.0.0.1:1", "http://me:hunter2/@a"])
def test_a_password_in_the_address_is_never_shown(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("GRAFT_URL", url)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 0.0)
    code, out, err = graft("list", monkeypatch=monkeypatch)
    (finding,) = look({"GRAFT_URL": url})
    assert (code, out, finding.subject) == (4, "", "service")
    for said in (err, finding.found):
        assert url.rpartition("@")[2] in said and "hunter2" not in said


@pytest.mark.parametrize("key", ["graft_s\nx", "graft_s\u00e9x", "graft_s\u2028x"])
def test_a_key_that_no_header_may_hold_is_refused_and_never_shown(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("GRAFT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("GRAFT_API_KEY", key)
    code, out, err = graft("list", monkeypatch=monkeypatch)
    assert (code, out) == (2, "")
    (finding,) = look({"GRAFT_API_KEY": key})
    assert finding.subject == "key"
    for said in (err, finding.found):
        assert "printable ASCII" in said and "graft_s" not in said


def test_a_file_or_folder_that_cannot_be_used_is_the_users_to_correct(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answers["GET /models"] = [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))]
    for arguments, said in (
        (["download", "ftjob-1", "--to", "/proc/x/y"], "/proc/x"),
        (["download", "ftjob-1", "--to", "x" * 300], "File name too long"),
        (["upload", "/proc/self/mem"], "Input/output error"),
        (["submit", "-", "--data", "x" * 300], "File name too long"),
        (["models"], "No space left on device"),
    ):
        code, out, err = graft(*arguments, monkeypatch=monkeypatch, stdin="{}")
        assert (code, out, said in err) == (2, "", True), arguments
    code, _, err = graft("get", "\udcff", monkeypatch=monkeypatch)
    assert code == 2 and "is no text" in err


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ALL_PROXY", "socks5://me:hunter2@127.0.0.1:1"),
        ("HTTPS_PROXY", "http://me:hunter2@a:b"),
        ("SSL_CERT_FILE", "/nonexistent"),
    ],
)
def test_a_network_that_the_environment_names_wrongly_is_the_users_to_correct_and_none_of_loopbacks(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(cli, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setenv("GRAFT_URL", "http://graft.invalid")
    code, _, err = graft("list", monkeypatch=monkeypatch)
    assert code == 2 and "mend or unset" in err and name in err and "hunter2" not in err
    (finding,) = look({"GRAFT_URL": "http://graft.invalid"})
    assert name in (finding.remedy or "") and "hunter2" not in finding.found
    monkeypatch.setenv("GRAFT_URL", "http://127.0.0.1:1")
    assert graft("list", monkeypatch=monkeypatch)[0] == 4


def test_a_list_is_no_longer_than_asked(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    service.jobs = [{"id": f"ftjob-{n}", "status": "queued", "created_at": 1.7e9} for n in range(9)]
    code, out, _ = graft("list", "--limit", "4", "--json", monkeypatch=monkeypatch)
    assert code == 0
    assert [job["id"] for job in json.loads(out)] == ["ftjob-0", "ftjob-1", "ftjob-2", "ftjob-3"]


def test_help_lists_plugins_and_works_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    assert " up " in CliRunner().invoke(cli.app, ["--help"]).output
    monkeypatch.setattr(cli, "entry_points", lambda group: ())
    alone = CliRunner().invoke(cli.app, ["--help"])
    assert alone.exit_code == 0
    assert " submit " in alone.output
    assert " up " not in alone.output and " doctor " in alone.output, "a user's doctor is the client's own"
    assert CliRunner().invoke(cli.app, ["up"]).exit_code == 2


SPEC_YAML = """
base_model: a/b
training: {learning_rate: 2e-4, max_steps: 5, packing: true}   # a comment
name: no
metadata: {since: 2026-11-29, version: "1.0"}
"""


def test_a_spec_may_be_yaml_and_its_values_are_what_json_would_make_of_them(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tmp_path / "job.yaml"
    spec.write_text(SPEC_YAML)
    service.jobs = [{"id": "ftjob-1", "status": "failed"}]
    code, out, _ = graft(
        "submit", str(spec), "--wait", "--set", "training.max_steps=9", "--json", monkeypatch=monkeypatch
    )
    assert (code, json.loads(out)["status"]) == (1, "failed")
    assert json.loads(service.heard("POST", "/jobs")[0].content) == {
        "base_model": "a/b",
        "training": {"learning_rate": 0.0002, "max_steps": 9, "packing": True},
        "name": "no",
        "metadata": {"since": "2026-11-29", "version": "1.0"},
    }
    spec.write_text("base_model: a/b\nbase_model: a/c\n")
    code, _, err = graft("submit", str(spec), monkeypatch=monkeypatch)
    assert code == 2 and "'base_model' stands twice" in err
    spec.write_text("- a list\n")
    assert graft("submit", str(spec), monkeypatch=monkeypatch)[0] == 2
    for wrong, said in (
        ("name: !!binary aGk=", "binary"),
        ("name: !!timestamp x", "timestamp"),
        ("name: !!int x", "invalid literal"),
        ("name: !!bool x", "neither JSON nor YAML"),
        ("name: &ring [*ring]", "Circular"),
        ("- " * 5000, "nested too deeply"),
    ):
        spec.write_text(wrong)
        code, _, err = graft("submit", str(spec), monkeypatch=monkeypatch)
        assert (code, said in err) == (2, True), wrong


def test_a_spec_in_another_encoding_or_with_a_key_twice_is_the_users_to_correct(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = tmp_path / "job.json"
    for content, said in (
        ('{"name": "caf\u00e9"}'.encode("latin-1"), "is not UTF-8 (byte 13)"),
        (b'{"lora": {"r": 8, "r": 16}}', "'r' stands twice"),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"name": "\\ud800"}', "surrogates not allowed"),
    ):
        spec.write_bytes(content)
        code, _, err = graft("estimate", str(spec), monkeypatch=monkeypatch)
        assert (code, said in err) == (2, True)
    code, _, err = graft("estimate", "-", monkeypatch=monkeypatch, stdin='{"name": "a", "name": "b"}')
    assert (code, "'name' stands twice" in err) == (2, True)


def test_words_in_brackets_are_shown_as_they_are(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    code, _, err = graft("estimate", "[/b].json", monkeypatch=monkeypatch)
    assert (code, "Cannot read [/b].json" in err) == (2, True)
    service.answers["POST /webhooks/test"] = [httpx.Response(200, json={"delivered": False, "reason": "[/b] [dim]"})]
    code, out, _ = graft("webhooks", "test", "https://a.test/", monkeypatch=monkeypatch)
    assert (code, out) == (1, "It was not taken: [/b] [dim]\n")
    service.jobs = [{"id": "[/b]", "status": "queued"}]
    service.answers["POST /jobs"] = [httpx.Response(202, json={"id": "[/b]", "status": "queued"})]
    service.answers["GET /jobs/[/b]"] = [httpx.Response(200, json={"id": "[/b]", "status": "succeeded"})]
    _, _, err = graft("submit", "-", "--watch", "--json", monkeypatch=monkeypatch, stdin="{}")
    assert "Job [/b] is accepted" in err
    service.jobs = [{"id": "[/b]", "status": "[/c]", "gpu_class": "[/d]"}]
    assert {"[/b]", "[/c]", "[/d]"} <= set(graft("list", monkeypatch=monkeypatch)[1].split())
    service.answers["GET /models"] = [error(422, "[/e]", "no", {}, **{"[/f]": 1})]
    _, _, err = graft("models", monkeypatch=monkeypatch)
    assert "error [/e]: no" in err and "[/f]: 1" in err


def test_what_others_wrote_makes_no_picture_and_steers_no_terminal(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wild, tame = "exp:a:lr2e-4\x1b]0;owned\x07\x9b2J", "exp:a:lr2e-4�]0;owned��2J"
    job = {"id": "ftjob-1", "status": "succeeded", "spec": {"name": wild}, "queue": {"reason": wild}}
    service.jobs, service.events = [job | {"base_model": wild}], [{"id": 1, "type": "note", "message": wild}]
    service.uploads = [{"id": "file-1", "filename": wild}]
    service.answers |= {
        "GET /models": [error(422, wild, wild)],
        "GET /jobs/ftjob-1/logs": [httpx.Response(200, text=wild)],
        "POST /webhooks/test": [httpx.Response(200, json={"delivered": False, "reason": wild})],
    }
    for arguments, times in (
        (["get", "ftjob-1"], 3),
        (["list"], 1),
        (["watch", "ftjob-1"], 5),
        (["files", "list"], 1),
        (["models"], 2),
        (["logs", "ftjob-1"], 1),
        (["webhooks", "test", "https://a.test/"], 1),
    ):
        _, out, err = graft(*arguments, monkeypatch=monkeypatch)
        assert (out + err).count(tame) == times and "\x1b" not in out + err, arguments
    screen = io.StringIO()
    terminal = Console(file=screen, force_terminal=True, width=300, color_system=None, emoji=False)
    watch([Update(job=Job(service.jobs[0] | {"phase": wild, "status": "running"}, GraftClient()), events=())], terminal)
    assert screen.getvalue().count("]0;owned") == screen.getvalue().count(tame) > 1
    show([note(wild, wild, wild)], as_json=False)
    assert capsys.readouterr().out.replace("\n", "").count("exp:a:lr2e-4�") == 3


def test_a_page_in_the_services_place_is_said_to_be_one(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    service.answers["GET /models"] = [httpx.Response(200, html="<html>Log in</html>")]
    code, out, err = graft("models", monkeypatch=monkeypatch)
    assert (code, out) == (4, "")
    assert "GET /models was answered 200" in err and "text/html" in err and "GRAFT_URL" in err


def test_a_log_without_a_line_says_so_and_where_to_look(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    service.answers["GET /jobs/ftjob-1/logs"] = [httpx.Response(200, text="") for _ in range(2)]  # type: ignore[assignment]
    code, out, err = graft("logs", "ftjob-1", monkeypatch=monkeypatch)
    assert (code, out) == (0, "")
    assert "is empty: graft get ftjob-1" in err and "/jobs/ftjob-1/events" in err
    code, out, err = graft("logs", "ftjob-1", "--json", monkeypatch=monkeypatch)
    assert (code, json.loads(out), err) == (0, {"job": "ftjob-1", "log": ""}, "")


def test_a_log_is_followed_to_the_jobs_end_and_a_new_runs_log_begins_anew(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    route = "GET /jobs/ftjob-1/logs"
    service.jobs = [{"id": "ftjob-1", "status": "queued"}]
    logs = [httpx.Response(200, text=text) for text in ("step 1\n", "step 1\nstep 2\n")]
    service.answers[route] = [error(404, "log_not_found", "Nothing has run yet."), *logs]
    statuses = iter(["running", "running", "succeeded"])
    answers = [httpx.Response(200, json={"id": "ftjob-1", "status": status}) for status in statuses]
    service.answers["GET /jobs/ftjob-1"] = answers  # type: ignore[assignment]
    assert graft("logs", "-f", "ftjob-1", monkeypatch=monkeypatch)[:2] == (0, "step 1\nstep 2\n")
    again = [httpx.Response(200, text="step 2\n"), httpx.Response(200, text="begun again\n")]
    service.answers[route] = again  # type: ignore[assignment]
    statuses = iter(["running", "succeeded"])
    answers = [httpx.Response(200, json={"id": "ftjob-1", "status": status}) for status in statuses]
    service.answers["GET /jobs/ftjob-1"] = answers  # type: ignore[assignment]
    _, out, _ = graft("logs", "-f", "--json", "ftjob-1", monkeypatch=monkeypatch)
    assert [json.loads(line)["log"] for line in out.splitlines()] == ["step 2\n", "begun again\n"]


def test_files_and_adapters_are_looked_at(
    service: FakeService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = {"id": "file-1", "filename": "rows.jsonl", "bytes": 3 * 1024**2}
    service.answers["GET /files"] = [httpx.Response(200, json={"data": [file], "has_more": False})]
    service.answers["GET /files/file-1"] = [httpx.Response(200, json=file)]
    service.answers["DELETE /files/file-1"] = [httpx.Response(200, json={"id": "file-1", "deleted": True})]
    for arguments, shown in (
        (("list",), "rows.jsonl"),
        (("show", "file-1"), "rows.jsonl"),
        (("delete", "file-1"), "is"),
    ):
        code, out, _ = graft("files", *arguments, monkeypatch=monkeypatch)
        assert code == 0 and shown in out
    service.jobs = [{"id": "ftjob-1"}]
    code, out, _ = graft("adapter", "show", "ftjob-1", monkeypatch=monkeypatch)
    assert code == 0 and "adapter_model.safetensors" in out and "store.test" not in out
    code, out, _ = graft(
        "adapter", "download", "ftjob-1", "--to", str(tmp_path / "a"), "--json", monkeypatch=monkeypatch
    )
    assert (code, json.loads(out)["path"]) == (0, str(tmp_path / "a"))


def test_a_shell_completes_commands() -> None:
    found = subprocess.run(
        [Path(sys.executable).parent / "graft"],
        env={**os.environ, "_GRAFT_COMPLETE": "complete_bash", "COMP_WORDS": "graft capa", "COMP_CWORD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout.split() == ["capacity"]


def test_a_curve_is_drawn_from_its_lowest_to_its_highest() -> None:
    assert sparkline([8, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, float("nan"), 1.0]) == "▁▁"
    assert len(sparkline([float(step) for step in range(1000)])) == 24
    assert sparkline([]) == ""


@pytest.mark.parametrize("width", [80, 140])
def test_on_a_terminal_a_bar_shows_step_loss_speed_and_eta(width: int) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=width, color_system=None)
    event = {"id": 1, "type": "warning", "level": "warning", "message": "12 rows [were] truncated"}
    steps = ({"id": 2 + n, "type": "metrics", "data": {"step": n, "loss": 2.0 - n}} for n in range(2))
    running = Job(RUNNING, GraftClient())
    job = watch(iter([Update(job=running, events=(event, *steps))]), console)
    assert job is running
    shown = screen.getvalue()
    assert "3/10" in shown
    for fact in ("running (training)", "loss 1.2500", "1,234 tokens/s", "ETA 3m09s", "█▁", "12 rows [were] truncated"):
        assert fact in shown


def test_amounts_and_losses_have_the_digits_that_say_something() -> None:
    assert [money(amount) for amount in (12.345, 0.5, 0.0614, 0.000417, 0.0)] == [
        "12.35", "0.50", "0.061", "0.00042", "0.00"
    ]  # fmt: skip
    screen = io.StringIO()
    losses = {"train_loss": 0.00013417914390578866, "eval_loss": 1.2345678901234567}
    Console(file=screen, width=80).print(job_table({"id": "ftjob-1", "status": "running", "metrics": losses}))
    assert [line.split()[-1] for line in screen.getvalue().splitlines() if "loss" in line] == ["0.0001342", "1.235"]


@pytest.mark.parametrize(("cost", "shown"), [(12.5, "12.50"), (0.0042, "0.0042"), (0.0, None), (None, None)])
def test_a_job_shows_what_it_has_cost_so_far(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, cost: float | None, shown: str | None
) -> None:
    service.jobs = [{"id": "ftjob-1", "status": "running", "cost": cost}]
    code, out, _ = graft("get", "ftjob-1", monkeypatch=monkeypatch)
    (line,) = [line.split() for line in out.splitlines() if "cost" in line] or [[None, None]]
    assert (code, line[-1]) == (0, shown)


def test_a_class_without_a_price_has_no_cost(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = dict.fromkeys(("low", "expected", "high"), 0.0)
    speed = {"tokens_per_second": nothing, "calibrated": True, "steps": 1, "duration_seconds": nothing, "cost": nothing}
    found = {"fits": True, "gpu_class": "24gb", "plan": {}, "memory": {}, "speed": speed}
    service.answers["POST /jobs/estimate"] = [httpx.Response(200, json=found)]
    assert "cost" not in graft("estimate", "-", monkeypatch=monkeypatch, stdin="{}")[1]


def test_durations_read_as_people_say_them() -> None:
    assert [duration(seconds) for seconds in (7.4, 189, 7500)] == ["7s", "3m09s", "2h05m"]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_a_refusal_and_an_estimate_are_never_cut(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, columns: str
) -> None:
    base = "an-organisation-with-a-long-name/and-a-base-model-with-a-long-one-7b"
    change = {"param": "base_model", "from": base + "0", "to": base, "needed_bytes": 1024**3, "gpu_class": "24gb"}
    needed = {"the_component_with_the_longest_name_of_all": 1024**3}
    service.answers["POST /jobs/estimate"] = [
        error(422, "vram_capacity_exceeded", "Too big.", needed=needed, changes=[change]),
        httpx.Response(200, json={"fits": True, "gpu_class": "24gb", "plan": {}, "memory": {"components": needed}}),
    ]
    _, _, err = graft("estimate", "-", monkeypatch=monkeypatch, stdin="{}", columns=columns)
    (line,) = (line for line in err.splitlines() if line.startswith("base_model"))
    assert line.split() == ["base_model", base + "0", base, "1.00", "GiB", "24gb"]
    _, out, _ = graft("estimate", "-", monkeypatch=monkeypatch, stdin="{}", columns=columns)
    for printed in (err, out):
        assert "the component with the longest name of all  1.00 GiB" in printed


@pytest.mark.parametrize("width", ["40", "80"])
def test_an_id_is_shown_whole_however_narrow_the_terminal(width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    job = {"id": "ftjob-" + "x" * 24, "status": "succeeded", "base_model": "an-organisation/with-a-long-base-name"}
    printed = io.StringIO()
    print_whole(Console(file=printed), jobs_table([job]))
    assert job["id"] in printed.getvalue()
    assert job["base_model"] in printed.getvalue()


def test_jobs_are_deleted_one_by_one_and_the_first_that_cannot_be_says_so(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.answers["DELETE /jobs/ftjob-1"] = [httpx.Response(200, json={"id": "ftjob-1", "deleted": True})]
    service.answers["DELETE /jobs/ftjob-2"] = [error(409, "job_not_ended", "The job 'ftjob-2' is 'running'.")]
    code, out, err = graft("delete", "ftjob-1", "ftjob-2", "ftjob-3", monkeypatch=monkeypatch)
    assert (code, out) == (2, "ftjob-1 is deleted.\n")
    assert "ftjob-2" in err and not service.heard("DELETE", "/jobs/ftjob-3")


def test_checkpoints_and_the_log_are_shown(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = {"id": "ftckpt-1", "step": 40, "size": 3 * 1024**3, "created_at": 1.7e9, "is_stored": True}
    page = {"data": [checkpoint | {"metrics": {"train_loss": 1.25, "eval_loss": None}}], "has_more": False}
    service.answers["GET /jobs/ftjob-1/checkpoints"] = [httpx.Response(200, json=page)]
    code, out, _ = graft("checkpoints", "ftjob-1", monkeypatch=monkeypatch)
    assert code == 0
    for expected in ("ftckpt-1", "40", "3.00 GiB", "1.25", "kept"):
        assert expected in out
    service.answers["GET /jobs/ftjob-1/logs"] = [httpx.Response(200, text="step 1\nstep 2\n")]
    assert graft("logs", "ftjob-1", monkeypatch=monkeypatch)[:2] == (0, "step 1\nstep 2\n")


def test_webhooks_are_shown_and_tried_out(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = {"id": "msg-1", "url": "https://a.test/", "type": "x", "tries": 2, "error": "it answered 500"}
    service.answers["GET /jobs/ftjob-1/webhooks"] = [httpx.Response(200, json={"data": [sent], "has_more": False})]
    code, out, _ = graft("webhooks", "show", "ftjob-1", monkeypatch=monkeypatch)
    assert code == 0 and "msg-1" in out and "it answered 500" in out
    service.answers["GET /webhooks/secret"] = [httpx.Response(200, json={"secret": "whsec_abc"})]
    assert graft("webhooks", "secret", monkeypatch=monkeypatch)[:2] == (0, "whsec_abc\n")
    answers = [{"delivered": True, "reason": None}, {"delivered": False, "reason": "it answered 404"}]
    service.answers["POST /webhooks/test"] = [httpx.Response(200, json=answer) for answer in answers]
    assert graft("webhooks", "test", "https://a.test/", monkeypatch=monkeypatch)[0] == 0
    code, out, _ = graft("webhooks", "test", "https://a.test/", monkeypatch=monkeypatch)
    assert (code, out) == (1, "It was not taken: it answered 404\n")


def test_a_merged_model_is_waited_for_and_brought_home(
    service: FakeService, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.jobs = [{"id": "ftjob-1"}]
    route = "/jobs/ftjob-1/merged"
    service.answers[f"POST {route}"] = [httpx.Response(202, json={"status": "queued"})]
    waiting = [httpx.Response(200, json={"status": status}) for status in ("queued", "running", "succeeded")]
    service.answers[f"GET {route}"] = [*waiting, httpx.Response(200, json=service.manifest())]
    code, out, err = graft("merge", "ftjob-1", "--to", str(tmp_path / "home"), monkeypatch=monkeypatch)
    assert code == 0, err
    assert str(tmp_path / "home") in out.replace("\n", "")
    assert (tmp_path / "home" / "adapter_model.safetensors").stat().st_size == 7000
    failed = {"status": "failed", "error": {"code": "host_out_of_memory", "message": "It needs 18 GB."}}
    service.answers[f"POST {route}"] = [httpx.Response(202, json={"status": "queued"})]
    service.answers[f"GET {route}"] = [httpx.Response(200, json=failed)]
    code, _, err = graft("merge", "ftjob-1", monkeypatch=monkeypatch)
    assert code == 1 and "It needs 18 GB." in err


REPORT: dict[str, Any] = {
    "kind": "messages",
    "rows": 200,
    "max_length": 64,
    "train": {"rows": 150, "tokens": 3000, "trained_tokens": 1500},
    "validation": {"rows": 40, "tokens": 800, "trained_tokens": 400, "overlap_rows": 4},
    "truncated_rows": 20,
    "truncated_share": 0.1,
    "duplicate_rows": 3,
    "nothing_to_learn_rows": 10,
    "lengths": {
        "percentiles": {"5": 3, "50": 20, "95": 60, "100": 90},
        "histogram": {"edges": [3, 4, 91], "counts": [150, 50]},
    },
    "first_rows": [
        {
            "line": 7,
            "tokens": 90,
            "spans": [
                {"text": "[user] hi\n", "trained": False, "cut": False, "left_out": 0},
                {"text": "good\x1b[2Jbye", "trained": True, "cut": False, "left_out": 0},
                {"text": "too late", "trained": False, "cut": True, "left_out": 0},
            ],
            "spans_left_out": 5,
        }
    ],
    "warnings": [{"code": "rows_duplicated", "message": "3 of 200 rows [stand] twice."}],
}


def report_answers(service: FakeService) -> None:
    waiting = {"id": "report-1", "status": "queued", "report": None}
    ready = {"id": "report-1", "status": "ready", "report": REPORT}
    answers = [httpx.Response(202, json=waiting, headers={"retry-after": "1"}), httpx.Response(200, json=ready)]
    service.answers["GET /files/file-1/report"] = answers  # type: ignore[assignment]
    service.jobs = [{"id": "ftjob-1", "status": "queued"}]


def test_a_report_is_waited_for_and_shown_with_a_mask_that_needs_no_colour(
    service: FakeService, monkeypatch: pytest.MonkeyPatch
) -> None:
    report_answers(service)
    arguments = ("files", "report", "file-1", "--base-model", "graft/tiny", "--max-length", "64")
    code, out, _ = graft(*arguments, monkeypatch=monkeypatch)
    assert code == 0
    for shown in (
        "200 of kind messages",
        "150 rows, 3,000 tokens, learnt 1,500 (50.0 %)",
        "4 validation rows (10.0 %)",
        "20 rows (10.0 %), at 64 tokens",
        "[user] hi\n⟦good�[2Jbye⟧‹too late›",
        "and 5 more pieces",
        "3 of 200 rows [stand] twice.",
    ):
        assert shown in out
    assert "4–90" in out and "3–3" not in out, "a bar of one length has one number"
    asked = service.heard("GET", "/files/file-1/report")
    assert len(asked) == 2
    assert dict(asked[0].url.params) == {"base_model": "graft/tiny", "max_length": "64"}


def test_a_report_as_json_is_the_services_answer(service: FakeService, monkeypatch: pytest.MonkeyPatch) -> None:
    report_answers(service)
    code, out, _ = graft("files", "report", "file-1", "--base-model", "graft/tiny", "--json", monkeypatch=monkeypatch)
    assert (code, json.loads(out)["report"]) == (0, REPORT)


def test_what_is_learnt_has_a_colour_of_its_own() -> None:
    out = io.StringIO()
    Console(file=out, force_terminal=True, width=100).print(masked(REPORT["first_rows"][0]["spans"]))
    assert "\x1b[30;42m⟦good�[2Jbye⟧\x1b[0m" in out.getvalue()
