"""`HalDispatcher`: takes the place of SGLang's ``DeepEPDispatcher``, with its arguments and its outputs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from sglang.srt.layers.dp_attention import get_is_extend_in_batch
from sglang.srt.layers.moe.token_dispatcher.base import BaseDispatcher
from sglang.srt.layers.moe.token_dispatcher.deepep import DeepEPLLDispatchOutput, DeepEPNormalDispatchOutput
from sglang.srt.layers.moe.utils import DeepEPMode, DispatcherOutputDtype, get_deepep_output_dtype
from torch import Tensor

from hal.plugins import select
from hal.spec.errors import SpecError, UnsupportedError
from hal_sglang import buffers

TOKENS_ENV: Final = "SGLANG_DEEPEP_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
"""SGLang's own variable: the most tokens a rank sends in one low-latency call, 128 unless it says otherwise."""

_STAGES: Final = ("dispatch_a", "dispatch_b", "combine_a", "combine_b")


class Routes(Protocol):
    """What is read of SGLang's top-k output."""

    topk_ids: Tensor
    topk_weights: Tensor


@dataclass
class Flight:
    """What one stage leaves for the next.

    Attributes
    ----------
    wait : callable
        Completes the stage.
    result : object
        What the stage returns once complete.
    combine : callable
        Posts the combine of these routes: expert outputs, top-k ids and weights to a completion and the sums.
    """

    wait: Callable[[], None]
    result: Any
    combine: Callable[[Tensor, Tensor, Tensor], tuple[Callable[[], None], Tensor]]


class Registration:
    """A hook of `HalDispatcher.register_deepep_dispatch_hook`."""

    def __init__(self, hooks: list[Registration], hook: Callable[[HalDispatcher], None]) -> None:
        self._hooks, self.hook = hooks, hook
        hooks.append(self)

    def remove(self) -> None:
        """Run it no more."""
        if self in self._hooks:
            self._hooks.remove(self)


