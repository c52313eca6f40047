"""The YAML configuration of the latent family, validated when it is read. Only targets of a closed table are made."""

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

import torch
from omegaconf import Container, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from ddim.config import TrainingConfig
from ldm.autoencoder import AutoencoderKL, FirstStage, IdentityFirstStage, VQModel
from ldm.encoders import BERTEmbedder, ClassEmbedder, Conditioner, FrozenCLIPEmbedder
from ldm.unet import IGNORED as UNET_IGNORED
from ldm.unet import UNetConfig, unet_config
from qdiff.errors import ConfigError
from qdiff.prediction import PREDICTIONS, Prediction
from qdiff.utils.resources import find
from qdiff.utils.settings import check_names, fill, typed

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
FIRST_STAGES: dict[str, type[FirstStage]] = {
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModel,
    "ldm.models.autoencoder.IdentityFirstStage": IdentityFirstStage,
}
CONDITIONERS: dict[str, type[Conditioner]] = {
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": FrozenCLIPEmbedder,
    "ldm.modules.encoders.modules.ClassEmbedder": ClassEmbedder,
    "ldm.modules.encoders.modules.BERTEmbedder": BERTEmbedder,
}
IGNORED_TARGETS = {"ldm.lr_scheduler.LambdaLinearScheduler", "torch.nn.Identity"}
# Keys of the released YAML files that only training reads.
TRAINING_SECTIONS = {"data", "lightning"}
TRAINING_PARAMS = {
    "cond_stage_key",
    "cond_stage_trainable",
    "concat_mode",
    "first_stage_key",
    "log_every_t",
    "loss_type",
    "monitor",
    "num_timesteps_cond",
    "scheduler_config",
}
# Keys of `model.params` that are read, and keys of which only some values are supported.
PARAMS = {
    "linear_start",
    "linear_end",
    "timesteps",
    "image_size",
    "channels",
    "scale_factor",
    "scale_by_std",
    "use_ema",
    "parameterization",
    "unet_config",
    "first_stage_config",
    "cond_stage_config",
}
EXPECTED = {"beta_schedule": ("linear",), "conditioning_key": ("crossattn", None), "rescale_betas_zero_snr": (False,)}
OWN_TRAINING = ("first_stage_training", "training")  # sections of the bundled models
SCALARS = {
    "linear_start": float,
    "linear_end": float,
    "timesteps": int,
    "image_size": int,
    "channels": int,
    "use_ema": bool,
    "parameterization": str,
}
IGNORED_OVERRIDES = (
    *("model.base_learning_rate", *sorted(TRAINING_SECTIONS), *OWN_TRAINING),
    *(f"model.params.{name}" for name in sorted(TRAINING_PARAMS)),
    *(f"model.params.unet_config.params.{name}" for name in UNET_IGNORED),
    *(f"model.params.first_stage_config.params.{name}" for name in ("lossconfig", "monitor")),
    *(f"model.params.cond_stage_config.params.{name}" for name in ("key", "version")),
)
UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"


Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class ModuleSpec(Generic[Module]):
    """A module that a target of the YAML file names, before it is made.

    Attributes:
        kind: the class of the module.
        params: the arguments of the class.
        where: the section of the YAML file, for messages.
    """

    kind: type[Module]
    params: dict[str, Any]
    where: str

    def make(self) -> Module:
        """Make the module, with fresh weights.

        Raises:
            ConfigError: the parameters do not fit the class.
        """
        known = inspect.signature(self.kind).parameters
        check_names(self.params, known, f"{self.where}.params")
        for name, value in self.params.items():
            if get_origin(known[name].annotation) is not dict and known[name].annotation is not object:
                typed(value, known[name].annotation, f"{self.where}.params.{name}")
        required = [name for name, parameter in known.items() if parameter.default is parameter.empty]
        if missing := [name for name in required if name not in self.params]:
            raise ConfigError(f"{self.where}.params: missing {', '.join(missing)}")
        try:
            return self.kind(**self.params)
        except (RuntimeError, ValueError, ZeroDivisionError) as error:
            raise ConfigError(f"{self.where}.params: {str(error).splitlines()[0]}") from None


