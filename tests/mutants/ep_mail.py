"""How the ranks of the sample engine meet: messages in a private folder, each written once."""

from __future__ import annotations

import os
import pickle
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from hal.ep.rendezvous import exchange_over
from hal.spec.ep import EpBufferArgs
from hal.spec.errors import RankFailure


class Mail:
    """One message a rank and operation. Sending waits for nobody; reading names whoever does not send."""

    def __init__(self, args: EpBufferArgs) -> None:
        exchange = exchange_over(args.group, args.timeout)
        name = f"hal-sample-{secrets.token_hex(16)}"
        everyone = exchange((name, os.getpid()))
        self.folder = Path(tempfile.gettempdir()) / everyone[0][0]
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.pids = [pid for _, pid in everyone]
        self.rank, self.ranks, self.timeout = args.rank, args.num_ranks, args.timeout
        exchange(None)

    def send(self, operation: int, message: Any) -> None:
        path = self.folder / f"{operation}.{self.rank}"
        part = path.with_suffix(f".{self.rank}.part")
        part.write_bytes(pickle.dumps(message))
        part.rename(path)

    def there(self, operation: int, source: int) -> bool:
        return (self.folder / f"{operation}.{source}").exists()

    def read(self, operation: int, source: int, phase: str, deadline: float) -> Any:
        path = self.folder / f"{operation}.{source}"
        while not path.exists():
            if not self.alive(source) and not path.exists():
                raise RankFailure(source, phase, "its process ended")
            if (self.folder / f"closed.{source}").exists() and not path.exists():
                raise RankFailure(source, phase, "it closed its buffer")
            if time.monotonic() > deadline:
                raise RankFailure(source, phase, f"no answer within {self.timeout:g} s")
            time.sleep(0.0003)
        return pickle.loads(path.read_bytes())

    def alive(self, rank: int) -> bool:
        try:
            state = Path(f"/proc/{self.pids[rank]}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return state not in "ZX"

    def close(self) -> None:
        """The last one to leave takes the folder along."""
        try:
            (self.folder / f"closed.{self.rank}").touch()
        except FileNotFoundError:
            return
        others = [r for r in range(self.ranks) if r != self.rank]
        if all((self.folder / f"closed.{r}").exists() or not self.alive(r) for r in others):
            shutil.rmtree(self.folder, ignore_errors=True)
