"""Pipelines of Hugging Face diffusers: calibrate and quantize the denoiser of one in place; save and load it packed.

An import of this module registers the quantization method `qdiff` with diffusers. `save_pretrained` of a quantized
pipeline then writes the packed format (`qdiff.checkpoint.packed`), and `DiffusionPipeline.from_pretrained` reads it.
"""

import inspect
import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from qdiff.api import quantize, validate_settings
from qdiff.calibration.data import spread
from qdiff.calls import describe_call, map_leaves, time_argument
from qdiff.checkpoint.diffusers_folder import CONFIG, INDEX, read_json
from qdiff.checkpoint.packed import PackedFile, pack, remembered_info
from qdiff.engines.onnx import NestedCall, export_onnx
from qdiff.engines.proxy import has_engine
from qdiff.errors import ConfigError
from qdiff.model import quant_layers
from qdiff.utils.compat import make_torchvision_importable
from qdiff.utils.extras import require_extra

require_extra("diffusers", "diffusers", "accelerate", "peft")
make_torchvision_importable()

import diffusers  # noqa: E402  # needs torchvision
from diffusers import DiffusionPipeline, ModelMixin  # noqa: E402
from diffusers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING  # noqa: E402
from diffusers.quantizers.base import DiffusersQuantizer  # noqa: E402
from diffusers.quantizers.quantization_config import QuantizationConfigMixin  # noqa: E402
from diffusers.utils.torch_utils import is_compiled_module  # noqa: E402
from peft.tuners.tuners_utils import BaseTunerLayer  # noqa: E402

log = logging.getLogger(__name__)

NETWORKS = ("unet", "transformer")  # what pipelines call the network that is quantized
WITHOUT_SAMPLES = ("img_ids", "txt_ids")  # inputs of Flux that have no batch dimension
LORA = (
    "a LoRA cannot be added to a quantized network, whose weights are integers: expected it to be loaded before "
    "quantize_pipeline, which fuses it"
)
QKV = "the projections of a quantized network cannot be fused: expected fuse_qkv_projections before quantize_pipeline"
PRECISIONS = {"bfloat16": torch.bfloat16, "float16": torch.float16}  # of networks, by their names in files
# Inputs of ONNX networks by the names of their types in files; half precision becomes float32.
INPUT_TYPES = dict.fromkeys(("float64", "float32", *PRECISIONS), torch.float32) | {
    "int64": torch.int64,
    "int32": torch.int32,
    "bool": torch.bool,
}
# Dimensions of the inputs of UNets that an ONNX network leaves free; transformers have them in their embeddings.
OUTPUT = "out_sample"  # of ONNX networks
FREE = {"sample": {2: "height", 3: "width"}, "encoder_hidden_states": {1: "length"}}
# Methods of networks that would add layers in full precision to a quantized network.
REFUSED = {
    "load_lora_adapter": LORA,
    "add_adapter": LORA,
    "fuse_qkv_projections": QKV,
    "unfuse_qkv_projections": QKV,
}


# --- quantize ---------------------------------------------------------------------------------------


