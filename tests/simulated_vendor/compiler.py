"""Stands for a vendor's compiler: makes of kernels in the dialect "host" what the simulated library loads."""

import re
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from hal.portable import host

if "--version" in sys.argv:
    print("simulated compiler 1")
    raise SystemExit
text = Path(sys.argv[-1]).read_text()
simulator = Path(host.__file__).parent / "dialects" / "host.cpp"
kernels = re.findall(r"HAL_KERNEL\(\w+\)\s*void (\w+)\(", text)
calls = [f'extern "C" void call_{k}(void **given) {{ Call<{k}>::by_address(given); }}\n' for k in kernels]
with tempfile.TemporaryDirectory() as folder:
    whole, made = Path(folder, "kernels.cpp"), Path(folder, "kernels.so")
    whole.write_text(f'{text}#line 1 "{simulator}"\n{simulator.read_text()}{"".join(calls)}')
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off"]
    subprocess.run([host.compiler(), *flags, "-o", str(made), str(whole)], check=True)
    code = made.read_bytes()
Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(struct.pack("=Q", len(code)) + code)
