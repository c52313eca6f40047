"""The README, the pages in docs/ and the cards of the models: commands and code run, and what they name exists."""

import contextlib
import io
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import pairwise, product
from pathlib import Path

import pytest

from qdiff import architecture
from qdiff.scale_rules import SCALE_RULES
from qdiff_cli import bundled
from qdiff_cli.main import COMMANDS
from qdiff_cli.sampling_commands import SAMPLING_COMMANDS, parse_sampling_command
from qdiff_cli.tables import DASH, TABLES
from tests.support import commands
from tests.support.commands import REPOSITORY, succeeded

README = REPOSITORY / "README.md"
CARDS = sorted(REPOSITORY.glob("models/*/*/README.md"))
PAGES = [README, REPOSITORY / "CONTRIBUTING.md", *sorted(REPOSITORY.glob("docs/**/*.md")), *CARDS]
README_LINES = 130
OLD_NAMES = re.compile(
    r"--embedded|--table embedded|--time_sets|train_embedded|embedded (model|checkpoint)s?\b|held[_ -]out"
    r"|scripts/common|qdiff[./]integer|step sizes"
)
FOLDERS = ("scripts", "qdiff", "qdiff_cli", "ddim", "ldm", "configs", "models", "docs", "benchmarks", "tests")
FOREIGN_OPTIONS = {  # options of other programs: torchrun, and `qdiff --help`
    *("--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint", "--help"),
}
# What stands for a placeholder in a command; "folder" and the files exist in the working directory of the tests.
PLACEHOLDERS = {
    "4 or 8": ["4", "8"],
    "output_path": ["results"],
    "packed_ckpt_path": ["quantized.safetensors"],
    "quantized_ckpt_path": ["quantized.pth"],
    "cali_data_path": ["calibration_set.pt"],
    "model.ckpt": ["quantized.pth"],
    "prompt": ["'red heart'"],
    "host": ["localhost"],
    "timestamp": ["2026-11-28-00-00-00"],
}
PLACEHOLDER_FOLDER = re.compile("folder|lmdb")
# Options that make a command short. A later option replaces an earlier one.
SHORT = {
    "sample_diffusion_ddim.py": "--timesteps 2 --max_images 1 --threads 1",
    "sample_diffusion_ldm.py": "-c 2 -n 1 --threads 1",
    "txt2img.py": "--ddim_steps 2 --n_iter 1 --n_samples 1 --threads 1",
    "make_calibration_set.py": "--timesteps 2 --cali_st 2 --cali_n 2 --threads 1",
    "compare.py": "--images 1 --no_nearest --threads 1",
    "reproduce.py": "--images 2 --trajectory_images 1 --models emoji32 --threads 1",
    "export.py": "",
}
SHORT_ROWS = "--rows full-precision q-diffusion-w4a8"
SHORT_CALIBRATION = "--cali_st 2 --cali_n 2 --a_min_max --cali_iters_a 1 --cali_iters_tune 1"
SLOW = re.compile(r"\.onnx\b|--check\b")  # commands that take more than some seconds even so
MODULES = {module: name for name, module in commands.MODULES.items()}


@dataclass(frozen=True)
class Command:
    """A command in a page.

    Attributes:
        page: the page.
        line: its line in the page.
        text: the command, with placeholders.
        inline: it stands inside a sentence.
    """

    page: Path
    line: int
    text: str
    inline: bool = False

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"

    def words(self) -> list[str]:
        return shlex.split(self.text, comments=True)

    def variants(self) -> Iterator[list[str]]:
        """The words with every combination of values for the placeholders."""
        parts = re.split(r"<([^<>]+)>", self.text)
        for values in product(*(values_of(name) for name in parts[1::2])):
            text = parts[0] + "".join(value + rest for value, rest in zip(values, parts[2::2], strict=True))
            yield shlex.split(text, comments=True)


def values_of(placeholder: str) -> list[str]:
    if placeholder in PLACEHOLDERS:
        return PLACEHOLDERS[placeholder]
    assert PLACEHOLDER_FOLDER.search(placeholder), f"<{placeholder}>: a placeholder without a value in this test"
    return ["folder"]


def blocks(page: Path) -> Iterator[tuple[str, int, list[str]]]:
    """The fenced blocks of a page: language, number of the first line, lines."""
    language, first, lines = None, 0, []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        if line.startswith("```"):
            if language is not None:
                yield language, first, lines
            language, first, lines = (line[3:].strip() if language is None else None), number + 1, []
        elif language is not None:
            lines.append(line)
    assert language is None, f"{page}: a block is not closed"


@cache
def prose(page: Path) -> list[str]:
    """The lines of a page outside its fenced blocks; the lines of the blocks are empty."""
    lines = page.read_text(encoding="utf-8").splitlines()
    for _, first, inside in blocks(page):
        for number in range(first - 2, first + len(inside)):
            lines[number] = ""
    return lines


def spans(page: Path) -> Iterator[tuple[int, str]]:
    """The code spans of a page with their lines."""
    for number, line in enumerate(prose(page), 1):
        for text in re.findall(r"`([^`]+)`", line):
            yield number, text