def quantize_pipeline(
    pipe: DiffusionPipeline,
    *,
    prompts: Sequence[str] | None = None,
    prompt_embeds: Tensor | Mapping[str, Tensor] | None = None,
    n: int | None = None,
    call: Mapping[str, Any] | None = None,
    timesteps: int = 20,
    images_per_call: int = 4,
    seed: int = 0,
    weight_bit: int = 8,
    act_bit: int | None = 8,
    policy: Mapping[str, str] | None = None,
    preset: str = "fast",
    **settings: Any,
) -> None:
    """Quantize and calibrate the UNet or transformer of a pipeline, in place; `pipe(...)` then samples with it.

    The pipeline samples by its own call, and the inputs of its network at some time steps are the calibration samples.
    LoRA weights are fused into the network before.

    Args:
        pipe: any pipeline with a `unet` or a `transformer`, on the device where the work is done.
        prompts: the texts to sample with. One of `prompts`, `prompt_embeds` and `n` is expected.
        prompt_embeds: embedded texts in their place, [N, L, D], or all such arguments of the pipeline's call by name
            (`pooled_prompt_embeds`, `negative_prompt_embeds`, ...), each [N, ...].
        n: the number of images of a pipeline without texts. A pipeline with classes samples classes at even distances.
        call: further arguments of the pipeline's call: `num_inference_steps`, `guidance_scale`, `height`, ...
        timesteps: the number of time steps of each image whose inputs become calibration samples, spread evenly.
            Guidance gives two samples at each. 500 samples or more are recommended.
        images_per_call: the number of images that are sampled together.
        seed: seed of the noise and of the calibration.
        weight_bit: the width of weights, 2 to 16 bits.
        act_bit: the width of activations, 2 to 16 bits; None leaves activations in full precision.
        policy: widths of single layers, see `qdiff.quantize`.
        preset: the recipe, see `qdiff.quantize`.
        settings: further arguments of `qdiff.quantize`: `keep`, `timestep_groups`, `folder`, settings of the recipe.

    Raises:
        ConfigError: the pipeline has no such network, or it is quantized, compiled or offloaded; arguments that do not
            fit together or that the pipeline does not take.
        TypeError: see `qdiff.quantize`.
    """
    name = _network_name(pipe)
    network = getattr(pipe, name)
    _validate_network(network, name)
    settings |= {"weight_bit": weight_bit, "act_bit": act_bit, "policy": policy, "preset": preset, "seed": seed}
    validate_settings(network, **settings)
    if timesteps < 1:
        raise ConfigError(f" {timesteps}: expected at least 1", field="timesteps")
    batches = _batches(pipe, _columns(pipe, prompts, prompt_embeds, n), call or {}, images_per_call)
    _fuse_lora(pipe, network)
    calls = _record(pipe, network, batches, timesteps, seed)
    log.info("calibration samples: %d calls of the %s", len(calls), name)
    settings.setdefault("shared", [name for name in WITHOUT_SAMPLES if name in calls[0][1]])
    quantized = quantize(network, calls, **settings)
    quantizer = QDiffQuantizer(QDiffConfig(weight_bit, act_bit))
    quantizer.call = describe_call(network, *calls[0], shared=settings["shared"])
    _adopt(quantized, quantizer)
    setattr(pipe, name, quantized)


def _network_name(pipe: DiffusionPipeline) -> str:
    """What the pipeline calls its network."""
    if not isinstance(pipe, DiffusionPipeline):
        raise ConfigError(f": expected a DiffusionPipeline, found {type(pipe).__name__}", field="pipe")
    for name in NETWORKS:
        if isinstance(getattr(pipe, name, None), nn.Module):
            return name
    found = ", ".join(key for key, part in pipe.components.items() if isinstance(part, nn.Module)) or "no networks"
    message = f": {type(pipe).__name__} with {found}: expected a component {' or '.join(NETWORKS)}"
    raise ConfigError(message, field="pipe")


def _validate_network(network: nn.Module, name: str) -> None:
    """Refuse a network that is not in its original form."""
    reason = None
    if is_compiled_module(network):
        reason = "is compiled; expected torch.compile after quantize_pipeline"
    elif has_engine(network) or quant_layers(network) or getattr(network, "hf_quantizer", None) is not None:
        reason = "is quantized already; expected full precision"
    elif any(hasattr(module, "_hf_hook") for module in network.modules()):
        reason = "is offloaded; expected enable_model_cpu_offload after quantize_pipeline"
    elif not isinstance(network, ModelMixin):
        reason = f"is a {type(network).__name__}; expected a network of diffusers"
    if reason:
        raise ConfigError(f": its {name} {reason}", field="pipe")


