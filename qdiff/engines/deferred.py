"""Activations whose pointwise work is put off until a product or an addition needs them.

A network is written as norm, SiLU, convolution; run one by one each passes over the memory. A `DeferredTensor` tensor
only notes what is to be done, and the next quantization does all of it in one pass. Any other operation
gets the values, in channels_last memory; operations in place change the tensor itself (not through views of it).
The network's result is an ordinary tensor in contiguous memory (`plain_output`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.engines.cpu_kernels import ChannelsLastView

_no_override = torch._C.DisableTorchFunctionSubclass


@dataclass(frozen=True)
class Epilogue:
    """What is to be done: value + shift, then a * value + b, then SiLU. shift, a, b: [N, C]."""

    shift: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None
    silu: bool = False

    def affine(self) -> tuple[Tensor | None, Tensor | None]:
        """The shift and the affine map as one."""
        if self.shift is None:
            return self.a, self.b
        if self.a is None:
            return torch.ones_like(self.shift), self.shift.contiguous()
        return self.a, self.b + self.a * self.shift


class DeferredTensor(Tensor):
    """[N, C, H, W] in channels_last memory, float32 or bfloat16, with pending work."""

    rows: ChannelsLastView
    epilogue: Epilogue

    @staticmethod
    def of(view: Tensor, rows: ChannelsLastView, epilogue: Epilogue) -> "DeferredTensor":
        """`view` [N, C, H, W] gives the shape; the values are those of `rows` after the pending work."""
        deferred = torch.Tensor._make_subclass(DeferredTensor, view)
        deferred.rows, deferred.epilogue = rows, epilogue
        return deferred

    def then(self, epilogue: Epilogue) -> "DeferredTensor":
        with _no_override():
            return DeferredTensor.of(self.as_subclass(Tensor), self.rows, epilogue)

    def shape4(self) -> torch.Size:
        with _no_override():
            return self.shape

    def values(self, other: Tensor | None = None) -> Tensor:
        """The values as an ordinary tensor in channels_last memory; plus `other`."""
        n, c, h, w = self.shape4()
        a, b = self.epilogue.affine()
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(n, h * w, c)
        return self.rows.values(a, b, self.epilogue.silu, other).view(n, h, w, c).permute(0, 3, 1, 2)

    def read(self) -> Tensor:
        """The values, which the caller must not change: without a copy where nothing is to be done."""
        rows = self.rows
        if self.epilogue != Epilogue() or rows.coef is not None:
            return self.values()
        n, c, h, w = self.shape4()
        return rows.data.as_strided((n, c, h, w), (rows.pixels * rows.ld, 1, w * rows.ld, rows.ld))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _no_override():
                return func(*args, **kwargs)
        if _writes(func, kwargs):
            return _write(func, args, kwargs)
        if (rule := _RULES.get(func)) is not None and (result := rule(*args, **kwargs)) is not None:
            return result
        return _on_values(func, args, kwargs)


def _on_values(func: Callable, args: tuple, kwargs: dict) -> Any:
    plain = _read if func in _FRESH else _plain
    with _no_override():
        return func(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})


def _writes(func: Callable, kwargs: dict) -> bool:
    """Whether an operation writes into its first argument, or into `out`."""
    name = func.__name__.partition(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place or name in ("__setitem__", "__set__") or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
    )


def _write(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Run an operation that writes; a lazy tensor that it writes into holds the new values, with nothing pending."""
    target = args[0] if args else kwargs["input"]
    if kwargs.get("out") is not None:
        target = kwargs["out"]
    if not isinstance(target, DeferredTensor):
        return _on_values(func, args, kwargs)
    values = target.values()
    args = tuple(values if item is target else item for item in args)
    result = _on_values(func, args, {name: values if item is target else item for name, item in kwargs.items()})
    stored = deferred(values)
    if stored is None or values.shape != target.shape4():
        raise RuntimeError(
            f"{func.__name__}: shape and type of an activation between integer products cannot be changed in place"
        )
    target.rows, target.epilogue = stored.rows, stored.epilogue
    return target if result is values else result


