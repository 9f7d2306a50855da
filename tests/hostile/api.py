"""What an attacker or a broken client sends to the API, by name; none of it is accepted, and each has its answer.

A case is the bytes of one exchange, for clients refuse to send half of it. `FILE` in a body is the id of a real file,
so that nothing else is wrong with the request.
"""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.api_service import register_base
from tests.factories import EMPTY_WEIGHTS

LLAMA = "meta-llama/Llama-2-7b-hf"
JSON = {"content-type": "application/json"}
WAIT_SECONDS = 20.0
UNSIGNED = "?expires=9999999999&signature=" + "0" * 64
LIMIT = 1_000_000  # bytes of a JSON body


@dataclass(frozen=True, kw_only=True)
class Case:
    """One exchange, and how it must end.

    Args:
        code: The stable word of the error; None where the server answers before the API is asked.
        raw: All that is sent, instead of what is made of the other fields.
    """

    status: int
    code: str | None
    method: str = "POST"
    path: str = "/jobs"
    headers: Mapping[str, str] = field(default_factory=lambda: JSON)
    body: bytes = b""
    raw: bytes = b""

    def request(self, file_id: str) -> bytes:
        """The bytes to send."""
        if self.raw:
            return self.raw
        body = self.body.replace(b"FILE", file_id.encode())
        lines = {"host": "localhost", "connection": "close", "content-length": str(len(body)), **self.headers}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value is not None)
        return f"{self.method} {self.path} HTTP/1.1\r\n{head}\r\n".encode("utf-8", "surrogateescape") + body


