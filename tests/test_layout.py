"""The layout: what imports what, and how long a line and a function may be."""
import ast
from pathlib import Path

import pytest

import sail

ROOT = Path(sail.__file__).parent
RUNTIME = ("runtime.command_line", "runtime.intervals", "runtime.processes", "runtime.run_directory",
           "runtime.settings", "runtime.saved_model", "runtime.optimizer", "runtime.packing",
           "runtime.training", "runtime.compare")
ORDER = (*RUNTIME, "formats", "data", "generate", "reward", "evaluate", "toy", "sail")  # each uses earlier
TEXTS = {name: (ROOT / f"{name.replace('.', '/')}.py").read_text(encoding="utf-8") for name in ORDER}
TREES = {name: ast.parse(text) for name, text in TEXTS.items()}


def ours(nodes):
    """The modules of ours that these nodes import."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & set(ORDER)


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]


def test_these_are_all_files():
    found = {path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
             for pattern in ("*.py", "runtime/*.py") for path in ROOT.glob(pattern)}
    assert found == {*ORDER, "runtime.__init__"}


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_those_above_it(name):
    assert ours(ast.walk(TREES[name])) <= set(ORDER[:ORDER.index(name)])


@pytest.mark.parametrize("name", ORDER)
def test_modules_of_ours_are_imported_at_the_top_level(name):
    assert ours(node for node in ast.walk(TREES[name]) if node not in TREES[name].body) == set()


@pytest.mark.parametrize("name", [name for name in ORDER if name not in ("toy", "sail")])
def test_the_toy_is_an_ordinary_user(name):
    names = {node.id.lower() for node in ast.walk(TREES[name]) if isinstance(node, ast.Name)}
    texts = {node.value.lower() for node in ast.walk(TREES[name])
             if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert [word for word in {*names, *texts} if word == "toy" or "toy_" in word or "toy-" in word] == []


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
