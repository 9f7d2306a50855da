"""TLS before a real server, with a certificate that nobody knows who is not told of it."""

from __future__ import annotations

import ipaddress
import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

HOST = "127.0.0.1"


@dataclass
class TlsFront:
    """Where it listens, the certificate to be told of, and what was said to it under TLS."""

    port: int
    certificate: Path
    heard: bytearray = field(default_factory=bytearray)


@contextmanager
def tls_before(port: int, folder: Path) -> Iterator[TlsFront]:
    """Hand everything that comes by TLS on to a server of this machine."""
    certificate = _self_signed(folder)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as caller,
                socket.create_connection((HOST, port)) as server,
            ):
                threading.Thread(target=_pass_on, args=[server, caller], daemon=True).start()
                _pass_on(caller, server, front.heard)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True

    with Server((HOST, 0), Handler) as listener:
        front = TlsFront(listener.server_address[1], certificate)
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield front
        listener.shutdown()


def _pass_on(source: socket.socket, target: socket.socket, heard: bytearray | None = None) -> None:
    with suppress(OSError):
        while piece := source.recv(65536):
            if heard is not None:
                heard += piece
            target.sendall(piece)
    with suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _self_signed(folder: Path) -> Path:
    """A file with a certificate for this machine and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name, now = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "a private CA")]), datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    form, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    secret = key.private_bytes(form, serialization.PrivateFormat.PKCS8, plain)
    path = folder / "certificate.pem"
    path.write_bytes(certificate.public_bytes(form) + secret)
    return path
