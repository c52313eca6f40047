"""Checkpoints of latent diffusion and Stable Diffusion: their content, and the parts of a model that they hold."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ldm.config import LatentConfig
from ldm.diffusers_format import read_networks
from ldm.encoders import BERT_NOT_SUPPORTED, BERTEmbedder, Conditioner, TextEmbedder
from ldm.unet import UNetModel
from qdiff.checkpoint import PackedFile, load_into, read_tensors
from qdiff.checkpoint.diffusers_folder import DiffusersFolder
from qdiff.errors import CheckpointError, ConfigError, NonFiniteError
from qdiff.utils.files import atomic_write

log = logging.getLogger(__name__)

UNET_PREFIX, EMA_PREFIX = "model.diffusion_model.", "model_ema.diffusion_model"
STAGE, CONDITIONING = "first_stage_model.", "cond_stage_model."
TEXT = "cond_stage_model.transformer."
PREFIX_OF_NETWORK = {"unet": UNET_PREFIX, "first_stage": STAGE, "text_encoder": TEXT}
PART_NAMES = {STAGE: "autoencoder", CONDITIONING: "text tower or class embedder"}
SCHEDULE = [  # buffers of the published class; our schedule comes from the configuration
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
    """What surrounds the UNet: the first stage and, in a conditional model, the conditioner.

    Args:
        config: the configuration of the model. If it leaves the scale factor to the checkpoint, `scale_factor` is None
            until somebody sets it.
    """

    cond_stage_model: Conditioner | None

    def __init__(self, config: LatentConfig) -> None:
        super().__init__()
        self.first_stage_model = config.first_stage.make()
        self.cond_stage_model = config.conditioning.make() if config.conditioning else None
        self.scale_factor = config.scale_factor

    def save(self, path: Path) -> None:
        """Write all parameters in half precision, under their released names, and the scale factor."""
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors["scale_factor"] = torch.tensor(self._scale())
        with atomic_write(path) as temporary:
            save_file(tensors, temporary)

    def _scale(self) -> float:
        if self.scale_factor is None:
            raise CheckpointError("scale_factor: the configuration expects it in the checkpoint, and none was read")
        return float(self.scale_factor)

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        """Decode latents.

        Args:
            z: scaled latents, [N, C, h, w].

        Returns:
            Images [N, 3, H, W], about [-1, 1].

        Raises:
            NonFiniteError: a value is not finite.
        """
        images = self.first_stage_model.decode(z / self._scale())
        if not torch.isfinite(images).all():
            raise NonFiniteError(
                "the first stage (autoencoder): decoded values that are not finite numbers; "
                "nothing of this batch was written"
            )
        return images

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images [N, 3, H, W], in [-1, 1], to scaled latents [N, C, h, w]; a KL autoencoder gives the mean."""
        return self.first_stage_model.encode(images) * self._scale()


def expected_shapes(config: LatentConfig) -> dict[str, torch.Size]:
    """Return every key of a released checkpoint of this model with its shape, without allocating memory."""
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
    if isinstance(model_parts.cond_stage_model, TextEmbedder):
        shapes[f"{TEXT}text_model.embeddings.position_ids"] = torch.Size([1, model_parts.cond_stage_model.max_length])
    return shapes


def _ema_name(name: str) -> str:
    """Return the key of a parameter's moving average; the published code removes the dots."""
    return EMA_PREFIX + name.replace(".", "")


def find_checkpoint(path: str | Path) -> list[Path]:
    """Find the files of a model.

    Args:
        path: a file, or a folder with `model.ckpt`, `model.safetensors` or the two files of a bundled model.

    Raises:
        CheckpointError: the file does not exist, or the folder has none of these files.
    """
    path = Path(path)
    if files := _files(path):
        return files
    raise CheckpointError(
        f"{path}: no model.ckpt or model.safetensors in this folder" if path.is_dir() else f"{path}: no such file"
    )


def _files(path: Path) -> list[Path]:
    """Return the files of a model, or an empty list."""
    if path.is_file():
        return [path]
    for names in (["model.ckpt"], ["model.safetensors"], ["unet.safetensors", "stages.safetensors"]):
        if all((path / name).is_file() for name in names):
            return [path / name for name in names]
    return []


