"""The files of deploy/prometheus and deploy/grafana: every question parses and is about something documented."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import promql_parser
import yaml

from graft_shared.jobs import REMEDIES, FailureReason, Fault
from graft_worker.supervisor.audience import LEFT, OUTCOMES
from tests.panels import ROOT, dashboard, expressions, metrics_asked_for, metrics_of, rules

DOCS = (ROOT / "docs" / "observability.md").read_text()
UID = "graft-prometheus"


def read(path: str) -> Any:
    return yaml.safe_load((ROOT / "deploy" / path).read_text())


def test_every_expression_is_promql() -> None:
    titles = [title for title, expression in expressions() if promql_parser.parse(expression) is not None]
    assert len(titles) > 50


def test_every_metric_that_is_asked_for_is_documented() -> None:
    types = dict(re.findall(r"^\| `(graft_\w+)` \| (\w+) \|", DOCS, re.MULTILINE))
    histograms = {name for name, kind in types.items() if kind == "histogram"}
    parts = {f"{name}_{part}" for name in histograms for part in ("bucket", "sum", "count")}
    assert metrics_asked_for() <= (types.keys() - histograms) | parts


def test_every_alert_is_documented_says_what_to_do_and_is_tried() -> None:
    names = [rule["alert"] for rule in rules()]
    assert names == re.findall(r"^\| `(Graft\w+)` \|", DOCS, re.MULTILINE)
    tried = {
        wanted["alertname"]
        for case in yaml.safe_load((ROOT / "tests" / "observability" / "alerts.yml").read_text())["tests"]
        for wanted in case["alert_rule_test"]
        if wanted["exp_alerts"]
    }
    assert tried == set(names)
    for rule in rules():
        assert set(rule["annotations"]) == {"summary", "action"}, rule["alert"]
        assert rule["labels"]["severity"] in ("info", "warning", "critical"), rule["alert"]


def test_the_rules_that_the_apis_figures_are_not_enough_for_are_named_beside_that_scrape() -> None:
    of_apis = DOCS.partition("### From the store")[2].partition("### Of each reconciler")[0]
    known = re.findall(r"^\| `(graft_\w+)`", of_apis, re.MULTILINE)
    told = {
        rule["alert"]
        for rule in rules()
        if "graft-reconciler" in rule["expr"]
        or not all(name.startswith(tuple(known)) for name in metrics_of(rule["expr"]))
    }
    (said,) = re.findall(r"^Rules about the reconciler.*\n.*", DOCS, re.MULTILINE)
    assert told == set(re.findall(r"`(Graft\w+)`", said))


def test_a_run_that_failed_for_no_fault_of_its_user_is_one_that_an_alert_counts() -> None:
    (asked,) = (rule["expr"] for rule in rules() if rule["alert"] == "GraftRunsFail")
    (wanted,) = re.findall(r'outcome=~"([^"]+)"', asked)
    faults = {reason for reason in FailureReason if REMEDIES[reason].fault is Fault.SERVER}
    told_elsewhere = {FailureReason.DRAINED, FailureReason.WORKER_LOST}  # a rollout; the leases that expire
    assert {each for each in OUTCOMES if re.fullmatch(wanted, each)} == {LEFT, *(faults - told_elsewhere)}


def test_the_dashboard_is_one_that_grafana_takes() -> None:
    board = dashboard()
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids))
    assert board["uid"] == "graft"
    for panel in board["panels"]:
        assert panel["type"] in ("row", "stat", "timeseries"), panel["title"]
        if panel["type"] == "row":
            continue
        assert panel["datasource"] == {"type": "prometheus", "uid": UID}, panel["title"]
        assert panel["description"], panel["title"]
        refs = [target["refId"] for target in panel["targets"]]
        assert refs and len(refs) == len(set(refs)), panel["title"]
        assert all(target["datasource"]["uid"] == UID for target in panel["targets"]), panel["title"]


def test_no_panel_covers_another_or_leaves_the_grid() -> None:
    places = [(panel["title"], panel["gridPos"]) for panel in dashboard()["panels"]]
    for title, at in places:
        assert at["x"] >= 0 and at["x"] + at["w"] <= 24, title
    for (one, a), (other, b) in combinations(places, 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"], f"{one} and {other}"


def test_grafana_finds_its_source_and_its_dashboard_where_compose_puts_them() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    (source,) = read("grafana/provisioning/datasources/graft.yml")["datasources"]
    assert (source["uid"], source["url"]) == (UID, "http://prometheus:9090")
    (provider,) = read("grafana/provisioning/dashboards/graft.yml")["providers"]
    mounts = dict(volume.split(":")[:2] for volume in services["grafana"]["volumes"])
    assert mounts["./deploy/grafana/dashboards"] == provider["options"]["path"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).parent == Path(provider["options"]["path"]) and json.loads(
        (ROOT / "deploy" / "grafana" / "dashboards" / Path(home).name).read_text()
    )


def test_prometheus_looks_for_every_service_that_shows_figures_on_the_port_that_it_is_told() -> None:
    compose = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    port = int(compose["x-settings"]["GRAFT_METRICS_PORT"])
    looked_for = {}
    for job in read("prometheus/prometheus.yml")["scrape_configs"]:
        (found,) = job["dns_sd_configs"]
        assert found["port"] == port
        looked_for[job["job_name"]] = set(found["names"])
    silent = {"postgres", "redis", "store", "migrate", "bucket", "train-image", "prometheus", "grafana"}
    workers = set(compose["services"]) - silent - {"api", "reconciler"}
    assert looked_for == {"graft-api": {"api"}, "graft-reconciler": {"reconciler"}, "graft-worker": workers}


def test_neither_is_published_beyond_this_machine() -> None:
    services = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    for name in ("prometheus", "grafana"):
        assert services[name]["profiles"] == ["observe"]
        assert all(port.startswith("127.0.0.1:") for port in services[name]["ports"]), name
        assert services[name]["healthcheck"]["test"], name
