"""One rank of a group: ``python -m hal_conformance.rank module:function FOLDER``, started by `ranks.run_ranks`."""

from __future__ import annotations

import faulthandler
import importlib
import json
import os
import sys
from pathlib import Path

from hal_conformance.ranks import Rank


def main() -> None:
    """Call the function and write down its answer, or what it raised."""
    faulthandler.enable()
    target, folder = sys.argv[1], Path(sys.argv[2])
    module, _, name = target.partition(":")
    rank = Rank(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), _payload(folder), folder)
    answer = folder / f"{rank.rank}.answer"
    try:
        work = getattr(importlib.import_module(module), name)
        rank.phase("start")
        value = work(rank)
    except Exception as error:
        answer.write_text(json.dumps({"raised": f"{type(error).__name__}: {error}"}))
        # At once: leaving in order may wait for peers that wait for this rank.
        os._exit(1)
    # The answer appears whole or not at all.
    partial = answer.with_suffix(".partial")
    partial.write_text(json.dumps(value))
    partial.rename(answer)
    sys.stdout.flush()
    # At once again: what the process group does while the interpreter ends, peers gone, is not under test.
    os._exit(0)


def _payload(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "payload").read_text())
    return found


if __name__ == "__main__":
    main()
