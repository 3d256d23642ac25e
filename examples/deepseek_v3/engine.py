"""One rank's engine: its prompts, its pages, and steps that all ranks take together."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from transformers import PreTrainedModel

import hal
from examples.deepseek_v3.attention import Step
from examples.deepseek_v3.cache import LatentCache
from examples.deepseek_v3.scheduler import Request, Scheduler, Work
from examples.deepseek_v3.surgery import HalModel


@dataclass(frozen=True, slots=True)
class Generated:
    """What one request came to: its tokens, and the float32 logits [tokens, vocabulary] each was chosen from."""

    number: int
    tokens: tuple[int, ...]
    logits: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Progress:
    """One step of one rank.

    Attributes
    ----------
    rank, step : int
    tokens : tuple of (int, int)
        New tokens: number of the request, token id.
    joined, left : tuple of int
        Requests that entered before the step and that were complete after it.
    rows : int
        Token rows in use.
    pages : int
        Pages in use.
    """

    rank: int
    step: int
    tokens: tuple[tuple[int, int], ...]
    joined: tuple[int, ...]
    left: tuple[int, ...]
    rows: int
    pages: int


@dataclass(frozen=True, slots=True)
class Summary:
    """One rank's whole run."""

    rank: int
    generated: tuple[Generated, ...]
    seconds: float
    steps: int
    pages: int
    recycled: int
    batch_invariant: bool


class Engine:
    """Generates greedily for this rank's requests.

    Parameters
    ----------
    model : PreTrainedModel
        Whole and untouched; it is changed in place and loses what other ranks hold.
    requests : sequence of Request
        Those of this rank; there may be none.
    buffer : hal.EpBuffer
        Between the ranks, with ``max_tokens_per_rank`` rows a step.
    backend : str
    page_size : int
    """

    def __init__(
        self,
        model: PreTrainedModel,
        requests: Sequence[Request],
        buffer: hal.EpBuffer,
        backend: str,
        page_size: int,
    ) -> None:
        config: Any = model.config
        self._dtype, self._device = model.dtype, buffer.args.device
        self._heads, self._latent = config.num_attention_heads, config.kv_lora_rank
        self._head_dim = config.kv_lora_rank + config.qk_rope_head_dim
        self._rows, self._buffer, self._backend = buffer.args.max_tokens_per_rank, buffer, backend
        declared = hal.capabilities(backend).mla_dense
        self.batch_invariant = declared is not None and declared.batch_invariant
        self.cache = LatentCache(
            config.num_hidden_layers,
            _enough_pages(requests, page_size),
            page_size,
            self._head_dim,
            self._dtype,
            self._device,
        )
        self.scheduler = Scheduler(requests, self.cache, self._rows)
        self._model = HalModel(model, self.cache, buffer, backend, self.batch_invariant)
        self._logits: dict[int, list[NDArray[np.float32]]] = {request.number: [] for request in requests}
        self._finished: list[Generated] = []

    def run(self) -> Iterator[Progress]:
        """Take steps until no rank has anything left; collective."""
        step = 0
        start = time.perf_counter()
        while self._anyone_busy():
            yield self._step(step)
            step += 1
        self._seconds, self._steps = time.perf_counter() - start, step

    def summary(self) -> Summary:
        """What `run` came to, once it has ended."""
        pool = self.cache.pool
        return Summary(
            self._buffer.args.rank,
            tuple(self._finished),
            self._seconds,
            self._steps,
            pool.size,
            pool.recycled,
            self.batch_invariant,
        )

    def _anyone_busy(self) -> bool:
        busy = torch.tensor([not self.scheduler.idle], dtype=torch.int32)
        dist.all_reduce(busy, dist.ReduceOp.MAX, group=self._buffer.args.group)
        return bool(busy)

    def _step(self, number: int) -> Progress:
        joined = self.scheduler.join()
        work = self.scheduler.plan()
        tokens, positions, step = self._prepare(work)
        logits = self._model.forward(tokens, positions, step)
        new = []
        row = -1
        for part in work:
            row += part.count
            sequence = part.sequence
            samples = part.samples
            sequence.cached += part.count
            if samples:
                chosen = logits[row].float().cpu()
                self._logits[sequence.request.number].append(chosen.numpy())
                sequence.tokens.append(int(chosen.argmax()))
                new.append((sequence.request.number, sequence.tokens[-1]))
        pages = self.cache.pool.size - self.cache.pool.free
        left = self.scheduler.leave()
        for sequence in left:
            logged = np.stack(self._logits.pop(sequence.request.number))
            self._finished.append(Generated(sequence.request.number, tuple(sequence.generated), logged))
        return Progress(
            self._buffer.args.rank,
            number,
            tuple(new),
            tuple(one.request.number for one in joined),
            tuple(one.request.number for one in left),
            step.live,
            pages,
        )

    def _prepare(self, work: Sequence[Work]) -> tuple[torch.Tensor, torch.Tensor, Step]:
        size = self.cache.page_size
        tokens, positions, slots, ends = [], [], [], [0]
        for part in work:
            sequence = part.sequence
            for position in range(sequence.cached, sequence.cached + part.count):
                tokens.append(sequence.tokens[position])
                positions.append(position)
                slots.append(sequence.pages[position // size] * size + position % size)
            ends.append(len(tokens))
        live, empty = len(tokens), [0] * (self._rows - len(tokens))
        lengths = self._int32([part.sequence.cached + part.count for part in work])
        widest = max((len(part.sequence.pages) for part in work), default=0)
        table = self._int32([part.sequence.pages + [-1] * (widest - len(part.sequence.pages)) for part in work])
        offsets = self._int32(ends)
        plan = None
        if live:
            plan = hal.mla_plan(
                lengths,
                h_q=self._heads,
                cu_seqlens_q=offsets,
                head_dim=self._head_dim,
                head_dim_v=self._latent,
                page_size=size,
                dtype=self._dtype,
                causal=True,
                batch_invariant=self.batch_invariant,
                backend=self._backend,
            )
        step = Step(live, self._int64(slots), table, lengths, offsets, plan)
        return self._int64(tokens + empty), self._int64(positions + empty), step

    def _int64(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._device)

    def _int32(self, values: Sequence[Any]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=self._device)


def _enough_pages(requests: Sequence[Request], page_size: int) -> int:
    """Too few for all requests at once, enough for the largest: some must wait for the pages of those that leave."""
    needs = [-(-request.length // page_size) for request in requests]
    return max([1, sum(needs) * 2 // 3, *needs])
