"""The `hal.EpBuffer` behind a published buffer: one for each geometry, opened by the first call that has it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import torch
import torch.distributed as dist

from hal.ep.buffer import EpBuffer
from hal.plugins import select
from hal.spec.errors import HalError, SpecError, UnsupportedError

TIMEOUT: Final = 100.0
"""Seconds to wait for another rank, as the published kernels do."""

_LEAST_TOPK: Final = 16
_TOKENS: Final = 4096


class Pool:
    """Opens buffers over one group and closes them all.

    Parameters
    ----------
    group : ProcessGroup
    timeout : float
        Seconds to wait for another rank.
    mask_ranks : bool
        Whether low-latency buffers may carry on without a failed rank.
    """

    def __init__(self, group: Any, timeout: float = TIMEOUT, mask_ranks: bool = False) -> None:
        if not dist.is_initialized():
            raise SpecError("group", "no initialised torch.distributed", "call torch.distributed.init_process_group")
        if not isinstance(group, dist.ProcessGroup):
            raise SpecError("group", type(group).__name__, "a torch.distributed.ProcessGroup this process belongs to")
        chosen = select()
        if chosen.capabilities.ep is None:
            legal = "no expert-parallel communication"
            raise UnsupportedError(chosen.name, "group", "an expert-parallel buffer", legal)
        self.backend = chosen.name
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.mask_ranks = mask_ranks
        self._timeout = timeout
        self._open: dict[tuple[Any, ...], EpBuffer] = {}
        self._masked: dict[int, bool] = {}
        self._last: dict[str, EpBuffer] = {}
        self._closed = False

    @contextmanager
    def checking(self, mode: str, buffer: EpBuffer | None = None) -> Iterator[None]:
        """A block that checks a collective call before a buffer gets it: what is wrong here is wrong on every rank.

        Parameters
        ----------
        mode : str
            Of the call.
        buffer : EpBuffer, optional
            To which the other ranks make the call; by default the one that had the last call of this mode, and where
            there has been none, the one they are about to open.

        Raises
        ------
        SpecError
            What the block raised, or what another rank refused at the same time: the same on every rank.
        UnsupportedError
            What the block raised; the other ranks raise a SpecError that says the same.
        """
        self.require_open()
        try:
            yield
        except (SpecError, UnsupportedError) as error:
            try:
                self._refuse(self._last.get(mode) if buffer is None else buffer, error)
            except SpecError as agreed:
                if isinstance(error, SpecError):
                    raise agreed from None
            raise error from None

    def _refuse(self, buffer: EpBuffer | None, error: SpecError | UnsupportedError) -> None:
        legal = error.legal if isinstance(error, SpecError) else error.supported
        told = SpecError(error.argument, error.got, legal)
        if buffer is None:
            EpBuffer.refuse_opening(self.group, told, self._timeout)
        buffer.refuse(told)

    def normal(self, num_experts: int, hidden: int, topk: int, dtype: torch.dtype) -> EpBuffer:
        """The buffer of a normal call; its windows grow to what is sent."""
        self._last["normal"] = found = self.beside(num_experts, hidden, topk, dtype)
        return found

    def beside(self, num_experts: int, hidden: int, topk: int, dtype: torch.dtype) -> EpBuffer:
        """The buffer of what a normal call sends besides."""
        return self._get("normal", num_experts, hidden, topk, dtype, _TOKENS)

    def low_latency(self, num_experts: int, hidden: int, topk: int, dtype: torch.dtype, tokens: int) -> EpBuffer:
        """The buffer of a low-latency call, for at most ``tokens`` of them a rank."""
        found = self._get("low_latency", num_experts, hidden, topk, dtype, tokens)
        self._last["low_latency"] = found
        return found

    def _get(self, mode: str, num_experts: int, hidden: int, topk: int, dtype: torch.dtype, tokens: int) -> EpBuffer:
        self.require_open()
        # The bound on K is a power of two, so that calls with a little more need no further buffer.
        room = max(_LEAST_TOPK, 1 << (topk - 1).bit_length())
        key = mode, num_experts, hidden, room, dtype, tokens
        if key not in self._open:
            self._open[key] = made = EpBuffer(
                self.group,
                num_experts=num_experts,
                hidden=hidden,
                topk=room,
                max_tokens_per_rank=tokens,
                dtype=dtype,
                modes=(mode,),
                overflow="grow" if mode == "normal" else "error",
                timeout=self._timeout,
                mask_ranks=self.mask_ranks and mode == "low_latency",
                backend=self.backend,
            )
            if mode == "low_latency":
                for rank, masked in self._masked.items():
                    made.set_mask(rank, masked)
        return self._open[key]

    def set_mask(self, rank: int, masked: bool) -> None:
        """Carry on without a rank in every low-latency buffer, those still to be opened too."""
        for one in self._low_latency():
            one.set_mask(rank, masked)
        self._masked[rank] = masked

    def masked(self) -> list[bool]:
        """For each rank, whether any low-latency buffer carries on without it."""
        found = [self._masked.get(rank, False) for rank in range(self.size)]
        for one in self._low_latency():
            found = [a or b for a, b in zip(found, one.masked(), strict=True)]
        return found

    def _low_latency(self) -> list[EpBuffer]:
        self.require_open()
        return [one for key, one in self._open.items() if key[0] == "low_latency"]

    def require_open(self) -> None:
        """Refuse a call on a destroyed buffer."""
        if self._closed:
            raise SpecError("destroy", "a call on a destroyed buffer", "calls before destroy()")

    def close(self) -> None:
        """Close every buffer. Idempotent."""
        self._closed = True
        for one in self._open.values():
            one.close()
        self._open.clear()
        self._last.clear()


@contextmanager
def published(names: Mapping[str, str]) -> Iterator[None]:
    """Errors of a block name the caller's arguments instead of those of `hal.EpBuffer`."""
    try:
        yield
    except SpecError as error:
        raise SpecError(names.get(error.argument, error.argument), error.got, error.legal) from None
    except UnsupportedError as error:
        argument = names.get(error.argument, error.argument)
        raise UnsupportedError(error.backend, argument, error.got, error.supported) from None


def unsupported(argument: str, got: object, supported: object) -> UnsupportedError:
    """The refusal of something published that no engine declares."""
    try:
        backend = select().name
    except HalError:
        backend = "none"
    return UnsupportedError(backend, argument, got, supported)
