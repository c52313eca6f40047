"""Checkpoints of latent diffusion and Stable Diffusion: what is in them, and the parts of a model out of them."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import LatentConfig
from ldm.encoders import BERTEmbedder, FrozenCLIPEmbedder
from ldm.unet import UNetModel
from qdiff.checkpoint import is_packed, load_into, model_parts_file, read_tensors
from qdiff.errors import CheckpointError, ConfigError, NonFiniteError
from qdiff.utils.files import atomic_write

log = logging.getLogger(__name__)

UNET_PREFIX, EMA_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model"
STAGE, CONDITIONING = "first_stage_model.", "cond_stage_model."
TEXT = "cond_stage_model.transformer."
SCHEDULE = [
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
]


class LatentModelParts(nn.Module):
    """What surrounds the UNet: the first stage (images <-> latents) and, for guided models, the conditioning."""

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.first_stage_model = config.first_stage.build()
        self.cond_stage_model = config.conditioning.build() if config.conditioning else None
        self.scale_factor = config.scale_factor

    def save(self, path: Path) -> None:
        """Write the stages in half precision, under their released names."""
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors["scale_factor"] = torch.tensor(float(self.scale_factor))
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents [N, C, h, w] to images [N, 3, H, W], about [-1, 1]; NonFiniteError where a value is not finite."""
        images = self.first_stage_model.decode(z / self.scale_factor)
        if not torch.isfinite(images).all():
            raise NonFiniteError(
                "the first stage (autoencoder): decoded values that are not finite numbers; nothing of this batch was written"
            )
        return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Images in [-1, 1] to scaled latents (of a KL autoencoder: the mean)."""
        return self.first_stage_model.encode(images) * self.scale_factor


def expected_shapes(config: LatentConfig) -> dict[str, torch.Size]:
    """Every key of a released checkpoint of this model, with its shape; nothing is allocated."""
    with torch.device("meta"):
        unet, model_parts = UNetModel(config.unet), LatentModelParts(config)
    shapes = {f"{UNET_PREFIX}{name}": tensor.shape for name, tensor in unet.state_dict().items()}
    shapes |= {name: tensor.shape for name, tensor in model_parts.state_dict().items()}
    shapes |= {name: torch.Size([config.timesteps]) for name in SCHEDULE}
    if config.scale_factor is None:
        shapes["scale_factor"] = torch.Size([])
    if config.use_ema:
        shapes |= {_ema_name(name): tensor.shape for name, tensor in unet.named_parameters()}
        shapes |= {"model_ema.decay": torch.Size([]), "model_ema.num_updates": torch.Size([])}
    if isinstance(model_parts.cond_stage_model, FrozenCLIPEmbedder):
        shapes[f"{TEXT}text_model.embeddings.position_ids"] = torch.Size([1, model_parts.cond_stage_model.max_length])
    return shapes


def _ema_name(name: str) -> str:
    return EMA_PREFIX + name.replace(".", "")


def find_checkpoint(path: str | Path) -> list[Path]:
    """The files of a model: the given one, or those of a folder (`model.ckpt`, `model.safetensors`, or the parts of a bundled model).

    Raises:
        CheckpointError: nothing there.
    """
    path = Path(path)
    if found := _files(path):
        return found
    raise CheckpointError(
        f"{path}: no model.ckpt or model.safetensors in this folder" if path.is_dir() else f"{path}: no such file"
    )


def _files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    for names in (["model.ckpt"], ["model.safetensors"], ["unet.safetensors", "stages.safetensors"]):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    return []


class LatentCheckpoint:
    """An official file (or a bundled model's files), memory-mapped; the parts are taken out of it by name.

    Raises:
        CheckpointError: damaged, or a part that the configuration names is not (wholly) in it.
    """

    def __init__(self, path: str | Path, config: LatentConfig) -> None:
        self.path, self.config = Path(path), config
        self.state: dict[str, Tensor] = {}
        for file in find_checkpoint(path):
            self.state |= read_tensors(file)
        if not any(name.startswith((UNET_PREFIX, EMA_PREFIX, STAGE)) for name in self.state):
            found = _some(self.state)
            raise CheckpointError(
                f"{path}: expected a latent diffusion checkpoint ({UNET_PREFIX}..., {STAGE}...), found {found}"
            )
        self._report_ignored()

    def _report_ignored(self) -> None:
        known = (UNET_PREFIX, "model_ema.", STAGE, CONDITIONING)
        ignored = [n for n in self.state if not n.startswith(known) and n not in {*SCHEDULE, "scale_factor"}]
        ignored += [n for n in self.state if n.startswith(CONDITIONING) and self.config.conditioning is None]
        if ignored:
            log.warning(
                "%s: ignored %d tensors that this model does not have: %s", self.path, len(ignored), _some(ignored)
            )

    def unet(self) -> UNetModel:
        """The UNet, from the EMA weights where the configuration uses them (and the file has them)."""
        with torch.device("meta"):
            unet = UNetModel(self.config.unet)
        plain = {
            name.removeprefix(UNET_PREFIX): tensor
            for name, tensor in self.state.items()
            if name.startswith(UNET_PREFIX)
        }
        ema = {
            name: self.state[_ema_name(name)] for name, _ in unet.named_parameters() if _ema_name(name) in self.state
        }
        if self.config.use_ema and ema and len(ema) < len(list(unet.parameters())):
            raise CheckpointError(
                f"{self.path}: its EMA weights are not complete ({len(ema)} of {len(list(unet.parameters()))} tensors)"
            )
        if self.config.use_ema and not ema:
            log.warning("%s: no EMA weights in it (a pruned file): the plain weights are used", self.path)
        if not plain and ema:
            log.warning("%s: only EMA weights in it: they are used", self.path)
        chosen = ema if ema and (self.config.use_ema or not plain) else plain
        return load_into(unet, chosen, f"{self.path} (UNet)").eval()

    def model_parts(self) -> LatentModelParts:
        """First stage and conditioning: nothing is left at random values; what they do not have is named in the log, and ignored."""
        with torch.device("meta"):
            model_parts = LatentModelParts(self.config)
        state = {name: tensor for name, tensor in self.state.items() if name.startswith((STAGE, CONDITIONING))}
        for name in [name for name in state if name.startswith(f"{STAGE}loss.")]:
            del state[name]  # the discriminator of the autoencoder's training
        if self.config.conditioning is None:
            state = {name: tensor for name, tensor in state.items() if name.startswith(STAGE)}
        elif self.config.conditioning.kind is FrozenCLIPEmbedder:
            state = _released_text_names(state)
        for part in [STAGE] + ([CONDITIONING] if model_parts.cond_stage_model is not None else []):
            if any(name.startswith(part) for name in model_parts.state_dict()) and not any(
                name.startswith(part) for name in state
            ):
                raise CheckpointError(f"{self.path}: {part[:-1]} is missing: the file holds no {_WORDS[part]}")
        expected = set(model_parts.state_dict())
        if extra := [name for name in state if name not in expected]:
            log.warning("%s: ignored %d tensors that its stages do not have: %s", self.path, len(extra), _some(extra))
            state = {name: tensor for name, tensor in state.items() if name in expected}
        load_into(model_parts, state, f"{self.path} (first stage and conditioning)")
        if self.config.scale_factor is None:
            if "scale_factor" not in self.state:
                raise CheckpointError(
                    f"{self.path}: scale_factor is missing, which the configuration expects in it (scale_by_std)"
                )
            model_parts.scale_factor = float(self.state["scale_factor"])
            if not math.isfinite(model_parts.scale_factor) or model_parts.scale_factor <= 0:
                raise CheckpointError(
                    f"{self.path}: damaged: scale_factor {model_parts.scale_factor}: expected a positive number"
                )
        return model_parts.eval()


def open_checkpoint(path: str | Path, config: LatentConfig, calibrated: str | None = None) -> LatentCheckpoint:
    """The model at `path`; where it is missing, the stages that a packed calibrated checkpoint names."""
    require_supported(config)
    if calibrated and not _files(Path(path)) and is_packed(calibrated):
        return LatentCheckpoint(model_parts_file(calibrated), config)
    return LatentCheckpoint(path, config)


_WORDS = {STAGE: "autoencoder", CONDITIONING: "text tower or class embedder"}


def _released_text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The text tower's keys with the `text_model.` level, whether the file has it or not, without `position_ids`."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(TEXT) and not name.startswith(f"{TEXT}text_model."):
            name = f"{TEXT}text_model.{name.removeprefix(TEXT)}"
        if not name.endswith("embeddings.position_ids"):
            renamed[name] = tensor
    return renamed


def _some(names: Mapping[str, Tensor] | list[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def require_supported(config: LatentConfig) -> None:
    """ConfigError where the model's conditioning cannot be computed here."""
    if config.conditioning is not None and config.conditioning.kind is BERTEmbedder:
        raise ConfigError(
            "BERTEmbedder (the text tower of the 1p4B model): not supported; its UNet and autoencoder are"
        )
