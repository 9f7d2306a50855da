"""Prometheus' own tool on its configuration, the alert rules, every question of the dashboard, and a scrape."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest

from graft_api.metrics import figures_of
from graft_shared.metrics import RECONCILER
from graft_worker.metrics import OWN
from tests.api_service import make_service, migrated_database
from tests.panels import ROOT, dashboard, questions, rules


def promtool(*words: str | Path, given: bytes = b"") -> str:
    found = shutil.which("promtool")
    assert found, "promtool is missing: apt-get install --no-install-recommends prometheus"
    done = subprocess.run([found, *words], input=given, capture_output=True, check=False)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_the_configuration_and_the_rules_are_valid() -> None:
    said = promtool("check", "config", ROOT / "deploy" / "prometheus" / "prometheus.yml")
    assert f"{len(rules())} rules found" in said


def test_each_alert_fires_when_it_should() -> None:
    assert "SUCCESS" in promtool("test", "rules", ROOT / "tests" / "observability" / "alerts.yml")


def test_every_question_of_the_dashboard_is_one_that_prometheus_takes(tmp_path: Path) -> None:
    asked = [expression for _, expression in questions()]
    recorded = [{"record": f"asked:{number}", "expr": expression} for number, expression in enumerate(asked)]
    (tmp_path / "asked.yml").write_text(yaml.safe_dump({"groups": [{"name": "asked", "rules": recorded}]}))
    assert f"{len(asked)} rules found" in promtool("check", "rules", tmp_path / "asked.yml")


@pytest.mark.parametrize("whose", ["api", "reconciler", "worker"])
def test_its_lint_finds_nothing_in_what_a_process_shows(tmp_path: Path, whose: str) -> None:
    service = make_service(tmp_path, migrated_database(tmp_path))
    service.train(service.new_job()["id"])
    shown: dict[str, CollectorRegistry] = {
        "api": figures_of(service.http.app.state.neighbours),
        "reconciler": RECONCILER,
        "worker": OWN,
    }
    assert promtool("check", "metrics", given=generate_latest(shown[whose])) == ""
    service.database.close()


def test_the_dashboard_is_written_as_it_is_read() -> None:
    text = (ROOT / "deploy" / "grafana" / "dashboards" / "graft.json").read_text()
    assert text == json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"
