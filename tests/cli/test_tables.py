"""The commands of a table's rows: which options and files they take, and which earlier calibration serves them."""

import json
from dataclasses import replace

import pytest

from qdiff_cli.commands.reproduce import parse
from qdiff_cli.options import OPTION_OF_FIELD
from qdiff_cli.quantization import GENERATED_SET
from qdiff_cli.sampling_commands import SAMPLING_COMMANDS, parse_sampling_command
from tests.support import commands
from tests.support.commands import REPOSITORY

ROW = "linear-w8a8"


def table(folder, *options):
    """The commands of the table of emoji32, with options after `--`."""
    words = ["--table", "bundled", "--models", "emoji32", "--rows", ROW, "--images", 1, "--output", folder]
    (found,) = parse(list(map(str, [*words, "--", *options]))).commands
    return found


def calibration_set_of(found, seed=0):
    (row,) = found.rows
    return found.started(row, seed).quantization.cali_data_path


def test_the_set_of_another_row_serves_unless_one_is_given(tmp_path):
    other = tmp_path / "emoji32" / "q-diffusion-w4a8" / GENERATED_SET
    other.parent.mkdir(parents=True)
    other.touch()
    assert calibration_set_of(table(tmp_path)) == str(other)
    given = table(tmp_path, "--cali_data_path", "mine.pt")
    (row,) = given.rows
    assert given.command(row, 1, 0, tmp_path).quantization.cali_data_path == "mine.pt"


def test_another_set_than_that_of_the_beginning_is_refused(tmp_path):
    assert calibration_set_of(table(tmp_path, "--cali_data_path", "a.pt")) == "a.pt"
    assert calibration_set_of(table(tmp_path, "--cali_data_path", "a.pt")) == "a.pt"
    with pytest.raises(ValueError, match=r"begun with other options .cali_data_path was a.pt, is b.pt"):
        calibration_set_of(table(tmp_path, "--cali_data_path", "b.pt"))


@pytest.mark.parametrize("option", [("--a_min_max",), ("--cali_n", 8), ("--preset", "published")])
def test_a_calibration_serves_only_the_same_recipe(tmp_path, option):
    found = table(tmp_path)
    (row,) = found.rows
    run = tmp_path / "emoji32" / ROW / "run"
    run.mkdir(parents=True)
    (run / "ckpt.safetensors").touch()
    command = replace(found.table.command, quantization=found.quantization(row))
    (run / "run.json").write_text(json.dumps(command.settings()))
    assert found.checkpoint(row) == run / "ckpt.safetensors"
    assert table(tmp_path, *option).checkpoint(row) is None


def test_an_option_that_changes_nothing_for_nearest_rounding_passes_with_a_harmless_value(tmp_path):
    assert table(tmp_path, "--cali_iters_tune", 0).rows
    with pytest.raises(ValueError, match="--cali_iters_tune: has no effect"):
        table(tmp_path, "--cali_iters_tune", 5)


def test_every_option_that_messages_name_exists():
    options = set()
    for name in SAMPLING_COMMANDS:
        required = {
            "sample_diffusion_ddim.py": ["--config", "c"],
            "sample_diffusion_ldm.py": ["-r", "m", "--seed", "0"],
        }
        command = type(parse_sampling_command([name, *required.get(name, [])]))
        own = {option for action in command.make_parser()._actions for option in action.option_strings}
        assert set(command.option_of_field.values()) <= own, name
        options |= own
    evaluation = commands.run("evaluate.py", "--help").stdout
    assert {option for option in OPTION_OF_FIELD.values() if option not in options} == {"--clip"}
    assert "--clip" in evaluation and (REPOSITORY / "scripts/evaluate.py").is_file()
