"""Read what is provisioned where Grafana reads it, and be healthy on port 3000 while every data source answers."""

from __future__ import annotations

import json
import os
import signal
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import yaml

PROVISIONING = Path(os.environ["GF_PATHS_PROVISIONING"])
DATABASE = Path(os.environ["GF_PATHS_DATA"]) / "grafana.db"
HOME = Path(os.environ["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
ANSWER_SECONDS = 3


def provisioned(kind: str, key: str) -> list[dict]:
    files = [path for path in sorted((PROVISIONING / kind).iterdir()) if path.suffix in (".yml", ".yaml")]
    return [entry for path in files for entry in yaml.safe_load(path.read_text())[key]]


def boards() -> list[dict]:
    folders = [Path(provider["options"]["path"]) for provider in provisioned("dashboards", "providers")]
    return [json.loads(path.read_text()) for path in [HOME, *(path for at in folders for path in at.rglob("*.json"))]]


def sources() -> dict[str, str]:
    """The address of each data source by its uid; every panel must ask one of them."""
    found = {source["uid"]: source["url"] for source in provisioned("datasources", "datasources")}
    asked = {panel["datasource"]["uid"] for board in boards() for panel in board["panels"] if "datasource" in panel}
    if not asked or not asked <= found.keys():
        sys.exit(f"panels ask the data sources {sorted(asked)}, and there are {sorted(found)}")
    return found


def answers(url: str) -> bool:
    try:
        with urlopen(f"{url}/api/v1/query?query=1", timeout=ANSWER_SECONDS) as answer:
            return json.load(answer)["status"] == "success"
    except OSError as error:
        print(f"{url} does not answer: {error}")
        return False


class Health(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/api/health":
            self.send_response(200 if all(map(answers, SOURCES.values())) else 503)
            self.end_headers()
        else:
            self.send_error(404)

    def log_message(self, *_: object) -> None: ...


signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
DATABASE.touch()  # Grafana does not start where it cannot write its own
SOURCES = sources()
ThreadingHTTPServer(("", 3000), Health).serve_forever()
