"""Export to ONNX with QuantizeLinear and DequantizeLinear nodes that hold exactly our integers and scales.

Weights are stored as UINT4 or UINT8 with per-channel zero points. If a zero point lies outside their range, they are
stored as INT8 or INT16 without zero points. Activations pass a QuantizeLinear and a DequantizeLinear node, which
runtimes may fuse into integer products. TensorRT accepts no zero point but 0 (NVIDIA/TensorRT#2774, #4698). The export
needs the packages onnx and onnxscript.
"""

import copy
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.calls import TensorArg, map_leaves, named_leaves
from qdiff.errors import ConfigError
from qdiff.layers import HALF, ActQuantizer, QuantLayer, QuantMatMul, WeightQuantizer, dequantize
from qdiff.model import replace_modules
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write

if TYPE_CHECKING:  # onnx is an optional dependency
    import onnx

OPSET = 21
NAMES = ("x", "t", "context")  # of the inputs of our networks
_FOUR_BITS = "_as_uint4"  # ends the names of buffers that are to be stored as UINT4


@torch.library.custom_op("qdiff::activation", mutates_args=())
def _activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize to the integer type of `zero_point` and dequantize."""
    info, zero = torch.iinfo(zero_point.dtype), zero_point.to(x.dtype)
    return (Q.quantize_nearest(x, scale, zero, info.bits, symmetric=info.min < 0) - zero) * scale


@_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qdiff::weight", mutates_args=())
def _weight(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Dequantize a weight [N, ...] with scales and zero points [N]."""
    shape = (-1, *[1] * (integers.dim() - 1))
    return dequantize(integers, scale.reshape(shape), zero_point.to(scale.dtype).reshape(shape))


@_weight.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return integers.new_empty(integers.shape, dtype=scale.dtype)


