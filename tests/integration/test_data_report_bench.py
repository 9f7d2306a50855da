"""The bench of reports on few rows: its figures are those that its data was made with, and it cannot rot."""

from __future__ import annotations

from pathlib import Path

from tests.bench.data_report import REPEAT_EVERY, measure

ROWS = 2 * REPEAT_EVERY + 1


def test_a_report_counts_what_the_data_was_made_with(tmp_path: Path) -> None:
    found = measure(tmp_path, rows=ROWS, vocabulary=1000)
    assert found["violations"] == []
    assert found["report"]["duplicate_rows"] == 2
    assert found["report"]["validation"]["rows"] == round(0.05 * ROWS)
    assert 0 < found["peak_rss_bytes"] < found["limits"]["peak_rss_bytes"]
