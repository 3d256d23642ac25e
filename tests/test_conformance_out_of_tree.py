"""A vendor outside this project: its installed distribution is certified, one with a bug refused with its cause."""

from __future__ import annotations

import json
from pathlib import Path

import mutants.sample
import pytest
from distributions import Distribution, Interpreter, install, suite_site

# A small chip, so that a complete run is short: what is not declared is refused, not tested.
_VENDOR = """

class Acme(Sample):
    def declared(self):
        return dense(
            dtypes=("bfloat16",), head_dim=Ints(96, 96), head_dim_v=Ints(64, 64), h_q=Ints(1, 8), h_kv=Ints(1, 1),
            s_q=Ints(1, 2), page_size=Ints(16, 16), ragged_q=False, batch_invariant=False, lse_bases=("e",),
        )


plugin = Plugin(Acme)
"""


def vendor(name: str, bug: str = "") -> Distribution:
    source = Path(mutants.sample.__file__).read_text() + _VENDOR.replace(
        "class Acme(Sample):", f"class Acme(Sample):{bug}"
    )
    module = f"hal_{name}"
    return Distribution(f"hal-{name}", source, entry_points={"hal.backends": {name: f"{module}:plugin"}})


_CAUSAL_BUG = """
    def seen(self, args, s_q, length):
        seen = super().seen(args, s_q, length)
        return (seen - 1).clamp(min=0) if args.causal else seen

"""


@pytest.fixture(scope="module")
def outside(bare: Interpreter, tmp_path_factory: pytest.TempPathFactory) -> Interpreter:
    """Sees the HAL, the suite as an installed distribution, and two vendors; nothing of this repository."""
    folder = tmp_path_factory.mktemp("outside")
    return bare.seeing(install(folder, vendor("acme"), vendor("lame", _CAUSAL_BUG)), suite_site(bare, folder / "suite"))


@pytest.mark.sampled
@pytest.mark.long(60)
@pytest.mark.timeout(600)
def test_an_installed_vendor_is_certified_and_its_certificate_binds_its_files(
    outside: Interpreter, tmp_path: Path
) -> None:
    done = outside.hal("conform", "--backend", "acme", "--out", str(tmp_path), timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    path = tmp_path / "report.json"
    report = json.loads(path.read_text())
    assert report["verdict"] == "PASS"
    assert report["certificate"]["levels"] == {"L0": "PASS", "L1": "PASS", "L2": "PASS"}
    assert report["certificate"]["distribution"] == "hal-acme 1.0"
    statuses = {row["id"]: row["status"] for row in report["obligations"]}
    assert statuses["MLA-34"] == statuses["MLA-35"] == statuses["MLA-05"] == "REFUSED"
    assert statuses["MLA-07"] == "PASS"
    launched = {name for row in report["obligations"] for name in row["launches"]}
    assert launched == {"torch:attend@cpu"}

    verified = outside.hal("conform", "verify", str(path))
    assert verified.returncode == 0, verified.stdout + verified.stderr
    module = next(folder / "hal_acme.py" for folder in outside.folders if (folder / "hal_acme.py").exists())
    module.write_text(module.read_text() + "\n# a patch after the certificate\n")
    verified = outside.hal("conform", "verify", str(path))
    assert verified.returncode == 1
    assert "are not the certified ones" in verified.stdout


@pytest.mark.sampled
@pytest.mark.long(20)
def test_an_installed_vendor_with_a_bug_is_refused_with_its_cause(outside: Interpreter, tmp_path: Path) -> None:
    line = ["conform", "--backend", "lame", "--out", str(tmp_path), "--seed", "7", "--quick"]
    done = outside.hal(*line, timeout=300)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "likely cause: causal is off by one: a query sees one key too few" in done.stdout
    assert "lame does not conform" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["certificate"] is None
    verdicts = {row["id"]: row["verdict"] for row in report["levels"]}
    assert (verdicts["L0"], verdicts["L1"], verdicts["L2"]) == ("PASS", "FAIL", "BLOCKED")
    failed = next(row for row in report["obligations"] if row["id"] == "MLA-07")
    case = failed["failures"][0]["reproduce"].split("--case ")[1].split()[0]

    again = outside.hal("conform", "--backend", "lame", "--case", case, "--quick", "--out", str(tmp_path / "again"))
    assert again.returncode == 1
    stages = outside.hal("conform", "bisect", case, "--backend", "lame")
    assert stages.returncode == 1
    assert "first wrong: scores, sequence 0" in stages.stdout


@pytest.mark.sampled
@pytest.mark.long(14)
def test_an_installed_vendor_runs_under_plain_pytest(outside: Interpreter, tmp_path: Path) -> None:
    line = [
        "--pyargs",
        "hal_conformance",
        "--hal-mode",
        "quick",
        "--hal-only",
        "MLA-07",
        "-q",
        "-p",
        "no:cacheprovider",
    ]
    good = outside.run("-m", "pytest", *line, "--hal-backend", "acme", "--rootdir", str(tmp_path))
    assert good.returncode == 0, good.stdout + good.stderr
    bad = outside.run("-m", "pytest", *line, "--hal-backend", "lame", "--rootdir", str(tmp_path))
    assert bad.returncode == 1, bad.stdout + bad.stderr
    assert "likely cause: causal is off by one" in bad.stdout
