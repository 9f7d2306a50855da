"""Start an engine in a folder, build the stand-ins there, say their times and sizes, stop: a trial by hand."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from tests.containers.engine import DockerEngine
from tests.containers.standins import build_standins

logging.basicConfig(level=logging.INFO, format="%(message)s")
folder = Path(sys.argv[1])
engine = DockerEngine(folder).start()
try:
    build_standins(engine, folder / "cache")
    print(engine.run("images", "--format", "{{.Repository}}:{{.Tag}} {{.Size}}"))
finally:
    engine.stop()
