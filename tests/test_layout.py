"""The layout: what imports what, and how long a line and a function may be."""
import ast
from pathlib import Path

import pytest

import sail

ORDER = ("data", "toy", "distributed", "generate", "reward", "evaluate", "sail")   # each uses those before it
TEXTS = {name: (Path(sail.__file__).parent / f"{name}.py").read_text(encoding="utf-8") for name in ORDER}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def ours(nodes):
    """The modules of ours that these nodes import."""
    names = {name for node in nodes for name in (
        [alias.name for alias in node.names] if isinstance(node, ast.Import) else
        [node.module] if isinstance(node, ast.ImportFrom) else [])}
    return names & set(ORDER)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_above_it(name):
    assert ours(ast.walk(TREES[name])) <= set(ORDER[:ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_modules_of_ours_are_imported_at_the_top_level(name):
    assert ours(node for node in ast.walk(TREES[name]) if node not in TREES[name].body) == set()


def test_the_imports_of_this_test_are_found():
    assert ours(ast.walk(ast.parse(Path(__file__).read_text(encoding="utf-8")))) == {"sail"}


@pytest.mark.parametrize("name", ORDER)
def test_no_line_is_longer_than_110_columns(name):
    assert [nth for nth, line in enumerate(TEXTS[name].splitlines(), 1) if len(line) > 110] == []


@pytest.mark.parametrize("name", ORDER)
def test_no_function_but_the_flags_is_longer_than_60_lines(name):
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions(TREES[name])}
    lengths.pop("parse_args", None)
    assert {function: length for function, length in lengths.items() if length > 60} == {}
