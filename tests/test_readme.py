"""What README.md says exists: the files it lists, the functions its map of equations names, the settings it types."""

import ast
import re

from conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def names_in(path):
    """All functions, classes and methods of a file: 'f', 'Class', 'Class.method'."""
    names = set()
    for node in ast.parse((ROOT / path).read_text(encoding="utf-8")).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
            names |= {f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef)}
    return names


def test_every_function_of_the_map_exists():
    named = re.findall(r"`(\w+\.py): ([\w.]+)`", README)
    assert len(named) >= 20
    missing = [(path, name) for path, name in named if name not in names_in(path)]
    assert not missing


def test_every_file_named_exists_and_every_source_file_is_named():
    linked = re.findall(r"\]\((?!http)([\w./]+)\)", README)
    assert linked and not [p for p in linked if not (ROOT / p).exists()]
    assert not [p.name for p in ROOT.glob("*.py") if p.name not in README]


def test_the_settings_in_its_commands_exist():
    for script, arguments in re.findall(r"python (train|sample)\.py ([^\n`]*)", README):
        known = (ROOT / f"{script}.py").read_text()
        for key in re.findall(r"--(\w+)", arguments):
            assert re.search(rf"^    {key}: ", known, re.M) or key == "help", (script, key)


def test_the_two_commands_are_there():
    assert "bash demo.sh" in README and "bash test.sh" in README