def commands_of(page: Path) -> Iterator[Command]:
    for language, first, lines in blocks(page):
        if language in ("", "sh", "bash"):
            number, text = first, ""
            for offset, line in enumerate(lines):
                number = number if text else first + offset
                text += line.removesuffix("\\")
                if not line.endswith("\\"):
                    if text.strip():
                        yield Command(page, number, text.strip())
                    text = ""
    for number, text in spans(page):
        if re.match(r"(python (scripts|benchmarks)/|qdiff |torchrun |make |pip |conda )", text):
            yield Command(page, number, text, inline=True)


ALL_COMMANDS = [command for page in PAGES for command in commands_of(page)]


def script_of(words: Sequence[str]) -> tuple[str, list[str]] | None:
    """The script that a command runs, and its options; None for a command of another kind."""
    if words[0] in ("python", "torchrun"):
        at = next((i for i, word in enumerate(words) if word.startswith("scripts/")), None)
        if at is not None and (words[0] == "torchrun" or at == 1):
            assert (REPOSITORY / words[at]).is_file(), f"{words[at]}: no such script"
            return Path(words[at]).name, list(words[at + 1 :])
    if words[0] == "qdiff" and words[1] in COMMANDS:
        module = COMMANDS[words[1]][0]
        return MODULES.get(module, f"{module}.py"), list(words[2:])
    return None


def parse(name: str, options: Sequence[str]) -> object:
    """Parse the options of a script; an assertion fails with what its parser says."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            if name in SAMPLING_COMMANDS:
                return parse_sampling_command([name, *options])
            module = commands.MODULES.get(name, name.removesuffix(".py"))
            return import_module(f"qdiff_cli.commands.{module}").parse(options)
        except SystemExit:
            pytest.fail(said.getvalue())


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A working directory that looks like the clone to a command, and that takes what the command writes."""
    for name in ("configs", "models", "scripts"):
        (tmp_path / name).symlink_to(REPOSITORY / name)
    (tmp_path / "folder").mkdir()
    for name in ("quantized.pth", "calibration_set.pt"):
        (tmp_path / name).write_bytes(b"a file")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


# --- what the pages show ---------------------------------------------------------------------------