@dataclass(frozen=True)
class LatentConfig:
    """A whole configuration file.

    Attributes:
        path: the YAML file, or a folder of diffusers.
        unet: the UNet.
        first_stage: the map between images and latents.
        conditioning: the map from prompts or classes to contexts. None for an unconditional model.
        linear_start: beta of the first time step.
        linear_end: beta of the last time step.
        image_size: width and height of the latents.
        channels: channels of the latents.
        scale_factor: the factor that latents are multiplied by. None: the checkpoint holds it (`scale_by_std`).
        timesteps: number of time steps T.
        use_ema: whether the checkpoint's moving averages are used instead of its plain weights.
        parameterization: what the network predicts: eps, x0 or v (`qdiff.prediction`).
        training: the sections with the training settings of a bundled model.
    """

    path: Path
    unet: UNetConfig
    first_stage: ModuleSpec[FirstStage]
    conditioning: ModuleSpec[Conditioner] | None
    linear_start: float
    linear_end: float
    image_size: int
    channels: int
    scale_factor: float | None
    timesteps: int = 1000
    use_ema: bool = True
    parameterization: str = "eps"
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The folder of the model."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def prompts(self) -> Path:
        """The file of the prompts of calibration samples; the project's own if a folder of diffusers has none."""
        file = self.folder / "prompts.txt"
        return file if file.is_file() or not self.path.is_dir() else find("configs/stable-diffusion/prompts.txt")

    @property
    def downsampling(self) -> int:
        """Pixels of the image per latent pixel, along one side; 1 without an autoencoder."""
        autoencoder = self.first_stage.params.get("ddconfig")
        return 1 if autoencoder is None else 2 ** (len(autoencoder["ch_mult"]) - 1)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha-bar_t, float64 [timesteps]; the square root of beta is linear in the time step."""
        betas = torch.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps, dtype=torch.float64) ** 2
        return torch.cumprod(1.0 - betas, dim=0)

    @property
    def prediction(self) -> Prediction:
        """The conversion from the network's output to eps under this schedule."""
        return Prediction(self.parameterization, self.alphas_cumprod)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LatentConfig:
    """Read a YAML file of the latent family.

    Args:
        path: the file.
        overrides: settings of the form `model.params.key=value`, which replace those of the file.

    Raises:
        ConfigError: the file does not exist or is not YAML, a target is unknown, or a setting is missing, unknown or
            cannot work.
    """
    path = find(path)
    if not path.is_file():
        raise ConfigError(f" {path}: no such file", field="config")
    for override in overrides:
        name, equals, _ = override.partition("=")
        if not equals:
            raise ConfigError(f"{override!r}: expected an option or key=value")
        if any(name == ignored or name.startswith(f"{ignored}.") for ignored in IGNORED_OVERRIDES):
            raise ConfigError(f"{override!r}: {name} changes nothing here (training reads it)")
    try:
        tree = OmegaConf.merge(_read_yaml(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        message = f" {path}: not a YAML file that can be read ({str(error).splitlines()[0]})"
        raise ConfigError(message, field="config") from None
    try:
        return _parse(path, values)
    except ConfigError as error:
        raise ConfigError(f" {path}: {error}", field="config") from None


def _read_yaml(path: Path) -> Container:
    with path.open(encoding="utf-8-sig") as file:
        return OmegaConf.load(file)


def _parse(path: Path, values: Any) -> LatentConfig:
    """Make and validate the configuration from the content of a file."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"the file: expected a section model, found {type(values).__name__}")
    check_names(values, ["model", *OWN_TRAINING, *TRAINING_SECTIONS], "of the file")
    _validate_targets(values.get("model"))
    model = _section(values, "model", "the file")
    check_names(model, ["target", "params", "base_learning_rate"], "model")
    if model.get("target") != DIFFUSION:
        raise ConfigError(f"model.target {model.get('target')!r}: expected {DIFFUSION}")
    params = _section(model, "params", "model")
    check_names(params, [*PARAMS, *EXPECTED, *TRAINING_PARAMS], "model.params")
    for name, expected in EXPECTED.items():
        if name in params and params[name] not in expected:
            raise ConfigError(f"model.params.{name} {params[name]!r}: expected {' or '.join(map(str, expected))}")
    missing = [key for key in ("linear_start", "linear_end", "image_size", "channels") if params.get(key) is None]
    if missing:
        raise ConfigError(f"model.params: missing {', '.join(missing)}")
    unet = _section(params, "unet_config", "model.params")
    check_names(unet, ["target", "params"], "unet_config")
    if unet.get("target") != UNET:
        raise ConfigError(f"unet_config.target {unet.get('target')!r}: expected {UNET}")
    config = LatentConfig(
        path=path,
        unet=unet_config(_section(unet, "params", "unet_config")),
        first_stage=_module_spec(
            _section(params, "first_stage_config", "model.params"), FIRST_STAGES, "first_stage_config"
        ),
        conditioning=_conditioning(params),
        scale_factor=_scale_factor(params),
        training={key: values[key] for key in OWN_TRAINING if key in values},
        **{name: typed(params[name], kind, f"model.params.{name}") for name, kind in SCALARS.items() if name in params},
    )
    validate(config)
    return config


def _scale_factor(params: Mapping[str, Any]) -> float | None:
    """Return the scale factor, or None if the checkpoint holds it."""
    if typed(params.get("scale_by_std", False), bool, "model.params.scale_by_std"):
        if "scale_factor" in params:
            raise ConfigError(
                "model.params.scale_factor: scale_by_std takes it from the checkpoint; expected one of them"
            )
        return None
    factor = typed(params.get("scale_factor", 1.0), float, "model.params.scale_factor")
    if factor <= 0:
        raise ConfigError(f"model.params.scale_factor {factor:g}: expected a positive number")
    return factor


def validate(config: LatentConfig) -> None:
    """Raise a ConfigError, by name, for values that cannot work."""
    start, end = config.linear_start, config.linear_end
    if not 0 < start <= end < 1:
        raise ConfigError(f"model.params.linear_start {start:g}, linear_end {end:g}: expected 0 < start <= end < 1")
    for name in ("timesteps", "image_size", "channels"):
        if getattr(config, name) < 1:
            raise ConfigError(f"model.params.{name} {getattr(config, name)}: expected at least 1")
    if config.parameterization not in PREDICTIONS:
        raise ConfigError(
            f"model.params.parameterization {config.parameterization!r}: expected one of {', '.join(PREDICTIONS)}"
        )
    for name in ("in_channels", "out_channels"):
        if getattr(config.unet, name) != config.channels:
            found = getattr(config.unet, name)
            raise ConfigError(
                f"unet_config.params.{name} {found}: expected {config.channels}, the channels of the latents"
            )
    for name in config.training:
        fill(TrainingConfig, config.training[name], name)
    with torch.device("meta"):  # an unknown parameter is an error now, not when the module is needed
        config.first_stage.make()
        if config.conditioning is not None:
            config.conditioning.make()


def _validate_targets(model: Any) -> None:
    """Raise a ConfigError if a `target` below `model` is unknown: no class is imported by its name."""
    known = {DIFFUSION, UNET, *FIRST_STAGES, *CONDITIONERS, *IGNORED_TARGETS}

    def walk(node: Any, place: str) -> None:
        if isinstance(node, Mapping):
            if "target" in node and node["target"] not in known:
                raise ConfigError(
                    f"{place}.target {node['target']!r}: not one of the supported targets ({', '.join(sorted(known))})"
                )
            for key, child in node.items():
                walk(child, f"{place}.{key}")

    walk(model, "model")


def _section(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    """Return a section that must exist."""
    section = values.get(key)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: expected a section {key}, found {type(section).__name__}")
    return dict(section)


def _module_spec(section: Mapping[str, Any], kinds: Mapping[str, type[Module]], where: str) -> ModuleSpec[Module]:
    """Resolve a section with a target and its parameters."""
    check_names(section, ["target", "params"], where)
    if section.get("target") not in kinds:
        raise ConfigError(f"{where}.target {section.get('target')!r}: expected one of {', '.join(kinds)}")
    params = section.get("params") or {}
    if not isinstance(params, Mapping):
        raise ConfigError(f"{where}.params: expected settings, found {params!r}")
    return ModuleSpec(kinds[section["target"]], dict(params), where)


def _conditioning(params: Mapping[str, Any]) -> ModuleSpec[Conditioner] | None:
    section = params.get("cond_stage_config")
    if section in (UNCONDITIONAL, None):
        return None
    if section == IS_FIRST_STAGE:
        raise ConfigError(f"cond_stage_config {IS_FIRST_STAGE}: conditioning on images is not supported")
    if not isinstance(section, Mapping):
        raise ConfigError(f"cond_stage_config {section!r}: expected a section or {UNCONDITIONAL}")
    return _module_spec(section, CONDITIONERS, "cond_stage_config")
