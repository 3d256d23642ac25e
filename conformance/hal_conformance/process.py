"""The other end of a worker's pipe: starts it, asks it, and says how it died or that it hangs."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from typing import Any, Final

from hal_conformance.alone import BY_ITSELF

TAIL = 4000
"""Characters of a worker's output kept when it dies."""


INTERPRETER = [sys.executable, *(["-S"] if sys.flags.no_site else [])]
"""This interpreter, seeing the same installed distributions as this process."""

_START = "import sys; sys.path.remove(''); from hal_conformance.worker import main; main()"
"""Imports what is installed, whatever lies in the folder the command was given in."""

_UNSET = ("HAL_BACKEND", "HAL_VALIDATE", "HAL_EP_RANKS_PER_NODE", "PYTHONOPTIMIZE")
"""Variables that change what the HAL checks or does: the suite judges it as it is by default."""


OUTSIDE: Final = "which the suite did not send; the system does for want of memory"
"""Said of a signal that no fault of the process's own raises."""

_STACK: Final = re.compile(r'Current thread[^\n]*:\n +File "([^"\n]+)", line (\d+) in (\S+)')
"""The innermost call of the thread in question, as faulthandler prints it."""

_SENT: Final = ("SIGKILL", "SIGTERM", "SIGINT", "SIGHUP", "SIGQUIT")


def ending(code: int) -> str:
    """How a process ended that this suite did not end, from its exit code."""
    if code >= 0:
        return f"ended with exit code {code}"
    name = next((known.name for known in signal.Signals if known == -code), f"signal {-code}")
    return f"was killed by {name}" + (f", {OUTSIDE}" if name in _SENT else "")


def within(output: str) -> str:
    """Where the thread was that died or was asked, by the last stack that was printed; empty if none was."""
    found = _STACK.findall(output)
    return f" in {found[-1][2]} ({found[-1][0]}:{found[-1][1]})" if found else ""


class WorkerDied(Exception):
    """The process ended before it answered; says which, and by what signal or exit code.

    Attributes
    ----------
    output : str
        The end of what it printed, with the stack where the interpreter could still tell.
    """

    def __init__(self, who: str, code: int, output: str) -> None:
        super().__init__(f"{who} {ending(code)}{within(output)}")
        self.output = output


class WorkerGarbles(WorkerDied):
    """Something that is no answer came where the process answers; it is ended."""

    def __init__(self, who: str, line: bytes, output: str) -> None:
        Exception.__init__(
            self,
            f"{who} answered what this suite does not ({line[:40]!r}): the backend, or what it loads, writes to file "
            "descriptors that are not its own",
        )
        self.output = output


class WorkerHangs(Exception):
    """No answer within the time allowed. Attribute ``output`` ends with the stacks of its threads."""

    def __init__(self, who: str, seconds: float, output: str) -> None:
        super().__init__(f"{who} gave no answer within {seconds:g} s{within(output)}")
        self.output = output


class Worker:
    """One worker process, started when first asked."""

    role = "backend"
    who = "the worker process, in which the backend is called,"

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._requests = self._answers = -1
        self._buffer = b""
        self._output: Any = None

    def ask(self, request: dict[str, Any], timeout: float) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises
        ------
        WorkerDied, WorkerHangs
            The process is gone; the next request starts another.
        """
        if self._process is None:
            self._start()
        try:
            os.write(self._requests, json.dumps(request).encode() + b"\n")
        except BrokenPipeError:
            raise self._death() from None
        deadline = time.monotonic() + timeout
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise self._hang(timeout)
            ready, _, _ = select.select([self._answers], [], [], min(left, 1.0))
            if not ready:
                continue
            chunk = os.read(self._answers, 1 << 20)
            if not chunk:
                raise self._death()
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            answer = {}
        if not isinstance(answer, dict) or not answer or self._buffer:
            # More than what was asked for is nobody's answer either.
            garbled = WorkerGarbles(self.who, line, self._tail())
            self.stop()
            raise garbled
        return answer

    def _command(self) -> list[str]:
        """What starts the process, before its arguments."""
        return [*INTERPRETER, "-c", _START]

    def _environment(self) -> dict[str, str]:
        """Its variables."""
        return {name: value for name, value in os.environ.items() if name not in _UNSET}

    def start(self) -> None:
        """Start the process now, so that it is ready when it is asked."""
        if self._process is None:
            self._start()

    def _start(self) -> None:
        request_read, self._requests = os.pipe()
        self._answers, answer_write = os.pipe()
        self._buffer = b""
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [*self._command(), str(request_read), str(answer_write), self.role],
            env=self._environment(),
            pass_fds=(request_read, answer_write),
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            # Its own group, so that whatever a backend started dies with it.
            start_new_session=True,
        )
        os.close(request_read)
        os.close(answer_write)

    def _tail(self) -> str:
        self._output.seek(0)
        text: str = self._output.read().decode(errors="replace")
        return text[-TAIL:]

    def _death(self) -> WorkerDied:
        assert self._process is not None
        try:
            code = self._process.wait(10)
        except subprocess.TimeoutExpired:
            code = 0
        died = WorkerDied(self.who, code, self._tail())
        self.stop()
        return died

    def _hang(self, timeout: float) -> WorkerHangs:
        assert self._process is not None
        # faulthandler writes every thread's stack when told to.
        self._process.send_signal(signal.SIGUSR1)
        time.sleep(0.3)
        hangs = WorkerHangs(self.who, timeout, self._tail())
        self.stop()
        return hangs

    def stop(self) -> None:
        """End the process and everything it started."""
        process, self._process = self._process, None
        if process is None:
            return
        try:
            for descriptor in (self._requests, self._answers):
                os.close(descriptor)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.2)
        finally:
            # Also where a signal ends the run meanwhile.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            # What sleeps in a driver outlives even this; nobody's report waits for it.
            process.wait(5.0)
        self._output.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()


class Secluded(Worker):
    """A worker process in which no installed distribution runs code before it is imported.

    Interpreters do so for ``.pth`` files and ``sitecustomize``, torch for entry points in ``torch.backends``, and
    hypothesis for those in its own group: ways for a distribution to be in every process without being asked for.
    """

    role = "judge"
    who = "the judge, a process of the suite that never loads the backend,"

    def _command(self) -> list[str]:
        # This process's folders, but for the first, that of the script or the current one, unless it was asked for.
        asked = os.environ.get("PYTHONPATH", "").split(os.pathsep)
        paths = [path for index, path in enumerate(sys.path) if path and (index or path in asked)]
        start = f"import sys; sys.path[:] = {paths!r}; from hal_conformance.worker import main; main()"
        return [sys.executable, "-I", "-S", "-c", start]

    def _environment(self) -> dict[str, str]:
        return super()._environment() | BY_ITSELF
