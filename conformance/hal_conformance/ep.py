"""The rank's side of an expert-parallel case: plays a script of calls and writes down everything that happened.

All inputs come with the script and all results go back: a rank decides nothing and judges nothing but what only it can
see, that inputs keep their bits and memory around outputs is not written.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import hal
from hal_conformance import manners
from hal_conformance.around import SETTINGS
from hal_conformance.memory import Guarded, Placed, bits
from hal_conformance.ranks import Rank

OUTPUTS: Final = (
    "out",
    "cumulative_local_expert_recv_stats",
    "dispatch_wait_recv_cost_stats",
    "combine_wait_recv_cost_stats",
)
"""Arguments that a call writes."""

CALLS: Final = ("dispatch", "combine", "low_latency_dispatch", "low_latency_combine", "hooked")
RECEIVED: Final = ("recv_x", "recv_topk_idx", "recv_topk_weights")
"""Tensors of the result of a normal dispatch; scales come with recv_x."""

TOLD: Final = ("recv_src_rank", "recv_src_position", "recv_src_choice", "recv_counts", "sent_counts")
"""What the handle of a normal dispatch tells when it is asked."""

_FIELDS: Final = ("argument", "got", "legal", "rank", "phase", "reason", "expert", "expected", "received")
_PLACES: Final = ("/dev/shm/", "/tmp/", "/run/", "/var/tmp/")


@dataclass(frozen=True, slots=True)
class Ref:
    """Something an earlier step of the same rank gave: the attribute ``field`` of the result called ``name``."""

    name: str
    field: str = "handle"


@dataclass(frozen=True, slots=True)
class Late:
    """A ``previous_event``: only its ``wait()`` puts the right rows into the argument ``x``."""

    rows: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """One thing a rank does.

    Attributes
    ----------
    op : str
        A method of `hal.EpBuffer`, or one of the player's own: group, barrier, open, close, hooked, finish, look, tell,
        drop, fill, spoil, scribble, processors, sleep, die, die_after, stop, files.
    name : str
        What its result is called.
    args : mapping of str to object
    on : str
        The name of the buffer.
    elsewhere : bool
        Whether the call is made on a thread of its own, as a backward pass is.
    around : str
        The setting of the process (`hal_conformance.around`) while it is done; empty for none.
    """

    op: str
    name: str = ""
    args: Mapping[str, Any] = field(default_factory=dict)
    on: str = "buffer"
    elsewhere: bool = False
    around: str = ""


@dataclass(slots=True)
class Done:
    """What became of a step.

    Attributes
    ----------
    name : str
    begin, end : float
        By a clock all ranks share.
    raised : dict or None
        Type, text and fields of the error.
    problems : list of str
        Changed inputs, written guards, results that came too early.
    result : dict of str to object
        Tensors on the host, numbers, texts.
    """

    name: str
    begin: float = 0.0
    end: float = 0.0
    raised: dict[str, Any] | None = None
    problems: list[str] = field(default_factory=list)
    result: dict[str, Any] = field(default_factory=dict)


def play(rank: Rank) -> dict[str, Any]:
    """Play this rank's script."""
    rank.join()
    player = _Player(rank)
    return player.play()


def own_device(asked: str, rank: int) -> str:
    """The device of a rank: where none is named by number, ranks take those of the machine in turn.

    It becomes the current one, as in a program of one process a device.
    """
    wanted = torch.device(asked)
    if wanted.type == "cpu":
        return asked
    module = torch.get_device_module(wanted)
    index = rank % max(module.device_count(), 1) if wanted.index is None else wanted.index
    module.set_device(index)
    return f"{wanted.type}:{index}"


class _Event:
    def __init__(self, rows: Tensor, into: Tensor) -> None:
        self.rows, self.into = rows, into

    def wait(self) -> None:
        time.sleep(0.02)
        self.into.copy_(self.rows)


