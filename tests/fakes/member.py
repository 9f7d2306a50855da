"""A tiny child that writes in a journal what happens to it, and behaves as told: leave, refuse, die or finish."""

from __future__ import annotations

import os
import signal
import subprocess
import sys


def main() -> None:
    journal, name, behaviour = sys.argv[1:4]
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def note(what: str) -> None:
        fd = os.open(journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(fd, f"{name} {what}\n".encode())
        os.close(fd)

    if behaviour == "parent":
        orphan = subprocess.Popen(["sleep", "1000"], start_new_session=True)
        note(f"bore {orphan.pid}")
    note(f"started {os.getpid()}")
    print(f"{name} says hello", flush=True)
    if behaviour == "finish":
        return
    if behaviour == "die":
        sys.exit(3)
    while True:
        signal.sigwait({signal.SIGTERM})
        if behaviour != "refuse":
            note("left")
            return
        note("refused")


if __name__ == "__main__":
    main()
