"""What the alert rules and the dashboard ask for: every expression, and the metrics that it names."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[1]
DASHBOARD = ROOT / "deploy" / "grafana" / "dashboards" / "graft.json"
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
# Of GPUs alone: tests/unit/test_metrics.py has them from a driver's stand-in, tests/gpu/ from a card.
ON_A_GPU = ("graft_gpu_", "graft_memory_forecast_")
_METRIC = re.compile(r"\bgraft_\w+")


def dashboard() -> dict[str, Any]:
    read: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return read


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    """Each by the title of what it belongs to."""
    for rule in rules():
        yield rule["alert"], rule["expr"]
    yield from questions()


def questions() -> Iterator[tuple[str, str]]:
    """Those of the dashboard."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", ()):
            yield panel["title"], target["expr"]


def metrics_asked_for() -> set[str]:
    """Names as they are scraped; those of a histogram's parts included."""
    return {name for _, expression in expressions() for name in metrics_of(expression)}


def metrics_of(expression: str) -> set[str]:
    return set(_METRIC.findall(expression))
