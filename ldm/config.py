"""The YAML configuration of a latent diffusion model: read, resolved through a closed table of targets, checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from ldm.autoencoder import AutoencoderKL, IdentityFirstStage, VQModel
from ldm.encoders import BERTEmbedder, ClassEmbedder, FrozenCLIPEmbedder
from ldm.unet import UNetConfig, unet_config
from qdiff.config import ConfigError
from qdiff.resources import find

DIFFUSION = "ldm.models.diffusion.ddpm.LatentDiffusion"
UNET = "ldm.modules.diffusionmodules.openaimodel.UNetModel"
FIRST_STAGES = {
    "ldm.models.autoencoder.AutoencoderKL": AutoencoderKL,
    "ldm.models.autoencoder.VQModel": VQModel,
    "ldm.models.autoencoder.VQModelInterface": VQModel,
    "ldm.models.autoencoder.IdentityFirstStage": IdentityFirstStage,
}
ENCODERS = {
    "ldm.modules.encoders.modules.FrozenCLIPEmbedder": FrozenCLIPEmbedder,
    "ldm.modules.encoders.modules.ClassEmbedder": ClassEmbedder,
    "ldm.modules.encoders.modules.BERTEmbedder": BERTEmbedder,
}
IGNORED_TARGETS = {"ldm.lr_scheduler.LambdaLinearScheduler", "torch.nn.Identity"}
UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"


@dataclass(frozen=True)
class Part:
    """A module named by a target of the YAML file, not yet built."""

    kind: type[nn.Module]
    params: dict[str, Any]
    where: str

    def build(self) -> nn.Module:
        """The module, with fresh weights; ConfigError if the parameters do not fit it."""
        try:
            return self.kind(**self.params)
        except TypeError as error:
            raise ConfigError(f"{self.where}.params: {str(error).partition(') ')[2] or error}") from None


@dataclass(frozen=True)
class LatentConfig:
    """A whole configuration file.

    image_size, channels: of the latents. conditioning: None for an unconditional model. scale_factor:
    latents are multiplied by it (None: it is stored in the checkpoint, `scale_by_std`).
    """

    path: Path
    unet: UNetConfig
    first_stage: Part
    conditioning: Part | None
    linear_start: float
    linear_end: float
    timesteps: int
    image_size: int
    channels: int
    scale_factor: float | None
    use_ema: bool
    training: dict[str, Any] = field(default_factory=dict)

    @property
    def alphas_cumprod(self) -> Tensor:
        """alpha-bar_t in float64, [timesteps]; sqrt(beta) is linear."""
        betas = torch.linspace(self.linear_start**0.5, self.linear_end**0.5, self.timesteps, dtype=torch.float64) ** 2
        return torch.cumprod(1.0 - betas, dim=0)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> LatentConfig:
    """Read a latent-family YAML file; `overrides` are words of the form `model.params.key=value`.

    Raises:
        ConfigError: no such file, not YAML, an unknown target, or a setting that is missing or cannot work.
    """
    path = find(path)
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file")
    if wrong := [word for word in overrides if "=" not in word]:
        raise ConfigError(f"{wrong[0]!r}: expected an option or key=value")
    try:
        tree = OmegaConf.merge(OmegaConf.load(path), OmegaConf.from_dotlist(list(overrides)))
        values = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise ConfigError(f"--config {path}: not a YAML file that can be read ({str(error).splitlines()[0]})") from None
    try:
        return _parse(path, values)
    except ConfigError as error:
        raise ConfigError(f"--config {path}: {error}") from None


def _parse(path: Path, values: Any) -> LatentConfig:
    _check_targets(values, ("model",))
    params = _section(_section({"": values}, "", "the file"), "model", "the file")
    if params.get("target") != DIFFUSION:
        raise ConfigError(f"model.target {params.get('target')!r}: expected {DIFFUSION}")
    params = _section(params, "params", "model")
    missing = [key for key in ("linear_start", "linear_end", "image_size", "channels") if params.get(key) is None]
    if missing:
        raise ConfigError(f"model.params: missing {', '.join(missing)}")
    unet = _section(params, "unet_config", "model.params")
    if unet.get("target") != UNET:
        raise ConfigError(f"unet_config.target {unet.get('target')!r}: expected {UNET}")
    return LatentConfig(
        path=path,
        unet=unet_config(_section(unet, "params", "unet_config")),
        first_stage=_part(_section(params, "first_stage_config", "model.params"), FIRST_STAGES, "first_stage_config"),
        conditioning=_conditioning(params),
        linear_start=float(params["linear_start"]),
        linear_end=float(params["linear_end"]),
        timesteps=int(params.get("timesteps", 1000)),
        image_size=int(params["image_size"]),
        channels=int(params["channels"]),
        scale_factor=None if params.get("scale_by_std") else float(params.get("scale_factor", 1.0)),
        use_ema=bool(params.get("use_ema", True)),
        training={key: values[key] for key in ("first_stage_training", "training") if key in values},
    )


def _check_targets(values: Any, where: tuple[str, ...]) -> None:
    """Every `target` below `model` must be one that is known: nothing is imported by name."""
    known = {DIFFUSION, UNET, *FIRST_STAGES, *ENCODERS, *IGNORED_TARGETS}
    tree = values.get("model") if isinstance(values, Mapping) else None

    def walk(node: Any, place: str) -> None:
        if isinstance(node, Mapping):
            if "target" in node and node["target"] not in known:
                raise ConfigError(f"{place}.target {node['target']!r}: not one of the supported targets ({', '.join(sorted(known))})")
            for key, child in node.items():
                walk(child, f"{place}.{key}")

    walk(tree, where[0])


def _section(values: Mapping[str, Any], key: str, where: str) -> dict[str, Any]:
    section = values.get(key)
    if not isinstance(section, Mapping):
        raise ConfigError(f"{where}: expected a section {key or 'model'}, found {type(section).__name__}")
    return dict(section)


def _part(section: Mapping[str, Any], kinds: Mapping[str, type[nn.Module]], where: str) -> Part:
    if section.get("target") not in kinds:
        raise ConfigError(f"{where}.target {section.get('target')!r}: expected one of {', '.join(kinds)}")
    return Part(kinds[section["target"]], dict(section.get("params") or {}), where)


def _conditioning(params: Mapping[str, Any]) -> Part | None:
    section = params.get("cond_stage_config")
    if section in (UNCONDITIONAL, None):
        return None
    if section == IS_FIRST_STAGE:
        raise ConfigError(f"cond_stage_config {IS_FIRST_STAGE}: conditioning on images is not supported")
    if not isinstance(section, Mapping):
        raise ConfigError(f"cond_stage_config {section!r}: expected a section or {UNCONDITIONAL}")
    return _part(section, ENCODERS, "cond_stage_config")
