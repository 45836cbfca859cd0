"""Modules and functions stay short enough to be read in one go."""

import ast
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
MODULE_LINES = 400
FUNCTION_LINES = 70  # without the docstring


def code_files() -> list[Path]:
    folders = ("jaxfm", "parallel", "federated", "search", "launch", "benchmarks", "tools")
    return [file for folder in folders for file in (REPOSITORY / folder).rglob("*.py")]


def lines_of_code(function: ast.FunctionDef) -> int:
    first = function.body[0]
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is None:
        return lines
    return lines - (first.end_lineno - first.lineno + 1)


def test_no_module_is_too_long():
    lengths = {str(file): len(file.read_text().splitlines()) for file in code_files()}
    assert not {name: length for name, length in lengths.items() if length > MODULE_LINES}


def test_no_function_is_too_long():
    """A `main`, which is one straight line of steps, may be."""
    too_long = {
        f"{file}:{node.name}": lines_of_code(node)
        for file in code_files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
        and node.name != "main"
        and lines_of_code(node) > FUNCTION_LINES
    }
    assert not too_long
