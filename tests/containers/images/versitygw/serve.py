"""Serve S3 on port 9000 over /data: Swift's four servers, with the credential that the environment names."""

import multiprocessing
import os
import signal
import sys
import tempfile
from base64 import b64encode
from multiprocessing.connection import wait
from pathlib import Path

GATEWAY = Path("/gateway")


def credential() -> str:
    """Swift's S3 access key is `account:user`; in base64, since its own spelling has no underscores."""
    access, secret = os.environ["ROOT_ACCESS_KEY"], os.environ["ROOT_SECRET_KEY"]
    account, colon, user = access.partition(":")
    if not (account and colon and user) or len(secret.split()) != 1:
        sys.exit("this stand-in needs a ROOT_ACCESS_KEY like account:user, and a ROOT_SECRET_KEY without blanks")
    names = [b64encode(name.encode()).decode().rstrip("=") for name in (account, user)]
    return f"user64_{names[0]}_{names[1]} = {secret} .admin"


def serve(kind: str, conf: Path) -> None:
    from swift.common import wsgi

    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    wsgi.drop_privileges = lambda user: None  # stay whoever the container runs as
    sys.exit(wsgi.run_wsgi(str(conf), f"{kind}-server", verbose=True))


def main() -> None:
    (Path("/data") / "d1").mkdir(exist_ok=True)
    proxy = Path(tempfile.mkdtemp()) / "proxy-server.conf"
    proxy.write_text((GATEWAY / "proxy-server.conf").read_text().replace("CREDENTIAL", credential()))
    os.environ["EVENTLET_NO_GREENDNS"] = "yes"
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(0))
    confs = {kind: GATEWAY / f"{kind}-server.conf" for kind in ("account", "container", "object")}
    servers = [multiprocessing.Process(target=serve, args=pair) for pair in (*confs.items(), ("proxy", proxy))]
    for server in servers:
        server.start()
    try:
        wait([server.sentinel for server in servers])
        sys.exit("one of Swift's servers ended")
    finally:
        for server in servers:
            server.kill()


main()
