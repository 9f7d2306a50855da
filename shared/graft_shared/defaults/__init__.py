"""The catalogue and the capacity table that come with Graft (`deploy/*.yaml`), or the operator's own."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from graft_shared.capacity import CapacityTable
from graft_shared.catalogue import Catalogue


def load_catalogue(path: Path | None = None) -> Catalogue:
    """Read the catalogue of base models."""
    return Catalogue.from_dict(_read(path, "catalogue.yaml"))


def load_capacity(path: Path | None = None) -> CapacityTable:
    """Read the VRAM-capacity table."""
    shipped = CapacityTable.from_dict(_read(None, "capacity.yaml"))
    return shipped if path is None else CapacityTable.from_dict(_read(path, "capacity.yaml"), known=shipped.classes)


def _read(path: Path | None, name: str) -> Any:
    text = path.read_text() if path is not None else (files(__name__) / name).read_text()
    return yaml.safe_load(text)
