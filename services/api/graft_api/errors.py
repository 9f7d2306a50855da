"""How errors look over HTTP: the one table of status codes, the one shape of an error body, and the handlers."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from math import inf
from typing import Any, cast

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.exceptions import HTTPException

from graft_api.parsing import error_of
from graft_shared.errors import (
    ArtifactCorrupt,
    BadRequest,
    Conflict,
    FileTooLarge,
    GraftError,
    InvalidParameter,
    JobFinished,
    JobNotFound,
    LeaseLost,
    LimitReached,
    NeighbourUnavailable,
    NotFound,
    Refused,
    StoreUnavailable,
    UnknownParameter,
)
from graft_shared.logs import log_event

LONGEST_WAIT_SECONDS = 120  # that a client should do by itself; what takes longer is for its user to decide
REQUEST_ID_HEADER = "x-request-id"
COUNTED_RESENDS = ("POST", "/v1/fine_tuning/jobs")  # where a client that counts its sendings needs no key
MAYBE_MADE = "This was sent before and may have made its job: look for that with GET {path} before you call anew."
RETRY_AFTER_SECONDS = 5  # a neighbour that restarts is usually back by then

logger = logging.getLogger(__name__)


class BodyTooLarge(BadRequest):
    """The body is larger than {limit_bytes} bytes."""


class AddressTooLong(BadRequest):
    """The path and the query have more than {limit_bytes} bytes."""


class HeadersTooLarge(BadRequest):
    """The headers have more than {limit_bytes} bytes."""


class AmbiguousLength(BadRequest):
    """The request has both a Content-Length and a Transfer-Encoding: where it ends cannot be known for sure."""


class RepeatedHeader(BadRequest):
    """The header '{header}' is given twice: which one counts cannot be known for sure."""


class UnsupportedEncoding(BadRequest):
    """The body is encoded as '{found}'. Send it as it is, without a Content-Encoding."""


class UnsupportedMediaType(BadRequest):
    """The body must be sent as '{expected}'; the request says '{found}'."""


class RouteNotFound(NotFound):
    """There is no such route. GET /openapi.json lists them."""


class MethodNotAllowed(BadRequest):
    """This route does not take '{method}'."""


class Unauthenticated(GraftError):
    """Send a valid key as 'Authorization: Bearer KEY' (with the `graft` command: GRAFT_API_KEY)."""


class InsufficientScope(GraftError):
    """This key may not do that: it lacks the scope '{scope}'. Ask the operator for a key that has it."""


class RateLimited(LimitReached):
    """This tenant may make {limit} requests a minute, and has made them. Try again in {retry_after_seconds} s."""


class TooManyWebhookTests(LimitReached):
    """A test of this tenant's webhooks is under way, or several of others'. Try again in {retry_after_seconds} s."""


class ForeignCaller(GraftError):
    """Without keys only this machine is served: {reason}. Use http://127.0.0.1, or a key: graft keys create default"""


class LinkExpired(GraftError):
    """This link has expired or was never signed. Ask the route that gave it for a fresh one."""


class UploadDiskFull(NeighbourUnavailable):
    """There is no room for what arrives. Nothing was stored: send it again once GRAFT_STATE_DIR's disk has some."""


class InternalError(GraftError):
    """Something went wrong in the service, and was logged. Give the operator the request id '{request_id}'."""


# The most exact class of an error decides.
STATUS_CODES: dict[type[GraftError], int] = {
    BadRequest: 400,
    Unauthenticated: 401,
    InsufficientScope: 403,
    ForeignCaller: 403,
    LinkExpired: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    Conflict: 409,
    LeaseLost: 409,
    BodyTooLarge: 413,
    AddressTooLong: 414,
    HeadersTooLarge: 431,
    FileTooLarge: 413,
    UnsupportedEncoding: 415,
    UnsupportedMediaType: 415,
    Refused: 422,
    LimitReached: 429,
    InternalError: 500,
    ArtifactCorrupt: 500,
    NeighbourUnavailable: 503,
    GraftError: 500,
}

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    429: "rate_limit_error",
}


class ErrorFacts(BaseModel):
    """What is wrong, and the facts that go with it."""

    model_config = ConfigDict(extra="allow")

    message: str
    type: str
    param: str | None
    code: str


class ErrorBody(BaseModel):
    """The body of every answer that is not a success."""

    error: ErrorFacts


def status_code(error: GraftError) -> int:
    """The HTTP status of an error."""
    return next(STATUS_CODES[kind] for kind in type(error).__mro__ if kind in STATUS_CODES)


def answer(error: GraftError) -> JSONResponse:
    """The error as a response."""
    status = status_code(error)
    kind = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    own = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    headers: dict[str, str] = {}
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    if isinstance(error, InsufficientScope):
        headers["www-authenticate"] = f'Bearer error="insufficient_scope", scope="{error.facts["scope"]}"'
    after = RETRY_AFTER_SECONDS if isinstance(error, NeighbourUnavailable) else error.facts.get("retry_after_seconds")
    if after is not None:
        headers["retry-after"] = str(after)
    if isinstance(error, Conflict) or (isinstance(error, LimitReached) and (after or inf) > LONGEST_WAIT_SECONDS):
        headers["x-should-retry"] = "false"
    return JSONResponse({"error": {**_facts(error), **own}}, status_code=status, headers=headers)


def _facts(error: GraftError) -> Mapping[str, Any]:
    """The facts that users may see: what a neighbour says of itself is for the log."""
    return {} if isinstance(error, NeighbourUnavailable | ArtifactCorrupt) else error.facts


