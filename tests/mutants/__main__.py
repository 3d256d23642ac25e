"""``python -m mutants [NAME …]``: the kill table, then correct backends against fresh seeds."""

from __future__ import annotations

import argparse
import sys

from hal import plugins
from mutants.runner import installed, survivors, table


def main() -> int:
    """Exit code 1 when a mutant survives, dies in the wrong level, or a correct backend does not survive."""
    parser = argparse.ArgumentParser(prog="mutants", description=__doc__)
    parser.add_argument("names", nargs="*", help="only mutants whose names contain one of these")
    parser.add_argument("--seeds", type=int, default=20, help="fresh seeds for each correct backend (default 20)")
    parser.add_argument("--no-table", action="store_true", help="only the correct backends")
    chosen = parser.parse_args()
    with installed():
        wrong = 0 if chosen.no_table else table(chosen.names)
        correct = ["sample", "ep-sample", "ep-modest", "ep-low-latency-only"]
        correct += ["cpu"] if "cpu" in plugins.registry().names() else []
        alarms = 0 if chosen.names else survivors(correct, chosen.seeds)
    if not chosen.names:
        print(f"{len(correct)} correct backends × {chosen.seeds} fresh seeds: {alarms} false alarms")
    return 1 if wrong or alarms else 0


if __name__ == "__main__":
    sys.exit(main())
