"""The verdicts: beside the untouched model of transformers with its eager attention, and run beside run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from examples.deepseek_v3.engine import Generated
from examples.deepseek_v3.model import in_dtype
from examples.deepseek_v3.scheduler import Request

Answers = Mapping[int, Generated]
"""What a run generated, by number of the request."""

LOGIT_LIMIT: Final = 1e-4
"""How far a float32 logit may be from transformers'."""

MEAN_LIMIT: Final = 1.25
"""How much further than transformers a narrow dtype may be in the mean, where single tokens count for much."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """One check: whether it holds, what it demands, and what was found."""

    passed: bool
    demand: str
    found: str


def transformers_greedy(model: PreTrainedModel, request: Request) -> Generated:
    """What ``generate`` of the untouched model gives for one prompt by itself, with its own cache."""
    untouched: Any = model
    output = untouched.generate(
        torch.tensor([request.prompt]),
        attention_mask=torch.ones(1, len(request.prompt), dtype=torch.int64),
        max_new_tokens=request.new_tokens,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    tokens = output.sequences[0, len(request.prompt) :].tolist()
    return Generated(request.number, tuple(tokens), torch.cat(output.logits).float().numpy())


def same_as_transformers(answers: Answers, references: Sequence[Generated]) -> Verdict:
    """In float32: the same greedy tokens, and every logit within `LOGIT_LIMIT`."""
    wrong = []
    worst = 0.0
    for reference in references:
        ours = answers[reference.number]
        if ours.tokens != reference.tokens:
            at = next(i for i, (a, b) in enumerate(zip(ours.tokens, reference.tokens, strict=True)) if a != b)
            first, second = np.sort(reference.logits[at])[:-3:-1]
            wrong.append(
                f"prompt {reference.number} differs from token {at}: {ours.tokens[at]}, not {reference.tokens[at]} "
                f"(transformers' two best logits are {first - second:.2g} apart)"
            )
        else:
            # NaN compares as false everywhere, so it must not vanish in a maximum.
            apart = np.abs(ours.logits - reference.logits).max()
            worst = max(worst, float("inf") if np.isnan(apart) else float(apart))
    tokens = sum(len(reference.tokens) for reference in references)
    found = "; ".join([*wrong, f"{tokens} tokens, logits off by at most {worst:.2g}"])
    demand = f"float32: greedy tokens equal to transformers' and logits within {LOGIT_LIMIT:g}"
    return Verdict(not wrong and worst <= LOGIT_LIMIT, demand, found)


def no_worse_than_transformers(
    answers: Answers, requests: Sequence[Request], model: PreTrainedModel, dtype: torch.dtype
) -> Verdict:
    """In a narrower dtype: no further from transformers in float32 than transformers is in that dtype.

    All three compute the logits of the tokens that our run chose. The distance of a token is the root mean square over
    its logits. Where two experts score almost the same, rounding decides which one a token gets, on either side; such
    tokens are far off by chance and would drown the others in a mean. So medians are compared, and the mean only bounds
    how much is far off.
    """
    narrow = in_dtype(model, dtype)
    ours, theirs = [], []
    for request in requests:
        answer = answers[request.number]
        exact = _teacher_forced(model, request, answer.tokens)
        ours.append((torch.from_numpy(answer.logits).double() - exact).square().mean(-1))
        theirs.append((_teacher_forced(narrow, request, answer.tokens) - exact).square().mean(-1))
    squares = torch.cat(ours), torch.cat(theirs)
    median, peer_median = (float(one.median().sqrt()) for one in squares)
    mean, peer_mean = (float(one.mean().sqrt()) for one in squares)
    name = "bf16" if dtype == torch.bfloat16 else str(dtype).removeprefix("torch.")
    demand = (
        f"{name}: no further from transformers' float32 than its own {name}, at the median token, "
        f"and at most {MEAN_LIMIT:g} times as far in the mean"
    )
    found = (
        f"{len(squares[0])} tokens, median {median:.4g} beside transformers' {peer_median:.4g}, "
        f"root mean square {mean:.4g} beside {peer_mean:.4g}"
    )
    # A NaN on our side makes this false, as it should be.
    return Verdict(median <= peer_median and mean <= MEAN_LIMIT * peer_mean, demand, found)


def _teacher_forced(model: PreTrainedModel, request: Request, tokens: Sequence[int]) -> Tensor:
    fed = torch.tensor([[*request.prompt, *tokens[:-1]]])
    untouched: Any = model
    logits: Tensor = untouched(input_ids=fed, use_cache=False, logits_to_keep=len(tokens)).logits
    return logits[0].double()


def same_bits(answers: Answers, first: Answers, what: str, reference: str) -> Verdict:
    """Two runs of one dtype: tokens and all bits of the logits equal."""
    differing = [
        number
        for number, one in first.items()
        if answers[number].tokens != one.tokens or answers[number].logits.tobytes() != one.logits.tobytes()
    ]
    logits = sum(one.logits.size for one in first.values())
    found = f"prompts {differing} differ" if differing else f"all {logits} logits"
    return Verdict(not differing, f"{what}: every bit equal to {reference}", found)