_SAID = {
    400: "The request cannot be read, or has a key that is not known.",
    401: "The request brings no key that is in force.",
    403: "The key lacks the scope, or there is none and the caller is of elsewhere; or the link does not hold.",
    404: "There is no such thing, or it is another tenant's.",
    409: "Too late or too early: it cannot succeed as things are, and says so in `x-should-retry`.",
    413: "The body is too large.",
    414: "The path and the query are too long.",
    415: "The body is of another kind.",
    422: "The request was understood and refused by its meaning.",
    429: "More than the tenant may have now: `rate_limited`, or `quota_exceeded` with the numbers.",
    431: "The headers are too large.",
    500: "Something unforeseen went wrong, or stored bytes are not those that were proven.",
    503: "Something that the service depends on does not answer; try again after `Retry-After`.",
}
_EXAMPLES: dict[int, GraftError] = {
    400: UnknownParameter(param="lora.rank", hint="Did you mean 'r'?"),
    401: Unauthenticated(),
    403: InsufficientScope(scope="jobs:write"),
    404: JobNotFound(job_id="ftjob-4fTr8vBn3YcD6f9aQ2mXw7Lk"),
    409: JobFinished(job_id="ftjob-4fTr8vBn3YcD6f9aQ2mXw7Lk", status="succeeded"),
    413: BodyTooLarge(limit_bytes=1_000_000),
    414: AddressTooLong(limit_bytes=16_384),
    415: UnsupportedMediaType(expected="application/json", found="text/plain"),
    422: InvalidParameter(param="lora.r", reason="input should be less than or equal to 512"),
    429: RateLimited(limit=600, retry_after_seconds=3),
    431: HeadersTooLarge(limit_bytes=32_768),
    500: InternalError(request_id="req-9aQ2mXw7Lk4TzR8vBn3YcD6f"),
    503: StoreUnavailable(reason="connection refused"),
}
_HEADERS = {
    401: {"www-authenticate": "The scheme: `Bearer`."},
    409: {"x-should-retry": "`false`: sending it again would be answered alike."},
    429: {
        "retry-after": "Seconds, where waiting helps.",
        "x-should-retry": "`false` where no client should try again by itself.",
    },
    503: {
        "retry-after": "Seconds.",
        "x-should-retry": "`false` where no client should try again by itself.",
    },
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says of the errors that it answers with, beside those that every route may."""
    return {status: _documented(status) for status in statuses}


def _documented(status: int) -> dict[str, Any]:
    """The content is named here, since FastAPI would give an error the media type of the route's success."""
    content: dict[str, Any] = {"schema": {"$ref": "#/components/schemas/ErrorBody"}}
    if status in _EXAMPLES:
        content["example"] = json.loads(bytes(answer(_EXAMPLES[status]).body))
    named = {REQUEST_ID_HEADER: "Names this exchange in the service's log.", **_HEADERS.get(status, {})}
    headers = {name: {"description": said, "schema": {"type": "string"}} for name, said in named.items()}
    return {"description": _SAID[status], "content": {"application/json": content}, "headers": headers}


# Every route may answer so.
DOCUMENTED = documented(400, 414, 422, 431, 500, 503)


def install_handlers(app: FastAPI) -> None:
    """Make every error that a route raises leave in one shape."""
    app.add_exception_handler(GraftError, _on_graft_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)


async def _on_graft_error(request: Request, error: Exception) -> JSONResponse:
    error = cast(GraftError, error)
    sent_before = _sent_before(request)
    if sent_before not in (None, "0") and isinstance(error, LimitReached):
        message = f"{error.message} {MAYBE_MADE.format(path=request.url.path)}"
        error = type(error)(message, param=error.param, **error.facts)
    response = answer(error)
    if sent_before == "0" and _has_surely_left_nothing(error):
        response.headers["x-should-retry"] = "false"
    if response.status_code >= 500:
        facts = {"path": request.url.path, "code": error.code, "reason": error.message}
        log_event(logger, "request_failed", level=logging.ERROR, request_id=request.state.request_id, **facts)
    return response


def _sent_before(request: Request) -> str | None:
    """How often its client has sent a request without a key before; None where a key decides, or nobody counts."""
    if (request.method, request.url.path) != COUNTED_RESENDS or "idempotency-key" in request.headers:
        return None
    return request.headers.get("x-stainless-retry-count")


def _has_surely_left_nothing(error: GraftError) -> bool:
    """Whether the first sending of a request made no job: a second one might then be given that of an equal request.

    A later sending knows nothing of the earlier ones: the job that the next one would be given may be its own.
    """
    return isinstance(error, LimitReached | NeighbourUnavailable) and "in_commit" not in error.facts


async def _on_invalid_parameters(_request: Request, error: Exception) -> JSONResponse:
    return answer(error_of(cast(RequestValidationError, error).errors(), in_query=True))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    error = cast(HTTPException, error)
    if error.status_code == 405:
        response = answer(MethodNotAllowed(method=request.method))
        response.headers.update(error.headers or {})
        response.headers.update(_allow(request))
        return response
    if error.status_code == 404:
        return answer(RouteNotFound())
    return answer(BadRequest(str(error.detail)))


def _allow(request: Request) -> dict[str, str]:
    """Every method of a documented path: Starlette names those of the first route on it alone."""
    route = request.scope.get("route")
    operations = request.app.openapi()["paths"].get(route.path_format, {}) if route is not None else {}
    return {"allow": ", ".join(method.upper() for method in operations)} if operations else {}
