"""The package stays small, files stay short, and imports run downward: tests/budgets.py has the numbers and counts."""

from __future__ import annotations

import budgets
import pytest

GRAPH = budgets.imports()


def test_the_package_is_within_its_budget():
    total = sum(budgets.lines(path) for path in budgets.PACKAGE.rglob("*.py"))
    assert total <= budgets.TOTAL, f"{total} lines: take something away, or raise TOTAL with a reason in CONTRIBUTING.md"


def test_the_students_part_is_within_its_budget():
    part = budgets.student(GRAPH)
    assert sum(part.values()) <= budgets.STUDENT, part


def test_no_file_is_too_long():
    assert not {str(path): n for path in budgets.modules().values() if (n := budgets.lines(path)) > budgets.FILE}


@pytest.mark.parametrize("graph", [GRAPH, budgets.packages(GRAPH)], ids=["files", "packages"])
def test_there_is_no_circle(graph):
    assert budgets.circles(graph) == []


def test_imports_run_downward():
    assert budgets.upward(GRAPH) == []


def test_the_checks_can_fail():
    loop = {"a.x": {"b.y"}, "b.y": {"c.z"}, "c.z": {"a.x"}, "d": set()}
    assert budgets.circles(loop) == [["a.x", "b.y", "c.z"]]
    assert budgets.circles({"a": {"b"}, "b": set()}) == []
    assert budgets.upward({"functional.linear": {"layers.linear"}, "layers.linear": set()}) == ["functional.linear imports layers.linear"]
