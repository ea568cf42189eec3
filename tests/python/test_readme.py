"""The README's Python blocks run, one after the other, and its links and commands exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

README = Path(__file__).resolve().parents[2] / "README.md"
TEXT = README.read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)


def test_python_blocks_run():
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        for number, block in enumerate(blocks("python")):
            exec(compile(block, f"README.md, Python block {number}", "exec"), names)
    assert names["y"].shape == (16, 1024)
    assert names["rows"].shape == (3, 64)


def test_the_first_screen_has_the_two_commands():
    first_screen = "\n".join(TEXT.splitlines()[:25])
    assert re.findall(r"^```bash\n(.*)\n```$", first_screen, re.MULTILINE) == [
        "python3 -m pip install . && python3 -m moecore demo",
        "python3 -m pip install '.[test]' && python3 tests/run.py",
    ]


def test_links_lead_somewhere():
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", TEXT) if "://" not in t]
    assert targets
    assert [t for t in targets if not (README.parent / t.split("#")[0]).exists()] == []
