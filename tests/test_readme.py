"""The README shows what happens."""

import io
import re
import subprocess
from contextlib import redirect_stdout
from pathlib import Path

import budgets
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```(?:\s*```\n(.*?)```)?", README, re.DOTALL)


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The output of each Python block of the README, run in order in one namespace."""
    import os

    here, folder = os.getcwd(), tmp_path_factory.mktemp("readme")
    (folder / "README.md").write_text(README)
    os.chdir(folder)
    names: dict = {}
    outputs = []
    try:
        for code, _ in BLOCKS:
            out = io.StringIO()
            with redirect_stdout(out):
                if "layer.forward(x, keep=True" not in code:  # the contract: a template, not a program
                    exec(compile(code, "README.md", "exec"), names)
            outputs.append(out.getvalue())
        assert (folder / "my-adapter" / "adapter_model.safetensors").is_file()
    finally:
        os.chdir(here)
    return outputs


def test_blocks_print_the_output_below_them(printed):
    shown = [(out, expected) for out, (_, expected) in zip(printed, BLOCKS, strict=True) if expected]
    assert len(shown) == 2
    for out, expected in shown:
        hide = lambda text: re.sub(r"\d\.\de-\d\d", "<rounding>", text).strip()  # noqa: E731
        assert hide(out) == hide(expected)


def test_the_first_screen_agrees_to_eight_digits(printed):
    by_hand, finite = (np.array(re.findall(r"-?\d+\.\d+", line), float) for line in printed[0].splitlines())
    np.testing.assert_allclose(by_hand, finite, atol=2e-8)
    assert by_hand.size == 6


def test_the_short_example_adapts_the_model(printed):
    bits = [float(line.split()[1]) for line in printed[1].splitlines()]
    assert len(bits) == 20
    assert bits[-1] < bits[0] - 0.3


def test_linked_files_exist():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
        assert not tracked or target.rstrip("/") in tracked, target


def test_the_stated_budgets_are_those_of_the_test():
    stated = re.search(r"student reads has at most ([\d,]+) lines, the package at most ([\d,]+)", README)
    assert [int(number.replace(",", "")) for number in stated.groups()] == [budgets.STUDENT, budgets.TOTAL]
