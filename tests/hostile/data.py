"""Hostile datasets: files, forms, links, sources and reports that nobody sends in good faith, and what is answered."""

from __future__ import annotations

import bz2
import gzip
import io
import itertools
import json
import lzma
import pickle
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow
import pyarrow.parquet

from graft_shared.rows import MAX_LINE_BYTES, MAX_TURNS, MAX_VALUES

FORM = "multipart/form-data; boundary=b"
HEAD = b'--b\r\ncontent-disposition: form-data; name="file"; filename="r.jsonl"\r\n\r\n'
TAIL = b"\r\n--b--\r\n"
ROW = b'{"text": "a"}\n'
SHA256 = "a" * 64


@dataclass(frozen=True, kw_only=True)
class Case:
    """One request and its refusal.

    Args:
        content: The body, whole or in pieces that are sent chunked and may never end; made anew for each sending.
        line: Where in the file it is wrong.
    """

    name: str
    method: str = "POST"
    path: str = "/files"
    headers: dict[str, str] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)
    json: Any = None
    files: list[tuple[str, tuple[str | None, bytes]]] | None = None
    content: Any = None
    status: int = 422
    code: str = "invalid_training_file"
    line: int | None = None
    param: str | None = None


class _Pickled:
    def __reduce__(self) -> Any:
        return (print, ("ran",))


def _zip_bomb() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("rows.jsonl", b"\0" * 50_000_000)
    return out.getvalue()


def _tar_with_symlink() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as made:
        link = tarfile.TarInfo("rows.jsonl")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    return out.getvalue()


def _parquet() -> bytes:
    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), out)
    return out.getvalue()


def _dumped(row: Any) -> bytes:
    return json.dumps(row).encode() + b"\n"


def _chat(*turns: Any, name: str = "messages") -> bytes:
    return _dumped({name: list(turns)})


_USER, _ANSWER = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}

