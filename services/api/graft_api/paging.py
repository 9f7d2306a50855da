"""The envelope of every list, in the shape that OpenAI's clients page through."""

from __future__ import annotations

from typing import Annotated, Generic, Literal, TypeVar

from fastapi import Query
from pydantic import BaseModel

from graft_shared.specs import NO_NUL

Item = TypeVar("Item")

After = Annotated[str | None, Query(pattern=NO_NUL, description="The last id of the page before.")]
Limit = Annotated[int, Query(ge=1, le=100, description="At most so many.")]


class Page(BaseModel, Generic[Item]):
    """One page; `after=<last_id>` gives the next one."""

    object: Literal["list"] = "list"
    data: list[Item]
    first_id: str | int | None
    last_id: str | int | None
    has_more: bool


def envelope(data: list[Item], ids: list[str] | list[int], *, has_more: bool) -> Page[Item]:
    """Wrap one page, whose items have these ids."""
    return Page(data=data, first_id=ids[0] if ids else None, last_id=ids[-1] if ids else None, has_more=has_more)
