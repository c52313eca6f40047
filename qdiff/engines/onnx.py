"""Export to ONNX: QuantizeLinear and DequantizeLinear nodes with exactly our integers and step sizes.

Weights are stored as UINT4 or UINT8 with per-channel zero points (or as INT8 and INT16 without, where a zero point lies
outside their range); activations pass a QuantizeLinear and a DequantizeLinear, which runtimes may fuse into integer products.
TensorRT takes no zero points but 0 (NVIDIA/TensorRT#2774, #4698). Needs the packages onnx and onnxscript.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from qdiff import quantizers as Q
from qdiff.errors import ConfigError
from qdiff.layers import ActQuantizer, QuantLayer, QuantMatMul
from qdiff.model import replace_modules
from qdiff.utils.extras import require_extra
from qdiff.utils.files import atomic_write

OPSET = 21
_FOUR_BITS = "_as_uint4"  # the end of a buffer's name that says: store as UINT4


@torch.library.custom_op("qdiff::activation", mutates_args=())
def _activation(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Quantize to the integer type of `zero_point` and back."""
    info = torch.iinfo(zero_point.dtype)
    return (
        torch.clamp(torch.round(x / scale) + zero_point.to(x.dtype), info.min, info.max) - zero_point.to(x.dtype)
    ) * scale


@_activation.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return torch.empty_like(x)


