compiler: str

class Schedule:
    @property
    def parts(self) -> int: ...
    @property
    def items(self) -> int: ...
    @property
    def slots(self) -> int: ...

Fault = tuple[int, int, int, int]

def plan(
    lengths: int,
    first_query: int,
    batch: int,
    queries: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    head_dim_v: int,
    flags: int,
    threads: int,
    /,
) -> Schedule | Fault: ...
def decode(schedule: object, /, *numbers: float) -> Fault | None: ...
def isas() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str, /) -> bool: ...
def launches() -> dict[str, int]: ...
