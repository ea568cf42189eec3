"""The C++ package, built against by a project of ten lines, and what the binaries need and show."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import moecore
import pytest

ROOT = Path(__file__).resolve().parents[2]
CONSUMER = ROOT / "tests" / "consumer"
OUTPUT = f"""\
4 5 6
0 0 0
1 2 3
79 7c 7e
0 0 0
71 79 7e
40e1 40e1
moecore {moecore.__version__}: shuffle_rows: map is f32[3,3] cpu, expected dtype i32|i64
"""

needs_cmake = pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed")
needs_binutils = pytest.mark.skipif(
    shutil.which("readelf") is None or shutil.which("gcc") is None,
    reason="gcc and binutils are not installed",
)


def command(*args, **options):
    """Runs a command and returns what it prints; a failure shows its errors."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, check=False, **options)
    assert done.returncode == 0, f"{args}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def generator():
    return ("-G", "Ninja") if shutil.which("ninja") else ()


# --- find_package(moecore) ---


def build_and_run_consumer(build, *options):
    command("cmake", "-S", CONSUMER, "-B", build, *generator(), *options)
    command("cmake", "--build", build)
    return command(build / "consumer")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """A `cmake --install` prefix, from MOECORE_BUILD_DIR when set, else from a CPU build of its own."""
    build = os.environ.get("MOECORE_BUILD_DIR")
    if build is None:
        build = ROOT / "build" / "package-test"
        options = ("-DMOECORE_CUDA=OFF", "-DMOECORE_TESTS=OFF")
        command("cmake", "-S", ROOT, "-B", build, *generator(), *options)
        command("cmake", "--build", build, "--target", "moecore", "-j2")
    path = tmp_path_factory.mktemp("prefix")
    command("cmake", "--install", build, "--prefix", path, "--component", "cpp")
    return path


@needs_cmake
def test_consumer_builds_against_an_installed_prefix(prefix, tmp_path):
    assert build_and_run_consumer(tmp_path, f"-DCMAKE_PREFIX_PATH={prefix}") == OUTPUT


@needs_cmake
def test_a_newer_minor_version_is_not_accepted(prefix, tmp_path):
    project = tmp_path / "project"
    shutil.copytree(CONSUMER, project)
    lists = project / "CMakeLists.txt"
    lists.write_text(lists.read_text().replace("moecore 0.1", "moecore 0.2"))
    done = subprocess.run(
        ["cmake", "-S", project, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={prefix}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert 'compatible with requested version "0.2"' in done.stderr


@needs_cmake
def test_consumer_builds_against_the_wheel(tmp_path):
    if moecore.cmake_dir() is None:
        pytest.skip("moecore is imported from a build tree, not from a wheel")
    directory = command(sys.executable, "-m", "moecore", "--cmake-dir").strip()
    assert directory == moecore.cmake_dir()
    assert build_and_run_consumer(tmp_path, f"-Dmoecore_DIR={directory}") == OUTPUT


def test_the_wheel_offers_its_prefix_to_build_backends():
    if moecore.cmake_dir() is None:
        pytest.skip("moecore is imported from a build tree, not from a wheel")
    from importlib.metadata import entry_points

    (entry,) = (e for e in entry_points(group="cmake.prefix") if e.name == "moecore")
    assert entry.load() is moecore
    assert Path(moecore.cmake_dir()).is_relative_to(Path(moecore.__file__).parent)
    assert (Path(moecore.include_dir()) / "moecore" / "moecore.h").is_file()


# --- What the binaries need ---

ALLOWED = {"libc", "libm", "libstdc++", "libgcc_s"}
if moecore.cuda_archs():
    # The static CUDA runtime reaches its thread-locals through the loader, which then is needed by name.
    ALLOWED |= {"ld-linux-x86-64", "ld-linux-aarch64"}


def unexpected_libraries(binary):
    """Libraries of the dynamic section beyond those that every machine has."""
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", command("readelf", "-d", binary))
    assert needed, f"{binary} has no dynamic section"
    return [name for name in needed if name.split(".so")[0] not in ALLOWED]


def exported_symbols(binary):
    lines = command("nm", "-D", "--defined-only", "--demangle", binary).splitlines()
    return [line.split(" ", 2)[2] for line in lines]


def shared_library(directory, name, source, *options):
    path = directory / f"lib{name}.so"
    (directory / f"{name}.c").write_text(source)
    command("gcc", "-shared", "-fPIC", directory / f"{name}.c", "-o", path, *options)
    return path


@needs_binutils
def test_the_extension_needs_only_what_every_machine_has():
    assert unexpected_libraries(moecore._core.__file__) == []


@needs_binutils
def test_the_check_of_needed_libraries_can_fail(tmp_path):
    shared_library(tmp_path, "other", "int other(void) { return 1; }\n")
    user = shared_library(
        tmp_path, "user", "int other(void); int user(void) { return other(); }\n", f"-L{tmp_path}", "-lother"
    )
    assert unexpected_libraries(user) == ["libother.so"]


@needs_binutils
def test_the_extension_shows_its_init_function_alone():
    assert exported_symbols(moecore._core.__file__) == ["PyInit__core"]


PUBLIC = re.compile(r"(vtable for |typeinfo for |typeinfo name for )?moecore::(?!cpu::|cuda::|python::)")


@needs_binutils
def test_the_shared_library_shows_the_public_api_alone():
    library = Path(moecore.__file__).parent / "lib" / "libmoecore.so"
    if not library.is_file():
        pytest.skip("moecore is imported from a build tree, not from a wheel")
    symbols = exported_symbols(library)
    assert [s for s in symbols if not PUBLIC.match(s)] == []
    for name in ("route(", "plan(", "permute(", "activate(", "grouped_gemm(", "finalize(", "fused_experts("):
        assert any(s.startswith(f"moecore::{name}") for s in symbols), name
    assert "typeinfo for moecore::InvalidArgument" in symbols
    assert unexpected_libraries(library) == []


@needs_binutils
def test_the_check_of_exported_symbols_can_fail(tmp_path):
    library = shared_library(tmp_path, "leaky", "int leak(void) { return 1; }\n")
    assert exported_symbols(library) == ["leak"]
    assert not PUBLIC.match("leak")
    assert not PUBLIC.match("moecore::cpu::plan(moecore::PlanProblem const&)")
    assert not PUBLIC.match("std::vector<int, std::allocator<int> >::~vector()")
