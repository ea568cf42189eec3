"""The README and docs/usage.md: their code runs, and their links and commands exist."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README, USAGE = ROOT / "README.md", ROOT / "docs" / "usage.md"
TEXT = README.read_text()


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def run(page, *numbers):
    """Python blocks of a page, by number, one after the other; what they define."""
    names: dict[str, object] = {}
    for number in numbers:
        exec(compile(blocks(page, "python")[number], f"{page.name}, Python block {number}", "exec"), names)
    return names


def test_python_blocks_run():
    pytest.importorskip("torch")
    assert len(blocks(README, "python")) == 4
    assert run(README, 0, 1)["y"].shape == (16, 1024)  # the second says that it goes on
    assert run(README, 2)["rows"].shape == (3, 64)
    names = run(USAGE, *range(len(blocks(USAGE, "python"))))
    assert names["y"] is names["out"]
    assert names["y"].shape == (16, 1024)


def test_the_transformers_block_runs():
    pytest.importorskip("transformers")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of transformers
        assert run(README, 3)["logits"].shape == (1, 8, 99)


def test_the_cpp_layer_is_the_one_that_the_consumer_builds():
    (block,) = blocks(USAGE, "cpp")
    assert block == (ROOT / "tests" / "consumer" / "layer.cc").read_text().split("\n", 1)[1]


def test_the_first_screen_has_the_two_commands():
    first_screen = "\n".join(TEXT.splitlines()[:25])
    assert re.findall(r"^```bash\n(.*)\n```$", first_screen, re.MULTILINE) == [
        "python3 -m pip install . && python3 -m moecore demo",
        "python3 -m pip install '.[test]' && python3 tests/run.py",
    ]


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    targets = [t for t in re.findall(r"\]\(([^)]+)\)", prose) if "://" not in t]
    assert [t for t in targets if not (page.parent / t.split("#")[0]).exists()] == []
