"""Which versions a figure was made with."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

import torch


def versions() -> dict[str, str]:
    """Interpreter, libraries, and the GPU if there is one."""
    found = {name: metadata.version(name) for name in ("transformers", "peft", "bitsandbytes")}
    found = {"python": platform.python_version(), "torch": torch.__version__, **found}
    if "trl" in sys.modules:  # what a benchmark compares with
        found["trl"] = metadata.version("trl")
    if torch.cuda.is_available():
        found["cuda"] = str(torch.version.cuda)
        found["gpu"] = torch.cuda.get_device_name()
    return found