# What a file may hold, and the line that is named.
_CONTENTS: dict[str, tuple[bytes, int]] = {
    # nothing
    "empty": (b"", 1),
    "only line ends": (b"\n" * 1000, 1),
    "only blanks": (b"  \t \r\n" * 100, 1),
    "only a byte order mark": (b"\xef\xbb\xbf", 1),
    # bytes that are no text
    "a byte that is not UTF-8": (ROW + b'{"text": "\xff"}\n', 2),
    "an overlong encoding": (b'{"text": "\xc0\xaf"}\n', 1),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\xbd"}\n', 1),
    "a character cut in two": (b'{"text": "\xf0\x9f\x99"}\n', 1),
    "Latin-1": (ROW + '{"text": "é"}\n'.encode("latin-1"), 2),
    "UTF-16 with its mark": ('{"text": "a"}\n'.encode("utf-16"), 1),
    "UTF-16 without": ('{"text": "a"}\n'.encode("utf-16-le"), 1),
    "UTF-32": ('{"text": "a"}\n'.encode("utf-32"), 1),
    "two byte order marks": (b"\xef\xbb\xbf\xef\xbb\xbf" + ROW, 1),
    "a byte order mark in the second line": (ROW + b"\xef\xbb\xbf" + ROW, 2),
    "a byte order mark at the end": (ROW + b"\xef\xbb\xbf", 2),
    "a NUL between the rows": (ROW + b"\0\n" + ROW, 2),
    "a NUL in a text": (b'{"text": "a\0"}\n', 1),
    "an escaped NUL in a text": (b'{"text": "a\\u0000"}\n', 1),
    "an escaped NUL in a key": (b'{"text": "a", "b\\u0000": 1}\n', 1),
    "half a surrogate pair": (b'{"text": "\\ud83d"}\n', 1),
    "surrogates the wrong way round": (b'{"text": "\\ude00\\ud83d"}\n', 1),
    "half a pair in a key that nobody reads": (b'{"text": "a", "\\udfff": 1}\n', 1),
    "a raw control character": (b'{"text": "a\x01"}\n', 1),
    "a raw tab in a text": (b'{"text": "a\tb"}\n', 1),
    # line ends
    "carriage returns alone": (ROW.replace(b"\n", b"\r") * 3, 1),
    "a carriage return within a row": (b'{"text":\r\n"a"}\r\n', 1),
    "a row over two lines": (b'{"text":\n"a"}\n', 1),
    "two rows in one line": (ROW.strip() + ROW, 1),
    "a record separator before each row": (b"\x1e" + ROW, 1),
    "a next-line character for a line end": (ROW.replace(b"\n", b"\xc2\x85") * 2, 1),
    # JSON that is not strict
    "NaN": (b'{"text": "a", "score": NaN}\n', 1),
    "Infinity": (ROW + b'{"text": "a", "score": Infinity}\n', 2),
    "minus Infinity": (b'{"text": "a", "score": -Infinity}\n', 1),
    "a number that is infinite": (b'{"text": "a", "score": 1e999}\n', 1),
    "a negative number that is infinite": (b'{"text": "a", "score": -1e999}\n', 1),
    "an integer of a hundred thousand digits": (b'{"text": "a", "score": ' + b"9" * 100_000 + b"}\n", 1),
    "a key twice": (b'{"text": "a", "text": "b"}\n', 1),
    "a key twice, once escaped": (b'{"text": "a", "\\u0074ext": "b"}\n', 1),
    "a key twice deep inside": (b'{"text": "a", "more": [{"x": {"y": 1, "y": 2}}]}\n', 1),
    "a trailing comma": (b'{"text": "a",}\n', 1),
    "single quotes": (b"{'text': 'a'}\n", 1),
    "a comment": (b'{"text": "a"} // b\n', 1),
    "a hexadecimal number": (b'{"text": "a", "n": 0x1F}\n', 1),
    "no closing brace": (ROW * 4 + b'{"text": "a"', 5),
    "an unfinished escape": (b'{"text": "\\u00"}\n', 1),
    # depth and size
    "a hundred thousand brackets": (b'{"text": "a", "x": ' + b"[" * 90_000 + b"]" * 90_000 + b"}\n", 1),
    "objects a thousand deep": (b'{"x":' * 1000 + b"1" + b"}" * 1000 + b"\n", 1),
    "one level too deep": (_dumped({"text": "a", "x": json.loads("[" * 17 + "]" * 17)}), 1),
    "more values than a row may hold": (b'{"text": "a", "x": [' + b"{}," * MAX_VALUES + b"1]}\n", 1),
    "a line beyond the limit": (ROW + b'{"text": "' + b"x" * MAX_LINE_BYTES + b'"}\n', 2),
    "a line beyond the limit without an end": (b"x" * (MAX_LINE_BYTES + 1), 1),
    "blanks beyond the limit": (b" " * (MAX_LINE_BYTES + 1), 1),
    "a chat of too many turns": (_chat(*[_USER, _ANSWER] * (MAX_TURNS // 2 + 1)), 1),
    # rows that are none
    "a list": (b'["text", "a"]\n', 1),
    "a text": (b'"text"\n', 1),
    "null": (ROW + b"null\n", 2),
    "a number": (b"1\n", 1),
    "one list of all rows": (b'[{"text": "a"}, {"text": "b"}]\n', 1),
    "an empty object": (b"{}\n", 1),
    "no known key": (b'{"question": "a", "answer": "b"}\n', 1),
    "half a pair": (b'{"prompt": "a"}\n', 1),
    "a text that is a number": (b'{"text": 7}\n', 1),
    "a text that is null": (b'{"text": null}\n', 1),
    "a text that is true": (b'{"text": true}\n', 1),
    "a text that is a list": (b'{"text": ["a"]}\n', 1),
    "a text that is an object": (b'{"text": {"a": 1}}\n', 1),
    "a text of blanks": (b'{"text": " \\n\\t "}\n', 1),
    "an empty completion": (b'{"prompt": "a", "completion": ""}\n', 1),
    "a completion that is a number": (b'{"prompt": "a", "completion": 1}\n', 1),
    "a prompt that is null": (b'{"prompt": null, "completion": "b"}\n', 1),
    "an instruction that is a list": (b'{"instruction": [], "output": "b"}\n', 1),
    "an input that is a number": (b'{"instruction": "a", "input": 1, "output": "b"}\n', 1),
    "an output of blanks": (b'{"instruction": "a", "output": " "}\n', 1),
    "messages that are a text": (b'{"messages": "a"}\n', 1),
    "messages that are an object": (b'{"messages": {"role": "user"}}\n', 1),
    "no messages": (_chat(), 1),
    "a message that is a text": (_chat("a"), 1),
    "a message without a role": (_chat({"content": "a"}), 1),
    "a role that nobody has": (_chat({"role": "root", "content": "a"}, _ANSWER), 1),
    "a role that is a list": (_chat({"role": ["user"], "content": "a"}, _ANSWER), 1),
    "a role that is an object": (_chat({"role": {"x": 1}, "content": "a"}, _ANSWER), 1),
    "a content that is a picture": (_chat({"role": "user", "content": [{"type": "image_url"}]}, _ANSWER), 1),
    "a content that is null": (_chat(_USER, {"role": "assistant", "content": None}), 1),
    "a chat without an answer": (_chat(_USER), 1),
    "a chat whose answer is empty": (_chat(_USER, {"role": "assistant", "content": " "}), 1),
    "a conversation with roles of another kind": (_chat({"from": "bot", "value": "a"}, name="conversations"), 1),
    "a conversation whose value is a number": (_chat({"from": "gpt", "value": 1}, name="conversations"), 1),
    "a second kind of row": (ROW * 2 + b'{"prompt": "a", "completion": "b"}\n', 3),
    "a chat among texts": (ROW + _chat(_USER, _ANSWER), 2),
    # other files under the name of JSONL
    "gzip": (gzip.compress(ROW * 1000), 1),
    "a gzip bomb": (gzip.compress(b"\0" * 50_000_000), 1),
    "bzip2": (bz2.compress(ROW), 1),
    "xz": (lzma.compress(ROW), 1),
    "Zstandard": (pyarrow.compress(ROW * 100, codec="zstd", asbytes=True), 1),
    "a zip bomb": (_zip_bomb(), 1),
    "a tar with a link to /etc/passwd": (_tar_with_symlink(), 1),
    "Parquet": (_parquet(), 1),
    "a pickle": (pickle.dumps(_Pickled()), 1),
    "a pickle in ASCII": (pickle.dumps(_Pickled(), protocol=0), 1),
    "CSV": (b"text\na\nb\n", 1),
    "YAML": (b"- text: a\n- text: b\n", 1),
    "HTML": (b"<!doctype html>\n<p>a</p>\n", 1),
    "XML with entities": (b'<!DOCTYPE x [<!ENTITY a "aaaa">]>\n<x>&a;</x>\n', 1),
    "Python": (b'import os\nos.system("id")\n', 1),
    "a path": (b"/etc/passwd\n", 1),
    "SQLite": (b"SQLite format 3\0" + b"\0" * 100, 1),
}

_FILENAMES = {
    "a name that climbs": "../../etc/passwd",
    "a name that climbs with backslashes": "..\\..\\windows\\win.ini",
    "a name with a line break": "a\nb.jsonl",
    "a name with an escape sequence": "\x1b[2Ja.jsonl",
    "a name with a NUL": "a\0.jsonl",
    "a name that is two dots": "..",
}


def _part(headers: bytes, content: bytes = ROW) -> bytes:
    return b"--b\r\n" + headers + b"\r\n\r\n" + content


_FILE = b'content-disposition: form-data; name="file"; filename="r.jsonl"'


def _pieces(first: bytes, then: bytes) -> Any:
    """A body that begins so and never ends."""

    def made() -> Iterator[bytes]:
        yield first
        yield from itertools.repeat(then * (65_536 // len(then)))

    return made


# Bodies of forms: the header that announces each, the body, and the refusal.
_FORMS: dict[str, tuple[str, Any, int, str, str | None]] = {
    "a form without a boundary": ("multipart/form-data", HEAD + ROW + TAIL, 415, "unsupported_media_type", None),
    "an empty boundary": ("multipart/form-data; boundary=", HEAD + ROW + TAIL, 415, "unsupported_media_type", None),
    "another boundary": ("multipart/form-data; boundary=c", HEAD + ROW + TAIL, 400, "malformed_body", None),
    "a mixed body": ("multipart/mixed; boundary=b", HEAD + ROW + TAIL, 415, "unsupported_media_type", None),
    "a plain body": ("application/jsonl", ROW, 415, "unsupported_media_type", None),
    "a form for JSON": ("application/json", HEAD + ROW + TAIL, 415, "unsupported_media_type", None),
    "an empty body": (FORM, b"", 400, "malformed_body", None),
    "only the last boundary": (FORM, b"--b--\r\n", 422, "invalid_parameter", "file"),
    "no last boundary": (FORM, HEAD + ROW, 400, "malformed_body", None),
    "a body that breaks off in a header": (FORM, b"--b\r\ncontent-disp", 400, "malformed_body", None),
    "no blank line after the headers": (FORM, b"--b\r\n" + _FILE + b"\r\n" + ROW + TAIL, 400, "malformed_body", None),
    "line feeds alone": (FORM, (HEAD + ROW + TAIL).replace(b"\r\n", b"\n"), 400, "malformed_body", None),
    "two files": (FORM, _part(_FILE) + b"\r\n" + _part(_FILE) + TAIL, 422, "invalid_parameter", "file"),
    "a field that is not known": (
        FORM, _part(b'content-disposition: form-data; name="../file"') + TAIL, 400, "unknown_parameter", "../file",
    ),
    "a field without a name": (FORM, _part(b"content-disposition: form-data") + TAIL, 400, "unknown_parameter", ""),
    "a part without headers": (FORM, b"--b\r\n\r\n" + ROW + TAIL, 400, "unknown_parameter", ""),
    "another purpose": (
        FORM, _part(_FILE) + b"\r\n" + _part(b'content-disposition: form-data; name="purpose"', b"batch") + TAIL,
        422, "invalid_parameter", "purpose",
    ),
    "a purpose that goes on": (
        FORM, _part(b'content-disposition: form-data; name="purpose"', b"fine-tune" * 100_000) + TAIL,
        422, "invalid_parameter", "purpose",
    ),
    "a form within the form": (
        FORM,
        _part(_FILE + b"\r\ncontent-type: multipart/mixed; boundary=c", b"--c\r\n\r\n" + ROW + b"--c--\r\n") + TAIL,
        422, "invalid_training_file", None,
    ),
    "a file in base64": (
        FORM, _part(_FILE + b"\r\ncontent-transfer-encoding: base64", b"eyJ0ZXh0IjogImEifQo=") + TAIL,
        422, "invalid_training_file", None,
    ),
    "a part header of a megabyte": (FORM, _part(b"x-long: " + b"x" * 1_000_000) + TAIL, 400, "malformed_body", None),
    "a header name of a megabyte": (FORM, _part(b"x" * 1_000_000 + b": a") + TAIL, 400, "malformed_body", None),
    "ten thousand part headers": (
        FORM,
        _part(b"\r\n".join(b"x-%d: %s" % (number, b"y" * 1000) for number in range(10_000))) + TAIL,
        400, "malformed_body", None,
    ),
    "part headers without end": (FORM, _pieces(b"--b\r\n", b"x-more: yyyyyyyy\r\n"), 400, "malformed_body", None),
    "a hundred thousand parts": (
        FORM, b'--b\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n' * 100_000 + b"--b--\r\n",
        422, "invalid_parameter", "file",
    ),
    "a file without end": (FORM, _pieces(HEAD, ROW), 413, "file_too_large", None),
    "a line without end": (FORM, _pieces(HEAD + b'{"text": "', b"xxxxxxxx"), 413, "file_too_large", None),
    "a preamble without end": (FORM, _pieces(b"", b"\r\n"), 400, "malformed_body", None),
    "expires_after": (
        FORM, _part(b'content-disposition: form-data; name="expires_after[anchor]"', b"x") + TAIL,
        422, "invalid_parameter", "expires_after",
    ),
}  # fmt: skip

# Sources that a job may name, beside what is right in it.
_SOURCES: dict[str, tuple[dict[str, Any], str, str | None]] = {
    "no source": ({}, "invalid_parameter", "dataset"),
    "two sources": ({"file": "file-a", "hub": "a/b"}, "invalid_parameter", "dataset"),
    "a file that is a path": ({"file": "../../etc/passwd"}, "invalid_parameter", "dataset.file"),
    "a file that is a number": ({"file": 1}, "invalid_parameter", "dataset.file"),
    "a file that never was": ({"file": "file-none"}, "invalid_parameter", "dataset.file"),
    "a bucket that is not allowed": ({"uri": "s3://other/rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a bucket whose name begins as an allowed one": ({"uri": "s3://open.evil/r"}, "invalid_parameter", "dataset.uri"),
    "an allowed bucket in capitals": ({"uri": "s3://OPEN/rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a bucket with a user": ({"uri": "s3://open@evil/rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a key that climbs": ({"uri": "s3://open/../other/rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a key that climbs in the middle": ({"uri": "s3://open/a/../../b"}, "invalid_parameter", "dataset.uri"),
    "a key that climbs in escapes": ({"uri": "s3://open/%2e%2e/rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a key with an empty part": ({"uri": "s3://open//rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "no key": ({"uri": "s3://open/"}, "invalid_parameter", "dataset.uri"),
    "no key and no slash": ({"uri": "s3://open"}, "invalid_parameter", "dataset.uri"),
    "a key with a fragment": ({"uri": "s3://open/rows.jsonl#x"}, "invalid_parameter", "dataset.uri"),
    "a key with a query": ({"uri": "s3://open/rows.jsonl?versionId=1"}, "invalid_parameter", "dataset.uri"),
    "a key with a line break": ({"uri": "s3://open/rows\n.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a key with backslashes": ({"uri": "s3://open/..\\rows.jsonl"}, "invalid_parameter", "dataset.uri"),
    "a key that is a pattern": ({"uri": "s3://open/*"}, "invalid_parameter", "dataset.uri"),
    "a key of two thousand characters": ({"uri": "s3://open/" + "x" * 2000}, "invalid_parameter", "dataset.uri"),
    "a file of this machine": ({"uri": "file:///etc/passwd"}, "invalid_parameter", "dataset.uri"),
    "an address": ({"uri": "http://169.254.169.254/latest/meta-data"}, "invalid_parameter", "dataset.uri"),
    "a uri that is a list": ({"uri": ["s3://open/r"]}, "invalid_parameter", "dataset.uri"),
    "a hub name that climbs": ({"hub": "../../etc"}, "invalid_parameter", "dataset.hub"),
    "a hub name that climbs in the middle": ({"hub": "org/../etc"}, "invalid_parameter", "dataset.hub"),
    "a hub name that is a path": ({"hub": "/etc/passwd"}, "invalid_parameter", "dataset.hub"),
    "a hub name that is an address": ({"hub": "https://evil.example/x"}, "invalid_parameter", "dataset.hub"),
    "a hub name with a scheme": ({"hub": "hf://datasets/org/data"}, "invalid_parameter", "dataset.hub"),
    "a hub name with a revision": ({"hub": "org/data@main"}, "invalid_parameter", "dataset.hub"),
    "a hub name without an owner": ({"hub": "json"}, "invalid_parameter", "dataset.hub"),
    "a hub name of three parts": ({"hub": "org/data/more"}, "invalid_parameter", "dataset.hub"),
    "a hub name of a thousand characters": ({"hub": "org/" + "x" * 1000}, "invalid_parameter", "dataset.hub"),
    "a split that is a slice": ({"hub": "org/data", "split": "train[:1%]"}, "invalid_parameter", "dataset.split"),
    "a split that is a sum": ({"hub": "org/data", "split": "train+test"}, "invalid_parameter", "dataset.split"),
    "a revision that climbs": ({"hub": "org/data", "revision": "a/../../b"}, "invalid_parameter", "dataset.revision"),
    "a revision with a query": ({"hub": "org/data", "revision": "main?x"}, "invalid_parameter", "dataset.revision"),
    "a script to be trusted": ({"hub": "org/data", "trust_remote_code": True}, "unknown_parameter", None),
    "files to be read": ({"hub": "org/data", "data_files": "/etc/passwd"}, "unknown_parameter", None),
}

_JSON = {"content-type": "application/json"}
_UPLOAD = {"filename": "r.jsonl", "bytes": 14, "sha256": SHA256}
_ANNOUNCEMENTS: dict[str, tuple[Any, int, str, str | None]] = {
    "an upload larger than any file": ({**_UPLOAD, "bytes": 10**15}, 413, "file_too_large", None),
    "an upload of minus one byte": ({**_UPLOAD, "bytes": -1}, 422, "invalid_parameter", "bytes"),
    "an upload of half a byte": ({**_UPLOAD, "bytes": 0.5}, 422, "invalid_parameter", "bytes"),
    "an upload with a short checksum": ({**_UPLOAD, "sha256": "a"}, 422, "invalid_parameter", "sha256"),
    "an upload whose name climbs": ({**_UPLOAD, "filename": "../r"}, 422, "invalid_parameter", "filename"),
    "an upload to a key of its own": ({**_UPLOAD, "key": "tenants/x"}, 400, "unknown_parameter", "key"),
    "an upload that is a list": ([_UPLOAD], 422, "invalid_parameter", None),
}

_REPORT = {"base_model": "meta-llama/Llama-2-7b-hf"}
_ASKED: dict[str, tuple[dict[str, Any], int, str, str | None]] = {
    "a report on no base": ({}, 422, "invalid_parameter", "base_model"),
    "a report on a base that is a path": ({"base_model": "../../etc"}, 422, "invalid_parameter", "base_model"),
    "a report on rows of minus one token": ({**_REPORT, "max_length": -1}, 422, "invalid_parameter", "max_length"),
    "a report on rows of a billion tokens": ({**_REPORT, "max_length": 10**9}, 422, "invalid_parameter", "max_length"),
    "a report that holds all rows out": (
        {**_REPORT, "validation_split": 1.0}, 422, "invalid_parameter", "validation_split",
    ),
    "a report that holds NaN rows out": (
        {**_REPORT, "validation_split": "nan"}, 422, "invalid_parameter", "validation_split",
    ),
    "a report against a path": (
        {**_REPORT, "validation_file": "../x"}, 422, "invalid_parameter", "validation_file",
    ),
    "a report by code of the base": ({**_REPORT, "remote_code": "true"}, 400, "unknown_parameter", "remote_code"),
    "a report on a file that never was": (_REPORT, 404, "file_not_found", None),
}  # fmt: skip


def cases() -> Iterator[Case]:
    """Every case; their names differ."""
    for name, (content, line) in _CONTENTS.items():
        yield Case(name=name, files=[("file", ("rows.jsonl", content))], line=line)
    for name, filename in _FILENAMES.items():
        head = HEAD.replace(b"r.jsonl", filename.encode())
        body, form = head + ROW + TAIL, {"content-type": FORM}
        yield Case(name=name, content=body, headers=form, code="invalid_parameter", param="file")
    for name, (kind, body, status, code, param) in _FORMS.items():
        headers = {"content-type": kind}
        yield Case(name=name, content=body, headers=headers, status=status, code=code, param=param)
    for name, (source, code, param) in _SOURCES.items():
        job = {**_REPORT, "dataset": source}
        status = 400 if code == "unknown_parameter" else 422
        yield Case(name=name, path="/jobs", json=job, status=status, code=code, param=param)
    for name, (body, status, code, param) in _ANNOUNCEMENTS.items():
        yield Case(name=name, path="/files/uploads", json=body, status=status, code=code, param=param)
    for name, (params, status, code, param) in _ASKED.items():
        path = "/files/file-none/report"
        yield Case(name=name, method="GET", path=path, params=params, status=status, code=code, param=param)
    link = {"expires": 9_999_999_999, "signature": SHA256}
    for name, method, key, more in (
        ("a link to read that nobody signed", "GET", "tenants/default/files/file-a", {}),
        ("a link to read that climbs", "GET", "..%2f..%2fgraft.db", {}),
        ("a link to write that nobody signed", "PUT", "tenants/default/uploads/x", {"bytes": 14, "sha256": SHA256}),
        ("a link to write that climbs", "PUT", "..%2f..%2fgraft.db", {"bytes": 14, "sha256": SHA256}),
    ):
        content, params = ROW if method == "PUT" else None, {**link, **more}
        path = f"/objects/{key}"
        yield Case(name=name, method=method, path=path, params=params, content=content, status=403, code="link_expired")
    yield Case(name="completing what never was", path="/files/uploads/x/complete", status=404, code="upload_not_found")
    yield Case(
        name="completing what climbs",
        path="/files/uploads/..%2f..%2fx/complete",
        status=404,
        code="route_not_found",
    )
