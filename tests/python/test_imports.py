"""import moecore is cheap: no framework, few milliseconds."""

from __future__ import annotations

import statistics
import subprocess
import sys

PROGRAM = """
import sys, time
start = time.perf_counter()
import moecore
seconds = time.perf_counter() - start
heavy = {"torch", "numpy", "jax", "cupy", "transformers", "ml_dtypes"} & set(sys.modules)
print(seconds, *sorted(heavy))
"""


def test_import_is_quick_and_brings_in_no_framework():
    seconds = []
    for _ in range(7):
        run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
        fields = run.stdout.split()
        assert fields[1:] == [], "import moecore also imports these"
        seconds.append(float(fields[0]))
    assert statistics.median(seconds) < 0.1


def test_every_public_name_exists():
    import moecore

    assert all(hasattr(moecore, name) for name in moecore.__all__)
