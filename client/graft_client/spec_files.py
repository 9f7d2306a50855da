"""A job's spec as it is written: JSON or YAML, from a file or standard input, with what the command line changes."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import yaml

from graft_client.errors import SpecUnreadable


def read_spec(source: str, overrides: list[str]) -> dict[str, Any]:
    """Read a spec from a file or standard input (`-`) and apply `key.path=value`.

    Raises:
        SpecUnreadable: It cannot be read, or an override cannot be applied.
    """
    try:
        text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    except OSError as error:
        raise SpecUnreadable(f"Cannot read {source}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise SpecUnreadable(f"{source} is not UTF-8 (byte {error.start}): save it as UTF-8.") from error
    try:
        spec = _parsed(source, text)
        if not isinstance(spec, dict):
            raise SpecUnreadable(f"{source} must hold one object, the job's spec.")
        for override in overrides:
            _apply(spec, override)
    except RecursionError as error:
        raise SpecUnreadable(f"{source} is nested too deeply for a job's spec.") from error
    return spec


def _parsed(source: str, text: str) -> Any:
    try:
        return _json(text)
    except ValueError as error:
        if source.endswith(".json"):
            raise SpecUnreadable(f"{source} is not JSON: {error}.") from error
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader
    except (yaml.YAMLError, ValueError, LookupError) as error:  # the last two: a tag that its value does not fit
        raise SpecUnreadable(f"{source} is neither JSON nor YAML: {' '.join(str(error).split())}.") from error


def _apply(spec: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    *parents, last = path.split(".")
    if not separator or not last:
        raise SpecUnreadable(f"--set {override} is not KEY=VALUE, such as training.max_steps=100.")
    for parent in parents:
        if not isinstance(spec.setdefault(parent, {}), dict):
            raise SpecUnreadable(f"--set {override}: '{parent}' is not an object in the spec.")
        spec = spec[parent]
    try:
        spec[last] = _json(text)
    except ValueError:
        spec[last] = _parsed(f"--set {override}", text) if text.startswith(("[", "{")) else text


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_object)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key stands twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise SpecUnreadable(f"'{next(key for key in keys if keys.count(key) > 1)}' stands twice in one object.")
    return found


class _Loader(yaml.SafeLoader):
    """YAML's values as JSON has them: 2e-4 is a number, a date and `no` are texts, and no key stands twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - PyYAML's own way to say it
        first: [(tag, form) for tag, form in forms if not tag.endswith((":timestamp", ":bool", ":float", ":int"))]
        for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors = {  # noqa: RUF012 - likewise
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or not tag.endswith((":binary", ":timestamp", ":set", ":omap", ":pairs"))
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if repeated := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"'{repeated}' stands twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^-?(0|[1-9][0-9]*)$"), list("-0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][-+]?[0-9]+)?$"),
    list("-0123456789"),
)