class _Activation(nn.Module):
    """An activation quantizer as a QuantizeLinear and a DequantizeLinear node.

    ONNX has 8 and 16 bits. For other widths a Clip node before them keeps the values inside the range.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, quantizer: ActQuantizer, path: str) -> None:
        super().__init__()
        if quantizer.groups is not None:
            raise ConfigError(f"{path}: timestep groups cannot be exported: an ONNX node holds one scale")
        low, high = Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        zero = 0 if quantizer.zero_is_fixed else int(quantizer.zero_point.item())
        if bool(quantizer.zero_point != quantizer.zero_point.round()):
            raise ConfigError(f"{path}: an activation zero point of {quantizer.zero_point.item()}: ONNX has whole ones")
        inside = low <= zero <= high
        stored_bits = 8 if quantizer.n_bits <= 8 else 16
        dtype = {8: (torch.uint8, torch.int8), 16: (torch.uint16, torch.int16)}[stored_bits][quantizer.symmetric]
        self.register_buffer("scale", quantizer.scale.detach().float().clone())
        self.register_buffer("zero_point", torch.tensor(zero if inside else 0, dtype=dtype))
        # If the zero point is outside the range of the integers, the values are shifted instead, exactly up to float32.
        self.shift = 0.0 if inside else zero * quantizer.scale.item()
        offset = zero if inside else 0
        ends = tuple((end - offset) * quantizer.scale.item() for end in (low, high))
        self.range = None if quantizer.n_bits == stored_bits else ends

    def forward(self, x: Tensor) -> Tensor:
        if self.shift:
            x = x + self.shift
        if self.range:
            x = x.clamp(*self.range)
        x = torch.ops.qdiff.activation(x, self.scale, self.zero_point)
        return x - self.shift if self.shift else x


def _stored_integers(quantizer: WeightQuantizer, path: str) -> tuple[Tensor, Tensor]:
    """The integers and zero points [N] of a weight in an integer type that ONNX has: uint8, int8 or int16."""
    zero = quantizer.zero_point.flatten()
    levels = 2**quantizer.n_bits - 1
    if bool(((zero >= 0) & (zero <= levels) & (zero == zero.round())).all()) and quantizer.n_bits <= 8:
        return quantizer.integers.to(torch.uint8), zero.to(torch.uint8)
    shifted = quantizer.integers.double() - quantizer.zero_point.double()
    if shifted.min() < -(2**15) or shifted.max() >= 2**15 or bool((shifted != shifted.round()).any()):
        raise ConfigError(f"{path}: integers less their zero points do not fit 16 bits: ONNX has no wider ones")
    dtype = torch.int8 if shifted.min() >= -128 and shifted.max() <= 127 else torch.int16
    return shifted.to(dtype), torch.zeros(len(zero), dtype=dtype)


class _Layer(nn.Module):
    """A quantized layer that dequantizes its weight by a node of the graph."""

    layer: QuantLayer

    def __init__(self, layer: QuantLayer, path: str, activations: bool) -> None:
        super().__init__()
        if layer.dtype in HALF:
            name = str(layer.dtype).removeprefix("torch.")
            raise ConfigError(f"{path}: computes in {name}: expected a network in float32 (network.float())")
        self.layer, self.split = layer, layer.split
        self.acts = nn.ModuleList([_Activation(q, path) for q in layer.act_quantizers] if activations else [])
        self.names: list[tuple[str, str, str]] = []
        for index, quantizer in enumerate(layer.weight_quantizers):
            integers, zero_point = _stored_integers(quantizer, path)
            end = _FOUR_BITS if quantizer.n_bits == 4 and integers.dtype == torch.uint8 else ""
            names = (f"integers{index}{end}", f"scale{index}", f"zero_point{index}{end}")
            for name, value in zip(names, (integers, quantizer.scale.flatten().float(), zero_point), strict=True):
                self.register_buffer(name, value.clone())
            self.names.append(names)
        layer.drop_weight()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.layer.smoothing is not None:
            x = x / self.layer._along_channels(self.layer.smoothing, x.dim())
        weights = [torch.ops.qdiff.weight(*(getattr(self, name) for name in names)) for names in self.names]
        if not self.split:
            return self.layer.apply_weight(self.acts[0](x) if len(self.acts) else x, weights[0], *args, **kwargs)
        parts = self.layer._parts(x)
        if len(self.acts):
            parts = [act(part) for act, part in zip(self.acts, parts, strict=True)]
        return self.layer.apply_weight(self.layer._join(parts), self.layer._join(weights), *args, **kwargs)


class _MatMul(nn.Module):
    """A quantized attention matmul."""

    def __init__(self, matmul: QuantMatMul, path: str) -> None:
        super().__init__()
        self.first, self.second = (_Activation(quantizer, path) for quantizer in matmul.act_quantizers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.first(a), self.second(b))


def exportable(model: nn.Module) -> nn.Module:
    """Copy a quantized network and replace its quantized modules by modules that the export can translate.

    Raises:
        ConfigError: ONNX cannot express a number format of the network.
    """
    result = copy.deepcopy(model).eval()

    def replacement(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantLayer):
            return _Layer(module, path, module.act_quantizer.enabled)
        if isinstance(module, QuantMatMul) and module.act_quantizers[0].enabled:
            return _MatMul(module, path)
        return None

    replace_modules(result, replacement)
    return result


class NestedCall(nn.Module):
    """A network as a function of the tensors among the arguments of a call. All other arguments stay as they are.

    Its output is the first floating-point tensor that the network returns.

    Args:
        network: the network.
        args: the positional arguments, with nested tuples, lists and dicts.
        kwargs: the keyword arguments.
        alike: the numbers of tensors whose first dimensions are equal, which the export does not find for all networks.

    Attributes:
        tensors: the tensors of the call by name, in the order in which `forward` takes them.
    """

    def __init__(
        self, network: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], alike: Sequence[int] = ()
    ) -> None:
        super().__init__()
        self.network, self.alike = network, alike
        parameters = list(inspect.signature(network.forward).parameters)
        named = dict(zip(parameters, args, strict=False)) | dict(kwargs)
        found = [(path, leaf) for path, leaf in named_leaves(named) if isinstance(leaf, Tensor)]
        short = [path.rpartition(".")[2] for path, _ in found]
        names = short if len(set(short)) == len(short) else [path.replace(".", "_") for path, _ in found]
        self.tensors = dict(zip(names, (leaf for _, leaf in found), strict=True))
        indices = iter(range(len(found)))
        self.call = map_leaves(lambda leaf: TensorArg(next(indices)) if isinstance(leaf, Tensor) else leaf, named)

    def forward(self, *tensors: Tensor) -> Tensor:
        for index in self.alike[1:]:
            torch._check(tensors[index].shape[0] == tensors[self.alike[0]].shape[0])
        kwargs = map_leaves(lambda leaf: tensors[leaf.index] if isinstance(leaf, TensorArg) else leaf, self.call)
        outputs = [leaf for _, leaf in named_leaves(self.network(**kwargs)) if isinstance(leaf, Tensor)]
        return next(tensor for tensor in outputs if tensor.is_floating_point())


def export_onnx(
    path: str | Path,
    model: nn.Module,
    inputs: Sequence[Tensor],
    dynamic: Sequence[Mapping[int, str]] = (),
    output: str = "eps",
    names: Sequence[str] = NAMES,
) -> None:
    """Write a quantized network as ONNX.

    Args:
        path: the file to write.
        model: the network, simulated; a `NestedCall` of it if it takes more than tensors by position.
        inputs: example inputs: x [N, C, H, W], t [N] and, for a network with text, the context [N, L, D].
        dynamic: for each input the dimensions that may have any size, {dimension: its name}. The example must have at
            least 2 in each of these. An empty sequence fixes the sizes of the example.
        output: the name of the output, which says what the network predicts.
        names: the names of the inputs.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ConfigError: ONNX cannot express timestep groups, or a width or zero point of the network; or PyTorch cannot
            export the network, as it is or with these dimensions.
    """
    require_extra("export", "onnx", "onnxscript")
    import onnx

    shapes: tuple[Any, ...] | None = tuple(dict(axes) for axes in dynamic) or None
    exported = exportable(model)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the export warns that dimensions of two inputs share a name
            program = torch.onnx.export(
                exported,
                tuple(inputs),
                dynamo=True,
                optimize=False,
                opset_version=OPSET,
                custom_translation_table=_translations(),
                input_names=list(names[: len(inputs)]),
                output_names=[output],
                dynamic_shapes=(shapes,) if isinstance(model, NestedCall) and shapes else shapes,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        free = sorted({name for axes in dynamic for name in axes.values()})
        sizes = f" with any {', '.join(free)} (fixed sizes may work)" if free else ""
        raise ConfigError(f"the network cannot be exported{sizes}: {_reason(error)}") from error
    assert program is not None  # it is None only if the export writes the file itself
    proto = program.model_proto
    _pack_four_bits(proto)
    with atomic_write(path) as temporary:
        onnx.save(proto, str(temporary))
    onnx.checker.check_model(str(path))


def _reason(error: Exception) -> str:
    """What the exporter found, without its advice."""
    summary = str(error).partition("## Exception summary")[2].strip() or str(error)
    return summary.splitlines()[0]


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """The ONNX nodes of our custom operators, and of one of PyTorch's."""
    from onnxscript import opset21 as op

    def activation(x: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def weight(integers: Any, scale: Any, zero_point: Any) -> Any:
        return op.DequantizeLinear(integers, scale, zero_point, axis=0)

    def squeeze(x: Any, dim: int) -> Any:  # onnxscript's own fails at a dimension that is not 1
        return op.Squeeze(x, [dim]) if x.shape and x.shape[dim] == 1 else op.Identity(x)

    return {
        torch.ops.qdiff.activation.default: activation,
        torch.ops.qdiff.weight.default: weight,
        torch.ops.aten.squeeze.dim: squeeze,
    }


def _pack_four_bits(proto: "onnx.ModelProto") -> None:
    """Store the initializers that hold 4-bit integers as UINT4."""
    import onnx
    from onnx import numpy_helper

    for tensor in proto.graph.initializer:
        if tensor.name.endswith(_FOUR_BITS):
            values = numpy_helper.to_array(tensor)
            packed = onnx.helper.make_tensor(
                tensor.name, onnx.TensorProto.UINT4, values.shape, values.flatten().tolist()
            )
            tensor.CopyFrom(packed)
