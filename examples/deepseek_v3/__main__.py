"""The command line: which model, on which backend, over how many processes; runs, shows and checks."""

from __future__ import annotations

import enum
import os
import secrets
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

import hal
from examples.deepseek_v3 import check, model, ranks, show
from examples.deepseek_v3.engine import Generated, Summary
from examples.deepseek_v3.scheduler import Request
from hal.cli.status import InForce, choose
from hal.cli.text import console, paragraph, plain


class Model(str, enum.Enum):
    """Architectures, as the option spells them."""

    V3 = "v3"
    V2 = "v2"


class Dtype(str, enum.Enum):
    """Dtypes, as the option spells them."""

    FLOAT32 = "float32"
    BF16 = "bf16"


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)


@app.command(
    help="Decode with a tiny DeepSeek model of Hugging Face transformers whose attention and experts run through the "
    "HAL, and compare every run with the untouched model and with the other runs.\n\nExits with 0 if all checks pass, "
    "1 if one fails, 2 if a rank or the request fails.",
    context_settings={"help_option_names": ["-h", "--help"]},
)
def demo(
    backend: Annotated[str | None, typer.Option(metavar="NAME", help="Overrides HAL_BACKEND.")] = None,
    model_name: Annotated[Model, typer.Option("--model", help="Architecture.")] = Model.V3,
    processes: Annotated[
        list[int] | None, typer.Option(metavar="N", min=1, help="Ranks; once for every run.  [default: 1, 2 and 4]")
    ] = None,
    dtype: Annotated[
        list[Dtype] | None, typer.Option(help="Element type; once for every run.  [default: float32 and bf16]")
    ] = None,
    batch: Annotated[int, typer.Option(metavar="N", min=1, help="Prompts, of different lengths.")] = 8,
    tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens to decode for every prompt.")] = 64,
    rows: Annotated[
        int, typer.Option(metavar="N", min=1, help="Token rows of a rank's step, prompts and decoding together.")
    ] = 16,
    seed: Annotated[
        int | None, typer.Option(metavar="N", min=0, max=2**32 - 1, help="Weights and prompts; fresh ones if absent.")
    ] = None,
) -> None:
    """Run every combination of processes and dtypes and check them all."""
    chosen = choose(backend)
    assert chosen.selected is not None
    number = secrets.randbits(32) if seed is None else seed
    config = model.make_config(model_name.value)
    prompts = model.make_prompts(batch, config.vocab_size, number)
    requests = tuple(Request(i, tuple(prompt), tokens) for i, prompt in enumerate(prompts))
    dtypes = tuple(dict.fromkeys(one.value for one in dtype or Dtype))
    out = console()
    _print_setting(out, chosen, config, requests, rows, number)
    runs: dict[tuple[str, int], dict[int, Generated]] = {}
    for count in dict.fromkeys(processes or (1, 2, 4)):
        job = ranks.Job(model_name.value, number, dtypes, requests, count, chosen.selected.name, rows)
        for name, answers in _run(out, job, {one for one, _ in runs}).items():
            runs[name, count] = answers
    passed = show.print_verdicts(out, _check(runs, model_name.value, number, requests))
    raise typer.Exit(0 if passed else 1)


def _run(out: Any, job: ranks.Job, shown: set[str]) -> dict[str, dict[int, Generated]]:
    """One run of the ranks, all dtypes; returns the answers of each."""
    found: dict[str, dict[int, Generated]] = {}
    reports = ranks.run(job)
    count = f"{job.processes} process" + "es" * (job.processes > 1)
    for name in job.dtypes:
        title = f"{name}, {count}"
        summaries: list[Summary] = []
        with show.Stream(out, title, job.requests, name in shown) as stream:
            while len(summaries) < job.processes:
                report = next(reports)
                if isinstance(report, Summary):
                    summaries.append(report)
                else:
                    stream.add(report)
        found[name] = {one.number: one for summary in summaries for one in summary.generated}
        _print_run(out, title, job, summaries)
    for _ in reports:  # until the ranks have gone
        pass
    return found


def _check(
    runs: dict[tuple[str, int], dict[int, Generated]], name: str, seed: int, requests: tuple[Request, ...]
) -> Iterator[check.Verdict]:
    import torch

    torch.set_num_threads(1)  # so small a model only waits for more
    first: dict[str, int] = {}
    untouched = model.build_model(name, seed)
    with torch.no_grad():
        for (dtype, count), answers in runs.items():
            if dtype in first:
                reference = f"{first[dtype]} process" + "es" * (first[dtype] > 1)
                base = runs[dtype, first[dtype]]
                yield check.same_bits(answers, base, f"{dtype}, {count} processes", reference)
                continue
            first[dtype] = count
            if dtype == "float32":
                references = [check.transformers_greedy(untouched, request) for request in requests]
                yield check.same_as_transformers(answers, references)
            else:
                kind = model.DTYPES[dtype]
                yield check.no_worse_than_transformers(answers, requests, untouched, kind)


def _print_setting(out: Any, chosen: InForce, config: Any, requests: tuple[Request, ...], rows: int, seed: int) -> None:
    lengths = [len(request.prompt) for request in requests]
    experts = f"{config.n_routed_experts} experts of which {config.num_experts_per_tok} a token"
    show.print_rows(
        out,
        {
            "backend": f"{plain(chosen.name)}, {chosen.why}",
            "model": f"{config.model_type} of transformers: {config.num_hidden_layers} layers, "
            f"{config.num_attention_heads} heads over a latent cache of {config.kv_lora_rank} + "
            f"{config.qk_rope_head_dim}, {experts}",
            "prompts": f"{len(lengths)} of {min(lengths)} to {max(lengths)} tokens, "
            f"{requests[0].new_tokens} more each; steps of {rows} rows a rank",
            "seed": f"{seed} (--seed {seed} repeats this run)",
        },
    )


def _print_run(out: Any, title: str, job: ranks.Job, summaries: list[Summary]) -> None:
    seconds = max(summary.seconds for summary in summaries)
    new = sum(request.new_tokens for request in job.requests)
    read = sum(len(request.prompt) for request in job.requests)
    out.print(
        f"{title}: {new} tokens in {seconds:.3g} s, {new / seconds:.4g} tokens/s, beside {read} tokens of prompts; "
        f"{summaries[0].steps} steps; {sum(s.pages for s in summaries)} pages, "
        f"{sum(s.recycled for s in summaries)} times one was used again",
        soft_wrap=True,
    )
    if not all(summary.batch_invariant for summary in summaries):
        out.print("this backend declares no batch-invariant decode, so other processes may give other bits")


def main() -> None:
    """Run the command line and exit with its code."""
    try:
        app(prog_name="python -m examples.deepseek_v3")
    except hal.HalError as error:
        if os.environ.get("HAL_DEBUG", "") not in ("", "0"):
            print(getattr(error, "details", ""), file=sys.stderr)
        print(paragraph(error), file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        sys.stdout.flush()


if __name__ == "__main__":
    main()
