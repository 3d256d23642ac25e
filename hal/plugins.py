"""Discovery and selection of backends.

A backend is an installed distribution with an entry point in the group ``hal.backends``; the entry point's *name* is
the backend's name and its value is a module (or object) with one pluggy hook::

    from hal.plugins import hookimpl

    @hookimpl
    def hal_backend():
        return MyBackend()

Discovery reads metadata only. A plugin is imported when it is selected or asked about, inside a fence: whatever it
raises becomes the reason why *it* is out and never touches another one.
"""

from __future__ import annotations

import difflib
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Final, Literal, TypeVar

import pluggy

from hal.backend import Backend, Probe
from hal.spec import SPEC_VERSION
from hal.spec.capability import Capabilities
from hal.spec.errors import BackendUnavailable, SpecError, shown

GROUP: Final = "hal.backends"
ENV: Final = "HAL_BACKEND"

T = TypeVar("T")

hookspec = pluggy.HookspecMarker("hal")
hookimpl = pluggy.HookimplMarker("hal")


class HookSpecs:
    """The hooks a plugin implements."""

    @hookspec
    def hal_backend(self) -> Backend:  # type: ignore[empty-body]
        """Return the backend. Cheap: no device, no driver, no native library is touched before `Backend.probe`."""


State = Literal["available", "unavailable", "refused", "broken"]
"""``available``: usable now. ``unavailable``: its probe says what is missing. ``refused``: this HAL will not load it
(two distributions of one name, another specification). ``broken``: it raised."""


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of one backend after asking it, and why.

    Attributes
    ----------
    name : str
    state : {"available", "unavailable", "refused", "broken"}
    reason : str
        One line.
    fix : str
        What to type or install, empty where there is nothing to say.
    distribution : str
        ``name version`` of the distribution (or distributions) that registered it.
    backend, capabilities, probe : objects or None
        Present as far as the plugin could be followed.
    error : BaseException or None
        What a broken plugin raised.
    """

    name: str
    state: State
    reason: str
    fix: str = ""
    distribution: str = ""
    backend: Backend | None = None
    capabilities: Capabilities | None = None
    probe: Probe | None = None
    error: BaseException | None = None

    def line(self) -> str:
        """Name, state and reason with the fix, in one line."""
        return f"{self.name} ({self.state}: {self.reason}{'; fix: ' + self.fix if self.fix else ''})"


@dataclass(slots=True, eq=False)
class Selected:
    """An available backend in use, with what it declares. ``admitted`` remembers call geometries already allowed."""

    name: str
    backend: Backend
    capabilities: Capabilities
    admitted: set[Any] = field(default_factory=set)


class Registry:
    """All backends of one set of entry points, each asked at most once."""

    def __init__(self, found: Iterable[EntryPoint]) -> None:
        self._found: dict[str, list[EntryPoint]] = {}
        for entry in found:
            self._found.setdefault(entry.name, []).append(entry)
        self._statuses: dict[str, Status] = {}
        self._selected: dict[str | None, Selected] = {}
        self._lock = threading.RLock()

    def names(self) -> list[str]:
        """Every discovered name, sorted. Imports nothing."""
        return sorted(self._found)

    def status(self, name: str) -> Status:
        """Import and probe one backend, once.

        Raises
        ------
        BackendUnavailable
            No installed distribution registers that name.
        """
        with self._lock:
            if name not in self._found:
                raise self._unknown(name)
            if name not in self._statuses:
                self._statuses[name] = _ask(name, self._found[name])
            return self._statuses[name]

    def statuses(self) -> list[Status]:
        """Import and probe every backend; best priority first, then by name."""
        known = [self.status(name) for name in self.names()]
        return sorted(known, key=lambda s: (s.state != "available", -_priority(s), s.name))

    def selected(self, name: str | None) -> Selected | None:
        """The backend of this name if it was selected before; the fast path of every call."""
        return self._selected.get(name)

    def select(self, name: str | None, source: str) -> Selected:
        """The backend of this name, or for None the available one with the highest priority.

        ``source`` says who chose the name (``HAL_BACKEND``, ``backend=`` …), for the error.

        Raises
        ------
        BackendUnavailable
            Unknown, broken, refused or without a device. There is no silent fallback.
        """
        with self._lock:
            if name is None:
                best = next(iter(self.statuses()), None)
                if best is None or best.state != "available":
                    raise self._none_available()
                self._selected[None] = self.select(best.name, source)
            elif name not in self._selected:
                status = self._available(name, source)
                assert status.backend is not None
                assert status.capabilities is not None
                self._selected[name] = Selected(name, status.backend, status.capabilities)
            return self._selected[name]

    def _available(self, name: str, source: str) -> Status:
        if name not in self._found:
            raise self._unknown(name, source)
        status = self.status(name)
        if status.state != "available":
            others = self._others(name)
            fix = f" To fix it: {status.fix}." if status.fix else ""
            message = f"{source}: backend {name!r} is {status.state}: {status.reason}.{fix} {others}"
            raise BackendUnavailable(message, requested=name, reasons=self._reasons()) from status.error
        return status

    def _unknown(self, name: str, source: str = "backend") -> BackendUnavailable:
        near = difflib.get_close_matches(name.lower(), self.names(), n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        message = f"{source}: no installed backend is called {name!r}.{hint} {self._others(name)}"
        return BackendUnavailable(message, requested=name, reasons=self._reasons())

    def _none_available(self) -> BackendUnavailable:
        message = f"no backend is available. {self._others(None)}"
        return BackendUnavailable(message, reasons=self._reasons())

    def _others(self, name: str | None) -> str:
        lines = [s.line() for s in self.statuses() if s.name != name]
        if not lines and name is None:
            return "None is installed; 'pip install hal-cpu' gives the embedded one."
        if not lines:
            return "No other backend is installed; 'pip install hal-cpu' gives the embedded one."
        return f"There {'is' if len(lines) == 1 else 'are'}: {', '.join(lines)}."

    def _reasons(self) -> dict[str, str]:
        return {s.name: f"{s.state}: {s.reason}" for s in self.statuses()}


def _priority(status: Status) -> int:
    return status.backend.priority if status.backend is not None else -1


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist is not None else "an unnamed distribution"


def _ask(name: str, entries: list[EntryPoint]) -> Status:
    """Follow one plugin from its metadata to its probe; never raises for what the plugin does."""
    distribution = " and ".join(sorted(map(_distribution, entries)))
    if len(entries) > 1:
        reason = f"registered by {len(entries)} distributions, {distribution}"
        return Status(name, "refused", reason, "uninstall all but one of them", distribution)
    backend: Backend | None = None
    try:
        backend = _load(name, entries[0])
        refusal = _spec_mismatch(backend.spec_version)
        if refusal:
            return Status(name, "refused", *refusal, distribution, backend)
        probe = _expect(backend.probe(), Probe, "probe()")
        if not probe.available:
            return Status(name, "unavailable", probe.reason, probe.fix, distribution, backend, None, probe)
        capabilities = _expect(backend.capabilities(), Capabilities, "capabilities()")
        return Status(name, "available", probe.reason, probe.fix, distribution, backend, capabilities, probe)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit too: a plugin that calls sys.exit() at import must not end its neighbours' process.
        first_line = (str(error).splitlines() or [""])[0]
        reason = f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__
        fix = f"report it to the authors of {distribution}, or uninstall it"
        return Status(name, "broken", reason, fix, distribution, backend, error=error)


def _load(name: str, entry: EntryPoint) -> Backend:
    """Import one plugin into a plugin manager of its own, so that no plugin sees another."""
    manager = pluggy.PluginManager("hal")
    manager.add_hookspecs(HookSpecs)
    manager.register(entry.load(), name)
    manager.check_pending()
    made = manager.hook.hal_backend()
    if len(made) != 1 or not isinstance(made[0], Backend):
        raise TypeError(f"{entry.value} must implement the hook hal_backend() and return one hal.backend.Backend")
    _expect(made[0].spec_version, str, "spec_version")
    _expect(made[0].priority, int, "priority")
    return made[0]


def _expect(value: T, kind: type[T], what: str) -> T:
    """What a plugin gave, refused here, within its fence, where it is not what the contract says."""
    if not isinstance(value, kind):
        raise TypeError(f"{what} of the backend must give {kind.__name__}, got {type(value).__name__}")
    return value


def _spec_mismatch(theirs: str) -> tuple[str, str] | None:
    """Reason and fix where a backend written against specification ``theirs`` cannot run under ours."""
    major, minor = _version(theirs)
    our_major, our_minor = _version(SPEC_VERSION)
    if major == our_major and minor <= our_minor:
        return None
    reason = f"written for specification {theirs}, this HAL speaks {SPEC_VERSION}"
    older = (major, minor) < (our_major, our_minor)
    return reason, "upgrade the backend" if older else "upgrade kernel-hal"


def _version(text: str) -> tuple[int, int]:
    parts = text.split(".") if isinstance(text, str) else []
    if len(parts) != 2 or not all(p.isdigit() for p in parts):
        raise ValueError(f"spec_version must read 'major.minor', got {text!r}")
    return int(parts[0]), int(parts[1])


_lock = threading.RLock()
_registry: Registry | None = None
_used: str | None = None
_env_before_use: str | None = None


def registry() -> Registry:
    """The backends installed in this environment; entry points are read once."""
    global _registry
    if _registry is None:
        with _lock:
            if _registry is None:
                _registry = Registry(entry_points(group=GROUP))
    return _registry


def reset() -> None:
    """Forget every discovery and choice: the next call reads entry points, ``HAL_BACKEND`` and devices anew."""
    global _registry
    use(None)
    _registry = None


def select(name: str | None = None) -> Selected:
    """The backend in force: ``name`` if given, else `use`, else ``HAL_BACKEND``, else the best available one.

    Raises
    ------
    SpecError
        ``name`` is not a string.
    BackendUnavailable
        See `Registry.select`.
    """
    _require_name("backend", name)
    chosen = name if name is not None else _used or os.environ.get(ENV) or None
    selected = registry().selected(chosen)
    return selected if selected is not None else registry().select(chosen, _source(name))


def _require_name(argument: str, name: object) -> None:
    if name is not None and not isinstance(name, str):
        raise SpecError(argument, shown(name), "the name of a backend, or None")


def _source(name: str | None) -> str:
    if name is not None:
        return "backend="
    return "hal.use" if _used is not None else f"{ENV}={os.environ.get(ENV, '')}"


def use(name: str | None) -> None:
    """Choose the backend for this process and its children (through ``HAL_BACKEND``); None takes the choice back.

    Raises
    ------
    SpecError
        ``name`` is not a string.
    BackendUnavailable
        The backend cannot be used; the earlier choice stays.
    """
    global _used, _env_before_use
    _require_name("name", name)
    with _lock:
        if name is not None:
            registry().select(name, "hal.use")
        if _used is None:
            _env_before_use = os.environ.get(ENV)
        _used = name
        exported = name if name is not None else _env_before_use
        if exported is None:
            os.environ.pop(ENV, None)
        else:
            os.environ[ENV] = exported
