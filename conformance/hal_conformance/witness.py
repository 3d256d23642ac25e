"""Judges cases in a process that never loads the backend.

What runs beside a backend it could reach: replace the reference, loosen the limits, silence the judge. So beside it
nothing is judged by its numbers. What it gives in a case is written down (`Tape`): all of the memory that it was given
to write to, margins and gaps included, and a sum over the bytes of every input as it left them. Then the same check
runs in another process, from the same seeds, with the tape in the backend's place (`Replayer`), and judges by files
that nothing but this suite has touched. Ranks of expert-parallel calls are judged where they are started, and again
there.
"""

from __future__ import annotations

import copy
import threading
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from importlib.metadata import EntryPoint
from itertools import chain
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Final, TypeVar

import torch
from torch import Tensor

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

_ORACLE: Final = [
    held
    for held in vars(reference).values()
    if isinstance(held, FunctionType) and held.__module__ == reference.__name__
]
"""As it was before any backend was loaded."""

_WHOLE: Final = 1 << 30
_END: Final = 1 << 24
"""Bytes of an input up to which all are summed up, and how many of a larger one: its last, where its used pages are."""

_LOCK: Final = threading.Lock()
_HELD: Final[dict[Any, tuple[CodeType, int]]] = {}
"""Functions that are out of reach: their code, and for how many threads."""

Made = TypeVar("Made")

_CLOSED: Final = ExitStack()

_KERNEL: Final = "tape:mla_decode@tape"


def is_judged_twice(obligation: str) -> bool:
    """Whether an obligation compares numbers; those of L0 are about what a backend says of itself."""
    return not obligation.startswith("CAP")


def is_judged_apart(obligation: str) -> bool:
    """Whether every case of an obligation is judged in the other process, and beside the backend none."""
    return obligation.startswith("MLA")


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
        # What the backend puts in their place is no concern of the caller's, whose tensors these are.
        given = copy.copy(args)
        with self._watched(), out_of_reach(*_ORACLE):
            self.inner.mla_decode(args)
        entry: dict[str, Any] = {name: memory_of(to).cpu().clone() for name, to in _outputs(given).items()}
        if given.q.device.type == "cpu":
            # Elsewhere a NaN that fills memory may have other bits.
            entry["sums"] = sums(given)
        self.tape.note(entry | {"shapes": _shapes(given)})

    @contextmanager
    def _watched(self) -> Iterator[None]:
        as_it_was = manners.shared()
        try:
            yield
        except Exception as error:
            # As the nearest of HAL's own: what a backend derives from them is not there when it is judged.
            known = [kind.__name__ for kind in type(error).__mro__ if getattr(errors, kind.__name__, None) is kind]
            self.tape.note({"raised": [*known, type(error).__name__][0], "text": str(error)})
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


def memory_of(tensor: Tensor) -> Tensor:
    """All bytes of the allocation that a tensor is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def _outputs(args: MlaDecodeArgs) -> dict[str, Tensor]:
    return {"out": args.out, "lse": args.lse}


def _shapes(args: MlaDecodeArgs) -> list[list[int]]:
    return [list(tensor.shape) for tensor in _outputs(args).values()]


def sums(args: MlaDecodeArgs) -> dict[str, int]:
    """A checksum over the memory of every input."""
    names = ("q", "kv_cache", "block_table", "cache_seqlens", "cu_seqlens_q")
    found = {}
    for name in names:
        tensor = getattr(args, name)
        if tensor is not None:
            memory = memory_of(tensor.detach())
            found[name] = zlib.crc32((memory if len(memory) <= _WHOLE else memory[-_END:]).numpy().data)
    return found


@contextmanager
def out_of_reach(*functions: Any) -> Iterator[None]:
    """Make functions of the oracle raise for everybody who holds them: a backend computes by itself."""
    with _LOCK:
        for function in functions:
            kept, users = _HELD.pop(function, (function.__code__, 0))
            _HELD[function] = kept, users + 1
            function.__code__ = _refuses.__code__
    try:
        yield
    finally:
        with _LOCK:
            for function in functions:
                kept, users = _HELD.pop(function)
                if users > 1:
                    _HELD[function] = kept, users - 1
                else:
                    function.__code__ = kept


def close_the_reference() -> None:
    """Put it out of reach in this process, before anything of the backend is there to take a copy."""
    _CLOSED.enter_context(out_of_reach(*_ORACLE))


@contextmanager
def within_reach() -> Iterator[None]:
    """Let the suite itself ask the reference here for a while: to explain what others judged already."""
    if not _HELD:
        yield
        return
    _CLOSED.close()
    try:
        yield
    finally:
        close_the_reference()


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
        self.changed: set[str] = set()

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
        if entry.get("shapes") != _shapes(args):
            raise Departed("a decode of other sizes than the backend was seen to answer")
        for name, into in _outputs(args).items():
            memory = memory_of(into)
            if entry[name].shape != memory.shape:
                raise Departed("a decode into other memory than the backend was seen to write")
            memory.copy_(entry[name])
        if "sums" in entry:
            mine = sums(args)
            self.changed.update(name for name in mine if mine[name] != entry["sums"].get(name))

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
    _REPLAYER.changed.clear()
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
    for name in sorted(_REPLAYER.changed):
        context.problem(f"the input {name} was changed by a call")
    return context.record.to_dict()
