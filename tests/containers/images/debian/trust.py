"""Trust the certificates of a PEM file beside Debian's own, so that update-ca-certificates keeps them."""

import re
import sys
from pathlib import Path


def split(path: str) -> list[str]:
    return re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", Path(path).read_text(), re.DOTALL)


known = {"".join(pem.split()) for pem in split("/etc/ssl/certs/ca-certificates.crt")}
for number, pem in enumerate(split(sys.argv[1])):
    if "".join(pem.split()) not in known:
        Path(f"/usr/local/share/ca-certificates/machine-{number}.crt").write_text(pem + "\n")