class LatentCheckpoint:
    """The memory-mapped tensors of an official file, of the files of a bundled model, or of a folder of diffusers.

    Args:
        path: a file or folder; see `find_checkpoint`.
        config: the configuration of the model.

    Raises:
        CheckpointError: a file is damaged, or it is not a latent diffusion checkpoint.
    """

    def __init__(self, path: str | Path, config: LatentConfig) -> None:
        self.path, self.config = Path(path), config
        self.state: dict[str, Tensor] = {}
        if folder := DiffusersFolder.find(path):
            for name, tensors in read_networks(folder, config.unet).items():
                self.state |= {f"{PREFIX_OF_NETWORK[name]}{key}": tensor for key, tensor in tensors.items()}
        else:
            for file in find_checkpoint(path):
                self.state |= read_tensors(file)
        if not any(name.startswith((UNET_PREFIX, EMA_PREFIX, STAGE)) for name in self.state):
            found = _some(self.state)
            raise CheckpointError(
                f"{path}: expected a latent diffusion checkpoint ({UNET_PREFIX}..., {STAGE}...), found {found}"
            )
        self._report_ignored()

    def _report_ignored(self) -> None:
        """Name tensors in the log that no part of the model reads."""
        known = (UNET_PREFIX, "model_ema.", STAGE, CONDITIONING)
        ignored = [
            name for name in self.state if not name.startswith(known) and name not in {*SCHEDULE, "scale_factor"}
        ]
        if self.config.conditioning is None:
            ignored += [name for name in self.state if name.startswith(CONDITIONING)]
        if ignored:
            log.warning(
                "%s: ignored %d tensors that this model does not have: %s", self.path, len(ignored), _some(ignored)
            )

    def unet(self) -> UNetModel:
        """Load the UNet.

        The EMA weights are used if the configuration wants them and the file has them, or if it has no others.

        Raises:
            CheckpointError: tensors are missing or have other shapes.
        """
        with torch.device("meta"):
            unet = UNetModel(self.config.unet)
        parameters = [name for name, _ in unet.named_parameters()]
        plain = {
            name.removeprefix(UNET_PREFIX): tensor
            for name, tensor in self.state.items()
            if name.startswith(UNET_PREFIX)
        }
        ema = {name: self.state[_ema_name(name)] for name in parameters if _ema_name(name) in self.state}
        if self.config.use_ema and ema and len(ema) < len(parameters):
            raise CheckpointError(
                f"{self.path}: its EMA weights are not complete ({len(ema)} of {len(parameters)} tensors)"
            )
        if self.config.use_ema and not ema:
            log.warning("%s: no EMA weights in it (a pruned file): the plain weights are used", self.path)
        if not plain and ema:
            log.warning("%s: only EMA weights in it: they are used", self.path)
        chosen = ema if ema and (self.config.use_ema or not plain) else plain
        load_into(unet, chosen, f"{self.path} (UNet)")
        return unet.eval()

    def model_parts(self) -> LatentModelParts:
        """Load the first stage and the conditioner.

        No parameter keeps a random value. Tensors that the parts do not have are named in the log and ignored.

        Raises:
            CheckpointError: a part or the scale factor is missing, or tensors are missing or have other shapes.
        """
        with torch.device("meta"):
            model_parts = LatentModelParts(self.config)
        expected, state = set(model_parts.state_dict()), self._parts_state()
        for part in [STAGE] + ([CONDITIONING] if model_parts.cond_stage_model is not None else []):
            has_tensors = any(name.startswith(part) for name in expected)
            if has_tensors and not any(name.startswith(part) for name in state):
                raise CheckpointError(f"{self.path}: {part[:-1]} is missing: the file holds no {PART_NAMES[part]}")
        if extra := [name for name in state if name not in expected]:
            log.warning("%s: ignored %d tensors that its stages do not have: %s", self.path, len(extra), _some(extra))
            state = {name: tensor for name, tensor in state.items() if name in expected}
        load_into(model_parts, state, f"{self.path} (first stage and conditioning)")
        if self.config.scale_factor is None:
            model_parts.scale_factor = self._scale_factor()
        return model_parts.eval()

    def _parts_state(self) -> dict[str, Tensor]:
        """Return the tensors of the first stage and of the conditioner, under their released names."""
        prefixes = (STAGE,) if self.config.conditioning is None else (STAGE, CONDITIONING)
        discriminator = f"{STAGE}loss."  # of the autoencoder's training
        state = {
            name: tensor
            for name, tensor in self.state.items()
            if name.startswith(prefixes) and not name.startswith(discriminator)
        }
        if self.config.conditioning is not None and issubclass(self.config.conditioning.kind, TextEmbedder):
            return _released_text_names(state)
        return state

    def _scale_factor(self) -> float:
        """Return the scale factor of the file."""
        if "scale_factor" not in self.state:
            raise CheckpointError(
                f"{self.path}: scale_factor is missing, which the configuration expects in it (scale_by_std)"
            )
        scale_factor = float(self.state["scale_factor"])
        if not math.isfinite(scale_factor) or scale_factor <= 0:
            raise CheckpointError(f"{self.path}: damaged: scale_factor {scale_factor}: expected a positive number")
        return scale_factor


def open_checkpoint(path: str | Path, config: LatentConfig, calibrated: str | Path | None = None) -> LatentCheckpoint:
    """Open the checkpoint of a model.

    Args:
        path: a file or folder; see `find_checkpoint`.
        config: the configuration of the model.
        calibrated: a quantized checkpoint. If nothing is at `path` and this file is packed, the file with the first
            stage and the conditioner that it names is opened instead.

    Raises:
        CheckpointError: a file is missing or damaged, or it is not a latent diffusion checkpoint.
        ConfigError: the conditioner is not supported.
    """
    require_supported(config)
    exists = _files(Path(path)) or DiffusersFolder.find(path)
    if calibrated and not exists and (packed := PackedFile.find(calibrated)) is not None:
        return LatentCheckpoint(packed.model_parts_file(), config)
    return LatentCheckpoint(path, config)


def _released_text_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Add the level `text_model.` to the text tower's keys that lack it, and leave the buffer `position_ids` out."""
    renamed = {}
    for name, tensor in state.items():
        if name.startswith(TEXT) and not name.startswith(f"{TEXT}text_model."):
            name = f"{TEXT}text_model.{name.removeprefix(TEXT)}"
        if not name.endswith("embeddings.position_ids"):
            renamed[name] = tensor
    return renamed


def _some(names: Mapping[str, Tensor] | list[str]) -> str:
    """List the first three names."""
    listed = list(names)
    return ", ".join(listed[:3]) + (", ..." if len(listed) > 3 else "")


def require_supported(config: LatentConfig) -> None:
    """Check that the contexts of the model can be computed.

    Raises:
        ConfigError: the conditioner is not supported.
    """
    if config.conditioning is not None and config.conditioning.kind is BERTEmbedder:
        raise ConfigError(BERT_NOT_SUPPORTED)