def check_other_command(words: list[str]) -> None:
    """Check a command that is not one of the scripts: what it names must exist."""
    match words:
        case ["python", benchmark, *options] if benchmark.startswith("benchmarks/"):
            source = (REPOSITORY / benchmark).read_text(encoding="utf-8")
            for option in (word for word in options if word.startswith("--")):
                assert f'"{option}"' in source, f"{option}: not an option of {benchmark}"
        case ["make", target]:
            assert re.search(rf"^{target}:", (REPOSITORY / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        case ["pip", "install", *parts]:
            extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
            for extra in ",".join(re.findall(r"\[(.*?)\]", " ".join(parts))).split(","):
                assert extra in ("", *extras["optional-dependencies"]), extra
        case ["conda", "env", "create", "-f", file]:
            assert (REPOSITORY / file).is_file()
        case ["qdiff", "--help"] | ["npm", "pack", *_]:
            pass
        case _:
            pytest.fail("a command that this test does not know")


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=lambda command: command.place)
def test_commands_parse(command, workplace):
    for words in command.variants():
        found = script_of(words)
        if found is None:
            check_other_command(words)
        elif not (command.inline and words[0] == "qdiff" and len(words) == 2):  # the name of a command
            parse(*found)


def on_bundled_models() -> list[Command]:
    """The commands that the bundled models are enough for; of those that are alike when shortened, the first."""
    found: dict[tuple[str, ...], Command] = {}
    for command in ALL_COMMANDS:
        if not command.inline and "<" not in command.text and re.search("emoji|bundled", command.text):
            script = script_of(command.words())
            if script is not None and script[0] in SHORT:
                found.setdefault(tuple(without_replaced(*script)), command)
    return list(found.values())


def without_replaced(name: str, options: Sequence[str]) -> Iterator[str]:
    """The words of a command without the options, and their values, that `shortened` replaces."""
    yield name
    replaced = [word for word in SHORT[name].split() if word.startswith("-")]
    for before, word in pairwise(["", *options]):
        if word not in replaced and before not in replaced:
            yield word


def shortened(name: str, options: Sequence[str]) -> list[str]:
    """The options of a script, with those that make it short."""
    own, inner = list(options), []
    if "--" in options:
        at = options.index("--")
        own, inner = list(options[:at]), ["--", options[at + 1], *shortened(options[at + 1], options[at + 2 :])]
    own += shlex.split(SHORT[name])
    if name == "reproduce.py" and not {"--check", "--rows"} & set(own):
        own += shlex.split(SHORT_ROWS)
    if "--ptq" in own and "--cali_ckpt" not in own:
        own += shlex.split(SHORT_CALIBRATION)
        own += [] if {"fast", "best"} & set(own) else ["--cali_iters", "1"]
    if "--timestep_groups" in own:
        own += ["--timestep_groups", "2"]
    return own + inner


def is_slow(command: Command) -> bool:
    """Whether a command takes long even if shortened: calibrations and comparisons."""
    works_long = re.search(r"--ptq\b(?!.*--cali_ckpt)|compare\.py|reproduce\.py", command.text) is not None
    return SLOW.search(command.text) is not None or works_long


def run_parameters() -> list:
    return [
        pytest.param(command, id=command.place, marks=[pytest.mark.slow] if is_slow(command) else [])
        for command in on_bundled_models()
    ]


@pytest.mark.parametrize("command", run_parameters())
def test_commands_on_bundled_models_run(command, workplace, monkeypatch):
    if not SLOW.search(command.text):
        monkeypatch.setattr(bundled, "NUM_STEPS", 2)
    before = set(workplace.iterdir())
    name, options = script_of(command.words())
    succeeded(commands.run(name, *shortened(name, options)))
    assert set(workplace.iterdir()) > before  # something was written


def test_every_kind_of_command_runs_on_bundled_models():
    assert {script_of(command.words())[0] for command in on_bundled_models()} == set(SHORT)


@pytest.mark.parametrize("page", [README, REPOSITORY / "docs/python-api.md"], ids=lambda page: page.name)
def test_python_blocks_run(page, workplace, monkeypatch):
    monkeypatch.setattr(SCALE_RULES, "_entries", dict(SCALE_RULES._entries))
    monkeypatch.setattr(architecture, "_FAMILIES", dict(architecture._FAMILIES))
    namespace: dict[str, object] = {"__name__": "example"}
    code = [(first, lines) for language, first, lines in blocks(page) if language == "python"]
    assert code
    for first, lines in code:
        source = "\n" * (first - 1) + "\n".join(lines)  # so that a traceback has the lines of the page
        exec(compile(source, str(page), "exec"), namespace)


# --- what the pages name ---------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    titles = [line.lstrip("# ").lower() for line in prose(page) if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page):
    for line in prose(page):
        for target in re.findall(r"\]\(([^)\s]+)\)", line):
            if re.match(r"https?://", target):
                continue
            path, _, anchor = target.partition("#")
            file = (page.parent / path) if path else page
            assert file.exists(), f"{target}: no such file"
            assert not anchor or anchor in anchors(file), f"{target}: no such heading"


def expanded(text: str) -> list[str]:
    """A path with {a,b} as the paths that it stands for."""
    if (found := re.search(r"\{([^{}]*)\}", text)) is None:
        return [text]
    return [
        path for part in found[1].split(",") for path in expanded(text[: found.start()] + part + text[found.end() :])
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_paths_exist(page):
    shown = [word for command in commands_of(page) for words in command.variants() for word in words]
    for text in [*(text for _, text in spans(page)), *shown]:
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./{{}},*-]*", text) and Path(text).name != "model.ckpt":
            for path in expanded(text):
                assert any(REPOSITORY.glob(path.rstrip("/"))), f"{path}: no such file"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_python_names_exist(page):
    for _, text in spans(page):
        if re.fullmatch(r"qdiff(\.\w+)+", text) and text != architecture.ENTRY_POINTS:
            resolve(text)


def resolve(name: str) -> object:
    """The object of a dotted name: a module, or an attribute of one."""
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        try:
            found: object = import_module(".".join(parts[:count]))
        except ModuleNotFoundError:
            continue
        for part in parts[count:]:
            assert hasattr(found, part), f"{name}: no such name"
            found = getattr(found, part)
        return found
    raise AssertionError(f"{name}: no such name")


@cache
def options_of(name: str) -> frozenset[str]:
    """The long options of a script, from its --help."""
    return frozenset(re.findall(r"^  (?:-\w.*?, )?(--\w[\w-]*)", commands.run(name, "--help").stdout, re.MULTILINE))


SCRIPTS = sorted(path.name for path in REPOSITORY.glob("scripts/*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_option_is_documented(name):
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES if "docs" in page.parts)
    documented = set(re.findall(r"--\w[\w-]*", text))
    assert options_of(name) - documented == {"--help"} - documented
    assert len(options_of(name)) > 3


def test_every_option_exists():
    known = frozenset().union(*map(options_of, SCRIPTS)) | FOREIGN_OPTIONS
    for benchmark in REPOSITORY.glob("benchmarks/*.py"):
        known |= set(re.findall(r'add_argument\("(--\w+)"', benchmark.read_text(encoding="utf-8")))
    for page in PAGES:
        for number, text in spans(page):
            for option in re.findall(r"(?<![\w-])--\w[\w-]*", text):
                assert option in known, f"{page.name}:{number}: {option}: no such option"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_no_old_name_is_left(page):
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), 1):
        assert not OLD_NAMES.search(line), f"line {number}: {line}"


def test_the_front_door_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_published_figures_are_those_of_the_tables():
    text = (REPOSITORY / "docs/results.md").read_text(encoding="utf-8")
    for name in ("cifar10", "lsun-bedroom", "lsun-church", "stable-diffusion"):
        for table in TABLES[name]():
            for row in table.rows:
                for value in row.published.values():
                    assert value == DASH or re.search(rf"(?<![\d.]){re.escape(value)}(?!\d)", text), (name, row.name)
