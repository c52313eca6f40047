"""The one list of sampling commands, and reading one that stands after `--` in another command."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qdiff.errors import ConfigError
from qdiff_cli.sampling_run import SamplingCommand

# The name of each script that samples, and where its command is.
SAMPLING_COMMANDS = {
    "sample_diffusion_ddim.py": "qdiff_cli.commands.sample_ddim:PixelCommand",
    "sample_diffusion_ldm.py": "qdiff_cli.commands.sample_ldm:LatentCommand",
    "txt2img.py": "qdiff_cli.commands.txt2img:TextCommand",
}


def parse_sampling_command(words: Sequence[str]) -> SamplingCommand:
    """The command of a sampling script's name and its options.

    Raises:
        ConfigError: no such script, or options that cannot be meant.
    """
    name = Path(words[0]).name if words else ""
    if name not in SAMPLING_COMMANDS:
        known = ", ".join(SAMPLING_COMMANDS)
        raise ConfigError(f"{name or 'no command'}: expected a sampling command, one of {known} and its options")
    module, _, attribute = SAMPLING_COMMANDS[name].partition(":")
    command: type[SamplingCommand] = getattr(import_module(module), attribute)
    return command.parse(words[1:])
