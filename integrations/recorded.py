"""An engine's interface as data: taken from a release, held against a release, and stood in for where there is none.

A record is a JSON file next to the tests of an integration. It holds names, signatures, abstract methods and fields of
what the integration uses of the engine, with the release they were read from; no code.
``python -m integrations.recorded RECORD`` reads the installed release again and rewrites the record.
"""

from __future__ import annotations

import abc
import argparse
import contextlib
import dataclasses
import enum
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import inspect
import json
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

Described = dict[str, Any]


def load(path: Path) -> Described:
    """Read a record: ``distribution``, ``version``, ``released``, ``objects`` by ``module:name``."""
    record: Described = json.loads(path.read_text(encoding="utf-8"))
    return record


def package(record: Described) -> str:
    """The engine's top-level package."""
    first: str = next(iter(record["objects"]))
    return first.partition(".")[0]


def installed(record: Described) -> bool:
    """Whether the engine itself can be imported here."""
    found = importlib.util.find_spec(package(record))
    return found is not None and found.loader is not None


def drift(record: Described) -> list[str]:
    """What differs between a record and the installed engine, one line each."""
    found = []
    for name, recorded in record["objects"].items():
        try:
            real = describe(name, recorded)
        except (ImportError, AttributeError) as error:
            found.append(f"{name}: recorded, and gone: {error}")
            continue
        was, now = _flat(recorded), _flat(real)
        found += [f"{name} {key}: recorded {was[key]}, is {now.get(key)}" for key in was if was[key] != now.get(key)]
    return found


def _flat(described: Described) -> Described:
    members = {f".{member}": shown for member, shown in described.get("members", {}).items()}
    return {key: shown for key, shown in described.items() if key != "members"} | members


def describe(name: str, like: Described) -> Described:
    """Describe the installed object ``module:name``, of a class only the members that ``like`` lists."""
    module, _, attribute = name.partition(":")
    thing = getattr(importlib.import_module(module), attribute)
    if not isinstance(thing, type):
        return {"kind": "function", "signature": _signature(thing)}
    ancestors = [f"{one.__module__}:{one.__name__}" for one in thing.__mro__[1:]]
    bases = [one for one in like.get("bases", ()) if one in ancestors]
    if issubclass(thing, enum.Enum):
        names = [member for member in like["names"] if member in thing.__members__]
        return {"kind": "enum", "names": names, "strings": issubclass(thing, str)}
    if issubclass(thing, tuple):
        named: Any = thing
        made = named(*[None] * len(named._fields))
        found = getattr(made, "format", None)
        shown = None if found is None else [f"{type(found).__module__}:{type(found).__name__}", found.name]
        return {"kind": "namedtuple", "fields": list(made._fields), "format": shown}
    if dataclasses.is_dataclass(thing):
        fields = [[field.name, _has_default(field)] for field in dataclasses.fields(thing)]
        return {"kind": "dataclass", "bases": bases, "fields": fields}
    abstract = sorted(getattr(thing, "__abstractmethods__", ()))
    members = {member: _member(thing, member) for member in like.get("members", {}) if hasattr(thing, member)}
    return {"kind": "class", "bases": bases, "abstract": abstract, "members": members}


@contextlib.contextmanager
def engine(path: Path) -> Iterator[bool]:
    """The engine of a record, importable: its release where one is installed, else what the record describes.

    Yields whether it is the release. Of what stands in, the ``__init__`` of a class keeps its arguments as attributes,
    as both engines' classes do; all else raises NotImplementedError, and a test that needs it puts its own there.
    """
    record = load(path)
    if installed(record):
        yield True
        return
    before = set(sys.modules)
    made: dict[str, Any] = {}
    try:
        for name, described in record["objects"].items():
            module, _, attribute = name.partition(":")
            made[name] = _make(name, attribute, described, made)
            setattr(_module(module), attribute, made[name])
        yield False
    finally:
        # What was imported meanwhile may hold on to what stood in.
        for name in set(sys.modules) - before:
            if name.split(".")[0] in (package(record), f"hal_{package(record)}"):
                del sys.modules[name]


