"""Pydantic's errors told in this project's words: file, key, value, what is allowed."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from jmedlora.config.faults import Fault
from jmedlora.config.parts import COMMIT, FILE_NAME, NAME, REPOSITORY, URL, VARIABLE

PartT = TypeVar("PartT", bound=BaseModel)

_KINDS = {
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "list_type": "a list",
    "tuple_type": "a list",
    "finite_number": "a finite number",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "missing": "this key is required",
}


def unknown_name(name: str, known: Iterable[str]) -> str:
    """`did you mean 'x'? one of a, b, x`."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1)
    return (f"did you mean {close[0]!r}? " if close else "") + "one of " + ", ".join(names)


def describe_allowed(error: ErrorDetails) -> str:
    """What a value would have to be, from pydantic's error."""
    kind, context = error["type"], error.get("ctx", {})
    if kind in _KINDS:
        return _KINDS[kind]
    bounds = {"greater_than_equal": "ge", "greater_than": "gt", "less_than_equal": "le", "less_than": "lt"}
    if kind in bounds:
        words = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}[bounds[kind]]
        return f"{words} {context[bounds[kind]]:g}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind == "union_tag_invalid":
        return "kind: " + str(context["expected_tags"])
    if kind == "union_tag_not_found":
        return "a mapping with the key 'kind'"
    if kind == "too_short":
        return f"at least {context['min_length']} entries"
    if kind == "string_too_short":
        return "a text that is not empty"
    if kind == "string_pattern_mismatch":
        return _PATTERNS.get(context["pattern"], f"a text that matches {context['pattern']}")
    if kind == "value_error":
        return ""
    return error["msg"]


def faults_of(error: ValidationError, model: Any, where: str, prefix: str = "") -> list[Fault]:
    """One fault per key: alternatives of a union are joined by 'or'."""
    grouped: dict[str, list[ErrorDetails]] = {}
    for detail in error.errors(include_url=False):
        grouped.setdefault(_dotted(detail, prefix), []).append(detail)
    # a mapping that is wrong inside is not told as `not a list` as well, where a list would do too
    outer = {key for key in grouped for other in grouped if other.startswith((f"{key}.", f"{key}["))}
    faults = []
    for key, details in grouped.items():
        if key in outer and all(detail["type"] in ("list_type", "dict_type") for detail in details):
            continue
        first = details[0]
        if first["type"] == "extra_forbidden":
            parent = _model_at(model, [part for part in first["loc"][:-1] if isinstance(part, str)])
            problem = "unknown key" if parent else "not known here"
            known = list(parent.model_fields) if parent else []
            faults.append(Fault(where, key, problem, unknown_name(str(first["loc"][-1]), known) if known else ""))
        elif first["type"] == "missing":
            faults.append(Fault(where, key, "missing", "this key is required"))
        elif first["type"] == "value_error":
            faults.append(Fault(where, key or "training", str(first["ctx"]["error"])))
        else:
            allowed = " or ".join(dict.fromkeys(filter(None, map(describe_allowed, details))))
            # what stands where a variable is to be named may be the key itself
            shown = "what is given" if first.get("ctx", {}).get("pattern") == VARIABLE else _shown(first["input"])
            faults.append(Fault(where, key, f"{shown} is not allowed", allowed))
    return faults


def validated(model: type[PartT], value: Mapping[str, Any], where: str, prefix: str, faults: list[Fault]) -> PartT | None:
    """The model made from `value`; on errors None, with the faults appended."""
    try:
        return model.model_validate(dict(value))
    except ValidationError as error:
        faults.extend(faults_of(error, model, where, prefix))
        return None


def check_field(model: type[BaseModel], field: str, value: Any, where: str, key: str) -> list[Fault]:
    """Faults of one value for one field of a model."""
    info = model.model_fields[field]
    annotation: Any = typing.Annotated[info.annotation, *info.metadata] if info.metadata else info.annotation
    try:
        TypeAdapter(annotation, config=ConfigDict(allow_inf_nan=False)).validate_python(value)
    except ValidationError as error:
        told = list(map(describe_allowed, error.errors(include_url=False)))
        if type(None) in typing.get_args(info.annotation):
            told.append("null")
        allowed = " or ".join(dict.fromkeys(filter(None, told)))
        return [Fault(where, key, f"{_shown(value)} is not allowed", allowed)]
    return []


def _dotted(detail: ErrorDetails, prefix: str) -> str:
    # Pydantic puts the names of union members into `loc`; only keys and positions that the user wrote are shown.
    text, previous = prefix, ""
    for part in detail["loc"]:
        if isinstance(part, int):
            text += f"[{part}]"
            continue
        is_tag = previous == "source" and part in _SOURCE_KINDS
        if part.isidentifier() and part not in _BUILTIN_TYPES and not is_tag:
            text += f".{part}" if text else part
        previous = part
    return text


_PATTERNS = {
    NAME: "a name of letters, digits, - and _",
    FILE_NAME: "a name of letters, digits, -, _ and . (not in front)",
    REPOSITORY: "owner/name",
    COMMIT: "a commit of 40 hex digits",
    URL: "an address that begins with http:// or https://",
    VARIABLE: "the name of an environment variable, such as OPENAI_API_KEY",
}
_BUILTIN_TYPES = {"str", "int", "float", "bool", "dict", "list", "none"}
_SOURCE_KINDS = {"hub", "path", "gguf", "random", "named", "api", "github", "dataset"}


def _model_at(model: Any, path: list[str]) -> type[BaseModel] | None:
    """The model that a path of keys (and tags of unions) leads to."""
    found: list[Any] = [model]
    for name in path:
        tagged = [item for item in found if item.model_fields.get("kind") and name in typing.get_args(item.model_fields["kind"].annotation)]
        if tagged and len(found) > 1:
            found = tagged
            continue
        found = [inner for item in found if name in item.model_fields for inner in _models_in(item.model_fields[name].annotation)]
    return found[0] if len(found) == 1 else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for item in typing.get_args(annotation) for model in _models_in(item)]


def _shown(value: Any) -> str:
    text = {None: "null", True: "true", False: "false"}.get(value) if value is None or isinstance(value, bool) else repr(value)
    assert text is not None
    return text if len(text) <= 80 else text[:77] + "..."