def plain_output(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
    """Forward hook of a whole network: its result, a tensor or tensors in lists, tuples and dictionaries, as ordinary tensors."""
    if isinstance(output, Tensor):
        return _plain(output).contiguous()
    if isinstance(output, dict):
        for key, value in output.items():
            output[key] = plain_output(_module, _inputs, value)
    elif isinstance(output, list | tuple):
        items = [plain_output(_module, _inputs, item) for item in output]
        return output if all(new is old for new, old in zip(items, output, strict=True)) else _rebuilt(output, items)
    return output


def _rebuilt(old: list | tuple, items: list) -> list | tuple:
    return type(old)(*items) if hasattr(old, "_fields") else type(old)(items)


def _plain(value: Any, values: Callable[[DeferredTensor], Tensor] = DeferredTensor.values) -> Any:
    if isinstance(value, DeferredTensor):
        return values(value)
    if isinstance(value, list | tuple) and any(isinstance(item, DeferredTensor) for item in value):
        return _rebuilt(value, [_plain(item, values) for item in value])
    return value


def _read(value: Any) -> Any:
    return _plain(value, DeferredTensor.read)


def deferred(x: Tensor) -> DeferredTensor | None:
    """`x` as a lazy tensor without pending work; None where its form does not allow it."""
    if isinstance(x, DeferredTensor):
        return x
    x = x.float() if x.dtype == torch.float16 else x  # from a part that autocast ran
    if x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu" or x.numel() == 0:
        return None
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    return DeferredTensor.of(x, ChannelsLastView(x, n, h * w, c, c), Epilogue())


def group_norm(
    x: Tensor, groups: int, weight: Tensor | None = None, bias: Tensor | None = None, eps: float = 1e-5
) -> Tensor:
    """F.group_norm whose second pass is put off."""
    source = deferred(x)
    affine = weight is not None and bias is not None and source is not None and weight.numel() == source.shape4()[1]
    if not affine or source.epilogue.a is not None or source.epilogue.silu:
        return F.group_norm(_plain(x), groups, weight, bias, eps)
    if source.rows.data is x:  # the network's own tensor, which it may change before the values are formed
        part = (
            x.untyped_storage().nbytes() != x.numel() * x.element_size()
        )  # changes of the others would count as its own
        if part or x.is_inference():
            source = deferred(x.clone())
        else:
            source.rows.version = x._version
    shift = source.epilogue.shift
    mean, rstd = source.rows.stats(None if shift is None else shift.contiguous(), groups, eps)
    width = weight.numel() // groups
    a = rstd.repeat_interleave(width, dim=1) * weight.float()
    b = bias.float() - mean.repeat_interleave(width, dim=1) * a
    return source.then(replace(source.epilogue, a=a, b=b))


def _contiguous(func: Callable) -> Callable:
    """A rule: `func` of the values in contiguous memory, where networks expect them."""

    def rule(x: Tensor, *args: Any, **named: Any) -> Tensor:
        with _no_override():
            return func(_plain(x).contiguous(), *map(_plain, args), **named)

    return rule


def _silu(x: DeferredTensor, inplace: bool = False) -> DeferredTensor | None:
    return None if x.epilogue.silu else x.then(replace(x.epilogue, silu=True))


def _dropout(x: DeferredTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> DeferredTensor | None:
    return None if training else x


def _per_channel(value: Any, shape: torch.Size) -> Tensor | None:
    """`value` as [N, C] in float32 if it is one number for each image and channel."""
    if isinstance(value, Tensor) and not isinstance(value, DeferredTensor) and value.shape == (*shape[:2], 1, 1):
        return value.flatten(1).float()
    return None


def _add(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Tensor | None:
    if alpha != 1:
        return None
    x, other = (input, other) if isinstance(input, DeferredTensor) else (other, input)
    if not isinstance(other, Tensor):
        return None
    if (shift := _per_channel(other, x.shape4())) is not None and not x.epilogue.silu:
        if x.epilogue.a is not None:
            return x.then(replace(x.epilogue, b=x.epilogue.b + shift))
        return x.then(
            replace(x.epilogue, shift=shift.clone() if x.epilogue.shift is None else x.epilogue.shift + shift)
        )
    other = _read(other)
    if other.shape != x.shape4() or other.dtype not in (torch.float32, torch.bfloat16):
        return None
    return x.values(other.to(x.rows.data.dtype))


def _mul(input: Any, other: Any, *, out: None = None) -> Tensor | None:
    x, other = (input, other) if isinstance(input, DeferredTensor) else (other, input)
    scale = _per_channel(other, x.shape4())
    if scale is None or x.epilogue.silu or x.epilogue.a is None:
        return None
    return x.then(replace(x.epilogue, a=x.epilogue.a * scale, b=x.epilogue.b * scale))


_RULES: dict[Callable, Callable] = {
    F.silu: _silu,
    F.dropout: _dropout,
    F.group_norm: group_norm,
    Tensor.view: _contiguous(Tensor.view),
    Tensor.view_as: _contiguous(Tensor.view_as),
    torch.add: _add,
    Tensor.add: _add,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    torch.mul: _mul,
    Tensor.mul: _mul,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
}
_FRESH = {torch.cat, F.interpolate}  # what they give never shares memory with what they are given
_METADATA = {
    Tensor.shape.__get__,
    Tensor.dtype.__get__,
    Tensor.device.__get__,
    Tensor.ndim.__get__,
    Tensor.requires_grad.__get__,
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
}
