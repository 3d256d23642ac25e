"""Continuous batching: which tokens of which prompts make up the next step."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from examples.deepseek_v3.cache import LatentCache
from hal import SpecError


@dataclass(frozen=True, slots=True)
class Request:
    """A prompt, and how many tokens are wanted after it."""

    number: int
    prompt: tuple[int, ...]
    new_tokens: int

    @property
    def length(self) -> int:
        """Rows the cache holds at the end: the last token is never fed back."""
        return len(self.prompt) + self.new_tokens - 1


@dataclass(slots=True, eq=False)
class Running:
    """A request that has joined: its tokens so far, those already in the cache, and its pages."""

    request: Request
    tokens: list[int]
    cached: int = 0
    pages: list[int] = field(default_factory=list)

    @property
    def generated(self) -> list[int]:
        """The tokens after the prompt."""
        return self.tokens[len(self.request.prompt) :]

    @property
    def done(self) -> bool:
        """Whether all tokens are there."""
        return len(self.tokens) == len(self.request.prompt) + self.request.new_tokens


@dataclass(frozen=True, slots=True)
class Work:
    """One sequence's part of a step: feed its tokens from ``cached`` on, ``count`` of them."""

    sequence: Running
    count: int

    @property
    def samples(self) -> bool:
        """Whether the last of these tokens is the sequence's last, so that its logits give the next one."""
        return self.sequence.cached + self.count == len(self.sequence.tokens)


class Scheduler:
    """Lets requests join in order when the pages they will need are there, and shares out the rows of a step.

    A sequence that decodes gets one row before any prompt gets its share; prompts take what is left, in pieces.

    Parameters
    ----------
    requests : sequence of Request
    cache : LatentCache
        Where pages come from.
    rows : int
        Token rows of a step.

    Raises
    ------
    SpecError
        A request that is empty, or that the cache could never hold.
    """

    def __init__(self, requests: Sequence[Request], cache: LatentCache, rows: int) -> None:
        for request in requests:
            if not request.prompt or request.new_tokens < 1:
                raise SpecError("requests", f"request {request.number}, which asks for nothing", "a prompt and a token")
            if cache.pages_for(request.length) > cache.pool.size:
                raise SpecError(
                    "requests", f"{request.length} tokens in request {request.number}", f"{cache.pool.size} pages"
                )
        self.waiting = deque(requests)
        self.running: list[Running] = []
        self._cache = cache
        self._rows = rows

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not self.waiting and not self.running

    def join(self) -> list[Running]:
        """Let in, in order, whoever can run to the end without waiting for pages again."""
        promised = sum(self._cache.pages_for(one.request.length) for one in self.running)
        joined = []
        while self.waiting and len(self.running) < self._rows:
            promised += self._cache.pages_for(self.waiting[0].length)
            if promised > self._cache.pool.size:
                break
            request = self.waiting.popleft()
            joined.append(Running(request, list(request.prompt)))
            self.running.append(joined[-1])
        return joined

    def plan(self) -> list[Work]:
        """Share out the rows of one step and take the pages they will be written to."""
        left = self._rows
        counts = {}
        for sequence in sorted(self.running, key=lambda one: len(one.tokens) - one.cached != 1):
            counts[sequence] = min(left, len(sequence.tokens) - sequence.cached)
            left -= counts[sequence]
        work = [Work(one, counts[one]) for one in self.running if counts[one]]
        for part in work:
            sequence = part.sequence
            while len(sequence.pages) < self._cache.pages_for(sequence.cached + part.count):
                sequence.pages.append(self._cache.pool.take())
        return work

    def leave(self) -> list[Running]:
        """Let go of whoever is done, and of their pages."""
        left = [one for one in self.running if one.done]
        self.running = [one for one in self.running if not one.done]
        for sequence in left:
            self._cache.release(sequence.pages)
        return left
