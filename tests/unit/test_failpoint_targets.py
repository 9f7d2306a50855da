"""Each failpoint stands at something that is there: one that is not would never be struck, minutes later."""

from __future__ import annotations

import importlib
from functools import reduce

import pytest

from tests.failpoints.points import POINTS, Point


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_a_point_stands_at_something_that_can_be_called(point: Point) -> None:
    module, _, name = point.target.partition(":")
    assert callable(reduce(getattr, name.split("."), importlib.import_module(module)))
