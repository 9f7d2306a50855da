"""From JSON text to a checked value, and from pydantic's complaints to the one error that helps the user most."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NoReturn

from pydantic import BaseModel, ValidationError

from graft_shared.errors import GraftError, InvalidParameter, MalformedBody, UnknownParameter
from graft_shared.specs import JobSpec, rename_aliases

_BOUNDS = ("ge", "gt", "le", "lt", "min_length", "max_length", "pattern", "expected", "multiple_of")


def parse_json(body: bytes) -> Any:
    """Read a JSON body; stricter than `json.loads`, because what is accepted must mean one thing everywhere.

    Raises:
        MalformedBody: Not JSON; NaN or Infinity; a key given twice; text that is no Unicode; a NUL character; too deep.
    """
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # a lone surrogate is valid JSON and no text
    except json.JSONDecodeError as error:
        reason = f"{error.msg} at line {error.lineno}, column {error.colno}"
        raise MalformedBody(reason=reason, line=error.lineno, column=error.colno, position=error.pos) from error
    except UnicodeDecodeError as error:
        raise MalformedBody(reason=f"byte {error.start} is not UTF-8", position=error.start) from error
    except UnicodeEncodeError as error:
        raise MalformedBody(reason="a string holds half of a surrogate pair") from error
    except RecursionError as error:
        raise MalformedBody(reason="it is nested too deeply") from error
    except ValueError as error:
        raise MalformedBody(reason=str(error)) from error
    if b"\\u0000" in body and _holds_nul(value):
        raise MalformedBody(reason="a string holds the NUL character")
    return value


def parse_spec(body: Any) -> JobSpec:
    """Read a job's spec.

    Raises:
        UnknownParameter: A key that no spec has; says which one was meant.
        InvalidParameter: A value of the wrong type or out of its bounds.
    """
    if not isinstance(body, dict):
        raise InvalidParameter("The body must be a JSON object: the job's spec.")
    try:
        spec = JobSpec.model_validate(body)
    except ValidationError as error:
        raise error_of(error.errors(), body=_renamed(body)) from error
    _refuse_conversions(_renamed(body), spec.model_dump(mode="json", by_alias=True), ())
    return spec


def error_of(
    errors: Sequence[Any], *, body: Any = None, in_query: bool = False, model: type[BaseModel] = JobSpec
) -> GraftError:
    """Choose what to say about a failed validation: unknown keys first, then the first refused value.

    Args:
        errors: As `pydantic.ValidationError.errors()` gives them.
        body: What was validated: tells the keys in an error's place from the branches of a union.
        in_query: The places begin with "query", "path" or "header", and name no part of a body.
        model: What the body was validated as: its keys are those that may have been meant.
    """
    unknown = [error for error in errors if error["type"] == "extra_forbidden"]
    if unknown:
        return _unknown_key(tuple(unknown[0]["loc"]), [_dotted(error["loc"]) for error in unknown], model)
    reasons: dict[str | None, list[str]] = {}
    for error in errors:
        place = _dotted(error["loc"][1:]) if in_query else _place(tuple(error["loc"]), error["type"], body)
        said = reasons.setdefault(place or None, [])
        if (reason := _reason(error)) not in said:
            said.append(reason)
    param, first = next(iter(reasons.items()))
    facts: dict[str, Any] = {"bounds": bounds} if (bounds := _bounds(errors[0])) else {}
    if len(reasons) > 1:
        facts["errors"] = [{"param": place, "reason": " or ".join(why)} for place, why in reasons.items()]
    reason = " or ".join(first)
    if param is None:
        return InvalidParameter(f"The request is not valid: {reason}.", reason=reason, **facts)
    return InvalidParameter(param=param, reason=reason, **facts)


def hint_for(key: str, known: Iterable[str]) -> str:
    """Say which known name was probably meant, or which names there are."""
    known = list(known)
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"Did you mean '{close[0]}'?"
    return f"Known here: {', '.join(known)}." if known else "This route takes none."


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"the key '{next(key for key in keys if keys.count(key) > 1)}' is given twice")
    return value


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _holds_nul(value: Any) -> bool:
    if isinstance(value, dict):
        return any(_holds_nul(part) for pair in value.items() for part in pair)
    if isinstance(value, list):
        return any(map(_holds_nul, value))
    return isinstance(value, str) and "\0" in value


def _renamed(body: dict[str, Any]) -> dict[str, Any]:
    try:
        return rename_aliases(body)
    except ValueError:  # aliases that disagree: pydantic's error says so already
        return body


def _refuse_conversions(given: Any, taken: Any, path: tuple[str, ...]) -> None:
    """Refuse what pydantic would silently convert, such as "10" or true for a number."""
    if isinstance(given, dict) and isinstance(taken, dict):
        for key, value in given.items():
            _refuse_conversions(value, taken.get(key), (*path, key))
        return
    kinds = _kind(given), _kind(taken)
    if None not in kinds and kinds[0] != kinds[1]:
        reason = f"input should be a {kinds[1]}, found the {kinds[0]} {json.dumps(given)}"
        raise InvalidParameter(param=_dotted(path), reason=reason)


def _kind(value: Any) -> str | None:
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int | float):
        return "number"
    return "text" if isinstance(value, str) else None


def _place(loc: tuple[str | int, ...], kind: str, body: Any) -> str:
    """The dotted place of an error, without the names of a union's branches."""
    parts: list[str | int] = []
    here = body
    for index, part in enumerate(loc):
        is_missing = kind == "missing" and index == len(loc) - 1
        if isinstance(here, Mapping) and (part in here or is_missing):
            here = here.get(part)
        elif isinstance(here, list) and isinstance(part, int) and part < len(here):
            here = here[part]
        else:
            continue
        parts.append(part)
    return _dotted(parts)