@dataclass(frozen=True)
class Answer:
    """What came back; status 0 for nothing."""

    status: int
    body: bytes

    @property
    def code(self) -> str | None:
        try:
            return str(json.loads(self.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            return None


def send(port: int, request: bytes) -> Answer:
    """Send these bytes and read until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=WAIT_SECONDS) as connection:
        with suppress(ConnectionError):  # answered and closed before its end
            connection.sendall(request)
        received = bytearray()
        with suppress(ConnectionError):
            while chunk := connection.recv(65_536):
                received += chunk
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return Answer(int(head.split()[1]) if head else 0, body)


def spec(**changes: Any) -> bytes:
    """A body that is accepted, but for these changes."""
    return json.dumps({"base_model": LLAMA, "dataset": {"file": "FILE"}, **changes}).encode()


def malformed(body: bytes) -> Case:
    return Case(status=400, code="malformed_body", body=body)


def refused(status: int = 422, code: str = "invalid_parameter", /, **changes: Any) -> Case:
    return Case(status=status, code=code, body=spec(**changes))


def get(path: str, status: int, code: str, **headers: str) -> Case:
    return Case(method="GET", path=path, status=status, code=code, headers=headers)


def encoded(how: str, body: bytes) -> Case:
    return Case(status=415, code="unsupported_encoding", headers=JSON | {"content-encoding": how}, body=body)


def twice(header: bytes) -> Case:
    return wire(
        b"GET /jobs/ftjob-a/events HTTP/1.1\r\nhost: localhost\r\n%s: 1\r\n%s: 2\r\n\r\n" % (header, header),
        code="repeated_header",
    )


def wire(text: bytes, *, status: int = 400, code: str | None = None) -> Case:
    return Case(raw=text, status=status, code=code)


def _in_spec(place: bytes) -> bytes:
    return spec()[:-1] + b", " + place + b"}"


def _posted(length: bytes, body: bytes) -> bytes:
    head = b"POST /jobs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
    return head + length + b"\r\n" + body


BODIES = {
    "a hundred thousand brackets": malformed(b"[" * 100_000),
    "a hundred thousand objects": malformed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "deep metadata": malformed(_in_spec(b'"metadata": ' + b"[" * 50_000 + b"]" * 50_000)),
    "a key twice": malformed(_in_spec(b'"base_model": "x"')),
    "a key twice, one of them escaped": malformed(_in_spec(b'"base\\u005fmodel": "x"')),
    "a key twice, deep inside": malformed(_in_spec(b'"lora": {"r": 8, "r": 16}')),
    "NaN": malformed(_in_spec(b'"training": {"learning_rate": NaN}')),
    "Infinity": malformed(_in_spec(b'"training": {"learning_rate": Infinity}')),
    "minus infinity": malformed(_in_spec(b'"training": {"learning_rate": -Infinity}')),
    "a float of 400 digits": Case(
        status=422, code="invalid_parameter", body=_in_spec(b'"training": {"learning_rate": 1e400}')
    ),
    "a negative float of 400 digits": Case(
        status=422, code="invalid_parameter", body=_in_spec(b'"training": {"warmup_ratio": -1e400}')
    ),
    "an integer of a thousand digits": Case(
        status=422, code="invalid_parameter", body=_in_spec(b'"training": {"seed": ' + b"9" * 1000 + b"}")
    ),
    "an integer of five thousand digits": malformed(_in_spec(b'"training": {"seed": ' + b"9" * 5000 + b"}")),
    "a float where a step is counted": refused(training={"max_steps": 1.5}),
    "a number as text": refused(training={"max_steps": "10"}),
    "true for a number": refused(training={"max_steps": True}),
    "steps beyond every int": refused(training={"max_steps": 2**63}),
    "patience beyond every int": refused(max_duration_seconds=2**200),
    "logging beyond every int": refused(training={"logging_steps": 2**64}),
    "bytes that are no UTF-8": malformed(b'{"base_model": "\xff\xfe"}'),
    "UTF-8 of more bytes than needed": malformed(b'{"base_model": "\xc0\xaf"}'),
    "half a surrogate pair": malformed(_in_spec(b'"name": "\\ud800"')),
    "the NUL character": malformed(_in_spec(b'"name": "a\\u0000b"')),
    "NUL as a key": malformed(_in_spec(b'"metadata": {"\\u0000": "x"}')),
    "a byte order mark": malformed(b"\xef\xbb\xbf" + spec()),
    "UTF-16": malformed(spec().decode().encode("utf-16")),
    "UTF-32": malformed(spec().decode().encode("utf-32")),
    "nothing": malformed(b""),
    "blanks": malformed(b" \r\n\t"),
    "two documents": malformed(spec() + spec()),
    "a comment": malformed(b"/* x */" + spec()),
    "a trailing comma": malformed(spec()[:-1] + b",}"),
    "single quotes": malformed(b"{'base_model': 'x'}"),
    "text": Case(status=422, code="invalid_parameter", body=b'"base_model"'),
    "a list": Case(status=422, code="invalid_parameter", body=b"[]"),
    "null": Case(status=422, code="invalid_parameter", body=b"null"),
    "too large, as it says": Case(status=413, code="body_too_large", body=_in_spec(b'"name": "' + b"x" * LIMIT + b'"')),
    "too large, in chunks": wire(
        _posted(b"transfer-encoding: chunked\r\n", (b"%x\r\n" % LIMIT + b" " * LIMIT + b"\r\n") * 2 + b"0\r\n\r\n"),
        status=413,
        code="body_too_large",
    ),
    "a length of twenty digits": wire(
        _posted(b"content-length: 99999999999999999999\r\n", b"{}"), status=413, code="body_too_large"
    ),
}

KINDS = {
    "no kind": Case(status=415, code="unsupported_media_type", headers={}, body=spec()),
    "text/plain": Case(status=415, code="unsupported_media_type", headers={"content-type": "text/plain"}, body=spec()),
    "a form": Case(
        status=415,
        code="unsupported_media_type",
        headers={"content-type": "application/x-www-form-urlencoded"},
        body=b"base_model=x",
    ),
    "JSON's name as a prefix": Case(
        status=415, code="unsupported_media_type", headers={"content-type": "application/jsonp"}, body=spec()
    ),
    "compressed": encoded("gzip", gzip.compress(spec())),
    "a bomb of zeros, compressed": encoded("gzip", gzip.compress(bytes(10**7))),
    "compressed, as it says, and not": encoded("gzip", spec()),
    "encoded twice": encoded("identity, br", spec()),
    "an upload that is compressed": Case(
        status=415,
        code="unsupported_encoding",
        path="/files",
        headers={"content-type": "multipart/form-data; boundary=b", "content-encoding": "gzip"},
        body=gzip.compress(b"--b--\r\n"),
    ),
    "UTF-16, and it says so": Case(
        status=400,
        code="malformed_body",
        headers={"content-type": "application/json; charset=utf-16"},
        body=spec().decode().encode("utf-16"),
    ),
    "a file as JSON": Case(status=415, code="unsupported_media_type", path="/files", body=spec()),
    "a form without a boundary": Case(
        status=415, code="unsupported_media_type", path="/files", headers={"content-type": "multipart/form-data"}
    ),
    "a form that breaks off": Case(
        status=400,
        code="malformed_body",
        path="/files",
        headers={"content-type": "multipart/form-data; boundary=b"},
        body=b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n{"text": "a"}\n',
    ),
    "a form whose part has a header without end": Case(
        status=400,
        code="malformed_body",
        path="/files",
        headers={"content-type": "multipart/form-data; boundary=b"},
        body=b"--b\r\nx: " + b"a" * 20_000 + b"\r\n\r\n\r\n--b--\r\n",
    ),
    "a form with two files": Case(
        status=422,
        code="invalid_parameter",
        path="/files",
        headers={"content-type": "multipart/form-data; boundary=b"},
        body=b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n{"text": "a"}\r\n' * 2
        + b"--b--\r\n",
    ),
}

IDS = {
    f"the id {shown}": get(f"/jobs/{sent}", status, code)
    for shown, sent, status, code in (
        ("of nothing", "ftjob-nothing", 404, "job_not_found"),
        ("with dots", "../../etc/passwd", 404, "route_not_found"),
        ("with encoded dots", "%2e%2e%2f%2e%2e%2fetc%2fpasswd", 404, "route_not_found"),
        ("with dots encoded twice", "%252e%252e%252fetc", 404, "job_not_found"),
        ("with a backslash", "..%5c..%5cetc", 404, "job_not_found"),
        ("with NUL", "ftjob-%00", 404, "route_not_found"),
        ("with a line break", "ftjob-%0d%0ax-evil:%201", 404, "job_not_found"),
        ("with a hash", "ftjob-a%23b", 404, "job_not_found"),
        ("that is no UTF-8", "%ff%fe", 404, "job_not_found"),
        ("of ten thousand characters", "ftjob-" + "a" * 10_000, 404, "job_not_found"),
        ("in letters that look alike", "ftj%D0%BEb-abc", 404, "job_not_found"),
        ("with a quote", "'%20or%20'1'='1", 404, "job_not_found"),
        ("that is a pattern", "%25", 404, "job_not_found"),
        ("of a job, with a dot behind", "ftjob-a.", 404, "job_not_found"),
    )
} | {
    "a file's id with dots": get("/files/..%2f..%2fetc%2fpasswd/content", 404, "route_not_found"),
    "an object outside": get("/objects/../../../etc/passwd" + UNSIGNED, 403, "link_expired"),
    "an object by encoded dots": get("/objects/%2e%2e%2f%2e%2e%2fetc%2fpasswd" + UNSIGNED, 403, "link_expired"),
    "a signature that is none": get("/objects/a?expires=9999999999&signature=x", 422, "invalid_parameter"),
    "a base by dots": get("/models/..%2f..%2fetc", 404, "base_model_not_found"),
    "a model of nobody's": get("/v1/models/ft:..:..:..:..%2f..", 404, "model_not_found"),
    "a checkpoint's cursor of another job": get("/jobs/ftjob-a/checkpoints?after=ftckpt-b-1", 404, "job_not_found"),
}

METADATA = {
    "seventeen pairs": refused(metadata={f"k{n}": "v" for n in range(17)}),
    "a key of 65 characters": refused(metadata={"k" * 65: "v"}),
    "a value of 513 characters": refused(metadata={"k": "v" * 513}),
    "a value that is a list": refused(metadata={"k": ["v"]}),
    "a value that is an object": refused(metadata={"k": {"a": "b"}}),
    "a number as a value": refused(metadata={"k": 1}),
    "an empty key": refused(metadata={"": "v"}),
    "a key with a bracket": refused(metadata={"a]": "v"}),
    "a key with a blank": refused(metadata={"a b": "v"}),
    "a key that ends in a line break": refused(metadata={"a\n": "v"}),
    "metadata that is a list": refused(metadata=["a"]),
    "a key of Python's": refused(400, "unknown_parameter", __class__="x"),
    "a key of JavaScript's": refused(400, "unknown_parameter", **{"__proto__": {"r": 1}}),
    "remote code": refused(400, "unknown_parameter", trust_remote_code=True),
}

WEBHOOKS = {
    f"a webhook to {url}": refused(webhook_url=url)
    for url in (
        "https://127.0.0.1/",
        "https://127.1/",
        "https://2130706433/",
        "https://0177.0.0.1/",
        "https://0x7f.0.0.1/",
        "https://0x7f000001/",
        "https://017700000001/",
        "https://0/",
        "https://0.0.0.0/",
        "https://10.0.0.1/",
        "https://172.16.0.1/",
        "https://192.168.1.1/",
        "https://100.64.0.1/",
        "https://169.254.169.254/latest/meta-data",
        "https://[::1]/",
        "https://[::]/",
        "https://[::ffff:127.0.0.1]/",
        "https://[::ffff:7f00:1]/",
        "https://[::127.0.0.1]/",
        "https://[64:ff9b::7f00:1]/",
        "https://[64:ff9b:1::7f00:1]/",
        "https://[2002:7f00:1::]/",
        "https://[2001:0:7f00:1::]/",
        "https://[fe80::1]/",
        "https://[fe80::1%25eth0]/",
        "https://[fd00:ec2::254]/latest/meta-data",
        "https://224.0.0.1/",
        "https://255.255.255.255/",
        "https://localhost/",
        "https://LOCALHOST./",
        "https://a.localhost/",
        "https://metadata.google.internal/computeMetadata/v1/",
        "https://printer.local/",
        "https://redis/",
        "https://\uff11\uff12\uff17.0.0.1/",
        "https://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/",
        "https://127.0.0.1\\@example.com/",
        "https://example.com\\@127.0.0.1/",
        "https://example.com@127.0.0.1/",
        "https://user:password@example.com/",
        "https://example.com%2f@127.0.0.1/",
        "https://127.0.0.1%00.example.com/",
        "https://example.com:22/",
        "https://example.com:6379/",
        "https://example.com:0/",
        "https://example.com:99999/",
        "https://example.com:https/",
        "http://example.com/",
        "ftp://example.com/",
        "file:///etc/passwd",
        "gopher://127.0.0.1:6379/_x",
        "javascript:alert(1)",
        "//example.com/",
        "https://",
        "https:///path",
        "https://[",
        "https://example.com/\r\nx-evil: 1",
        "https://exa\tmple.com/",
        "https://example.com/#frag",
        "https://example.com/" + "a" * 2048,
    )
}

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 320,
    "max_position_embeddings": 2048,
}
BAD_CONFIGS: dict[str, bytes] = {
    "huge": json.dumps(CONFIG | {"padding": "x" * 1_100_000}).encode(),
    "deep": b"[" * 200_000,
    "no-json": b"\x80\x04\x95",
    "no-object": b"[]",
    "duplicate": b"\xff\xfe{}",
    "no-architecture": b"{}",
    "list-as-type": json.dumps(CONFIG | {"model_type": ["llama"]}).encode(),
    "text-for-text-config": json.dumps({"text_config": "llama"}).encode(),
    "negative": json.dumps(CONFIG | {"hidden_size": -64}).encode(),
    "text-as-size": json.dumps(CONFIG | {"hidden_size": "64"}).encode(),
    "null-as-size": json.dumps(CONFIG | {"hidden_size": None}).encode(),
    "list-as-size": json.dumps(CONFIG | {"vocab_size": [1]}).encode(),
    "infinite-size": json.dumps(CONFIG | {"vocab_size": 1e400}).encode(),
    "astronomic-size": json.dumps(CONFIG | {"num_hidden_layers": 10**30}).encode(),
    "no-heads": json.dumps(CONFIG | {"num_attention_heads": 0}).encode(),
    "more-heads-than-width": json.dumps(CONFIG | {"num_attention_heads": 65}).encode(),
    "quantised": json.dumps(CONFIG | {"quantization_config": {"bits": 4}}).encode(),
}
BAD_WEIGHTS: dict[str, dict[str, bytes]] = {
    "pickle": {"pytorch_model.bin": b"\x80\x04."},
    "pickle-and-code": {"pytorch_model.bin": b"\x80\x04.", "modeling_evil.py": b"import os\n"},
    "header-beyond-the-file": {"model.safetensors": (2**40).to_bytes(8, "little") + b"{}"},
    "header-beyond-every-int": {"model.safetensors": b"\xff" * 8 + b"{}"},
    "empty-weights": {"model.safetensors": b""},
}


BAD_LINKS = (
    "config-elsewhere",
    "tokenizer-elsewhere",
    "weights-elsewhere",
    "weights-nowhere",
    "weights-in-a-circle",
)


def put_bad_bases(models: Path) -> None:
    """Folders that an operator may have been handed, each wrong in one way, where registered ones are looked for."""
    for name, content in BAD_CONFIGS.items():
        register_base(models / name, CONFIG)
        (models / name / "config.json").write_bytes(content)
    for name, files in BAD_WEIGHTS.items():
        register_base(models / name, CONFIG)
        (models / name / "model.safetensors").unlink()
        for file, data in files.items():
            (models / name / file).write_bytes(data)
    register_base(models / "config-elsewhere", CONFIG)
    (models / "config-elsewhere" / "config.json").unlink()
    (models / "config-elsewhere" / "config.json").symlink_to("/etc/passwd")
    register_base(models / "tokenizer-elsewhere", CONFIG)
    (models / "tokenizer-elsewhere" / "tokenizer.json").symlink_to("../../../../etc/passwd")
    register_base(models / "weights-nowhere", CONFIG)
    (models / "weights-nowhere" / "shard-2.safetensors").symlink_to("shard-3.safetensors")
    register_base(models / "weights-in-a-circle", CONFIG)
    (models / "weights-in-a-circle" / "shard-2.safetensors").symlink_to("shard-2.safetensors")
    register_base(models / "weights-elsewhere", CONFIG)
    (models / "weights-elsewhere" / "model.safetensors").unlink()
    (models.parent / "elsewhere.safetensors").write_bytes(EMPTY_WEIGHTS)
    (models / "weights-elsewhere" / "model.safetensors").symlink_to("../../elsewhere.safetensors")


BASES = {
    f"the base {name!r}": refused(base_model=name)
    for name in (
        "../../etc/passwd", "/etc/passwd", "./models", "..", ".", "", "a/../b", "a/b/c", "a//b", "a/", "/a",
        "file:///etc/passwd", "https://example.com/model", "s3://bucket/model", "a\\b", "~/model", "a b", "a/b\n",
        "a\x7fb", "m\u0435ta-llama/Llama-2-7b-hf", "x" * 201, "$(id)", "a%2f..%2fb",
    )
} | {
    f"the base {name!r}": refused(422, "unsupported_base_model", base_model=name)
    for name in (*BAD_CONFIGS, *BAD_WEIGHTS, *BAD_LINKS)
} | {
    "a base that nobody has": refused(422, "unknown_base_model", base_model="nobody/has-this"),
    "a revision with dots": refused(revision="../../main"),
    "a revision that is an option": refused(revision="--upload-pack=x"),
    "a dataset that is a path": refused(dataset={"file": "../../etc/passwd"}),
    "a dataset of another machine": refused(dataset={"uri": "file:///etc/passwd"}),
    "a dataset over http": refused(dataset={"uri": "http://169.254.169.254/"}),
    "a dataset in a bucket that is not allowed": refused(dataset={"uri": "s3://secrets/rows.jsonl"}),
    "a dataset of two sources": refused(dataset={"file": "FILE", "uri": "s3://a/b"}),
}  # fmt: skip

HEADERS = {
    "an empty idempotency key": Case(
        status=422, code="invalid_parameter", headers=JSON | {"idempotency-key": ""}, body=spec()
    ),
    "a key of 256 characters": Case(
        status=422, code="invalid_parameter", headers=JSON | {"idempotency-key": "k" * 256}, body=spec()
    ),
    "two idempotency keys": twice(b"idempotency-key"),
    "two API keys": twice(b"authorization"),
    "two kinds": twice(b"content-type"),
    "two last events": twice(b"Last-Event-ID"),
    "a last event that is text": get("/jobs/ftjob-a/events", 422, "invalid_parameter", **{"last-event-id": "abc"}),
    "a last event below nothing": get("/jobs/ftjob-a/events", 422, "invalid_parameter", **{"last-event-id": "-1"}),
    "a last event beyond every int": get(
        "/jobs/ftjob-a/events", 422, "invalid_parameter", **{"last-event-id": "9" * 30}
    ),
    "a last event with a sign and a point": get(
        "/jobs/ftjob-a/events", 422, "invalid_parameter", **{"last-event-id": "+0.0"}
    ),
    "a last event that is no number": get("/jobs/ftjob-a/events", 422, "invalid_parameter", **{"last-event-id": "NaN"}),
    "a count of retries that is none": Case(
        path="/v1/fine_tuning/jobs",
        status=422,
        code="invalid_parameter",
        headers=JSON | {"x-stainless-retry-count": "1e9"},
        body=b'{"model": "a/b", "training_file": "FILE"}',
    ),
    "a patience without end": Case(
        path="/v1/fine_tuning/jobs",
        status=422,
        code="unknown_base_model",
        headers=JSON | {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "inf"},
        body=b'{"model": "a/b", "training_file": "FILE"}',
    ),
    "a patience that is no number": Case(
        path="/v1/fine_tuning/jobs",
        status=422,
        code="invalid_parameter",
        headers=JSON | {"x-stainless-retry-count": "1", "x-stainless-read-timeout": "nan"},
        body=b'{"model": "a/b", "training_file": "FILE"}',
    ),
    "a name of elsewhere for this machine": get("/jobs", 403, "foreign_caller", host="rebound.example"),
    "a page of elsewhere": Case(status=403, code="foreign_caller", headers=JSON | {"origin": "https://a.example"}),
    "a header of forty kilobytes": get("/jobs", 431, "headers_too_large", x="a" * 40_000),
    "a thousand headers": get("/jobs", 431, "headers_too_large", **{f"x-{n}": "a" * 40 for n in range(1_000)}),
    "a header of a megabyte": wire(b"GET /jobs HTTP/1.1\r\nhost: localhost\r\nx: " + b"a" * 1_000_000 + b"\r\n\r\n"),
    "a path of twenty kilobytes": get("/jobs/" + "a" * 20_000, 414, "address_too_long"),
    "a query of twenty kilobytes": get("/jobs?base_model=" + "a" * 20_000, 414, "address_too_long"),
    "a hundred thousand headers": wire(
        b"GET /jobs HTTP/1.1\r\nhost: localhost\r\n" + b"".join(b"x-%d: a\r\n" % n for n in range(100_000)) + b"\r\n"
    ),
    "a path of a megabyte": wire(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nhost: localhost\r\n\r\n"),
}

# A range is for the server to heed or not, and this one does not: whatever it says, the whole file comes.
RANGES = (
    "bytes=0-0",
    "bytes=9999999999-",
    "bytes=-1",
    "bytes=5-2",
    "bytes=" + ",".join(["0-"] * 5000),
    "bytes=99999999999999999999999999-99999999999999999999999999",
    "lines=1-2",
    "\ufffd",
)

QUERIES = {
    "an unknown parameter": get("/jobs?limt=3", 400, "unknown_parameter"),
    "a limit of nothing": get("/jobs?limit=0", 422, "invalid_parameter"),
    "a limit below nothing": get("/jobs?limit=-1", 422, "invalid_parameter"),
    "a limit beyond every int": get("/jobs?limit=" + "9" * 400, 422, "invalid_parameter"),
    "a limit of five thousand digits": get("/jobs?limit=" + "9" * 5000, 422, "invalid_parameter"),
    "a limit in other digits": get("/jobs?limit=%D9%A3%2e5", 422, "invalid_parameter"),
    "a moment after the end of time": get("/jobs?created_after=253402300800", 422, "invalid_parameter"),
    "a status that is none": get("/jobs?status=done", 422, "invalid_parameter"),
    "NUL in a value": get("/jobs?base_model=%00", 400, "bad_request"),
    "NUL in a key": get("/jobs?%00=1", 400, "bad_request"),
    "a page behind nothing": get("/jobs?after=ftjob-nothing", 404, "job_not_found"),
    "metadata without a key": get("/jobs?metadata[]=x", 422, "invalid_parameter"),
    "metadata of one key twice": get("/jobs?metadata[a]=x&metadata[a]=y", 422, "invalid_parameter"),
    "metadata of a key that no job can have": get("/jobs?metadata[a%0bb]=x", 422, "invalid_parameter"),
    "metadata that is not closed": get("/jobs?metadata[a=x", 400, "unknown_parameter"),
    "metadata without brackets": get("/jobs?metadata=x", 400, "unknown_parameter"),
    "events behind text": get("/jobs/ftjob-a/events?after=x", 422, "invalid_parameter"),
    "two thousand parameters": get("/jobs?" + "&".join(f"a{n}=1" for n in range(2_000)), 400, "unknown_parameter"),
}

METHODS = {
    f"{method} {path}": Case(method=method, path=path, status=status, code=code, headers={})
    for method, path, status, code in (
        ("PUT", "/jobs", 405, "method_not_allowed"),
        ("PATCH", "/jobs/ftjob-a", 405, "method_not_allowed"),
        ("TRACE", "/jobs", 405, "method_not_allowed"),
        ("OPTIONS", "/jobs", 405, "method_not_allowed"),
        ("BREW", "/jobs", 405, "method_not_allowed"),
        ("get", "/jobs", 405, "method_not_allowed"),
        ("PROPFIND", "/", 405, "method_not_allowed"),
        ("PROPFIND", "/nowhere", 404, "route_not_found"),
        ("GET", "/jobs/", 404, "route_not_found"),
        ("GET", "//jobs", 404, "route_not_found"),
        ("GET", "/JOBS", 404, "route_not_found"),
        ("GET", "http://evil.example/jobs", 404, "route_not_found"),
        ("POST", "/jobs/ftjob-a/delete", 404, "route_not_found"),
    )
} | {
    "a method by a header": Case(
        path="/jobs/ftjob-a/cancel", status=404, code="job_not_found", headers={"x-http-method-override": "DELETE"}
    ),
}

# What a proxy and this server might read differently, so that one request hides another.
WIRE = {
    "a length and chunks, and a request behind them": wire(
        b"POST /jobs HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: 4\r\n"
        b"transfer-encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n",
        code="ambiguous_length",
    ),
    "two lengths": wire(_posted(b"content-length: 2\r\ncontent-length: 20\r\n", b"{}")),
    "a length with a sign": wire(_posted(b"content-length: +2\r\n", b"{}")),
    "a length below nothing": wire(_posted(b"content-length: -1\r\n", b"{}")),
    "a length in hex": wire(_posted(b"content-length: 0x2\r\n", b"{}")),
    "chunks, and something else": wire(_posted(b"transfer-encoding: chunked, identity\r\n", b"0\r\n\r\n")),
    "chunks by another name": wire(_posted(b"transfer-encoding: xchunked\r\n", b"0\r\n\r\n")),
    "chunks twice": wire(_posted(b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n", b"0\r\n\r\n")),
    "a chunk of no size": wire(_posted(b"transfer-encoding: chunked\r\n", b"zz\r\n{}\r\n0\r\n\r\n")),
    "a chunk of a size without end": wire(_posted(b"transfer-encoding: chunked\r\n", b"f" * 40 + b"\r\n{}")),
    "a chunk's size ended by a line feed alone": wire(
        _posted(b"transfer-encoding: chunked\r\n", b"2\n{}\r\n0\r\n\r\n")
    ),
    "a chunk ended by a line feed alone": wire(_posted(b"transfer-encoding: chunked\r\n", b"2\r\n{}\n0\r\n\r\n")),
    "a line feed alone in a chunk's extension": wire(
        _posted(b"transfer-encoding: chunked\r\n", b"2;a\nb\r\n{}\r\n0\r\n\r\n")
    ),
    "a blank before the colon": wire(b"GET /jobs HTTP/1.1\r\nhost : localhost\r\n\r\n"),
    "a header in two lines": wire(
        b"POST /jobs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"transfer-encoding:\r\n chunked\r\n\r\n0\r\n\r\n",
        status=415,
        code="unsupported_media_type",
    ),
    "NUL in a header": wire(b"GET /jobs HTTP/1.1\r\nhost: gra\0ft\r\n\r\n"),
    "a header without a colon": wire(b"GET /jobs HTTP/1.1\r\nhost\r\n\r\n"),
    "no host": wire(b"GET /jobs HTTP/1.1\r\n\r\n"),
    "two hosts": wire(b"GET /jobs HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n"),
    "a version of two digits": wire(b"GET /jobs HTTP/1.11\r\nhost: localhost\r\n\r\n"),
    "no version": wire(b"GET /jobs\r\n\r\n"),
    "a line break alone in the first line": wire(b"GET /jobs\nx HTTP/1.1\r\nhost: localhost\r\n\r\n"),
    "a carriage return alone": wire(b"GET /jobs HTTP/1.1\r\nhost: localhost\rx: y\r\n\r\n"),
    "TLS": wire(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(32)),
    "bytes of nothing": wire(bytes(range(128, 256)) + b"\r\n\r\n"),
}

CASES: dict[str, Case] = {}
for _table in (BODIES, KINDS, IDS, METADATA, WEBHOOKS, BASES, HEADERS, QUERIES, METHODS, WIRE):
    CASES |= _table
