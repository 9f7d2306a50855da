"""`python deploy/make_env.py`: write .env for docker-compose.yml, with fresh secrets and this machine's GPUs."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECRETS = ("POSTGRES_PASSWORD", "REDIS_PASSWORD", "S3_SECRET_ACCESS_KEY")


def env_text(example: str, gpus: int) -> str:
    """The example with its secrets filled in, and one worker per GPU, or one on the CPU."""
    profiles = ",".join(f"gpu{index}" for index in range(gpus)) or "cpu"
    values = {name: secrets.token_hex(24) for name in SECRETS}
    values |= {"API_KEYS": f"default={secrets.token_hex(24)}", "COMPOSE_PROFILES": profiles}
    for name, value in values.items():
        example, found = re.subn(rf"^{name}=.*$", f"{name}={value}", example, flags=re.MULTILINE)
        if found != 1:
            raise ValueError(f"the example has {found} lines for {name}")
    return example


def _gpus_here() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    listed = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, check=False)
    return min(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()), 8)


def main() -> None:
    """Write .env, readable by its owner alone; one that exists is left as it is."""
    try:
        fd = os.open(ROOT / ".env", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return
    with os.fdopen(fd, "w") as file:
        file.write(env_text((ROOT / "deploy" / "env.example").read_text(), _gpus_here()))
    sys.stdout.write("wrote .env with fresh secrets; the API key is in its line API_KEYS\n")


if __name__ == "__main__":
    main()
