"""`graft doctor` on a disk that is full, and on one that cannot be written; root only: it mounts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

GRAFT = str(Path(sys.executable).parent / "graft")


def test_a_disk_that_is_full_or_read_only_and_too_few_open_files(tmp_path: Path) -> None:
    """In a mount namespace of its own: the disk is a tmpfs that ends with it."""
    script = f"""
        mount -t tmpfs -o size=1m none {tmp_path} && mkdir {tmp_path}/bucket
        {GRAFT} doctor disk bucket --json
        head -c 2m /dev/zero > {tmp_path}/zeros 2> /dev/null
        {GRAFT} doctor bucket --json
        mount -o remount,ro {tmp_path}
        ulimit -n 200
        {GRAFT} doctor disk bucket limits --json
    """
    environment = {**os.environ, "GRAFT_STATE_DIR": str(tmp_path)}
    command = ["unshare", "--map-root-user", "--mount", "sh", "-c", script]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 1, ran.stderr
    small, full, read_only = (json.loads(f"[{part}]") for part in ran.stdout.strip().strip("[]").split("]\n["))
    assert [(row["subject"], row["verdict"]) for row in small] == [("disk", "fault"), ("bucket", "ok")]
    assert "du -xh" in small[0]["remedy"]
    assert [(row["verdict"], "No space left" in row["found"]) for row in full] == [("fault", True)]
    assert [row["subject"] for row in read_only if row["verdict"] == "fault"] == ["disk", "open files", "bucket"]
    assert "chown" in read_only[0]["remedy"] and read_only[1]["remedy"] == "ulimit -n 65536"
