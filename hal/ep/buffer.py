"""`hal.EpBuffer`: expert-parallel communication as the user calls it."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Any, NoReturn

import torch

from hal.ep.calls import this_process
from hal.ep.engine import EpEngine
from hal.ep.low_latency_calls import LowLatencyCalls
from hal.ep.memory import size_hint
from hal.ep.normal_calls import NormalCalls
from hal.ep.opening import TIMEOUT, agreed_args
from hal.ep.rendezvous import agree, exchange_over
from hal.spec.ep import (
    MODES,
    EpBufferArgs,
)
from hal.spec.errors import SpecError
from hal.spec.tensors import require_int


class EpBuffer(NormalCalls, LowLatencyCalls):
    """Dispatch and combine over the ranks of a group; use as a context manager, the same on every rank.

    All calls but `layout` are collective: every rank makes the same calls in the same order. A wrong call on one rank
    raises the same SpecError on all; a rank that dies or stalls raises a RankFailure that names it.

    The gradient of a dispatch is a combine with its handle; the gradient of a combine is a dispatch with the handle.

    Parameters
    ----------
    group : ProcessGroup, optional
        Of torch.distributed, any backend; None is the default group.
    num_experts, hidden, topk : int
        Experts in all, columns of a token, the most experts a token may have.
    max_tokens_per_rank : int
        The most tokens a rank sends in one call.
    dtype : torch.dtype
        Of unquantised rows: bfloat16, float16 or float32.
    modes : tuple of str
        ``"normal"`` and ``"low_latency"``, those that will be used.
    max_recv_tokens : int, optional
        Tokens a rank has room for in one normal dispatch, a token counting once in either layout; by default all that
        can come.
    overflow : {"error", "drop", "grow"}
        What happens beyond that.
    ranks_per_node : int, optional
        Default: ``HAL_EP_RANKS_PER_NODE``, else what torchrun says (``LOCAL_WORLD_SIZE``), else one node.
    pre_reduce : bool
        Between nodes combine sends a partial sum a node: fewer bytes, another order of summation.
    timeout : float
        Seconds within which a rank that does not answer is named, here too.
    mask_ranks : bool
        Carry on without failed ranks.
    device : torch.device, optional
        Default: the backend's first device type.
    faults : EpFaults, optional
        Things to do wrong, for tests.
    backend : str, optional
        Overrides `hal.use` and ``HAL_BACKEND``.

    Raises
    ------
    SpecError
        An argument is wrong, or differs between ranks.
    UnsupportedError
        The backend does not declare what is asked.
    """

    def __init__(
        self,
        group: Any = None,
        *,
        num_experts: int,
        hidden: int,
        topk: int,
        max_tokens_per_rank: int,
        dtype: torch.dtype = torch.bfloat16,
        modes: Sequence[str] = MODES,
        max_recv_tokens: int | None = None,
        overflow: str = "error",
        ranks_per_node: int | None = None,
        pre_reduce: bool = False,
        timeout: float = TIMEOUT,
        mask_ranks: bool = False,
        device: torch.device | str | None = None,
        faults: object = None,
        backend: str | None = None,
    ) -> None:
        args, chosen = agreed_args(
            group,
            num_experts=num_experts,
            hidden=hidden,
            topk=topk,
            max_tokens_per_rank=max_tokens_per_rank,
            dtype=dtype,
            modes=modes,
            max_recv_tokens=max_recv_tokens,
            overflow=overflow,
            ranks_per_node=ranks_per_node,
            pre_reduce=pre_reduce,
            timeout=timeout,
            mask_ranks=mask_ranks,
            device=device,
            faults=faults,
            backend=backend,
        )
        assert chosen.capabilities.ep is not None
        self._args = args
        self._backend = chosen.name
        self._declared = chosen.capabilities.ep
        self._opened_by = this_process()
        self._engine: EpEngine = chosen.backend.ep_buffer(args)

    def __enter__(self) -> EpBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the windows. Results of before stay as they are, live ones too. Idempotent; waits for nobody.

        In a forked child it does nothing: the buffer is its parent's.
        """
        if self._opened_by == this_process():
            self._engine.close()

    @property
    def args(self) -> EpBufferArgs:
        """The resolved geometry and policies."""
        return self._args

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend

    def refuse(self, error: SpecError) -> NoReturn:
        """Make every rank's call raise this error, in place of a call that this rank cannot make. Collective.

        For callers that check arguments of their own: a rank that simply raised would leave the others waiting.

        Raises
        ------
        SpecError
            ``error``, or what another rank refused at the same time: the same on every rank.
        """
        self._require_own()
        if not isinstance(error, SpecError):
            raise SpecError("error", type(error).__name__, "a SpecError")
        raise self._engine.refuse("refuse", error)

    @staticmethod
    def refuse_opening(group: Any, error: SpecError, timeout: float = TIMEOUT) -> NoReturn:
        """As `refuse`, in place of a buffer that the other ranks are opening. Collective.

        Raises
        ------
        SpecError
            What the first rank in number that refuses gave.
        RankFailure
            A rank does not open one within ``timeout`` seconds.
        """
        agree(exchange_over(group, timeout), {error.argument: error})
        raise error

    def set_mask(self, rank: int, masked: bool = True) -> None:
        """Carry on without a rank, or with it again; needs ``mask_ranks=True``. Local.

        A mask is lifted between the same two calls on all ranks. A rank that is to take part again has made all calls
        meanwhile, with the others masked; one that failed, or that was told that others carry on without it, cannot.
        """
        self._require_own()
        if not self._args.mask_ranks:
            raise SpecError("mask_ranks", False, "True when the buffer is made")
        require_int("rank", rank, 0, self._args.num_ranks - 1)
        if rank == self._args.rank:
            raise SpecError("rank", rank, f"another rank of 0…{self._args.num_ranks - 1}")
        self._engine.set_mask(rank, bool(masked))

    def masked(self) -> list[bool]:
        """For each rank, whether this one carries on without it."""
        return list(self._engine.masked())

    @property
    def num_sms(self) -> int | None:
        """Processors of this rank's device that the kernels of a call may take; None, the default, for all of them.

        May be set between calls, differently on each rank; a call has what is set when it is made. Not counted is what
        torch itself computes of routes. Without effect where a backend runs on the host.
        """
        return self._args.num_sms

    @num_sms.setter
    def num_sms(self, value: int | None) -> None:
        if value is not None:
            require_int("num_sms", value, 1)
        self._args.num_sms = value

    def memory(self) -> dict[str, int]:
        """Bytes this rank's windows hold now, by purpose."""
        return dict(self._engine.memory())

    size_hint = staticmethod(size_hint)
