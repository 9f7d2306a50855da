"""How errors look over HTTP: the one table of status codes, the one shape of an error body, and the handlers."""

from __future__ import annotations

import logging
from collections.abc import Mapping
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
    LeaseLost,
    NeighbourUnavailable,
    NotFound,
    Refused,
    TooManyReports,
)
from graft_shared.logs import log_event

RETRY_AFTER_SECONDS = 5  # a neighbour that restarts is usually back by then

logger = logging.getLogger(__name__)


class BodyTooLarge(BadRequest):
    """The body is larger than {limit_bytes} bytes."""


class UnsupportedMediaType(BadRequest):
    """The body must be sent as '{expected}'; the request says '{found}'."""


class RouteNotFound(NotFound):
    """There is no such route. GET /openapi.json lists them."""


class MethodNotAllowed(BadRequest):
    """This route does not take '{method}'."""


class Unauthenticated(GraftError):
    """Send a valid key as 'Authorization: Bearer KEY' (with the `graft` command: GRAFT_API_KEY)."""


class LinkExpired(GraftError):
    """This link has expired or was never signed. Ask the route that gave it for a fresh one."""


class InternalError(GraftError):
    """Something went wrong in the service, and was logged. Give the operator the request id '{request_id}'."""


# The most exact class of an error decides.
STATUS_CODES: dict[type[GraftError], int] = {
    BadRequest: 400,
    Unauthenticated: 401,
    LinkExpired: 403,
    NotFound: 404,
    MethodNotAllowed: 405,
    Conflict: 409,
    LeaseLost: 409,
    BodyTooLarge: 413,
    FileTooLarge: 413,
    UnsupportedMediaType: 415,
    Refused: 422,
    TooManyReports: 429,
    InternalError: 500,
    ArtifactCorrupt: 500,
    NeighbourUnavailable: 503,
    GraftError: 500,
}

_TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error"}


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


# Every route may answer so; what is documented is what `STATUS_CODES` can give.
DOCUMENTED: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request was refused; `code` says why."},
    "5XX": {"model": ErrorBody, "description": "The service could not answer; try again after `Retry-After`."},
    422: {"model": ErrorBody, "description": "The request was understood and refused by its meaning."},
}


_SAID = {
    400: "The request cannot be read, or has a key that is not known.",
    404: "There is no such thing, or it is another tenant's.",
    409: "Too late or too early: it cannot succeed as things are, and says so in `x-should-retry`.",
    413: "The body is too large.",
    415: "The body is of another kind.",
    429: "Too much of it at once: try again after `Retry-After`.",
}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route says of the errors that it answers with, beside those that every route may."""
    return {status: {"model": ErrorBody, "description": _SAID[status]} for status in statuses}


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
    if isinstance(error, Conflict):
        headers["x-should-retry"] = "false"
    if isinstance(error, NeighbourUnavailable | TooManyReports):
        headers["retry-after"] = str(RETRY_AFTER_SECONDS)
    return JSONResponse({"error": {**_facts(error), **own}}, status_code=status, headers=headers)


def install_handlers(app: FastAPI) -> None:
    """Make every error that a route raises leave in one shape."""
    app.add_exception_handler(GraftError, _on_graft_error)
    app.add_exception_handler(RequestValidationError, _on_invalid_parameters)
    app.add_exception_handler(HTTPException, _on_http_exception)


def _facts(error: GraftError) -> Mapping[str, Any]:
    """The facts that users may see: what a neighbour says of itself is for the log."""
    return {} if isinstance(error, NeighbourUnavailable | ArtifactCorrupt) else error.facts


async def _on_graft_error(request: Request, error: Exception) -> JSONResponse:
    error = cast(GraftError, error)
    response = answer(error)
    if response.status_code >= 500:
        facts = {"path": request.url.path, "code": error.code, "reason": error.message}
        log_event(logger, "request_failed", level=logging.ERROR, request_id=request.state.request_id, **facts)
    return response


async def _on_invalid_parameters(_request: Request, error: Exception) -> JSONResponse:
    return answer(error_of(cast(RequestValidationError, error).errors(), in_query=True))


async def _on_http_exception(request: Request, error: Exception) -> JSONResponse:
    error = cast(HTTPException, error)
    if error.status_code == 405:
        response = answer(MethodNotAllowed(method=request.method))
        response.headers.update(error.headers or {})
        return response
    if error.status_code == 404:
        return answer(RouteNotFound())
    return answer(BadRequest(str(error.detail)))
