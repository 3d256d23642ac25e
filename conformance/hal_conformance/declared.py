"""What a report says is declared, field by field, as people read it."""

from __future__ import annotations

from typing import Any, Final

OPERATIONS: Final = {"mla_dense": "dense decode", "mla_sparse": "sparse decode", "ep": "expert parallel"}


def fields(capabilities: dict[str, Any] | None, operation: str) -> dict[str, str]:
    """Of one operation; nothing where it is not declared."""
    return {name: _value(value) for name, value in ((capabilities or {}).get(operation) or {}).items()}


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value is None:
        return "–"
    if isinstance(value, dict):
        if value["only"]:
            return ", ".join(map(str, value["only"]))
        step = f", step {value['multiple_of']}" if value["multiple_of"] != 1 else ""
        return f"{value['low']} or more{step}" if value["high"] is None else f"{value['low']}…{value['high']}{step}"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
