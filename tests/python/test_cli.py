"""The command line: every command, and what it says when it cannot."""

from __future__ import annotations

import re
import subprocess
import sys

import moecore
import pytest
from moecore import cli
from moecore.models import MODELS


def run(capsys, *args):
    status = cli.main(list(args))
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_version_from_a_shell():
    done = subprocess.run(
        [sys.executable, "-m", "moecore", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"moecore {moecore.__version__}\n"


def test_without_a_command_it_prints_help(capsys):
    status, out, _ = run(capsys)
    assert status == 2
    for command in ("demo", "show-config", "collect-env", "explain"):
        assert command in out


@pytest.mark.parametrize("option", ["--cmake-dir", "--include-dir"])
def test_directories_are_printed_or_missed_clearly(capsys, option):
    expected = moecore.cmake_dir() if option == "--cmake-dir" else moecore.include_dir()
    status, out, err = run(capsys, option)
    if expected is None:
        assert status == 2
        assert "pip install ." in err
    else:
        assert (status, out) == (0, f"{expected}\n")


def test_show_config(capsys):
    status, out, _ = run(capsys, "show-config")
    assert status == 0
    config = moecore.show_config(mode="dicts")
    assert f"moecore {config['version']}" in out
    assert config["cpu"]["isa"] in out
    for op in moecore.OPS:
        assert op in out


def test_collect_env(capsys):
    status, out, _ = run(capsys, "collect-env")
    assert status == 0
    for title in ("[moecore]", "[machine]", "[Python]", "[environment]"):
        assert title in out
    for field in ("version", "CPU engine", "CUDA kernels", "OS", "CPU", "memory", "GPU", "torch", "numpy"):
        assert re.search(rf"^{field}: +\S", out, re.MULTILINE), field


def test_collect_env_imports_no_framework():
    program = (
        "import sys; from moecore.collect_env import collect_env; collect_env(); "
        "print({'torch', 'numpy', 'jax'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


@pytest.mark.parametrize("op", moecore.OPS)
def test_explain_names_the_op_and_runs_nothing(capsys, op):
    status, out, _ = run(capsys, "explain", op, "--model", "gpt-oss-20b", "--tokens", "5", "--device", "cpu")
    assert status == 0
    heading, reasons = out.split("\n", 1)
    assert heading.startswith(f"{op} of gpt-oss-20b, 5 tokens, bf16, cpu (")
    assert reasons.strip()


@pytest.mark.parametrize("model", MODELS)
def test_explain_knows_every_model(capsys, model):
    """Tensors of 34 GB for the largest: they must never be touched."""
    status, out, _ = run(
        capsys, "explain", "fused_experts", "--model", model, "--tokens", "1", "--device", "cpu"
    )
    assert status == 0
    assert "grouped_gemm" in out


def test_explain_without_a_gpu_says_why(capsys):
    if moecore.is_available("cuda"):
        pytest.skip("there is a GPU")
    status, _, err = run(capsys, "explain", "permute", "--device", "cuda")
    assert status == 2
    assert err.startswith("moecore: ")
    assert "CUDA" in err


@pytest.mark.parametrize(
    "args",
    [["explain", "nonsense"], ["demo", "--model", "nonsense"], ["demo", "--tokens", "-1"], ["nonsense"]],
)
def test_bad_arguments_are_refused(capsys, args):
    with pytest.raises(SystemExit, match="2"):
        cli.main(args)
    assert args[-1] in capsys.readouterr().err
