"""What endpoints are handed: the neighbours that `app.py` chose, the JSON body, and checked query parameters.

What never waits is `async` here: FastAPI hands each plain function to another thread, which costs more than it does.
And what every request needs asks for the neighbours itself: a dependency of a dependency costs ten times the look.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import Depends, Request

from graft_api.errors import BodyTooLarge, RouteNotFound, UnsupportedEncoding, UnsupportedMediaType
from graft_api.jobs.bells import Bells
from graft_api.jobs.fleet import Fleet
from graft_api.jobs.lines import HeldLines
from graft_api.jobs.starts import Starts
from graft_api.jobs.watch import Watch
from graft_api.keys.ring import KeyRing
from graft_api.models.bases import BaseModels
from graft_api.parsing import hint_for, parse_json
from graft_api.rates import Rates
from graft_api.settings import ApiSettings
from graft_api.webhooks.trials import Trials
from graft_shared.buckets import Bucket
from graft_shared.capacity import CapacityTable
from graft_shared.dispatch import Doorbell
from graft_shared.errors import BadRequest, MalformedBody, UnknownParameter
from graft_shared.store import Database, Files, Jobs, Merges, Outbox, Reports, Totals, Workers
from graft_shared.tracing import Tracing
from graft_shared.webhooks import Postman


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """Everything outside this process, and the tables that were loaded once."""

    settings: ApiSettings
    keys: KeyRing
    rates: Rates
    database: Database
    jobs: Jobs
    merges: Merges
    files: Files
    reports: Reports
    workers: Workers
    totals: Totals
    fleet: Fleet
    lines: HeldLines
    starts: Starts
    bells: Bells
    watch: Watch
    outbox: Outbox
    postman: Postman | None  # None: the operator has not set webhooks up
    bucket: Bucket
    doorbell: Doorbell
    capacity: CapacityTable
    largest_bases: Mapping[str, str | None]  # by class, as `capacity.endpoints` computes it
    bases: BaseModels
    trials: Trials = field(default_factory=Trials)
    tracing: Tracing | None = None  # None: the operator names no collector


def here_of(request: Request) -> Neighbours:
    """The neighbours of the app that serves this request."""
    found: Neighbours = request.app.state.neighbours
    return found


async def neighbours(request: Request) -> Neighbours:
    """The same, for endpoints."""
    return here_of(request)


Here = Annotated[Neighbours, Depends(neighbours)]


async def json_body(request: Request) -> Any:
    """The parsed body.

    Raises:
        UnsupportedMediaType: It is not sent as JSON.
        BodyTooLarge: It is larger than the operator allows.
        MalformedBody: It cannot be read.
    """
    kind = request.headers.get("content-type", "nothing")
    if kind.split(";")[0].strip().lower() != "application/json":
        raise UnsupportedMediaType(expected="application/json", found=kind)
    limit = here_of(request).settings.max_body_bytes
    body = bytearray()
    async for chunk in limited(request, limit, BodyTooLarge(limit_bytes=limit)):
        body += chunk
    if not body:
        raise MalformedBody(reason="it is empty")
    return parse_json(bytes(body))


JsonBody = Annotated[Any, Depends(json_body)]


async def limited(request: Request, limit_bytes: int, too_large: Exception) -> AsyncIterator[bytes]:
    """The body piece by piece; raises `too_large` as soon as it is known to be longer than the limit.

    Raises:
        UnsupportedEncoding: It is compressed.
    """
    encoding = request.headers.get("content-encoding", "identity")
    if encoding.strip().lower() != "identity":
        raise UnsupportedEncoding(found=encoding)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > limit_bytes:
        raise too_large
    received = 0
    async for chunk in request.stream():
        received += len(chunk)
        if received > limit_bytes:
            raise too_large
        yield chunk


async def known_query(request: Request) -> None:
    """Refuse query parameters that the route does not document, and text that no store can hold.

    Raises:
        UnknownParameter: Says which one was meant.
    """
    if "\0" in request.url.path:
        raise RouteNotFound
    known = _documented_query(request)
    for key, value in request.query_params.multi_items():
        if "\0" in key or "\0" in value:
            raise BadRequest("The query holds the NUL character.", param=key.replace("\0", ""))
        name, bracket, rest = key.partition("[")
        if name not in known or bool(bracket) != known[name] or (bracket and not rest.endswith("]")):
            names = [f"{other}[…]" if is_deep else other for other, is_deep in known.items()]
            raise UnknownParameter(param=key, hint=hint_for(key, names))


def _documented_query(request: Request) -> dict[str, bool]:
    """The route's query parameters by the OpenAPI document, and whether they are written as `name[key]`."""
    path = request.scope["route"].path_format
    operation = request.app.openapi()["paths"].get(path, {}).get(request.method.lower(), {})
    return {
        parameter["name"]: parameter.get("style") == "deepObject"
        for parameter in operation.get("parameters", ())
        if parameter["in"] == "query"
    }
