"""What every call of a buffer shares: checks that all ranks hear of, completion, and what is left of a failure."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial

import torch

from hal.ep.doctor import write_dump
from hal.ep.engine import EpEngine, Finish
from hal.ep.results import (
    DONE,
    EpCompletion,
)
from hal.spec.capability import EpCapabilities
from hal.spec.ep import (
    EpBufferArgs,
)
from hal.spec.errors import RankFailure, SpecError, UnsupportedError

_process = 0


def this_process() -> int:
    """Another number in a forked child than in its parent; asking the kernel would cost a call a microsecond."""
    return _process


def _forked() -> None:
    global _process
    _process += 1


os.register_at_fork(after_in_child=_forked)


class Calls:
    """One rank's end of an open buffer, as its calls see it."""

    _args: EpBufferArgs
    _backend: str
    _declared: EpCapabilities
    _engine: EpEngine
    _opened_by: int
    _recorded = False

    def records(self) -> list[Mapping[str, object]]:
        """The flight recorder: the last operations of every rank of this node, oldest first."""
        return list(self._engine.records())

    def _require_own(self) -> None:
        """Refuse, here alone, what a forked child calls: it would speak in the name of the process it came from."""
        if self._opened_by != _process:
            raise SpecError("buffer", "one that another process opened", "one that this process opened itself")

    def _require_mode(self, mode: str) -> None:
        if mode not in self._args.modes:
            raise SpecError("modes", self._args.modes, f"a buffer made with {mode!r} among its modes")

    def _refused(self, phase: str, error: SpecError | UnsupportedError) -> Exception:
        """Tell the other ranks what is wrong with a call here, since they would wait otherwise."""
        if isinstance(error, SpecError):
            return self._engine.refuse(phase, error)
        self._engine.refuse(phase, SpecError(error.argument, error.got, error.supported))
        return error

    def _completion(
        self, finish: Finish, async_finish: bool, return_recv_hook: bool
    ) -> tuple[EpCompletion, EpCompletion | None]:
        if return_recv_hook or async_finish:
            late = EpCompletion(partial(self._late, finish, torch.is_inference_mode_enabled()))
            return late, late if return_recv_hook else None
        finish()
        return DONE, None

    def _late(self, finish: Finish, inference: bool) -> None:
        """Finish a call in the mode in which it was made: its tensors are written in that alone."""
        self._require_own()
        try:
            with torch.inference_mode() if inference else nullcontext():
                finish()
        except RankFailure as failure:
            self._record(failure)
            raise

    def _record(self, failure: RankFailure) -> None:
        """Leave a dump for ``hal ep doctor``, once."""
        if not self._recorded:
            self._recorded = True
            write_dump(failure, self._args.rank, self._args.num_ranks, self.records())