def _dotted(parts: Iterable[str | int]) -> str:
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _reason(error: Mapping[str, Any]) -> str:
    """Pydantic's sentence as the end of ours, in JSON's words."""
    message = re.sub(r"^(Value|Assertion) error, ", "", str(error["msg"]))
    message = re.sub(r"valid dictionary( or instance of \w+)?$", "JSON object", message).replace(
        "valid tuple", "valid array"
    )
    return message[:1].lower() + message[1:]


def _bounds(error: Mapping[str, Any]) -> dict[str, Any]:
    context = error.get("ctx") or {}
    return {name: context[name] for name in _BOUNDS if isinstance(context.get(name), int | float | str)}


def _unknown_key(loc: tuple[str | int, ...], unknown: list[str], model: type[BaseModel]) -> UnknownParameter:
    key = str(loc[-1])
    fields = _fields_at(loc[:-1], model)
    elsewhere = [place for place in _all_places(model) if place.rsplit(".", 1)[-1] == key]
    hint = f"Did you mean '{elsewhere[0]}'?" if elsewhere else hint_for(key, fields)
    facts: dict[str, Any] = {"unknown": unknown} if len(unknown) > 1 else {}
    return UnknownParameter(param=_dotted(loc), hint=hint, **facts)


def _fields_at(loc: tuple[str | int, ...], body: type[BaseModel]) -> list[str]:
    """The names that a section of the body knows."""
    model: Any = body
    for part in loc:
        named = {field.alias or name: field for name, field in model.model_fields.items()}
        model = next((kind for kind in _models_in(named[str(part)].annotation)), None) if str(part) in named else None
        if model is None:
            return []
    return [field.alias or name for name, field in model.model_fields.items()]


def _all_places(body: type[BaseModel]) -> list[str]:
    places = []
    for name, field in body.model_fields.items():
        inner = [f"{name}.{key}" for model in _models_in(field.annotation) for key in _names(model)]
        places += [name, *inner]
    return places


def _names(model: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    """The pydantic models of an annotation such as `Validation | None`."""
    kinds = getattr(annotation, "__args__", (annotation,))
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)]
