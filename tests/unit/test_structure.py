"""The rules of docs/architecture.md: who may import whom, no circles, nothing that stands twice."""

import ast
import tomllib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.support.commands import REPOSITORY

MAY_IMPORT = {
    "qdiff": {"qdiff"},
    "ddim": {"qdiff", "ddim"},
    "ldm": {"qdiff", "ddim", "ldm"},
    "qdiff_cli": {"qdiff", "ddim", "ldm", "qdiff_cli"},
    "scripts": {"qdiff_cli"},
}
OWN = {*MAY_IMPORT, "benchmarks", "tests"}
# Modules of the command line that may see words or a namespace: the parser, and the commands that it makes.
PARSERS = {"options", "quantization_options", "sampling_run", "sampling_commands", "evaluation", "main", "__init__"}
BLOCK = 10  # lines


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for file in sorted((REPOSITORY / package).rglob("*.py")):
        parts = file.relative_to(REPOSITORY).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(file: Path, top_level: bool) -> set[str]:
    """The full names that a file imports; `top_level`: those of functions are left out."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    found = set()
    for node in tree.body if top_level else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{name.name}" for name in node.names)}
    return found


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_packages_import_only_what_stands_below_them(package):
    for name, file in modules(package):
        above = {found for found in imports(file, top_level=False) if found.split(".")[0] in OWN - MAY_IMPORT[package]}
        assert not above, f"{name} imports {sorted(above)}"


def circle(files: dict[str, Path]) -> list[str] | None:
    """Modules that import one another when they are imported, if there are any."""
    graph = {}
    for name, file in files.items():
        found = imports(file, top_level=True) & set(files) - {name}
        # `from package import module` imports the module; that its package is imported first is no circle
        graph[name] = {one for one in found if not any(other.startswith(f"{one}.") for other in found)}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        return error.args[1]
    return None


def test_no_modules_import_each_other():
    assert circle({name: file for package in MAY_IMPORT for name, file in modules(package)}) is None


def test_a_circle_is_found(tmp_path):
    for name, other in (("first", "second"), ("second", "first")):
        (tmp_path / f"{name}.py").write_text(f"import math\nfrom {other} import something\n")
    assert circle({name: tmp_path / f"{name}.py" for name in ("first", "second")}) is not None


@pytest.mark.parametrize("package", ["qdiff", "ddim", "ldm"])
def test_libraries_know_no_command_line(package):
    for name, file in modules(package):
        text = file.read_text(encoding="utf-8")
        assert "argparse" not in imports(file, top_level=False) and "sys.argv" not in text, name


def test_nothing_below_the_parser_sees_a_namespace_or_words():
    for name, file in modules("qdiff_cli"):
        if file.stem in PARSERS or file.parent.name == "commands":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
        assert not names & {"argparse", "Namespace", "ParsedArgs", "argv"}, name


def test_every_script_is_a_docstring_and_a_call_of_main():
    for _, file in modules("scripts"):
        first, *rest = ast.parse(file.read_text(encoding="utf-8")).body
        assert isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant), file
        assert [type(node) for node in rest] == [ast.ImportFrom, ast.ImportFrom, ast.If], file
        assert ast.unparse(rest[2]) == "if __name__ == '__main__':\n    run_main(main)", file


def test_no_block_of_lines_stands_twice_in_the_application():
    seen: dict[tuple[str, ...], str] = {}
    for package in ("scripts", "qdiff_cli"):
        for name, file in modules(package):
            numbered = enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
            lines = [(number, text.strip()) for number, text in numbered if text.strip()]
            for start in range(len(lines) - BLOCK + 1):
                block = tuple(text for _, text in lines[start : start + BLOCK])
                place = f"{name}:{lines[start][0]}"
                assert block not in seen, f"{place} repeats {seen[block]}"
                seen[block] = place


def test_mypy_exempts_no_module_of_the_project():
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    exempt = [module for entry in settings.get("overrides", []) for module in entry["module"]]
    assert not {module.split(".")[0] for module in exempt} & OWN and set(settings["packages"]) == set(MAY_IMPORT) - {
        "scripts"
    }
