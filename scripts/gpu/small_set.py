"""Small decodes of every kind, compared with the reference: what a sanitizer can afford to watch."""

from __future__ import annotations

import itertools
import os
import sys

import torch
from hal_conformance.case import MlaCase
from hal_conformance.decode import call, expect, judge
from hal_conformance.inputs import build

import hal
from hal.spec.limits import DENSE_LSE, DENSE_OUT


def cases(device: str) -> list[MlaCase]:
    """The common shape, then one option after the other."""
    base = MlaCase(device=device, lengths=(130, 64, 1, 0), h_q=16)
    changes: list[dict[str, object]] = [
        {},
        {"h_q": 128},
        {"h_q": 64, "s_q": 2, "causal": True, "lengths": (130, 64, 3, 0)},
        {"page": 16, "d": 512},
        {"q_lens": (2, 0, 1, 3), "causal": True},
        {"batch_invariant": True, "lengths": (1500, 64, 1, 0)},
        {"h_q": 24, "h_kv": 2, "page": 7, "d": 65, "d_v": 33, "kv_layout": "odd"},
        {"lengths": (4000,), "plan": True},
    ]
    return [base.but(**change) for change in changes]


def main() -> int:
    """Exit code 1 if a result is wrong."""
    name = os.environ["HAL_BACKEND"]
    device = hal.capabilities(name).device_types[0]
    wrong = 0
    few = 3 if "--few" in sys.argv else None
    for case in itertools.islice(cases(device), few):
        inputs = build(case, 1)
        outcome = call(inputs, name)
        right = judge(outcome.out, outcome.lse, expect(inputs), DENSE_OUT, DENSE_LSE).ok and not outcome.problems
        print("ok   " if right else "WRONG", case.to_dict(), *outcome.problems, flush=True)
        wrong += not right
    if device != "cpu":
        torch.accelerator.synchronize()
    print(f"{wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
