"""Print functions and classes that are too long to see: `python tests/check_length.py FOLDER ...`; status 1 if any."""

import ast
import sys
from pathlib import Path

LIMITS = {ast.FunctionDef: 80, ast.AsyncFunctionDef: 80, ast.ClassDef: 200}


def too_long(file: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        limit = LIMITS.get(type(node))
        if limit and (length := node.end_lineno - node.lineno + 1) > limit:
            found.append(f"{file}:{node.lineno}: {node.name} has {length} lines, expected at most {limit}")
    return found


if __name__ == "__main__":
    lines = [line for folder in sys.argv[1:] for file in sorted(Path(folder).rglob("*.py")) for line in too_long(file)]
    print(*lines, sep="\n", end="\n" if lines else "")
    sys.exit(bool(lines))