class HalDispatcher(BaseDispatcher):
    """Sends tokens to their experts and brings them back, over `hal.EpBuffer`.

    ``dispatch`` is ``dispatch_a`` and ``dispatch_b``, ``combine`` likewise; what is placed between costs nothing.
    All are collective.

    Parameters
    ----------
    group : ProcessGroup
    router_topk, num_experts, num_local_experts, hidden_size : int
    params_dtype : torch.dtype
        Of rows and sums.
    deepep_mode : DeepEPMode
        ``NORMAL``, ``LOW_LATENCY``, or ``AUTO``: normal for batches with a prefill in them.
    permute_fusion, async_finish, return_recv_hook, runner_backend
        Accepted; every stage is asynchronous here.

    Raises
    ------
    SpecError
        A size is missing, or the experts are not spread evenly.
    """

    expert_mask_gpu: Tensor | None = None

    def __init__(
        self,
        group: Any,
        router_topk: int,
        permute_fusion: bool = False,
        num_experts: int | None = None,
        num_local_experts: int | None = None,
        hidden_size: int | None = None,
        params_dtype: torch.dtype | None = None,
        deepep_mode: DeepEPMode = DeepEPMode.AUTO,
        async_finish: bool = False,
        return_recv_hook: bool = False,
        runner_backend: Any = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_experts", num_experts), ("hidden_size", hidden_size)):
            if not isinstance(value, int):
                raise SpecError(name, value, "an integer")
        assert num_experts is not None and hidden_size is not None
        share = -(-num_experts // group.size())
        if num_local_experts is not None and num_local_experts != share:
            raise SpecError("num_local_experts", num_local_experts, f"{share}, an even share of {num_experts}")
        self.runner_backend = runner_backend
        self.deepep_mode = deepep_mode
        self._group, self._topk = group, router_topk
        self._experts, self._hidden = num_experts, hidden_size
        self._dtype = params_dtype or torch.bfloat16
        self._tokens = int(os.environ.get(TOKENS_ENV) or 128)
        self._between: list[Registration] = []
        self._stage = 0
        self._flight: Flight | None = None

    def dispatch(self, hidden_states: Tensor, topk_output: Routes) -> Any:
        """Send rows to the ranks of their experts.

        Parameters
        ----------
        hidden_states : Tensor
            [n, hidden].
        topk_output : StandardTopKOutput
            ``topk_ids`` [n, K], -1 is no expert, and ``topk_weights`` [n, K].

        Returns
        -------
        DeepEPNormalDispatchOutput or DeepEPLLDispatchOutput
        """
        self.dispatch_a(hidden_states, topk_output)
        for one in list(self._between):
            one.hook(self)
        return self.dispatch_b()

    def dispatch_a(self, hidden_states: Tensor, topk_output: Routes) -> None:
        """Post the dispatch."""
        self._enter("dispatch_a")
        ids, weights = topk_output.topk_ids.to(torch.int64), topk_output.topk_weights.to(torch.float32)
        send = self._low_latency if self._mode() is DeepEPMode.LOW_LATENCY else self._normal
        self._flight = send(hidden_states, ids, weights)
        self._stage = 1

    def dispatch_b(self) -> Any:
        """Return the rows received."""
        return self._complete("dispatch_b", 2)

    def combine(self, combine_input: Any) -> Tensor:
        """Bring expert outputs back and sum them.

        Parameters
        ----------
        combine_input : DeepEPNormalCombineInput or DeepEPLLCombineInput
            Rows like those received, weighted by the experts' runner in normal mode; ``topk_ids`` and ``topk_weights``
            as dispatched in low-latency mode.

        Returns
        -------
        Tensor
            [n, hidden].
        """
        self.combine_a(combine_input)
        return self.combine_b()

    def combine_a(self, combine_input: Any) -> None:
        """Post the combine."""
        flight = self._enter("combine_a")
        rows, ids, weights = combine_input
        wait, sums = flight.combine(rows, ids, weights)
        self._flight = Flight(wait, sums, flight.combine)
        self._stage = 3

    def combine_b(self) -> Tensor:
        """Return the sums."""
        sums: Tensor = self._complete("combine_b", 0)
        self._flight = None
        return sums

    def _enter(self, stage: str) -> Any:
        """What the stage before left."""
        if _STAGES[self._stage] != stage:
            raise SpecError(stage, f"a call of {stage}", f"{_STAGES[self._stage]}, which comes next")
        return self._flight

    def _complete(self, stage: str, after: int) -> Any:
        flight = self._enter(stage)
        flight.wait()
        self._stage = after
        return flight.result

    def _mode(self) -> DeepEPMode:
        if self.deepep_mode is not DeepEPMode.AUTO:
            return self.deepep_mode
        return DeepEPMode.NORMAL if get_is_extend_in_batch() else DeepEPMode.LOW_LATENCY

    def _normal(self, x: Tensor, ids: Tensor, weights: Tensor) -> Flight:
        buffer = buffers.normal(self._group, self._experts, self._hidden, self._topk, self._dtype)
        sent = buffer.dispatch(x, ids, weights, async_finish=True)
        rows, scales = sent.recv_x if isinstance(sent.recv_x, tuple) else (sent.recv_x, None)
        counts = list(sent.num_recv_tokens_per_expert)

        def back(y: Tensor, ids: Tensor, weights: Tensor) -> tuple[Callable[[], None], Tensor]:
            summed = buffer.combine(y, sent.handle, async_finish=True)
            return summed.event.wait, summed.combined_x

        received = DeepEPNormalDispatchOutput(rows, scales, sent.recv_topk_idx, sent.recv_topk_weights, counts)
        return Flight(sent.event.wait, received, back)

    def _low_latency(self, x: Tensor, ids: Tensor, weights: Tensor) -> Flight:
        buffer = buffers.low_latency(self._group, self._experts, self._hidden, self._topk, self._dtype, self._tokens)
        sent = buffer.low_latency_dispatch(x, ids, use_fp8=self._use_fp8(), return_recv_hook=True)
        assert sent.hook is not None
        rows, scales = sent.recv_x if isinstance(sent.recv_x, tuple) else (sent.recv_x, None)
        expected = (len(x) * self._group.size() * ids.shape[1] + self._experts) // self._experts

        def back(y: Tensor, ids: Tensor, weights: Tensor) -> tuple[Callable[[], None], Tensor]:
            ids, weights = ids.to(torch.int64), weights.to(torch.float32)
            summed = buffer.low_latency_combine(y, ids, weights, sent.handle, return_recv_hook=True)
            assert summed.hook is not None
            return summed.hook, summed.combined_x

        received = DeepEPLLDispatchOutput(rows, scales, ids, weights, sent.recv_count, expected)
        return Flight(sent.hook, received, back)

    def _use_fp8(self) -> bool:
        """Whether the experts' runner takes FP8 rows with scales; the HAL sends those, or rows as they are."""
        wanted = get_deepep_output_dtype(self)
        if wanted not in (DispatcherOutputDtype.BF16, DispatcherOutputDtype.FP8):
            raise UnsupportedError(select().name, "deepep_dispatcher_output_dtype", wanted.name, "BF16 or FP8")
        return wanted is DispatcherOutputDtype.FP8

    def set_overlap_args(self, combine_overlap_args: Any, meta_overlap_args: Any) -> None:
        """Refuse to combine while experts still compute: the HAL's combine takes finished rows.

        Raises
        ------
        UnsupportedError
            Always.
        """
        raise UnsupportedError(
            select().name, "combine_overlap_args", "combining unfinished rows", "dispatch_a … combine_b"
        )

    def register_deepep_dispatch_hook(self, hook: Callable[[HalDispatcher], None]) -> Registration:
        """Have something run between ``dispatch_a`` and ``dispatch_b`` of every `dispatch`; the handle removes it."""
        return Registration(self._between, hook)
