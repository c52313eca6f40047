"""The list of sampling commands, and the parser for a sampling command inside the arguments of another command."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from qdiff.errors import ConfigError
from qdiff_cli.options import DeviceOptions
from qdiff_cli.sampling_run import SamplingCommand

# For each script that samples: the module and the class of its command.
SAMPLING_COMMANDS = {
    "sample_diffusion_ddim.py": "qdiff_cli.commands.sample_ddim:PixelCommand",
    "sample_diffusion_ldm.py": "qdiff_cli.commands.sample_ldm:LatentCommand",
    "txt2img.py": "qdiff_cli.commands.txt2img:TextCommand",
}


def parse_sampling_command(args: Sequence[str], device: DeviceOptions | None = None) -> SamplingCommand:
    """Parse the name of a sampling script and its options.

    Args:
        args: the name and the options.
        device: defaults of --device and --threads; None: those of the script.

    Raises:
        ConfigError: no sampling script has this name, or its options contradict each other.
    """
    name = Path(args[0]).name if args else ""
    if name not in SAMPLING_COMMANDS:
        known = ", ".join(SAMPLING_COMMANDS)
        raise ConfigError(f"{name or 'no command'}: expected a sampling command, one of {known} and its options")
    module, _, attribute = SAMPLING_COMMANDS[name].partition(":")
    command: type[SamplingCommand] = getattr(import_module(module), attribute)
    return command.parse(args[1:], device)
