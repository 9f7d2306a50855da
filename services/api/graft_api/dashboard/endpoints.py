"""The routes of the dashboard: files that anybody may read; what they show is asked of the API, with the user's key."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header, Response

from graft_api.dashboard.files import static_files
from graft_api.errors import RouteNotFound

# Nothing from elsewhere, nothing inline, no text that becomes markup: a name that holds a script would not run.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "cache-control": "no-cache",  # kept, and asked for by its tag: after an upgrade nobody has half of the old one
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

router = APIRouter(include_in_schema=False)

IfNoneMatch = Annotated[str | None, Header()]


@router.get("/")
async def get_dashboard(if_none_match: IfNoneMatch = None) -> Response:
    """Send the page."""
    return _answer("index.html", if_none_match)


@router.get("/dashboard/{path:path}")
async def get_part(path: str, if_none_match: IfNoneMatch = None) -> Response:
    """Send one of its files."""
    return _answer(path, if_none_match)


def _answer(path: str, known: str | None) -> Response:
    found = static_files().get(path)
    if found is None:
        raise RouteNotFound
    headers = {**HEADERS, "etag": found.etag}
    if known is not None and found.etag in (tag.strip().removeprefix("W/") for tag in known.split(",")):
        return Response(status_code=304, headers=headers)
    return Response(found.content, media_type=found.media_type, headers=headers)
