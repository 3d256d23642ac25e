"""``docs/spec.md``, made from the table, so that what is written and what is tested cannot drift apart."""

from __future__ import annotations

from hal.spec import SPEC_VERSION
from hal.spec.limits import DENSE_LSE, DENSE_OUT, DIRECTION, WHOLE
from hal_conformance.requirements import REQUIREMENTS
from hal_conformance.table import LEVELS, TABLE

_HEAD = f"""<!-- Made by `hal conform spec`; edit conformance/hal_conformance/table.py instead. -->
# What a backend must do

Specification {SPEC_VERSION}. Each obligation is one sentence, held by the check of the same id in `hal-conformance`. A
backend climbs the levels in order: a level is not tested while one below it fails.

**Declared or refused.** Each obligation names what it requires a backend to declare. Declared: it must pass. Not
declared: the suite makes the call all the same, and it must raise `UnsupportedError`. There is no third state.

**Limits.** Against the float64 reference, for every (query, head) row:

| | absolute | or relative | and cosine difference of the row | and of the whole |
|---|---|---|---|---|
| out | {DENSE_OUT.absolute:g} | {DENSE_OUT.relative * 128:g}/128 | {DENSE_OUT.row_cosine:g} | {DENSE_OUT.cosine:g} |
| lse | {DENSE_LSE.absolute:g} | {DENSE_LSE.relative * 65536:g}/65536 | implied by that of each value | likewise |

The direction of a row is judged from {DIRECTION} columns on, that of the whole from {WHOLE} rows on. An element of out
also passes within {DENSE_OUT.rounding:g} times u · (Σ p|v| + 2·|out|), with u half a unit in the last place of q's
type: what rounding the weights p to that type leaves.

inf and NaN must be where the reference has them. The absolute limits are for data within ±1: where a row's V (or the
sum of the absolute products behind its scores) is larger, they grow with it. A vendor may tighten limits, never loosen
them.

**What is tried.** Every declared value of a size up to a bound (d 576, h_q 160, page_size 256, s_q 64, h_kv 16), every
pair of notable values in one call, tensors that begin at any element, sequences of up to 131072 tokens, and free values
of everything else, in an order nobody knows before the run. A quick run tries a part; the report says how many pairs
met, of how many, and how large each size was.

**Expert-parallel calls** have no limits: what `hal.reference.ep` says is meant bit for bit. Rows are moved, not
computed, and sums are float32 additions in a stated order, rounded once. As far as they are declared, sizes go up to 8
ranks, 1024 experts, a top-k of 16, 1300 tokens of a rank, and rows of 16384 bytes; with `--ranks` groups are larger.
Every pair of notable values up to 4 ranks, 100 tokens and 5,120 columns meets in one call of either mode, on one node,
and over several of up to 6 ranks; beyond that one size is large at a time.
"""


def spec() -> str:
    """The text of ``docs/spec.md``."""
    lines = [_HEAD]
    for level in LEVELS:
        lines.append(f"## {level.id} — {level.title}\n")
        if level.after:
            lines.append(f"Tested once {level.after} holds.\n")
        if level.coming:
            lines.append(f"Not in this version of the suite: {level.coming}.\n")
        rows = [o for o in TABLE if o.level == level.id]
        if rows:
            lines.append("| id | obligation | requires |\n|---|---|---|")
            for o in rows:
                refusal = "" if o.covered else " *Only that undeclared calls are refused is tested so far.*"
                title = REQUIREMENTS[o.requires].title
                lines.append(f"| {o.id} | **{o.title}.** {o.sentence}{refusal} | {title} |")
            lines.append("")
    lines.append(f"{len(TABLE)} obligations.")
    return "\n".join(lines) + "\n"
