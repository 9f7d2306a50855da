"""Who asks: the one place that turns a request into a tenant."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends


def tenant() -> str:
    """The tenant of this request; there is one until keys exist, which is why the API serves loopback alone."""
    return "default"


Tenant = Annotated[str, Depends(tenant)]
