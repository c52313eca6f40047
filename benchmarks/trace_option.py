"""Count the functions that name or forward the value of an option, from the parser to where it acts.

    python benchmarks/trace_option.py act_bit cali_iters timesteps

Runs a short calibration of the bundled pixel model and watches every call. A function of this project counts if it was
called and its code names the value (the option, or the field that it becomes), or if it was called with an argument
that
holds the value: a namespace or one of the frozen configurations on the option's way. `self` is no argument. Nested
functions count as part of the function around them.
"""

import argparse
import ast
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

from qdiff.config import CalibrationConfig, QuantConfig
from qdiff_cli.commands.sample_ddim import PixelCommand, PixelSamplerConfig, main
from qdiff_cli.quantization_options import QuantizationConfig, QuantizationOptions

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("qdiff_cli", "qdiff", "ddim")
COMMAND = (
    "--config configs/emoji32.yml --use_pretrained --timesteps 3 --max_images 1 --ptq --weight_bit 8 --quant_act "
    "--act_bit 7 --a_sym --split --cali_st 2 --cali_n 2 --cali_iters 2 --cali_iters_a 2 --cali_batch_size 2"
)
COMMON = (argparse.Namespace, PixelCommand, QuantizationOptions, QuantizationConfig)


@dataclass(frozen=True)
class Route:
    """The names of a value, and the classes that hold it on its way."""

    names: frozenset[str]
    holders: tuple[type, ...]


ROUTES = {
    "act_bit": Route(frozenset({"act_bit"}), (*COMMON, QuantConfig)),
    "cali_iters": Route(frozenset({"cali_iters", "iters"}), (*COMMON, CalibrationConfig)),
    "timesteps": Route(frozenset({"timesteps"}), (argparse.Namespace, PixelCommand, PixelSamplerConfig)),
}


@dataclass
class Watch:
    """Remembers which functions were called, and which of them got an argument that holds a value."""

    called: set[tuple[str, int]] = field(default_factory=set)
    forwarded: dict[str, set[tuple[str, int]]] = field(default_factory=lambda: {name: set() for name in ROUTES})

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """A profile function of `sys.setprofile`."""
        if event != "call":
            return
        code: CodeType = frame.f_code
        place = (code.co_filename, code.co_firstlineno)
        if not any(code.co_filename.startswith(str(ROOT / folder)) for folder in FOLDERS):
            return
        self.called.add(place)
        names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        arguments = [frame.f_locals[name] for name in names if name not in ("self", "cls") and name in frame.f_locals]
        for option, route in ROUTES.items():
            if any(isinstance(argument, route.holders) for argument in arguments):
                self.forwarded[option].add(place)


def names_value(function: ast.FunctionDef, names: frozenset[str]) -> bool:
    """Whether the code of a function reads, passes or receives the value under one of its names."""
    for node in ast.walk(function):
        if isinstance(node, ast.Attribute) and node.attr in names:
            return True
        if isinstance(node, ast.keyword | ast.arg) and node.arg in names:
            return True
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.lstrip("-") in names:
            return True
    return False


def outer_functions(file: Path) -> list[ast.FunctionDef]:
    """The functions and methods of a file, without nested functions."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    return [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]


def on_the_way(option: str, watch: Watch) -> list[str]:
    """The functions on the way of an option, in order of files."""
    found = []
    for folder in FOLDERS:
        for file in sorted((ROOT / folder).rglob("*.py")):
            for function in outer_functions(file):
                first = min([function.lineno, *(decorator.lineno for decorator in function.decorator_list)])
                places = {(str(file), line) for line in range(first, (function.end_lineno or first) + 1)}
                named = places & watch.called and names_value(function, ROUTES[option].names)
                if named or places & watch.forwarded[option]:
                    found.append(f"{file.relative_to(ROOT)}:{function.lineno} {function.name}")
    return found


if __name__ == "__main__":
    watch = Watch()
    with tempfile.TemporaryDirectory() as folder:
        sys.setprofile(watch)
        try:
            main([*COMMAND.split(), "--logdir", folder])
        finally:
            sys.setprofile(None)
    for option in sys.argv[1:] or ROUTES:
        found = on_the_way(option, watch)
        print(f"{option}: {len(found)} functions", *found, sep="\n  ")
