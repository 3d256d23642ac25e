"""A record of an engine's interface: taken from a release, true of it, and stood in for where there is none."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from integrations import recorded

RELEASE = """
import abc, dataclasses, enum, typing

class Mode(enum.Enum):
    FAST = 1
    SLOW = 2

class Rows(typing.NamedTuple):
    x: object
    @property
    def format(self): return Mode.FAST

@dataclasses.dataclass
class Step:
    length: int
    plan: object = None

class Base(abc.ABC):
    def __init__(self, size, scale=1.0): self.size = size
    @abc.abstractmethod
    def send(self, x, *, wait=False): ...
    @classmethod
    def supports(cls, dtype): return True

class Impl(Base):
    @staticmethod
    def name(): return "impl"

def register(name, path=None): ...
"""
NAMES = {
    "Mode": {"names": ["FAST", "SLOW"]},
    "Rows": {},
    "Step": {"bases": []},
    "Base": {"bases": [], "members": {"__init__": {}, "send": {}, "supports": {}}},
    "Impl": {"bases": ["madeup_engine.api:Base"], "members": {"name": {}, "send": {}}},
    "register": {},
}


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A record taken from an engine made for this test, which is then there to be changed."""
    engine = tmp_path / "site" / "madeup_engine"
    engine.mkdir(parents=True)
    (engine / "__init__.py").write_text("")
    (engine / "api.py").write_text(RELEASE)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    path = tmp_path / "interface.json"
    listed = {f"madeup_engine.api:{name}": like for name, like in NAMES.items()}
    objects = {name: recorded.describe(name, like) for name, like in listed.items()}
    path.write_text(json.dumps({"distribution": "madeup", "version": "1", "released": "today", "objects": objects}))
    yield path
    for name in ("madeup_engine", "madeup_engine.api"):
        sys.modules.pop(name, None)


def changed(record: Path, old: str, new: str) -> list[str]:
    """What drifts when a line of the engine is another."""
    assert old in RELEASE
    (record.parent / "site" / "madeup_engine" / "api.py").write_text(RELEASE.replace(old, new) + "\n" * 9)
    sys.modules.pop("madeup_engine.api", None)
    importlib.invalidate_caches()
    return recorded.drift(recorded.load(record))


def test_a_release_is_what_was_recorded_of_it(record: Path) -> None:
    assert recorded.installed(recorded.load(record))
    assert recorded.drift(recorded.load(record)) == []


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ("def send(self, x, *, wait=False)", "def send(self, x, y, *, wait=False)", "Base .send"),
        ("def send(self, x, *, wait=False)", "def send(self, x, *, wait)", "Base .send"),
        ("    @abc.abstractmethod\n", "", "Base abstract"),
        ("    @staticmethod\n    def name()", "    def name(self)", "Impl .name"),
        ("class Impl(Base)", "class Impl", "Impl bases"),
        ("SLOW = 2", "LATE = 2", "Mode names"),
        ("return Mode.FAST", "return Mode.SLOW", "Rows format"),
        ("    plan: object = None", "    plans: object = None", "Step fields"),
        ("def register(name, path=None)", "def register(name)", "register signature"),
        ("def register(name", "def enlist(name", "register: recorded, and gone"),
    ],
)
def test_a_release_that_moved_on_is_told(record: Path, old: str, new: str, names: str) -> None:
    assert any(line.startswith(f"madeup_engine.api:{names}") for line in changed(record, old, new))


def test_what_stands_in_has_the_recorded_interface(record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    want = recorded.load(record)
    monkeypatch.setattr(sys, "path", [one for one in sys.path if not one.endswith("site") or "tmp" not in one])
    for name in ("madeup_engine", "madeup_engine.api"):
        sys.modules.pop(name, None)
    importlib.invalidate_caches()
    assert not recorded.installed(want)
    with recorded.engine(record) as is_release:
        from madeup_engine import api

        assert not is_release
        assert recorded.drift(want) == []
        with pytest.raises(TypeError, match="abstract"):
            api.Impl(3)
        made = type("Ours", (api.Impl,), {"send": lambda self, x, *, wait=False: x})(3)
        assert (made.size, made.send(4)) == (3, 4)
        assert api.Rows(1).format is api.Mode.FAST
        with pytest.raises(NotImplementedError, match="register is the engine's own"):
            api.register("a")
        with pytest.raises(TypeError):
            api.register()
    assert "madeup_engine.api" not in sys.modules
