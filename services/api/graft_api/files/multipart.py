"""One file out of a multipart body, written to disk as it arrives."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import BinaryIO

from python_multipart.exceptions import MultipartParseError
from python_multipart.multipart import MultipartParser, parse_options_header

from graft_api.errors import UnsupportedMediaType
from graft_api.parsing import hint_for
from graft_shared.errors import InvalidParameter, MalformedBody, UnknownParameter

FILE_FIELD = "file"
PURPOSE = "fine-tune"  # the only one, as OpenAI names it
MAX_HEADER_BYTES = 8_192
MAX_FIELD_BYTES = 64
_FIELDS = (FILE_FIELD, "purpose")


@dataclass
class _Part:
    headers: dict[str, str] = field(default_factory=dict)
    name: str = ""
    filename: str | None = None
    text: bytearray = field(default_factory=bytearray)


class FileForm:
    """A form with one `file` and an optional `purpose`; feed it chunks, then `finish`.

    Every method raises MalformedBody for a body that is no multipart, UnknownParameter and InvalidParameter for a form
    that is not this one.

    Args:
        content_type: The request's header, which holds the boundary.
        sink: Where the file's bytes go.
    """

    def __init__(self, content_type: str, sink: BinaryIO) -> None:
        kind, options = parse_options_header(content_type)
        boundary = options.get(b"boundary")
        if kind != b"multipart/form-data" or not boundary:
            raise UnsupportedMediaType(expected="multipart/form-data", found=content_type or "nothing")
        self.filename: str | None = None
        self._sink = sink
        self._part = _Part()
        self._header = (bytearray(), bytearray())
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin_part,
                "on_header_field": lambda data, start, end: self._add_header(0, data[start:end]),
                "on_header_value": lambda data, start, end: self._add_header(1, data[start:end]),
                "on_header_end": self._end_header,
                "on_headers_finished": self._begin_content,
                "on_part_data": lambda data, start, end: self._add_content(data[start:end]),
                "on_part_end": self._end_part,
                "on_end": self._end,
            },
        )

    def feed(self, chunk: bytes) -> None:
        """Take the next piece of the body."""
        try:
            self._parser.write(chunk)
        except MultipartParseError as error:
            raise _malformed(str(error)) from error

    def finish(self) -> str:
        """Check that the whole form came, and return the file's name."""
        if not self._ended:
            raise _malformed("it breaks off before its last boundary")
        if self.filename is None:
            raise InvalidParameter(param=FILE_FIELD, reason="send the JSONL in a form field named 'file'")
        return self.filename

    def _begin_part(self) -> None:
        self._part = _Part()

    def _add_header(self, which: int, data: bytes) -> None:
        self._header[which].extend(data)
        if sum(map(len, self._header)) > MAX_HEADER_BYTES:
            raise _malformed("a part's header is too long")

    def _end_header(self) -> None:
        name, value = (bytes(part).decode("latin-1") for part in self._header)  # any byte, as the parser wants it
        self._part.headers[name.lower()] = value
        self._header = (bytearray(), bytearray())

    def _begin_content(self) -> None:
        _, options = parse_options_header(self._part.headers.get("content-disposition", ""))
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        if self._part.name.partition("[")[0] == "expires_after":
            reason = "files stay until they are deleted; leave it out, and DELETE the file once its jobs have ended"
            raise InvalidParameter(param="expires_after", reason=reason)
        if self._part.name not in _FIELDS:
            raise UnknownParameter(param=self._part.name, hint=hint_for(self._part.name, _FIELDS))
        if self._part.name == FILE_FIELD:
            if self.filename is not None:
                raise InvalidParameter(param=FILE_FIELD, reason="one request takes one file")
            self.filename = options.get(b"filename", b"").decode("utf-8", "replace")

    def _add_content(self, data: bytes) -> None:
        if self._part.name == FILE_FIELD:
            self._sink.write(data)
        elif len(self._part.text) <= MAX_FIELD_BYTES:
            self._part.text.extend(data)

    def _end_part(self) -> None:
        if self._part.name == "purpose" and bytes(self._part.text) != PURPOSE.encode():
            raise InvalidParameter(param="purpose", reason=f"files are for '{PURPOSE}' only")

    def _end(self) -> None:
        self._ended = True


def _malformed(reason: str) -> MalformedBody:
    return MalformedBody(f"The body is not a multipart form: {reason}.", reason=reason)
