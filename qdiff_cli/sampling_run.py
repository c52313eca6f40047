"""A sampling command with its options, and the run that it describes: alike for all three sampling scripts."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from qdiff.engines.select import apply_engine
from qdiff.errors import CheckpointError, ConfigError
from qdiff.samplers import Callback, Denoiser
from qdiff.task import QuantizationTask
from qdiff.utils import distributed
from qdiff.utils.memory import Fitting, halving
from qdiff_cli.images import load_metadata
from qdiff_cli.options import ParsedArgs, Parser, Rule, RunOptions, autocast_dtype, to_settings
from qdiff_cli.quantization import NetworkSource
from qdiff_cli.quantization_options import RULES, QuantizationConfig, QuantizationOptions
from qdiff_cli.runs import discard_on_error, log_to, open_run, sample_missing

log = logging.getLogger(__name__)


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True, kw_only=True)
class SamplingRun:
    """A sampling command made ready: checked options with the model and the sampler that they describe.

    Attributes:
        title: what is sampled, in words.
        settings: all options, as `run.json` keeps them.
        options: how the command runs.
        device: where.
        task: the model.
        quantization: how its network is quantized; None: it is not.
        sample_latents: from (network, indices, callback of the sampler) to x_0 or latents.
        decode: from these to uint8 images [N, 3, H, W].
        denoiser: from (network, indices) to eps(x_t, t) for the images of these indices.
        total: the number of images.
        batch_size: images of one batch.
        runs: the folder of run folders.
        images: the folder of images inside a run.
        name: the pattern of the images' names.
        metadata: the text inside image i.
        extends: the option that says how many images there are.
        fitting: the largest batch that is known to fit into memory.
        begin: called with the run's folder before sampling, by the first process.
        finish: called with it after sampling.
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
    runs: Path
    images: str = "img"
    name: str = "{}.png"
    metadata: Callable[[int], dict[str, str]] | None = None
    extends: str = "max_images"
    fitting: Fitting = field(default_factory=Fitting)
    begin: Callable[[Path], None] = _nothing
    finish: Callable[[Path], None] = _nothing

    def sample(self, network: nn.Module, indices: Sequence[int], callback: Callback | None = None) -> Tensor:
        """Sample images.

        Args:
            network: the UNet.
            indices: the N images. On out-of-memory the batch is split in half and retried.
            callback: called with (x_t, t, eps) after every evaluation; such a batch is not split.

        Returns:
            uint8 images [N, 3, H, W].

        Raises:
            NonFiniteError: a value is not finite, before or after decoding.
        """
        half = autocast_dtype(self.device, self.options.precision)
        parts: list[Tensor] = []

        def work(part: Sequence[int]) -> None:
            with torch.autocast(self.device.type, half or torch.float32, enabled=half is not None):
                parts.append(self.decode(self.sample_latents(network, part, callback)))

        if callback is None:
            halving(work, indices, self.fitting)
        else:
            work(indices)
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def batches(self, count: int) -> list[range]:
        """The first `count` images in batches."""
        return [range(start, min(start + self.batch_size, count)) for start in range(0, count, self.batch_size)]

    def load_full_precision(self) -> nn.Module:
        """The full-precision network on the device, in eval mode."""
        return self.task.load_unet().to(self.device).eval()

    def execute(self) -> Path:
        """Load or calibrate the network, sample the images that are missing; the folder of the images.

        Raises:
            ConfigError: a run that cannot be continued; images are missing at the end.
        """
        distributed.connect(self.device)
        options, first = self.options, distributed.rank
        folder = distributed.run_on_first(
            lambda: open_run(self.runs, self.settings, options.continue_run, self.extends)
        )
        log_to(folder if first() == 0 else None, options.verbose)
        images = folder / self.images
        distributed.run_on_first(lambda: self._validate_metadata(images))
        if first() == 0:
            self.begin(folder)
        with discard_on_error(folder):
            source = NetworkSource(self.quantization, self.task, self.device, folder)
            network = apply_engine(source.network(options.continue_run), options.engine)
        sample_missing(
            images, self.total, self.batch_size, lambda indices: self.sample(network, indices), self.name, self.metadata
        )
        distributed.barrier()
        if missing := sum(not (images / self.name.format(i)).exists() for i in range(self.total)):
            raise ConfigError(
                f"{images}: {missing} of {self.total} images are missing; expected a folder that all processes share"
            )
        if first() == 0:
            dtype = autocast_dtype(self.device, options.precision) or torch.float32
            log.info("precision: %s", str(dtype).removeprefix("torch."))
            self.finish(folder)
            print(f"{self.total} images in {images}")
        return images

    def _validate_metadata(self, images: Path) -> None:
        """Raise ConfigError if an image of a continued run was sampled from another prompt than it has now."""
        if self.metadata is None or not self.options.continue_run:
            return
        for i in range(self.total):
            if (file := images / self.name.format(i)).exists():
                before, now = load_metadata(file).get("prompt"), self.metadata(i)["prompt"]
                if before != now:
                    raise ConfigError(
                        f"--continue: {file} was made from the prompt {before!r}, which is {now!r} now; "
                        "expected prompts to be added"
                    )


