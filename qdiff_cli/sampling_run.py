"""A sampling command with its options, and the run that it describes. All sampling scripts share these classes."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.engines.cuda import halve_weights
from qdiff.engines.select import apply_engine, validate_engine
from qdiff.errors import CheckpointError, ConfigError
from qdiff.samplers import Callback, Denoiser
from qdiff.task import QuantizationTask
from qdiff.utils import distributed
from qdiff.utils.devices import float32_products
from qdiff.utils.memory import Fitting, halving
from qdiff_cli.options import DeviceOptions, ParsedArgs, Parser, Rule, RunOptions, autocast_dtype, to_settings
from qdiff_cli.quantization import NetworkSource
from qdiff_cli.quantization_options import RULES, QuantizationConfig, QuantizationOptions
from qdiff_cli.runs import RunOutput, discard_on_error, log_to, sample_missing

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SamplingRun:
    """A run that is ready to sample: checked options with the model and the sampler that they describe.

    Attributes:
        title: a description of the model and the sampler.
        settings: the values of all options, in the form of `run.json`.
        options: how the command runs.
        device: the device of the network.
        task: the model.
        quantization: how the network is quantized; None: full precision.
        sample_latents: returns x_0 or latents for (network, indices of the images, callback of the sampler).
        decode: converts the result of `sample_latents` to uint8 images [N, 3, H, W].
        denoiser: returns the function eps(x_t, t) for (network, indices of the images).
        total: the number of images.
        batch_size: images of one batch.
        output: the files of the run.
        fitting: the largest batch size that is known to fit into memory.
    """

    title: str
    settings: Mapping[str, object]
    options: RunOptions
    device: torch.device
    task: QuantizationTask
    quantization: QuantizationConfig | None
    sample_latents: Callable[[nn.Module, Sequence[int], Callback | None], Tensor]
    decode: Callable[[Tensor], Tensor]
    denoiser: Callable[[nn.Module, Sequence[int]], Denoiser]
    total: int
    batch_size: int
    output: RunOutput
    fitting: Fitting = field(default_factory=Fitting)

    def sample(self, network: nn.Module, indices: Sequence[int], callback: Callback | None = None) -> Tensor:
        """Sample images.

        Args:
            network: the UNet.
            indices: the indices of N images. On out-of-memory the batch is split in half and retried.
            callback: is called with (x_t, t, eps) after every evaluation. A batch with a callback is not split.

        Returns:
            uint8 images [N, 3, H, W].

        Raises:
            NonFiniteError: a value is not finite, before or after decoding.
        """
        dtype = autocast_dtype(self.device, self.options.precision)
        parts: list[Tensor] = []

        def sample_part(part: Sequence[int]) -> None:
            with torch.autocast(self.device.type, dtype or torch.float32, enabled=dtype is not None):
                parts.append(self.decode(self.sample_latents(network, part, callback)))

        if callback is None:
            halving(sample_part, indices, self.fitting)
        else:
            sample_part(indices)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def batches(self, count: int) -> list[range]:
        """The indices of the first `count` images, in batches."""
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def load_full_precision(self) -> nn.Module:
        """The full-precision network on the device, in eval mode."""
        return self.task.load_unet().to(self.device).eval()

    def execute(self) -> Path:
        """Load or calibrate the network, and sample the missing images.

        Returns:
            The folder of the images.

        Raises:
            ConfigError: the engine is for another device, the run cannot be continued, or images are missing at the
                end.
        """
        validate_engine(self.options.engine, self.device)
        distributed.connect(self.device)
        options, output, is_first = self.options, self.output, distributed.rank() == 0
        folder = distributed.run_on_first(lambda: output.open(self.settings, options.continue_run))
        log_to(folder if is_first else None, options.verbose)
        if options.continue_run:
            distributed.run_on_first(lambda: output.validate_prompts(folder, self.total))
        if is_first:
            output.begin(folder)
        with discard_on_error(folder):
            source = NetworkSource(self.quantization, self.task, self.device, folder)
            network = apply_engine(source.network(options.continue_run), options.engine)
            dtype = autocast_dtype(self.device, options.precision)
            if self.device.type == "cuda" and dtype is not None:
                halve_weights(network, dtype)
        images = output.images_of(folder)
        sample = partial(self.sample, network)
        with float32_products(self.device, tf32=False):
            sample_missing(images, self.total, self.batch_size, sample, output.name, output.metadata)
        distributed.barrier()
        if missing := len(output.missing(folder, self.total)):
            raise ConfigError(
                f"{images}: {missing} of {self.total} images are missing; expected a folder that all processes share"
            )
        if is_first:
            log.info("precision: %s", str(dtype or torch.float32).removeprefix("torch."))
            output.finish(folder)
            print(f"{self.total} images in {images}")
        return images


@dataclass(frozen=True, kw_only=True)
class SamplingCommand(ABC):
    """A sampling command with the values of all its options. A subclass has a field for each option of its script.

    Attributes:
        sampler_rules: when the options of the sampler have an effect.
        option_of_field: the option of each setting that has another name in this script.
        seed: seed of the noise, 0 to 2^63 - 1.
        run: how the command runs.
        quantization: the quantization options.
    """

    sampler_rules: ClassVar[tuple[Rule, ...]] = ()
    option_of_field: ClassVar[Mapping[str, str]] = {}

    seed: int
    run: RunOptions = field(default_factory=RunOptions)
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)

    @classmethod
    @abstractmethod
    def make_parser(cls) -> Parser:
        """The parser of the command's options."""

    def resolved(self) -> Self:
        """The same command, with each option that abbreviates other options replaced by them.

        Raises:
            ConfigError: options contradict each other.
        """
        return self

    @abstractmethod
    def _make_run(self) -> SamplingRun:
        """Check the options, and make the run that they describe."""

    @abstractmethod
    def to_folder(self, folder: Path) -> Self:
        """The same command with another output folder."""

    @abstractmethod
    def with_images(self, count: int) -> Self:
        """The same command for this number of images, rounded up to a number that it can sample."""

    @abstractmethod
    def with_num_steps(self, num_steps: int) -> Self:
        """The same command with another number of sampling steps."""

    def make_run(self) -> SamplingRun:
        """Check the options, and make the run that they describe. What is logged goes to `run.log` once it is open.

        Raises:
            ConfigError: options cannot work together or with this model.
            CheckpointError: a file cannot be used.
        """
        log_to(None, self.run.verbose)
        try:
            return self._make_run()
        except (ConfigError, CheckpointError) as error:
            raise error.renamed(self.option_of_field) from None

    @classmethod
    def parse(cls, argv: Sequence[str] | None, device: DeviceOptions | None = None) -> Self:
        """Parse the arguments of the command.

        Args:
            argv: the arguments; None: those of this process.
            device: defaults of --device and --threads; None: those of the parser.

        Raises:
            ConfigError: an option would have no effect, or options contradict each other.
        """
        parser = cls.make_parser()
        if device is not None:
            parser.set_defaults(device=device.device, threads=device.threads)
        args = parser.parse_args(argv)
        command = cls._of(args)
        args.validate((*cls.sampler_rules, *RULES))
        return command

    def changed(self, args: Sequence[str]) -> tuple[Self, frozenset[str]]:
        """The same command with some options replaced.

        Quantization options are not checked for an effect, because it depends on the options they are combined with.

        Args:
            args: the replaced options, as arguments of the command.

        Returns:
            The command, and the names of the replaced options.

        Raises:
            ConfigError: an option of the sampler would have no effect.
        """
        parser = self.make_parser()
        for action in parser._actions:
            action.required = False
        parser.set_defaults(**self._options())
        values = parser.parse_args(args)
        command = self._of(values)
        values.validate(self.sampler_rules)
        return command, values.typed

    @classmethod
    def _of(cls, args: ParsedArgs) -> Self:
        """The command with the values of parsed arguments."""
        return args.make(cls, run=args.make(RunOptions), quantization=args.make(QuantizationOptions)).resolved()

    def _options(self) -> dict[str, Any]:
        """The values of all options by name."""
        groups = {"run", "quantization"}
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in groups}
        return values | vars(self.run) | vars(self.quantization)

    def settings(self) -> dict[str, object]:
        """The values of all options, in the form of `run.json`."""
        return to_settings(self._options())

    def input_files(self) -> list[Path]:
        """The existing files among the values of the options, and those that are read of a folder of diffusers."""
        values = [value for value in self._options().values() if isinstance(value, Path | str)]
        folders = [DiffusersFolder.find(value) for value in values if isinstance(value, Path)]
        files = [Path(value) for value in values if Path(value).is_file()]
        return files + [file for folder in folders if folder is not None for file in folder.files()]

    def on(self, device: str, threads: int) -> Self:
        """The same command on another device, with this number of threads."""
        return replace(self, run=replace(self.run, device=device, threads=threads))
