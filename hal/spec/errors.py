"""The error tree of the HAL: one small set of types that every backend and every caller shares.

``HalError`` is the root. Each class answers one question a person has at that moment: *what did I pass wrong*
(`SpecError`), *what can this backend not do* (`UnsupportedError`), *why is my backend out* (`BackendUnavailable`),
*why did the kernel not build* (`CompileError`), *who stopped answering* (`RankFailure`), *what did the device say*
(`DeviceError`). All of them survive pickling, because expert-parallel ranks send them to each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_LONGEST: Final = 200


def shown(value: object) -> str:
    """``repr(value)``, shortened, for a message: what cannot be shown must not hide that it is wrong."""
    try:
        text = repr(value)
    except Exception as error:
        # Integers of more digits than Python prints, and objects of the caller's own.
        return f"an unprintable {type(value).__name__} ({type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def first_line(error: BaseException) -> str:
    """The first line of what an error of somebody else's says, at most 200 characters; its type if it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


class HalError(Exception):
    """Root of every error the HAL raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # Subclasses take keyword arguments, which the default pickling of exceptions drops.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


def _rebuild(cls: type[HalError], args: tuple[Any, ...], state: dict[str, Any]) -> HalError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class SpecError(HalError, ValueError):
    """An argument breaks the specification, whatever the backend.

    Attributes
    ----------
    argument : str
        Name of the offending argument as the caller wrote it.
    got : str
        What was passed.
    legal : str
        What would have been legal.
    """

    def __init__(self, argument: str, got: object, legal: object) -> None:
        self.argument = argument
        self.got = got if isinstance(got, str) else shown(got)
        super().__init__(f"{argument}: got {self.got}; legal: {legal}")
        self.legal = str(legal)


class UnsupportedError(HalError, NotImplementedError):
    """A legal call that this backend does not declare in its capabilities.

    Attributes
    ----------
    backend, argument, got, supported : str
        Who refuses, which argument decides, its value, and what the backend declares for it.
    """

    def __init__(self, backend: str, argument: str, got: object, supported: object) -> None:
        super().__init__(
            f"{argument}: got {got}, which is legal but not declared by backend {backend!r}; it declares: {supported}"
        )
        self.backend = backend
        self.argument = argument
        self.got = str(got)
        self.supported = str(supported)


class BackendUnavailable(HalError, RuntimeError):
    """The requested backend cannot be used; says which ones there are and why each other one is out.

    Attributes
    ----------
    requested : str or None
        The name asked for, None where any available backend would have done.
    reasons : dict of str to str
        One line for every discovered backend.
    """

    def __init__(self, message: str, *, requested: str | None = None, reasons: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.requested = requested
        self.reasons = dict(reasons or {})


class CompileError(HalError, RuntimeError):
    """A kernel did not compile.

    Attributes
    ----------
    log : str
        The compiler's own.
    source_path : str
        The file it blames; where it names none, the one to look at first.
    line : int or None
        The line it blames there.
    fix : str
        What to do.
    """

    def __init__(self, message: str, *, log: str, source_path: str, line: int | None = None, fix: str = "") -> None:
        where = source_path if line is None else f"{source_path}:{line}"
        super().__init__("\n".join(filter(None, (message, where, fix, log))))
        self.log = log
        self.source_path = source_path
        self.line = line
        self.fix = fix


class RankFailure(HalError, RuntimeError):
    """A rank of an expert-parallel group died, stalled or broke the protocol.

    Attributes
    ----------
    rank : int
        The rank that failed, in the numbering of the group.
    phase : str
        What was under way, for instance ``"dispatch"`` or ``"low_latency_combine"``.
    expert : int or None
        The expert whose tokens were awaited, where one can be named.
    expected, received : int or None
        Counts of what was awaited from that rank and what had arrived.
    """

    def __init__(
        self,
        rank: int,
        phase: str,
        reason: str,
        *,
        expert: int | None = None,
        expected: int | None = None,
        received: int | None = None,
    ) -> None:
        counts = "" if expected is None else f"; expected {expected}, received {0 if received is None else received}"
        where = "" if expert is None else f" for expert {expert}"
        super().__init__(f"rank {rank} failed in {phase}{where}: {reason}{counts}")
        self.rank = rank
        self.phase = phase
        self.reason = reason
        self.expert = expert
        self.expected = expected
        self.received = received


class DeviceError(HalError, RuntimeError):
    """The device or its driver refused a call; names the call and the driver's own error."""