@dataclass(frozen=True, kw_only=True)
class SamplingCommand(ABC):
    """A sampling command with the values of all its options. Subclasses have a field for each option of their own.

    Attributes:
        seed: seed of the noise, 0 to 2^63 - 1.
        run: how the command runs.
        quantization: the quantization options.
    """

    sampler_rules: ClassVar[tuple[Rule, ...]] = ()  # when the options of the sampler act
    option_of_field: ClassVar[Mapping[str, str]] = {}  # of settings whose option has a name of its own here

    seed: int
    run: RunOptions = field(default_factory=RunOptions)
    quantization: QuantizationOptions = field(default_factory=QuantizationOptions)

    @classmethod
    @abstractmethod
    def make_parser(cls) -> Parser:
        """The parser of the command's options."""

    def resolved(self) -> Self:
        """The same command, with options that stand for others replaced by these.

        Raises:
            ConfigError: options that contradict each other.
        """
        return self

    @abstractmethod
    def _make_run(self) -> SamplingRun:
        """The run that the options describe, checked."""

    @abstractmethod
    def to_folder(self, folder: Path) -> Self:
        """The same command with another output folder."""

    @abstractmethod
    def with_images(self, count: int) -> Self:
        """The same command for this number of images or the next larger one that it can make."""

    @abstractmethod
    def with_num_steps(self, num_steps: int) -> Self:
        """The same command with another number of sampling steps."""

    def make_run(self) -> SamplingRun:
        """The run that the options describe, checked.

        Raises:
            ConfigError: options that cannot work together or with this model.
            CheckpointError: a file that cannot be used.
        """
        try:
            return self._make_run()
        except (ConfigError, CheckpointError) as error:
            raise error.renamed(self.option_of_field) from None

    @classmethod
    def parse(cls, argv: Sequence[str] | None) -> Self:
        """The command of these words.

        Raises:
            ConfigError: an option that would have no effect, or options that contradict each other.
        """
        args = cls.make_parser().parse_args(argv)
        command = cls._of(args)
        args.validate((*cls.sampler_rules, *RULES))
        return command

    def changed(self, words: Sequence[str]) -> tuple[Self, frozenset[str]]:
        """The same command with options replaced by those of `words`, and the names of these options.

        Quantization options are not checked for an effect: that depends on what they are combined with.

        Raises:
            ConfigError: an option of the sampler that would have no effect.
        """
        parser = self.make_parser()
        for action in parser._actions:
            action.required = False
        parser.set_defaults(**self._options())
        args = parser.parse_args(words)
        command = self._of(args)
        args.validate(self.sampler_rules)
        return command, args.typed

    @classmethod
    def _of(cls, args: ParsedArgs) -> Self:
        return args.make(cls, run=args.make(RunOptions), quantization=args.make(QuantizationOptions)).resolved()

    def _options(self) -> dict[str, Any]:
        """The values of all options by name."""
        groups = {"run", "quantization"}
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name not in groups}
        return own | vars(self.run) | vars(self.quantization)

    def settings(self) -> dict[str, object]:
        """All options, as `run.json` keeps them."""
        return to_settings(self._options())

    def input_files(self) -> list[Path]:
        """The files among the values of the options."""
        values = [Path(value) for value in self._options().values() if isinstance(value, Path | str)]
        return [path for path in values if path.is_file()]

    def on(self, device: str, threads: int) -> Self:
        """The same command on another device."""
        return replace(self, run=replace(self.run, device=device, threads=threads))
