"""Read bodies and queries into models, and name every fault of them at once.

msgspec stops at the first fault. So a value that it refuses is taken apart: each field, item and value is converted on
its own. What is read in the end is msgspec's own conversion.
"""

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin
from urllib.parse import parse_qsl

import msgspec

from mcp_auth_proxy.errors import excerpt
from mcp_auth_proxy.web.api.models import Check, Fault, PartsInvalid
from mcp_auth_proxy.web.api.problems import invalid

M = TypeVar("M", bound=msgspec.Struct)
Loc = tuple[str | int, ...]
MoreFaults = Callable[[Mapping[str, Any]], Iterable[Fault]]
"""Returns what other rules find in a body that has faults."""

MAX_FAULTS = 100
"""Faults that are named; a body of 256 KiB may have many more."""

MAX_PARAMETERS = 50

MAX_DEPTH = 64
"""Levels of objects and lists in a body."""


def read_body(raw: bytes, model: type[M], more: MoreFaults = lambda value: ()) -> M:
    """Return the model that a JSON body has. Raises Problem (422) with all faults.

    ``more`` is asked about the fields without a fault, if others have one. A valid body is for the caller to check.
    """
    try:
        # An empty body is an empty object: a model that needs nothing need not be sent.
        value = msgspec.json.decode(raw) if raw else {}
        _check_depth(value)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else excerpt(str(error))
        raise invalid([Fault(loc=["body"], msg=f"The body is not JSON: {reason}", type="json_invalid")]) from None
    return _read(value, model, "body", strict=True, more=more)


def _check_depth(value: object) -> None:
    """Raise RecursionError for a value of more than MAX_DEPTH levels: whatever walks through it has room for those."""
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return
    raise RecursionError


def read_query(raw: bytes, model: type[M]) -> M:
    """Return the model that a query string has. Parameters that it does not know are ignored.

    Raises Problem (422) with all faults; a parameter that is given twice is one.
    """
    known = {field.encode_name for field in msgspec.structs.fields(model)}
    values: dict[str, str] = {}
    twice: list[Fault] = []
    try:
        pairs = parse_qsl(raw.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=MAX_PARAMETERS)
    except ValueError:
        raise invalid([Fault(loc=["query"], msg="The query can't be read.", type="query_invalid")]) from None
    for name, value in pairs:
        if name in known and name in values:
            twice.append(Fault(loc=["query", name], msg="The parameter is given twice.", type="value_error"))
        elif name in known:
            values[name] = value
    if twice:
        raise invalid(twice)
    return _read(values, model, "query", strict=False)


def _read(value: object, model: type[M], place: str, *, strict: bool, more: MoreFaults = lambda value: ()) -> M:
    found: list[Fault] = []
    for fault in _faults(value, model, (place,), strict):
        found.append(fault)
        if len(found) >= MAX_FAULTS:
            break
    if found:
        if isinstance(value, dict):
            named = {fault.loc[1] for fault in found if len(fault.loc) > 1}
            found += [fault for fault in more(value) if fault.loc[1] not in named][: MAX_FAULTS - len(found)]
        raise invalid(found)
    return msgspec.convert(value, model, strict=strict)


def _faults(value: object, kind: Any, loc: Loc, strict: bool) -> Iterator[Fault]:
    """Yield the faults of a value: those of its parts, else its own."""
    good = True
    for fault in _faults_of_parts(value, kind, loc, strict):
        good = False
        yield fault
    if good:
        yield from _own_faults(value, kind, loc, strict)


def _own_faults(value: object, kind: Any, loc: Loc, strict: bool) -> Iterator[Fault]:
    try:
        converted = msgspec.convert(value, kind, strict=strict)
        for check in _checks(kind):
            if converted is not None and converted is not msgspec.UNSET:
                check.test(converted)
    except msgspec.ValidationError as error:
        text = str(error).partition(" - at `")[0]
        wrong_type = text.startswith("Expected `") and ", got `" in text
        yield Fault(loc=list(loc), msg=excerpt(text), type="type_error" if wrong_type else "value_error")
    except PartsInvalid as error:
        for name, problem in error.parts:
            yield Fault(loc=[*loc, name], msg=excerpt(problem), type="value_error")
    except ValueError as error:
        yield Fault(loc=list(loc), msg=excerpt(str(error)), type="value_error")


def _faults_of_parts(value: object, kind: Any, loc: Loc, strict: bool) -> Iterator[Fault]:
    for member in _members(kind):
        origin = get_origin(member) or member
        if isinstance(value, dict):
            if isinstance(origin, type) and issubclass(origin, msgspec.Struct):
                yield from _faults_of_fields(value, origin, loc, strict)
            elif origin is dict:
                for name, each in value.items():
                    yield from _faults(each, get_args(member)[1], (*loc, name), strict)
        elif isinstance(value, list) and origin in (list, tuple):
            for index, each in enumerate(value):
                yield from _faults(each, get_args(member)[0], (*loc, index), strict)


def _faults_of_fields(value: dict[str, object], model: type[msgspec.Struct], loc: Loc, strict: bool) -> Iterator[Fault]:
    fields = {field.encode_name: field for field in msgspec.structs.fields(model)}
    for name, field in fields.items():
        if name in value:
            yield from _faults(value[name], field.type, (*loc, name), strict)
        elif field.required:
            yield Fault(loc=[*loc, name], msg="The field is required.", type="missing")
    for name in value:
        if name not in fields:
            yield Fault(loc=[*loc, excerpt(name)], msg="There is no such field.", type="extra_forbidden")


def _members(kind: Any) -> Iterator[Any]:
    """Yield the types that a value may have, without what is annotated."""
    origin = get_origin(kind)
    if origin is Annotated:
        yield from _members(get_args(kind)[0])
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _members(member)
    else:
        yield kind


def _checks(kind: Any) -> Iterator[Check]:
    origin = get_origin(kind)
    if origin is Annotated:
        base, *annotations = get_args(kind)
        yield from _checks(base)
        yield from (annotation for annotation in annotations if isinstance(annotation, Check))
    elif origin in (Union, types.UnionType):
        for member in get_args(kind):
            yield from _checks(member)