def _columns(
    pipe: DiffusionPipeline,
    prompts: Sequence[str] | None,
    prompt_embeds: Tensor | Mapping[str, Tensor] | None,
    n: int | None,
) -> dict[str, Any]:
    """The arguments of the pipeline's call that say what is sampled, each with one entry for every image."""
    if sum(value is not None for value in (prompts, prompt_embeds, n)) != 1:
        raise ConfigError("expected one of prompts, prompt_embeds and n")
    known = inspect.signature(pipe.__call__).parameters
    if prompts is not None:
        if isinstance(prompts, str) or not all(isinstance(prompt, str) for prompt in prompts):
            raise ConfigError(": expected a list of texts", field="prompts")
        columns: dict[str, Any] = {"prompt": list(prompts)}
    elif prompt_embeds is not None:
        columns = {"prompt_embeds": prompt_embeds} if isinstance(prompt_embeds, Tensor) else dict(prompt_embeds)
    elif "class_labels" in known:
        classes = getattr(pipe, _network_name(pipe)).config.num_embeds_ada_norm
        columns = {"class_labels": [number * classes // n for number in range(n or 0)]}
    elif "batch_size" in known:
        columns = {"batch_size": [1] * (n or 0)}
    else:
        raise ConfigError(f": {type(pipe).__name__} samples from texts: expected prompts", field="n")
    if unknown := [name for name in columns if name not in known]:
        raise ConfigError(f": {type(pipe).__name__} takes none", field=unknown[0])
    counts = {name: len(column) for name, column in columns.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"{count} for {name}" for name, count in counts.items())
        raise ConfigError(f"{found}: expected the same number of each, 1 or more")
    return columns


def _batches(
    pipe: DiffusionPipeline, columns: Mapping[str, Any], call: Mapping[str, Any], size: int
) -> list[dict[str, Any]]:
    """The arguments of each call of the pipeline.

    Args:
        pipe: the pipeline.
        columns: see `_columns`.
        call: the other arguments, the same in each call.
        size: the number of images of a call.
    """
    known = inspect.signature(pipe.__call__).parameters
    if unknown := [name for name in call if name not in known]:
        raise ConfigError(f": {type(pipe).__name__} takes no {unknown[0]}", field="call")
    if size < 1:
        raise ConfigError(f" {size}: expected at least 1", field="images_per_call")
    latent = {"output_type": "latent"} if "output_type" in known else {}  # images are not needed
    total = len(next(iter(columns.values())))
    batches = []
    for start in range(0, total, size):
        batch = {name: column[start : start + size] for name, column in columns.items()}
        if "batch_size" in batch:
            batch["batch_size"] = len(batch["batch_size"])
        batches.append(latent | dict(call) | batch)
    return batches


def _fuse_lora(pipe: DiffusionPipeline, network: nn.Module) -> None:
    """Add the LoRA weights of a pipeline to those of their layers, so that they are quantized with them."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    layers = {
        name: found
        for name, part in parts.items()
        if (found := [module for module in part.modules() if isinstance(module, BaseTunerLayer)])
    }
    if not layers:
        return
    counts = ", ".join(f"{len(found)} layers of the {name}" for name, found in layers.items())
    adapters = sorted({adapter for found in layers.values() for layer in found for adapter in layer.active_adapters})
    log.info("LoRA %s: fused into %s", ", ".join(adapters), counts)
    if hasattr(pipe, "fuse_lora"):
        pipe.fuse_lora(components=list(layers))
        pipe.unload_lora_weights()
    else:
        network.fuse_lora()  # type: ignore[operator]  # a method of diffusers' networks
        network.unload_lora()  # type: ignore[operator]


class _Recorder:
    """A hook that records the inputs of a network at some time steps of a sampler.

    Args:
        network: the network.
        timesteps: the number of time steps of a run that are recorded, spread evenly.
        count_steps: the number of time steps of the sampler, once it runs.
        progress: is moved with every time step.
    """

    def __init__(self, network: nn.Module, timesteps: int, count_steps: Callable[[], int], progress: tqdm) -> None:
        self.network, self.timesteps, self.count_steps, self.progress = network, timesteps, count_steps, progress
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.begin()

    def begin(self) -> None:
        """Begin with another run of the sampler."""
        self.step, self.time = -1, math.nan
        self.recorded: set[int] = set()

    def __call__(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        time = self._time(args, kwargs)
        if time != self.time:  # guidance may call the network twice at a time step; without a time it is nan
            if self.step < 0:
                total = self.count_steps()
                self.recorded = set(spread(min(self.timesteps, total), total))
            self.step, self.time = self.step + 1, time
            self.progress.update()
        if self.step in self.recorded:
            # pipelines change tensors in place; a clone of an inference tensor is a normal one outside that mode
            with torch.inference_mode(False):
                self.calls.append(map_leaves(_copy, (args, kwargs)))

    def _time(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> float:
        place = time_argument(self.network, args, kwargs)
        if place is None:
            return math.nan
        return float(torch.as_tensor(kwargs[place] if isinstance(place, str) else args[place]).flatten()[0])


def _copy(value: Any) -> Any:
    return value.detach().clone().cpu() if isinstance(value, Tensor) else value


def _record(
    pipe: DiffusionPipeline,
    network: nn.Module,
    batches: Sequence[Mapping[str, Any]],
    timesteps: int,
    seed: int,
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Sample with a pipeline, and return calls of its network.

    Args:
        pipe: the pipeline.
        network: its network.
        batches: the arguments of each call of the pipeline.
        timesteps: the number of time steps of a run that are recorded.
        seed: seed of the noise.
    """

    def count_steps() -> int:
        total = len(pipe.scheduler.timesteps)
        progress.total = total * len(batches)
        return total

    with tqdm(desc="calibration samples", unit="step") as progress, logging_redirect_tqdm(), _silent(pipe):
        recorder = _Recorder(network, timesteps, count_steps, progress)
        hook = network.register_forward_pre_hook(recorder, with_kwargs=True)
        try:
            for number, batch in enumerate(batches):
                recorder.begin()
                generator = torch.Generator().manual_seed(seed * 100_003 + number)
                pipe(**({"generator": generator} | batch))  # type: ignore[operator]  # every pipeline can be called
        finally:
            hook.remove()
    if not recorder.calls:
        raise ConfigError(f": {type(pipe).__name__} did not call its network", field="pipe")
    return recorder.calls


@contextmanager
def _silent(pipe: DiffusionPipeline) -> Iterator[None]:
    """Hide the progress bar of the pipeline: ours says when all images are done."""
    config = getattr(pipe, "_progress_bar_config", None)
    pipe.set_progress_bar_config(**(config or {}) | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**(config or {}))


# --- save and load ----------------------------------------------------------------------------------


class QuantizationMethod(str, Enum):
    """The name of our quantization among those of diffusers, which reads its `value`."""

    QDIFF = "qdiff"


class QDiffConfig(QuantizationConfigMixin):
    """What `config.json` says of a quantized network; the packed file holds the details.

    Args:
        weight_bit: the nominal width of weights.
        act_bit: the nominal width of activations; None: they are in full precision.
        quant_method: `qdiff`.
    """

    def __init__(self, weight_bit: int, act_bit: int | None, quant_method: str = QuantizationMethod.QDIFF) -> None:
        self.weight_bit, self.act_bit = weight_bit, act_bit
        self.quant_method = QuantizationMethod(quant_method)

    def to_dict(self) -> dict[str, Any]:
        """The settings as `config.json` holds them."""
        return {"quant_method": self.quant_method.value, "weight_bit": self.weight_bit, "act_bit": self.act_bit}

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that are printed."""
        return self.to_dict()


class QDiffQuantizer(DiffusersQuantizer):
    """Saves and loads quantized networks for diffusers. The weights are a packed file, whole or in shards.

    Attributes:
        network: the quantized network that it belongs to.
        call: the inputs of the network, see `describe_call`; None: the file does not say them.
    """

    requires_calibration = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: QDiffConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise ConfigError(": qdiff needs calibration; expected quantize_pipeline", field="quantization_config")
        super().__init__(quantization_config, **kwargs)
        self.network: nn.Module | None = None
        self.call: dict[str, Any] | None = None
        self.file: PackedFile | None = None
        self.tensors: dict[str, Tensor] = {}
        self.dtype: torch.dtype | None = None
        self.device: torch.device | str | int = "cpu"

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype | None:
        """Note the precision that `from_pretrained` was called with."""
        self.dtype = torch_dtype
        return torch_dtype

    def update_device_map(self, device_map: dict[str, Any] | None) -> None:
        """Note the device that the network goes to; it is moved there once it is whole."""
        if device_map is None:
            return
        if not isinstance(device_map, dict) or set(device_map) != {""}:
            raise ConfigError(f" {device_map}: expected one device for the whole network", field="device_map")
        self.device = device_map[""]

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Read the header of the weights. diffusers itself loads no tensor, so it expects none."""
        self.file = PackedFile.open(checkpoint_files[0])
        self.call = json.loads(self.file.metadata.get("call", "null"))
        return []

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        """None is missing: see `maybe_update_loaded_keys`."""
        return []

    def maybe_update_state_dict(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Collect the tensors of a shard."""
        self.tensors |= state_dict
        return {}

    def preprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        """Do nothing. diffusers would mark the network and then refuse another precision, which ours takes."""

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Do nothing: see `preprocess_model`."""

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        """Make the quantized network, in place."""
        assert self.file is not None  # its header was read before
        tensors, self.tensors = self.tensors, {}
        self.file.restore(model, tensors)
        dtype = self.dtype or PRECISIONS.get(self.file.metadata.get("dtype", ""), torch.float32)
        nn.Module.to(model, self.device, dtype)  # that of diffusers warns
        _adopt(model, self)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], safe_serialization: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """The tensors and the metadata of the packed file."""
        assert self.network is not None  # set by `_adopt`
        info = remembered_info(self.network)
        if has_engine(self.network) or info is None:
            raise ConfigError("the network runs on an engine: expected it to be saved before apply_engine")
        if not safe_serialization:
            raise ConfigError(" False: packed weights need safetensors, expected True", field="safe_serialization")
        tensors, metadata = pack(self.network, info)
        dtype = str(self.network.dtype).removeprefix("torch.")
        return tensors, metadata | {"dtype": dtype, "call": json.dumps(self.call)}


def _adopt(network: nn.Module, quantizer: QDiffQuantizer) -> None:
    """Make a quantized network one that diffusers saves, and that refuses what would add layers to it."""
    quantizer.network = network
    network.hf_quantizer = quantizer  # a plain attribute; a copy of the network has its own
    network.register_to_config(quantization_config=quantizer.quantization_config)  # type: ignore[operator]
    for name, reason in REFUSED.items():
        if hasattr(network, name):
            setattr(network, name, partial(_refuse, reason))


def _refuse(reason: str, *_: Any, **__: Any) -> NoReturn:
    raise ConfigError(reason)


# --- export -----------------------------------------------------------------------------------------


def load_network(folder: str | Path) -> nn.Module:
    """Load the quantized network of a pipeline in float32.

    Args:
        folder: the folder of a pipeline that `quantize_pipeline` quantized, or of its network.

    Raises:
        CheckpointError: a file is missing or damaged.
        ConfigError: there is no network in the folder that `quantize_pipeline` quantized.
    """
    folder = Path(folder)
    if (folder / INDEX).is_file():
        found = [name for name in NETWORKS if (folder / name / CONFIG).is_file()]
        if not found:
            raise ConfigError(f"{folder}: expected a pipeline with {' or '.join(NETWORKS)}")
        folder = folder / found[0]
    config = read_json(folder / CONFIG)
    method = (config.get("quantization_config") or {}).get("quant_method", "not quantized")
    if method != QuantizationMethod.QDIFF.value:
        raise ConfigError(f"{folder}: {method}: expected a network that quantize_pipeline has quantized")
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    if not (isinstance(kind, type) and issubclass(kind, ModelMixin)):
        raise ConfigError(f"{folder / CONFIG}: class {config.get('_class_name')}: expected a network of diffusers")
    network: nn.Module = kind.from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]  # a ModelMixin
    return network


def export_network(path: str | Path, network: nn.Module, batch_size: int | None = None) -> None:
    """Write the quantized network of a pipeline as ONNX. Its inputs have the names and types of the pipeline's call.

    Inputs in dicts become inputs of their own. A UNet takes any height, width and length of the context; the network
    of another class takes those of the calibration samples.

    Args:
        path: the file to write.
        network: the network, simulated, in float32.
        batch_size: the number of samples of a call; None: any.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ConfigError: `quantize_pipeline` has not made the network; and see `qdiff.engines.onnx.export_onnx`.
    """
    call = getattr(getattr(network, "hf_quantizer", None), "call", None)
    if call is None or has_engine(network):
        reason = "runs on an engine" if has_engine(network) else "its inputs are not known"
        raise ConfigError(f": {reason}: expected the simulated network of quantize_pipeline", field="network")
    free: list[dict[int, str]] = []  # of each tensor

    def example(spec: dict[str, Any], name: str) -> Any:
        """A tensor as `spec` describes it. Values do not matter: ones are a class, and an open mask."""
        if "class" in spec or spec["dtype"] not in INPUT_TYPES:
            raise ConfigError(f": its input {name} is a {spec.get('class') or spec['dtype']}", field="network")
        sides = FREE.get(name, {}) if type(network).__name__.startswith("UNet2D") else {}
        batch = {dim: "batch" for dim, size in enumerate(spec["shape"]) if size is None and batch_size is None}
        free.append(batch | sides)
        # 3: the export may take 2 for the size of something else
        shape = [(batch_size or 3) if size is None else size for size in spec["shape"]]
        return torch.ones(shape, dtype=INPUT_TYPES[spec["dtype"]])

    names = list(inspect.signature(network.forward).parameters)
    kwargs = dict(zip(names, call["args"], strict=False)) | call["kwargs"]
    kwargs = {name: _with_tensors(value, partial(example, name=name)) for name, value in kwargs.items()}
    nested = NestedCall(network, (), kwargs, [index for index, axes in enumerate(free) if 0 in axes])
    export_onnx(path, nested, list(nested.tensors.values()), free, OUTPUT, list(nested.tensors))


def _with_tensors(value: Any, make: Callable[[dict[str, Any]], Any]) -> Any:
    """The arguments of a call from their description, see `describe_call`; `make` is called for tensors and objects."""
    if isinstance(value, list):
        return [_with_tensors(part, make) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() in ({"shape", "dtype"}, {"class"}):
        return make(value)
    return {name: _with_tensors(part, make) for name, part in value.items()}


AUTO_QUANTIZER_MAPPING["qdiff"] = QDiffQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING["qdiff"] = QDiffConfig
