"""The JSON schema of ``report.json``, version 1."""

from __future__ import annotations

import json
from typing import Any, Final

import jsonschema  # type: ignore[import-untyped]

SCHEMA_VERSION: Final = 1

_TEXT: Final = {"type": "string"}
_COUNT: Final = {"type": "integer", "minimum": 0}
_TEXTS: Final = {"type": "object", "additionalProperties": _TEXT}
_HASH: Final = {"type": "string", "pattern": "^[0-9a-f]{64}$"}
_VERDICTS: Final = ["PASS", "WAIVED", "FAIL", "BLOCKED", "INCOMPLETE", "UNCOVERED", "UNDECLARED", "EMPTY"]
_STATUSES: Final = [
    "PASS",
    "FAIL",
    "CRASH",
    "TIMEOUT",
    "ERROR",
    "REFUSED",
    "UNCOVERED",
    "BLOCKED",
    "WAIVED",
    "SKIPPED",
]


def _object(properties: dict[str, Any], *optional: str) -> dict[str, Any]:
    """``optional`` is what older reports lack: they are read, and certify nothing."""
    required = [name for name in properties if name not in optional]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


_WAIVER: Final = _object(
    {"obligation": _TEXT, "reason": _TEXT, "expires": {"type": "string", "pattern": "^[0-9]{4}-[0-9]{2}-[0-9]{2}$"}}
)

_FAILURE: Final = _object(
    {
        "index": _COUNT,
        "status": {"enum": ["FAIL", "CRASH", "TIMEOUT", "ERROR"]},
        "problems": {"type": "array", "items": _TEXT, "minItems": 1},
        "reproduce": _TEXT,
        "case": {"type": "object"},
        "diagnosis": {"type": "object"},
        "output": _TEXT,
    },
    "case",
    "diagnosis",
    "output",
)
"""What is known of a case that failed; the call, and what was found out about it, are for people."""

_AMOUNT: Final = {"oneOf": [{"type": "number", "minimum": 0}, {"enum": ["inf", "nan"]}]}

_ERROR: Final = _object(
    {
        "rows": _COUNT,
        "worst": _AMOUNT,
        "max_abs": _AMOUNT,
        "max_cosine": _AMOUNT,
        "ulp": {"type": "array", "items": _COUNT},
        "ratio": {"type": "array", "items": _COUNT},
    }
)

_POSITIVE: Final = {"type": "number", "exclusiveMinimum": 0}

_ROOFLINE: Final = _object(
    {
        "points": {
            "type": "array",
            "items": _object({"name": _TEXT, "seconds": _POSITIVE, "flops": _POSITIVE, "bytes": _POSITIVE}),
        },
        "flops": {"type": "number", "minimum": 0},
        "bytes": {"type": "number", "minimum": 0},
        "dtype": _TEXT,
    },
    "dtype",
)

