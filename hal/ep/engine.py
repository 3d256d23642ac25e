"""The contract of an expert-parallel engine: what ``Backend.ep_buffer`` returns and `hal.EpBuffer` drives.

An engine receives validated arguments (`hal.spec.ep`). Its calls are collective: every rank of the group makes the
same calls in the same order. Every call posts its work and returns a result whose tensors are complete once the
result's ``finish`` has run; the front runs it at once, or hands it out as event or hook. An engine must notice when
ranks disagree, when one stops answering, and when a window is damaged: it raises, it never hangs and never reads out of
bounds. An error of one rank's own, as of its device, ends the buffer, and the other ranks are told (`own_failure`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from torch import Tensor

from hal.spec.ep import (
    EpCombineArgs,
    EpDispatchArgs,
    EpHandle,
    EpLayout,
    EpLowLatencyCombineArgs,
    EpLowLatencyDispatchArgs,
    EpLowLatencyHandle,
)
from hal.spec.errors import RankFailure, SpecError

Finish = Callable[[], None]
"""Completes a posted call: waits for the other ranks and fills the result's tensors. Called exactly once, on any
thread. Raises RankFailure when a rank does not answer."""


class Untimely(SpecError):
    """What a finish raises that cannot run now, and can at another time: it was not called."""


_REASON: Final = 300


def own_failure(rank: int, phase: str, error: BaseException) -> RankFailure:
    """What all others raise of an error that came to a rank by itself, and this rank at every later call."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return RankFailure(rank, phase, said if len(said) <= _REASON else f"{said[: _REASON - 1]}…")


@dataclass(slots=True, eq=False)
class EpDispatched:
    """A posted normal dispatch.

    Attributes
    ----------
    recv_x, recv_scales : Tensor, Tensor or None
        [rows, H] and [rows, scales a row]. Rows by source rank, then source position; in the expand layout grouped by
        local expert first, the padding of a group all zero.
    recv_topk_idx : Tensor
        [rows, K] int64 local expert ids, -1 where the expert lives elsewhere; in the expand layout [rows] the local
        expert of the row, -1 for padding.
    recv_topk_weights : Tensor or None
        float32 like recv_topk_idx, 0 where that is -1; None where the call had no weights.
    handle : EpHandle
    finish : Finish
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_topk_idx: Tensor
    recv_topk_weights: Tensor | None
    handle: EpHandle
    finish: Finish


@dataclass(slots=True, eq=False)
class EpCombined:
    """A posted normal combine: ``out`` [n, H], ``topk_weights`` [n, K] or None."""

    out: Tensor
    topk_weights: Tensor | None
    finish: Finish


@dataclass(slots=True, eq=False)
class EpLowLatencyDispatched:
    """A posted low-latency dispatch.

    Attributes
    ----------
    recv_x : Tensor
        [L, R · M, H] of the buffer's dtype or float8_e4m3fn; rows past the count are undefined.
    recv_scales : Tensor or None
        float32 [L, R · M, ceil(H / 128)], or packed int32 [L, R · M, ceil(H / 512)]; the next to last dimension is the
        contiguous one.
    recv_count : Tensor
        [L] int32.
    handle : EpLowLatencyHandle
    finish : Finish
    """

    recv_x: Tensor
    recv_scales: Tensor | None
    recv_count: Tensor
    handle: EpLowLatencyHandle
    finish: Finish


@dataclass(slots=True, eq=False)
class EpLowLatencyCombined:
    """A posted low-latency combine: ``out`` [n, H]."""

    out: Tensor
    finish: Finish


class EpEngine(ABC):
    """One rank's end of an open buffer."""

    @property
    @abstractmethod
    def owner(self) -> object:
        """Identity that this engine's handles carry."""

    @abstractmethod
    def layout(self, topk_idx: Tensor) -> EpLayout:
        """Count where the tokens of [n, K] go. Local: no other rank takes part."""

    @abstractmethod
    def dispatch(self, args: EpDispatchArgs) -> EpDispatched:
        """Send every token to the ranks of its experts."""

    @abstractmethod
    def combine(self, args: EpCombineArgs) -> EpCombined:
        """Bring the rows back and sum them in float32: bias, then top-k order."""

    @abstractmethod
    def low_latency_dispatch(self, args: EpLowLatencyDispatchArgs) -> EpLowLatencyDispatched:
        """Send every token to its experts' packed slots.

        Raises
        ------
        SpecError
            Two results are live already.
        """

    @abstractmethod
    def low_latency_combine(self, args: EpLowLatencyCombineArgs) -> EpLowLatencyCombined:
        """Bring the rows back and sum them weighted, in float32, in top-k order."""

    @abstractmethod
    def low_latency_combine_buffer(self, handle: EpLowLatencyHandle) -> Tensor:
        """Lend the [L, R · M, H] memory that the next combine with this handle and ``zero_copy=True`` reads.

        The same until that combine is made, even before the dispatch's finish has run.
        """

    @abstractmethod
    def refuse(self, phase: str, error: SpecError) -> SpecError:
        """Tell the other ranks that this rank's call was wrong, and return the error that all ranks raise.

        Takes the place of the call: the others' next call raises the same error instead of waiting.
        """

    @abstractmethod
    def set_mask(self, rank: int, masked: bool) -> None:
        """Carry on without a rank, or with it again."""

    @abstractmethod
    def masked(self) -> Sequence[bool]:
        """For each rank, whether it is masked."""

    @abstractmethod
    def records(self) -> Sequence[Mapping[str, object]]:
        """The flight recorder: the last operations of every reachable rank, oldest first."""

    @abstractmethod
    def memory(self) -> Mapping[str, int]:
        """Bytes this rank's windows hold, by purpose."""

    @abstractmethod
    def close(self) -> None:
        """Release windows and handles. Idempotent; never waits for another rank."""
