#!/usr/bin/env python3
"""Build and run both test suites: the C++ core's under ctest, the Python boundary's under pytest.

    python3 -m pip install '.[test]' && python3 tests/run.py

Everything goes to build/<configuration>, so a second run builds only what changed. The exit status is zero
only if every requested suite passed.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Result:
    """How one suite ended, and its closing line."""

    suite: str
    passed: bool
    closing: str
    seconds: float


def say(text: str) -> None:
    """Print progress at once, in order with what the tools print."""
    print(f"== {text}", flush=True)


def run(command: list[str], closing_line: str = r"\S", **env: str) -> tuple[int, str]:
    """Run a command, show its output as it comes; return its status and the last line that matches."""
    print("+ " + shlex.join(command), flush=True)
    closing = ""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if re.search(closing_line, line):
                closing = line.strip()
    return process.returncode, closing


def tool(name: str) -> str:
    """Find a build tool next to this Python or on PATH; install it with pip when there is none."""
    search = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    found = shutil.which(name, path=search)
    if not found:
        say(f"installing {name} with pip")
        status, _ = run([sys.executable, "-m", "pip", "install", "--quiet", name])
        found = shutil.which(name, path=search)
        if status or not found:
            sys.exit(f"{name} is needed to build the C++ tests: python3 -m pip install {name}")
    return found


def require_gtest() -> None:
    """Install GoogleTest from Debian or Ubuntu when it is missing and we may; say how to get it otherwise."""
    if any(Path(prefix, "include/gtest/gtest.h").exists() for prefix in ("/usr", "/usr/local")):
        return
    if shutil.which("apt-get") and os.geteuid() == 0:
        say("installing libgtest-dev with apt-get")
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run(["apt-get", "update", "-q"], **quiet)
        if run(["apt-get", "install", "-qy", "--no-install-recommends", "libgtest-dev"], **quiet)[0] == 0:
            return
    sys.exit("the C++ tests need GoogleTest: apt-get install libgtest-dev (as root)")


def has_gpu() -> bool:
    """Tell whether this machine has an NVIDIA driver with a device, and a compiler for it."""
    return Path("/proc/driver/nvidia/gpus").exists() and shutil.which("nvcc") is not None


def cpp_suite(name: str, options: list[str], ctest_options: list[str]) -> Result:
    """Configure, build and run the C++ tests in build/<name>."""
    start = time.monotonic()
    require_gtest()
    cmake, ninja = tool("cmake"), tool("ninja")
    build = f"build/{name}"
    configure = [cmake, "-S", ".", "-B", build, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"]
    say(f"C++ tests: configure {build}")
    status, closing = run([*configure, "-DMOECORE_TESTS=ON", *options])
    if status == 0:
        say("C++ tests: build")
        status, closing = run([cmake, "--build", build])
    if status == 0:
        say("C++ tests: run")
        ctest = str(Path(cmake).parent / "ctest")
        command = [ctest, "--test-dir", build, "--output-on-failure", "--no-tests=error", *ctest_options]
        status, closing = run(command, closing_line="tests passed|No tests")
    return Result("ctest", status == 0, closing, time.monotonic() - start)


def python_suite(pytest_options: list[str]) -> Result:
    """Run pytest on the installed package."""
    start = time.monotonic()
    say("Python tests: run")
    probe = "import moecore, pytest; print('moecore', moecore.__version__, moecore.__file__)"
    status, closing = run([sys.executable, "-c", probe])
    if status:
        closing = "moecore or pytest is not installed: python3 -m pip install '.[test]'"
    else:
        status, closing = run([sys.executable, "-m", "pytest", "tests/python", *pytest_options])
    return Result("pytest", status == 0, closing, time.monotonic() - start)


def main() -> int:
    """Parse options, run what was asked for, print one line per suite."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpp", action="store_true", help="the C++ suite alone")
    parser.add_argument("--python", action="store_true", help="the Python suite alone")
    parser.add_argument("--asan", action="store_true", help="the C++ suite under sanitizers")
    parser.add_argument("--gpu", action="store_true", help="insist on building for and testing on a GPU")
    parser.add_argument("-k", metavar="PATTERN", help="only tests that match: ctest -R and pytest -k")
    args = parser.parse_args()
    everything = not (args.cpp or args.python or args.asan)

    gpu = args.gpu or has_gpu()
    if args.gpu and not has_gpu():
        sys.exit("--gpu: no NVIDIA driver with a device, or no nvcc on PATH")
    cuda = ["-DMOECORE_CUDA=ON", "-DMOECORE_CUDA_ARCHITECTURES=native"] if gpu else ["-DMOECORE_CUDA=OFF"]
    ctest_options = ["-R", args.k] if args.k else []

    results = []
    if args.cpp or everything:
        options = [*cuda, "-DCMAKE_BUILD_TYPE=Release"]
        results.append(cpp_suite("test-cuda" if gpu else "test", options, ctest_options))
    if args.asan:
        options = ["-DMOECORE_CUDA=OFF", "-DCMAKE_BUILD_TYPE=RelWithDebInfo"]
        options.append("-DMOECORE_SANITIZE=address,undefined")
        results.append(cpp_suite("test-asan", options, ctest_options))
    if args.python or everything:
        results.append(python_suite(["-k", args.k] if args.k else []))

    say("results")
    for r in results:
        print(f"{r.suite:7} {'passed' if r.passed else 'FAILED'} in {r.seconds:.0f} s: {r.closing}")
    return 0 if all(r.passed for r in results) else 1


if __name__ == "__main__":
    sys.exit(main())