@torch.library.custom_op("qdiff::weight", mutates_args=())
def _weight(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Dequantize per output channel."""
    shape = (-1, *[1] * (integers.dim() - 1))
    return (integers.to(scale.dtype) - zero_point.to(scale.dtype).reshape(shape)) * scale.reshape(shape)


@_weight.register_fake
def _(integers: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    return integers.new_empty(integers.shape, dtype=scale.dtype)


class _Act(nn.Module):
    """An activation quantizer as QuantizeLinear and DequantizeLinear."""

    def __init__(self, quantizer: ActQuantizer, path: str) -> None:
        super().__init__()
        if quantizer.groups is not None:
            raise ConfigError(f"{path}: time-step sets cannot be exported: an ONNX node holds one step size")
        if quantizer.n_bits not in (8, 16):
            raise ConfigError(f"{path}: {quantizer.n_bits}-bit activations: ONNX has 8 and 16 bits")
        low, high = Q.integer_range(quantizer.n_bits, quantizer.symmetric)
        zero = 0 if quantizer.symmetric or quantizer.always_zero else int(quantizer.zero_point.item())
        if bool(quantizer.zero_point != quantizer.zero_point.round()):
            raise ConfigError(f"{path}: an activation zero point of {quantizer.zero_point.item()}: ONNX has whole ones")
        inside = low <= zero <= high
        dtype = {8: (torch.uint8, torch.int8), 16: (torch.uint16, torch.int16)}[quantizer.n_bits][quantizer.symmetric]
        self.register_buffer("scale", quantizer.scale.detach().float().clone())
        self.register_buffer("zero_point", torch.tensor(zero if inside else 0, dtype=dtype))
        # a zero point outside the integers' range: shift the values instead, which is exact up to float32
        self.shift = 0.0 if inside else zero * quantizer.scale.item()

    def forward(self, x: Tensor) -> Tensor:
        if self.shift:
            return torch.ops.qdiff.activation(x + self.shift, self.scale, self.zero_point) - self.shift
        return torch.ops.qdiff.activation(x, self.scale, self.zero_point)


class _Layer(nn.Module):
    """A quantized layer on dequantized integers."""

    def __init__(self, layer: QuantLayer, path: str, activations: bool) -> None:
        super().__init__()
        self.layer, self.split = layer, layer.split
        self.acts = nn.ModuleList([_Act(q, path) for q in layer.act_quantizers] if activations else [])
        self.names: list[tuple[str, str, str]] = []
        for index, quantizer in enumerate(layer.weight_quantizers):
            zero = quantizer.zero_point.flatten()
            integers = quantizer.integers
            levels = 2**quantizer.n_bits - 1
            if bool(((zero >= 0) & (zero <= levels) & (zero == zero.round())).all()) and quantizer.n_bits <= 8:
                four = _FOUR_BITS if quantizer.n_bits == 4 else ""
                stored, stored_zero = integers.to(torch.uint8), zero.to(torch.uint8)
            else:
                four = ""
                shifted = integers.double() - quantizer.zero_point.double()
                if shifted.min() < -(2**15) or shifted.max() >= 2**15 or bool((shifted != shifted.round()).any()):
                    raise ConfigError(
                        f"{path}: integers less their zero points do not fit 16 bits: ONNX has no wider ones"
                    )
                dtype = torch.int8 if shifted.min() >= -128 and shifted.max() <= 127 else torch.int16
                stored, stored_zero = shifted.to(dtype), torch.zeros(len(zero), dtype=dtype)
            names = (f"integers{index}{four}", f"scale{index}", f"zero_point{index}{four}")
            for name, value in zip(names, (stored, quantizer.scale.flatten().float(), stored_zero), strict=True):
                self.register_buffer(name, value.clone())
            self.names.append(names)
        layer.drop_weight()

    def forward(self, x: Tensor) -> Tensor:
        weights = [torch.ops.qdiff.weight(*(getattr(self, name) for name in names)) for names in self.names]
        if not self.split:
            return self.layer.product(self.acts[0](x) if len(self.acts) else x, weights[0])
        parts = self.layer._parts(x)
        if len(self.acts):
            parts = [act(part) for act, part in zip(self.acts, parts, strict=True)]
        return self.layer.product(self.layer._join(parts), self.layer._join(weights))


class _Product(nn.Module):
    def __init__(self, product: QuantMatMul, path: str) -> None:
        super().__init__()
        self.first, self.second = (_Act(quantizer, path) for quantizer in product.act_quantizers)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.matmul(self.first(a), self.second(b))


def exportable(model: nn.Module) -> nn.Module:
    """A copy of a quantized network made of the operators that the export knows."""
    result = copy.deepcopy(model).eval()

    def replacement(path: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, QuantLayer):
            return _Layer(module, path, module.act_quantizer.enabled)
        return _Product(module, path) if isinstance(module, QuantMatMul) and module.act_quantizers[0].enabled else None

    replace_modules(result, replacement)
    return result


def export_onnx(
    path: str | Path,
    model: nn.Module,
    inputs: Sequence[Tensor],
    dynamic: Sequence[Mapping[int, str]] = (),
    output: str = "eps",
) -> None:
    """Write a quantized network as ONNX.

    Args:
        path: the file to write.
        model: the network, simulated.
        inputs: x [N, C, H, W], t [N] and, for a network with text, the context [N, L, D]: an example.
        dynamic: for each input the dimensions that may have any size, with their names; such a dimension needs at least 2 in the example.
            Nothing: the sizes of the example bind.
        output: the name of the output: what the network predicts.

    Raises:
        MissingExtra: onnx or onnxscript is not installed.
        ConfigError: time-step sets; widths or zero points that ONNX does not have.
    """
    require_extra("export", "onnx", "onnxscript")
    import onnx
    from onnxscript import opset21 as op

    def activation(x, scale, zero_point):
        return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero_point), scale, zero_point)

    def weight(integers, scale, zero_point):
        return op.DequantizeLinear(integers, scale, zero_point, axis=0)

    table = {torch.ops.qdiff.activation.default: activation, torch.ops.qdiff.weight.default: weight}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of that a dimension of two inputs has one name
        program = torch.onnx.export(
            exportable(model),
            tuple(inputs),
            dynamo=True,
            optimize=False,
            opset_version=OPSET,
            custom_translation_table=table,
            input_names=["x", "t", "context"][: len(inputs)],
            output_names=[output],
            dynamic_shapes=tuple(dict(axes) for axes in dynamic) or None,
            verbose=False,
        )
    proto = program.model_proto
    _pack_four_bits(proto)
    with atomic_write(path) as temporary:
        onnx.save(proto, str(temporary))
    onnx.checker.check_model(str(path))


def _pack_four_bits(proto) -> None:
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