def _module(name: str) -> ModuleType:
    if name not in sys.modules:
        parent, _, last = name.rpartition(".")
        sys.modules[name] = made = ModuleType(name, "Stands in for a module of an engine.")
        made.__path__ = []
        made.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
        if parent:
            setattr(_module(parent), last, made)
    return sys.modules[name]


def _make(name: str, attribute: str, described: Described, made: Described) -> Any:
    where: dict[str, Any] = {"__module__": name.partition(":")[0]}
    kind = described["kind"]
    if kind == "function":
        return _function(name, described["signature"])
    if kind == "enum":
        members = [(member, member.lower()) for member in described["names"]]
        return enum.Enum(attribute, members, type=str if described["strings"] else None, module=where["__module__"])
    if kind == "namedtuple":
        base = namedtuple(attribute, described["fields"])  # type: ignore[misc]
        if described["format"] is None:
            return base
        kinds, member = described["format"]
        return type(attribute, (base,), {**where, "format": property(lambda self: made[kinds][member])})
    bases = tuple(made[base] for base in described["bases"]) or (object,)
    # Parameters of generic classes are written where they are used, and mean nothing here.
    where["__class_getitem__"] = classmethod(lambda cls, parameters: cls)
    if kind == "dataclass":
        inherited = {
            field.name for base in bases if dataclasses.is_dataclass(base) for field in dataclasses.fields(base)
        }
        fields = [
            (field, Any, dataclasses.field(default=None)) if has_default else (field, Any)
            for field, has_default in described["fields"]
            if field not in inherited
        ]
        return dataclasses.make_dataclass(attribute, fields, bases=bases, namespace=where)
    body: dict[str, Any] = dict(where)
    for member, signature in described["members"].items():
        body[member] = _method(f"{name}.{member}", signature, member in described["abstract"])
    if bases == (object,):
        return abc.ABCMeta(attribute, (), body)
    return type(bases[0])(attribute, bases, body)


def _method(name: str, described: Described, is_abstract: bool) -> Any:
    made = _function(name, described["signature"], attributes=name.endswith(".__init__"))
    if is_abstract:
        made.__isabstractmethod__ = True
    return {"staticmethod": staticmethod, "classmethod": classmethod}.get(described["kind"], lambda f: f)(made)


def _function(name: str, parameters: list[str], attributes: bool = False) -> Any:
    signature = inspect.Signature([_parameter(one) for one in parameters])

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = dict(bound.arguments)
        if not attributes:
            raise NotImplementedError(f"{name} is the engine's own")
        vars(given.pop("self")).update(given)

    call.__name__ = name.rpartition(":")[2].rpartition(".")[2]
    call.__signature__ = signature  # type: ignore[attr-defined]
    return call


def _parameter(text: str) -> inspect.Parameter:
    name, _, default = text.partition("=")
    if name.startswith("**"):
        return inspect.Parameter(name[2:], inspect.Parameter.VAR_KEYWORD)
    shown = inspect.Parameter.empty if not default else None
    if name.startswith("*"):
        return inspect.Parameter(name[1:], inspect.Parameter.KEYWORD_ONLY, default=shown)
    return inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=shown)


def _signature(thing: Any) -> list[str]:
    """Names in order; ``*name`` for keyword-only ones, ``**name`` for the rest, ``=`` behind what has a default."""
    marks: dict[Any, str] = {inspect.Parameter.KEYWORD_ONLY: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(thing).parameters.values()
    return [
        f"{marks.get(one.kind, '')}{one.name}{'' if one.default is one.empty else '=…'}"
        for one in parameters
        if one.kind is not one.VAR_POSITIONAL
    ]


def _member(thing: type, name: str) -> Described:
    raw = inspect.getattr_static(thing, name)
    for kind in (staticmethod, classmethod):
        if isinstance(raw, kind):
            return {"kind": kind.__name__, "signature": _signature(raw.__func__)}
    return {"kind": "method", "signature": _signature(raw)}


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def main() -> None:
    """Rewrite a record from the installed release, keeping its list of names."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("record", type=Path)
    path = parser.parse_args().record
    record = load(path)
    record["version"] = importlib.metadata.version(record["distribution"])
    record["objects"] = {name: describe(name, like) for name, like in record["objects"].items()}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
