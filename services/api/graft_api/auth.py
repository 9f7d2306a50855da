"""Who asks: the one place that turns a request into a tenant, and refuses what its key does not allow."""

from __future__ import annotations

from typing import Annotated

from fastapi import Request, Security
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer, SecurityScopes

from graft_api.deps import Here, here_of
from graft_api.errors import InsufficientScope, Unauthenticated
from graft_api.keys.scopes import Scope
from graft_api.loopback import check_own

_bearer = HTTPBearer(
    auto_error=False, description="A key with the scope that the route names. A service without keys is loopback's own."
)


async def tenant(
    needed: SecurityScopes,
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)] = None,
) -> str:
    """The tenant of this request: the key's, or `default` in a service without keys.

    Raises:
        Unauthenticated: The request brings no key that is in force.
        ForeignCaller: It needs none, and is not of this machine.
        RateLimited: The tenant has asked too often.
        InsufficientScope: The key does not allow what the route does.
    """
    here = here_of(request)
    caller = await here.keys.caller(_shown(credentials))
    if caller is None:
        raise Unauthenticated
    if not caller.has_key:
        check_own(request.method, request.headers)
    here.rates.take(caller.tenant, request.state)
    for scope in needed.scopes:
        if scope not in caller.scopes:
            raise InsufficientScope(scope=str(scope))
    return caller.tenant


async def may_go_on(request: Request, here: Here) -> bool:
    """Whether the key of a request that is answered for long is still in force."""
    return await here.keys.caller(_shown(await _bearer(request))) is not None


def _shown(credentials: HTTPAuthorizationCredentials | None) -> str | None:
    return credentials.credentials if credentials is not None else None


# What an endpoint takes as its tenant says which scope its route needs.
MayReadJobs = Annotated[str, Security(tenant, scopes=[Scope.JOBS_READ.value])]
MayWriteJobs = Annotated[str, Security(tenant, scopes=[Scope.JOBS_WRITE.value])]
MayReadFiles = Annotated[str, Security(tenant, scopes=[Scope.FILES_READ.value])]
MayWriteFiles = Annotated[str, Security(tenant, scopes=[Scope.FILES_WRITE.value])]
MayUseWebhooks = Annotated[str, Security(tenant, scopes=[Scope.WEBHOOKS.value])]