SCHEMA: Final[dict[str, Any]] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "Conformance report of a kernel HAL backend",
    **_object(
        {
            "schema": {"const": SCHEMA_VERSION},
            "suite": _object({"version": _TEXT, "hash": _HASH}),
            "run": _object(
                {
                    "seed": _COUNT,
                    "fresh": {"type": "boolean"},
                    "host": _TEXT,
                    "mode": {"enum": ["quick", "default", "full"]},
                    "tighten": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
                    "patience": {"type": "number", "exclusiveMinimum": 0},
                    "device": _TEXT,
                    "ranks": _COUNT,
                    "started": _TEXT,
                    "ended": _TEXT,
                    "seconds": {"type": "number", "minimum": 0},
                    "filtered": {"type": "boolean"},
                    "only": {"type": "array", "items": _TEXT},
                    "case": {"type": ["integer", "null"]},
                    "command": _TEXT,
                },
                "fresh",
                "host",
                "ranks",
                "ended",
            ),
            "backend": _object(
                {
                    "name": _TEXT,
                    "state": _TEXT,
                    "reason": _TEXT,
                    "evidence": {"enum": ["hardware", "simulation", "compiled", None]},
                    "details": _TEXTS,
                    "distribution": _object(
                        {
                            "name": {"type": ["string", "null"]},
                            "version": {"type": ["string", "null"]},
                            "editable": {"type": "boolean"},
                            "hash": {"oneOf": [_HASH, {"type": "null"}]},
                            "requires": {
                                "type": "array",
                                "items": _object(
                                    {"name": _TEXT, "version": _TEXT, "hash": {"oneOf": [_HASH, {"type": "null"}]}}
                                ),
                            },
                            "reaches": {"type": "array", "items": _TEXT},
                        },
                        "requires",
                        "reaches",
                    ),
                    "capabilities": {"type": ["object", "null"]},
                }
            ),
            "environment": {**_TEXTS, "required": ["specification", "suite"]},
            "verdict": {"enum": ["PASS", "WAIVED", "FAIL", "INCOMPLETE"]},
            "headline": _TEXT,
            "problems": {"type": "array", "items": _TEXT},
            "notes": {"type": "array", "items": _TEXT},
            "coverage": _object({"covered": _COUNT, "pairs": _COUNT}),
            "sizes": {
                "type": "array",
                "items": _object({"axis": _TEXT, "declared": _TEXT, "least": _COUNT, "largest": _COUNT}),
            },
            "levels": {
                "type": "array",
                "items": _object(
                    {
                        "id": _TEXT,
                        "title": _TEXT,
                        "verdict": {"enum": _VERDICTS},
                        "counts": {"type": "object", "additionalProperties": _COUNT},
                    }
                ),
            },
            "obligations": {
                "type": "array",
                "items": _object(
                    {
                        "id": _TEXT,
                        "level": _TEXT,
                        "title": _TEXT,
                        "status": {"enum": _STATUSES},
                        "message": _TEXT,
                        "planned": _COUNT,
                        "executed": _COUNT,
                        "calls": _COUNT,
                        "seconds": {"type": "number", "minimum": 0},
                        "witnessed": {"type": "array", "items": _COUNT},
                        "notes": {"type": "array", "items": _TEXT},
                        "failures": {"type": "array", "items": _FAILURE},
                        "errors": {"type": "object", "additionalProperties": _ERROR},
                        "launches": {"type": "object", "additionalProperties": _COUNT},
                        "cases": {
                            "type": "array",
                            "items": _object(
                                {
                                    "index": _COUNT,
                                    "calls": _COUNT,
                                    "launches": {"type": "object", "additionalProperties": _COUNT},
                                    "seconds": {"type": "number", "minimum": 0},
                                }
                            ),
                        },
                    },
                    "witnessed",
                    "notes",
                ),
            },
            "waivers": {"type": "array", "items": _WAIVER},
            "roofline": {"oneOf": [_ROOFLINE, {"type": "null"}]},
            "certificate": {"type": ["object", "null"]},
        },
        "notes",
        "coverage",
        "sizes",
    ),
}


_COUNTING: Final = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine("integer", lambda _, value: type(value) is int)
"""1.0 is no count."""

_VALIDATOR: Final = jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=_COUNTING)(SCHEMA)


def schema_errors(report: Any) -> list[str]:
    """Where a report breaks the schema; empty if nowhere."""
    found = sorted(_VALIDATOR.iter_errors(report), key=lambda error: list(map(str, error.path)))
    told = [f"{'/'.join(map(str, error.path)) or 'the whole'}: {error.message[:200]}" for error in found]
    return told or _unwritable(report)


def _unwritable(report: Any) -> list[str]:
    """Numbers that Python reads and JSON does not have: no minimum is above a NaN."""
    try:
        json.dumps(report, allow_nan=False)
    except ValueError:
        return ["the whole: a number that is infinite or none"]
    return []
