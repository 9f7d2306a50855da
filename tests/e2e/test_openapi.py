"""Some hundred requests drawn from the OpenAPI document by a fixed seed; `make test-openapi` draws thousands."""

from __future__ import annotations

from pathlib import Path

from tests.openapi.__main__ import Wanted, run


def test_the_api_is_as_its_document_says(tmp_path: Path, postgres_url: str) -> None:
    wanted = Wanted(cases=100, seed=7, phases="fuzzing,stateful", spare_jobs=5)
    report = run(tmp_path, wanted, postgres_url)
    assert report["holds"], (report["failures"], report["errors"], report["said"])
    assert report["cases"] >= 100 and report["server_errors"] == 0
    checked = set(report["checks"].values())
    assert len(report["checks"]) >= 14 and min(checked) >= 60, "no check is left out"
