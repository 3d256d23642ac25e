"""Judges cases again in a process that never loads the backend.

A check runs beside the backend, which could reach it: replace the reference, loosen the limits, silence the judge.
So what the backend gives in a case is written down (`Tape`), and afterwards, for cases nobody knows before, the same
check runs again in another process, from the same seeds, with the tape in the backend's place (`Replayer`). There the
numbers are judged by files that nothing but this suite has touched.

What a tape cannot show is memory around outputs and inputs that were changed: those are looked at in place.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import EntryPoint
from itertools import chain
from pathlib import Path
from types import CodeType
from typing import Any, Final, TypeVar

import hal
from hal import plugins
from hal.backend import Backend, Probe
from hal.reference import mla as reference
from hal.spec import errors
from hal.spec.capability import Capabilities
from hal.spec.mla import MlaDecodeArgs
from hal_conformance import manners
from hal_conformance.checks import load
from hal_conformance.context import BackendRaised, Context, Settings, Stop
from hal_conformance.parcel import pack, unpack_plain
from hal_conformance.table import BY_ID
from hal_conformance.threads import side_by_side

SHARE: Final = 20
"""One case in so many is judged again, and at least one of every obligation that compares numbers."""

_ORACLE: Final = reference.mla_decode
"""As it was before any backend was loaded."""

_LOCK: Final = threading.Lock()
_HELD: Final[dict[Any, tuple[CodeType, int]]] = {}
"""Functions that are out of reach: their code, and for how many threads."""

Made = TypeVar("Made")

_KERNEL: Final = "tape:mla_decode@tape"


def is_judged_twice(obligation: str) -> bool:
    """Whether an obligation compares numbers; those of L0 are about what a backend says of itself."""
    return not obligation.startswith("CAP")


class Tape:
    """What a backend gave in one case, call by call; played, it gives the same again."""

    def __init__(self, entries: list[Any] | None = None) -> None:
        self.playing = entries is not None
        self.entries: deque[Any] = deque(entries or ())
        self._here = threading.local()

    @property
    def in_a_thread(self) -> bool:
        """Whether this is one of several threads that make calls at once."""
        return hasattr(self._here, "entries")

    def note(self, entry: Any) -> None:
        """Write down what a call gave."""
        (self._here.entries if self.in_a_thread else self.entries).append(entry)

    def together(self, calls: Sequence[Callable[[], Made]]) -> list[Made | BaseException]:
        """Make calls side by side, and write down what they gave one after the other; played, one after the other."""
        if self.playing:
            return [_made(call) for call in calls]
        entries: list[list[Any]] = [[] for _ in calls]

        def through(call: Callable[[], Made], mine: list[Any]) -> Made:
            self._here.entries = mine
            return call()

        found = side_by_side([partial(through, *pair) for pair in zip(calls, entries, strict=True)])
        self.entries.extend(chain(*entries))
        return found

    def through(self, make: Callable[[], Any]) -> Any:
        """Make a call and write down what it gave; or, while playing, only say what was written down."""
        if not self.playing:
            self.entries.append(make())
            return self.entries[-1]
        if not self.entries:
            raise Departed("more calls than the backend was seen to answer")
        return self.entries.popleft()

    def save(self, path: Path) -> None:
        """Write a file."""
        path.write_bytes(pack(list(self.entries)))

    @staticmethod
    def read(path: Path) -> Tape:
        """Read a file; nothing in it is executed."""
        return Tape(unpack_plain(path.read_bytes()))


def _made(call: Callable[[], Made]) -> Made | BaseException:
    try:
        return call()
    except Departed:
        raise
    except Exception as error:
        return error


class Departed(Exception):
    """The calls of the tape are not those this case makes."""


class Recorder(Backend):
    """Stands before a backend and writes down what it gives."""

    spec_version = hal.SPEC_VERSION
    priority = 0

    def __init__(self, inner: Backend, tape: Tape) -> None:
        self.inner, self.tape = inner, tape
        self.changed: set[str] = set()

    def probe(self) -> Probe:
        """As the backend."""
        return self.inner.probe()

    def capabilities(self) -> Capabilities:
        """As the backend."""
        return self.inner.capabilities()

    def mla_plan(self, args: Any) -> object:
        """As the backend; that it made one is written down."""
        with self._watched():
            made = self.inner.mla_plan(args)
        self.tape.note({"plan": True})
        return made

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """As the backend; what it wrote is written down."""
        with self._watched(), out_of_reach(_ORACLE):
            self.inner.mla_decode(args)
        self.tape.note({"out": args.out.detach().cpu().clone(), "lse": args.lse.detach().cpu().clone()})

    @contextmanager
    def _watched(self) -> Iterator[None]:
        as_it_was = manners.shared()
        try:
            yield
        except Exception as error:
            self.tape.note({"raised": type(error).__name__, "text": str(error)})
            raise
        finally:
            # What one of several threads finds changed may be about to be set back by another.
            if not self.tape.in_a_thread:
                self.changed.update(manners.changed(as_it_was))

    def ep_buffer(self, args: Any) -> Any:
        """As the backend."""
        return self.inner.ep_buffer(args)

    def launches(self) -> Mapping[str, int]:
        """As the backend."""
        return self.inner.launches()


@contextmanager
def out_of_reach(function: Any) -> Iterator[None]:
    """Make a function of the oracle raise for everybody who holds it: a backend computes by itself."""
    with _LOCK:
        kept, users = _HELD.pop(function, (function.__code__, 0))
        _HELD[function] = kept, users + 1
        function.__code__ = _refuses.__code__
    try:
        yield
    finally:
        with _LOCK:
            kept, users = _HELD.pop(function)
            if users > 1:
                _HELD[function] = kept, users - 1
            else:
                function.__code__ = kept


def _refuses(*args: object, **keywords: object) -> None:
    raise RuntimeError("the backend asked the reference for the result it is judged by")


@contextmanager
def recording(context: Context, tape: Tape) -> Iterator[None]:
    """Write down what the backend gives in a case, and see what it does to the process."""
    context.tape = tape
    status = plugins.registry().status(context.backend)
    if status.state != "available":
        yield
        return
    selected = plugins.select(context.backend)
    inner = selected.backend
    selected.backend = recorder = Recorder(inner, tape)
    try:
        yield
    finally:
        selected.backend = inner
        if recorder.changed and is_judged_twice(context.obligation.id):
            names = ", ".join(sorted(recorder.changed))
            context.problem(f"a call changed {names}, which the whole process shares")


class Replayer(Backend):
    """Gives what a tape holds, call by call."""

    spec_version = hal.SPEC_VERSION
    priority = 0

    def __init__(self) -> None:
        self.declared: Capabilities | None = None
        self.tape = Tape([])
        self.decodes = 0

    def probe(self) -> Probe:
        """It is there."""
        return Probe(True, "a tape of another process")

    def capabilities(self) -> Capabilities:
        """Those of the backend, on the host."""
        assert self.declared is not None
        return self.declared

    def _next(self) -> dict[str, Any]:
        entry: dict[str, Any] = self.tape.through(dict)
        if not isinstance(entry, dict):
            raise Departed("another kind of call than the backend was seen to answer")
        if "raised" in entry:
            kind = getattr(errors, entry["raised"], RuntimeError)
            raised = kind.__new__(kind)
            Exception.__init__(raised, entry["text"])
            raise raised
        return entry

    def mla_plan(self, args: Any) -> object:
        """Nothing is needed of a plan."""
        if "plan" not in self._next():
            raise Departed("a plan where the backend was seen to decode")
        return None

    def mla_decode(self, args: MlaDecodeArgs) -> None:
        """What the backend wrote, again."""
        entry = self._next()
        self.decodes += 1
        for name, into in (("out", args.out), ("lse", args.lse)):
            if name not in entry or entry[name].shape != into.shape or entry[name].dtype != into.dtype:
                raise Departed("a decode of other sizes than the backend was seen to answer")
            into.copy_(entry[name])

    def ep_buffer(self, args: Any) -> Any:
        """Ranks are replayed as a whole."""
        raise AssertionError("a rank in the witness")

    def launches(self) -> Mapping[str, int]:
        """So many calls."""
        return {_KERNEL: self.decodes}


_REPLAYER: Final = Replayer()


@plugins.hookimpl
def hal_backend() -> Backend:
    """The plugin that stands in the backend's place here."""
    return _REPLAYER


def witness(request: dict[str, Any]) -> dict[str, Any]:
    """Run the check of a case on its tape; the problems it finds."""
    settings = Settings(**request["settings"])
    settings.device = "cpu"
    capabilities = Capabilities.from_dict({**request["capabilities"], "device_types": ["cpu"]})
    _REPLAYER.declared, _REPLAYER.decodes = capabilities, 0
    _REPLAYER.tape = tape = Tape.read(Path(request["tape"]))
    here = EntryPoint(settings.backend, __name__, plugins.GROUP)
    plugins._registry = plugins.Registry([here])  # in place of all that is installed
    context = Context(settings, capabilities, BY_ID[request["obligation"]], request["index"])
    context.tape, context.wants_diagnosis = tape, False
    try:
        load()[context.obligation.id].run(context)
    except Stop:
        pass
    except Departed as departed:
        context.problem(str(departed))
    except BackendRaised as raised:
        context.problem(str(raised))
    if tape.entries and not context.record.problems:
        context.problem(f"{len(tape.entries)} calls of the backend are none of this case")
    return {"problems": context.record.problems}