class _Player:
    def __init__(self, rank: Rank) -> None:
        self.rank = rank
        self.device = own_device(rank.payload["device"], rank.rank)
        self.backend = rank.payload["backend"]
        self.live: dict[str, Any] = {}
        self.guards: dict[str, list[Guarded]] = {}

    def play(self) -> dict[str, Any]:
        before = self._launches()
        done = []
        for step in self.rank.payload["script"]:
            self.rank.phase(f"{step.op} {step.name}".strip())
            done.append(self._step(step))
        launched = {k: v - before.get(k, 0) for k, v in self._launches().items() if v > before.get(k, 0)}
        for one in self.live.values():
            if isinstance(one, hal.EpBuffer):
                one.close()
        return {"steps": done, "launches": launched}

    def _launches(self) -> dict[str, int]:
        from hal import plugins

        backend = plugins.registry().status(self.backend).backend
        return {} if backend is None else dict(backend.launches())

    def _step(self, step: Step) -> Done:
        done = Done(step.name, time.monotonic())
        with SETTINGS[step.around]() if step.around else nullcontext():
            as_it_was = manners.shared()
            try:
                own = getattr(self, f"_{step.op}", None)
                if own is not None:
                    own(step, done)
                else:
                    self._call(step, done)
            except Exception as error:
                done.raised = {"type": type(error).__name__, "text": str(error)}
                done.raised |= {name: getattr(error, name) for name in _FIELDS if hasattr(error, name)}
                done.raised = {k: v if isinstance(v, (int, type(None))) else str(v) for k, v in done.raised.items()}
            done.end = done.end or time.monotonic()
            changed = manners.changed(as_it_was)
        if changed:
            done.problems.append(f"changed {', '.join(changed)}, which the whole process shares")
        return done

    def _call(self, step: Step, done: Done) -> None:
        guards = self.guards[step.name] = []
        arguments = {key: self._argument(key, value, guards) for key, value in step.args.items()}
        if isinstance(step.args.get("previous_event"), Late):
            rows = step.args["previous_event"].rows.to(self.device)
            arguments["previous_event"] = _Event(rows, arguments["x"])
        positional = [arguments.pop("rank")] if step.op == "set_mask" else []
        method = getattr(self.live[step.on], step.op)
        done.begin = time.monotonic()
        result = self._elsewhere(method, arguments) if step.elsewhere else method(*positional, **arguments)
        done.end = time.monotonic()
        self.live[step.name] = result
        if arguments.get("return_recv_hook"):
            self._unwritten(step.name, done)
        elif not arguments.get("async_finish"):
            self._collect(step.name, done)

    def _elsewhere(self, method: Any, arguments: dict[str, Any]) -> Any:
        def call() -> Any:
            own_device(self.rank.payload["device"], self.rank.rank)
            return method(**arguments)

        return _on_another_thread(call)

    def _unwritten(self, name: str, done: Done) -> None:
        """See that a call whose hook has not run has written nothing of the caller's."""
        for guard in self.guards[name]:
            if guard.name in OUTPUTS and guard.modified():
                done.problems.append(f"{guard.name} was written before the hook ran")

    def _argument(self, key: str, value: Any, guards: list[Guarded]) -> Any:
        if isinstance(value, Ref):
            found = getattr(self.live[value.name], value.field) if value.field else self.live[value.name]
            return found[0] if isinstance(found, tuple) and value.field == "recv_x" else found
        if isinstance(value, tuple) and value and isinstance(value[0], (Tensor, Placed)):
            return tuple(self._argument(key, one, guards) for one in value)
        if not isinstance(value, (Tensor, Placed)):
            return value
        guard = (value if isinstance(value, Placed) else Placed(value)).guarded(key, self.device)
        guards.append(guard)
        return guard.view

    def _collect(self, name: str, done: Done) -> None:
        found, result = done.result, self.live[name]
        for guard in self.guards.get(name, ()):
            problem = guard.overrun() if guard.name in OUTPUTS else ""
            changed = guard.name not in OUTPUTS and bool((bits(guard.storage) != guard.before).any())
            late = guard.name == "x" and any(isinstance(s.args.get("previous_event"), Late) for s in self._steps(name))
            if changed and not late:
                problem = guard.modified()
            if problem:
                done.problems.append(problem)
            if guard.name in OUTPUTS:
                found[guard.name] = guard.view.detach().cpu().clone()
        if isinstance(result, list):
            found["value"] = list(result)
        fields: tuple[str, ...] = getattr(result, "_fields", ()) or getattr(type(result), "__slots__", ())
        for key in fields:
            value = getattr(result, key, None)
            if key == "handle":
                self._handle(value, found)
            elif key == "recv_x" and isinstance(value, tuple):
                found["recv_x"], found["recv_scales"] = (one.detach().cpu().clone() for one in value)
                found["scales_strides"] = list(value[1].stride())
            elif isinstance(value, Tensor):
                found[key] = value.detach().cpu().clone()
            elif key not in ("event", "hook", "owner", "state"):
                found[key] = value

    def _steps(self, name: str) -> list[Step]:
        return [step for step in self.rank.payload["script"] if step.name == name]

    @staticmethod
    def _handle(handle: Any, found: dict[str, Any]) -> None:
        for key in ("num_recv_tokens", "num_dropped", "num_tokens"):
            if hasattr(handle, key):
                found[key] = getattr(handle, key)
        for key in ("src_info", "layout_range"):
            if hasattr(handle, key):
                found[key] = getattr(handle, key).detach().cpu().clone()

    # The player's own steps.

    def _group(self, step: Step, done: Done) -> None:
        """A group of some of the ranks; all ranks make it."""
        self.live[step.name] = dist.new_group(step.args["ranks"], timeout=timedelta(seconds=60), backend="gloo")

    def _barrier(self, step: Step, done: Done) -> None:
        """Wait for all ranks, by no means of the backend's."""
        dist.barrier()

    def _open(self, step: Step, done: Done) -> None:
        arguments = {"backend": self.backend, "device": self.device, **step.args}
        if isinstance(arguments.get("group"), Ref):
            arguments["group"] = self.live[arguments["group"].name]
        self.live[step.name or "buffer"] = hal.EpBuffer(**arguments)

    def _close(self, step: Step, done: Done) -> None:
        self.live[step.on].close()

    def _hooked(self, step: Step, done: Done) -> None:
        """Make a call and run its hook: it is one step, whichever of them raises."""
        begin, call = time.monotonic(), step.args["call"]
        self._call(call, done)
        try:
            self._finish(Step("finish", args={"of": call.name}), done)
        finally:
            done.begin, done.end = begin, time.monotonic()

    def _finish(self, step: Step, done: Done) -> None:
        """Complete an asynchronous call, by its hook where it has one; on a thread of its own if told so."""
        result = self.live[step.args["of"]]
        wait = result.event.wait if result.hook is None else result.hook
        if result.hook is not None:
            self._unwritten(step.args["of"], done)
        done.begin = time.monotonic()
        if step.args.get("elsewhere"):
            _on_another_thread(wait)
        else:
            wait()
        done.end = time.monotonic()
        self._collect(step.args["of"], done)

    def _look(self, step: Step, done: Done) -> None:
        """Take the results of an earlier call once more."""
        self._collect(step.args["of"], done)

    def _tell(self, step: Step, done: Done) -> None:
        """Ask the handle of a dispatch where its rows came from."""
        handle = self.live[step.args["of"]].handle
        done.result |= {name: getattr(handle, name).detach().cpu().clone() for name in TOLD}

    def _drop(self, step: Step, done: Done) -> None:
        """Let go of a result."""
        self.live.pop(step.args["of"], None)

    def _processors(self, step: Step, done: Done) -> None:
        """Set how many processors of the device later calls of this rank may take."""
        self.live[step.on].num_sms = step.args["number"]

    def _fill(self, step: Step, done: Done) -> None:
        """Write into memory that the backend lent."""
        self.live[step.args["into"]].copy_(step.args["value"].to(self.device))

    def _spoil(self, step: Step, done: Done) -> None:
        """Put other, legal values into what a call was given to read, or into those of these names."""
        for guard in self.guards[step.args["of"]]:
            if guard.name not in OUTPUTS and guard.name in step.args.get("names", (guard.name,)):
                guard.view.fill_(3.0 if guard.view.is_floating_point() else 0)
                guard.seal()

    def _scribble(self, step: Step, done: Done) -> None:
        """Use the tensors of a result for something else, and let go of them: only its handle stays."""
        result = self.live[step.args["of"]]
        for name in RECEIVED:
            value = getattr(result, name)
            for one in value if isinstance(value, tuple) else (value,):
                if one is not None:
                    one.view(torch.uint8).fill_(1)
        self.live[step.args["of"]] = SimpleNamespace(handle=result.handle)

    def _sleep(self, step: Step, done: Done) -> None:
        time.sleep(step.args["seconds"])

    def _die(self, step: Step, done: Done) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def _die_after(self, step: Step, done: Done) -> None:
        """Die wherever this process is then."""

        def later() -> None:
            time.sleep(step.args["seconds"])
            os.kill(os.getpid(), step.args.get("signal", signal.SIGKILL))

        threading.Thread(target=later, daemon=True).start()

    def _stop(self, step: Step, done: Done) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def _files(self, step: Step, done: Done) -> None:
        """Everything with a name in memory or in a temporary folder that this process has open or mapped."""
        maps = [line.split(maxsplit=5)[5] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line]
        links = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _is_open(fd)]
        named = {path for path in maps + links if path.startswith(_PLACES) and not path.endswith(" (deleted)")}
        done.result["files"] = sorted(path for path in named if not path.startswith(str(self.rank.folder)))
        done.result["pid"] = os.getpid()


def _on_another_thread(call: Callable[[], Any]) -> Any:
    with ThreadPoolExecutor(1) as other:
        return other.submit(call).result()


def _is_open(fd: str) -> bool:
    return os.path.lexists(f"/proc/self/fd/{fd}")
