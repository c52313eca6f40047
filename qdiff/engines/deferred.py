"""Activations whose pointwise work is deferred until a layer or an addition needs the values.

A network is written as norm, SiLU, convolution. Run one by one, each of these passes over the memory. A
`DeferredTensor` only records the pointwise work (its `Epilogue`), and the next input quantization does all of it in one
pass. Any other operation gets the values, in channels_last memory. Operations in place change the tensor itself, but
not through a view of it. The network's result is an ordinary tensor in contiguous memory (`plain_output`).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.engines.cpu_kernels import Affine, ChannelsLastView
from qdiff.engines.proxy import Deferred, plain, rebuilt

_no_override = torch._C.DisableTorchFunctionSubclass


@dataclass(frozen=True)
class Epilogue:
    """Deferred pointwise work: value + shift, then a * value + b, then SiLU.

    Attributes:
        shift: [N, C]; None: 0.
        affine: (a, b), [N, C] each; None: no affine map.
        silu: whether SiLU follows.
    """

    shift: Tensor | None = None
    affine: Affine | None = None
    silu: bool = False

    @property
    def is_empty(self) -> bool:
        """Whether there is no work to do."""
        return self.shift is None and self.affine is None and not self.silu

    def merged(self) -> Affine | None:
        """The shift and the affine map as one affine map."""
        if self.shift is None:
            return self.affine
        if self.affine is None:
            return torch.ones_like(self.shift), self.shift.contiguous()
        a, b = self.affine
        return a, b + a * self.shift


class DeferredTensor(Deferred, Tensor):
    """A tensor [N, C, H, W] in channels_last memory, float32 or bfloat16, with deferred work.

    Attributes:
        rows: the stored values.
        epilogue: the work that turns them into the tensor's values.
    """

    rows: ChannelsLastView
    epilogue: Epilogue
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # of what can be added to it

    @classmethod
    def of(cls, view: Tensor, rows: Any, epilogue: Epilogue) -> Self:
        """Make a deferred tensor with the shape of `view` [N, C, H, W] and the values of `rows` after `epilogue`."""
        result = torch.Tensor._make_subclass(cls, view)
        result.rows, result.epilogue = rows, epilogue
        return result

    @classmethod
    def wrap(cls, x: Tensor) -> Self | None:
        """An ordinary tensor as a deferred one; None if shape, type or device do not allow it."""
        x = x.float() if x.dtype == torch.float16 else x  # from a part of the network under autocast
        if x.dim() != 4 or x.dtype not in (torch.float32, torch.bfloat16) or x.device.type != "cpu" or x.numel() == 0:
            return None
        x = x.contiguous(memory_format=torch.channels_last)
        n, c, h, w = x.shape
        return cls.of(x, ChannelsLastView(x, n, h * w, c, c), Epilogue())

    @property
    def awaits_product(self) -> bool:
        """Whether the stored values do not exist yet, and what is added to them costs nothing."""
        return False

    def then(self, epilogue: Epilogue) -> Self:
        """The same stored values with another epilogue."""
        with _no_override():
            return self.of(self.as_subclass(Tensor), self.rows, epilogue)

    def normalization(self, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Affine:
        """The affine map that a GroupNorm of the values, which have no deferred work but a shift, amounts to."""
        shift = self.epilogue.shift
        mean, rstd = self.rows.stats(None if shift is None else shift.contiguous(), groups, eps)
        width = weight.numel() // groups
        a = rstd.repeat_interleave(width, dim=1) * weight.float()
        return a, bias.float() - mean.repeat_interleave(width, dim=1) * a

    def shape4(self) -> torch.Size:
        """The shape [N, C, H, W]."""
        with _no_override():
            return self.shape

    def values(self, other: Tensor | None = None) -> Tensor:
        """Do the deferred work.

        Args:
            other: [N, C, H, W] in the type of this tensor, added to the result; None: nothing is added.

        Returns:
            A new ordinary tensor in channels_last memory.
        """
        n, c, h, w = self.shape4()
        if other is not None:
            other = other.contiguous(memory_format=torch.channels_last).permute(0, 2, 3, 1).view(n, h * w, c)
        values = self.rows.values(self.epilogue.merged(), self.epilogue.silu, other)
        return values.view(n, h, w, c).permute(0, 3, 1, 2)

    def read(self) -> Tensor:
        """The values, which the caller must not change: they are not copied if there is no work to do."""
        rows = self.rows
        if not self.epilogue.is_empty or rows.correction is not None:
            return self.values()
        n, c, h, w = self.shape4()
        return rows.data.as_strided((n, c, h, w), (rows.pixels * rows.ld, 1, w * rows.ld, rows.ld))

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with _no_override():
                return func(*args, **kwargs)
        if writes(func, kwargs):
            return _write(func, args, kwargs)
        if (rule := _RULES.get(func)) is not None and (result := rule(*args, **kwargs)) is not None:
            return result
        return _on_values(func, args, kwargs)


def _on_values(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Run an operation on the values of its deferred arguments."""
    copy = func not in _FRESH
    with _no_override():
        return func(*(plain(item, copy) for item in args), **{name: plain(item, copy) for name, item in kwargs.items()})


def writes(func: Callable, kwargs: dict) -> bool:
    """Whether an operation writes into its first argument, or into `out`."""
    name = func.__name__.partition(".")[0]
    in_place = name.endswith("_") and not name.endswith("__")
    return (
        in_place or name in ("__setitem__", "__set__") or bool(kwargs.get("inplace")) or kwargs.get("out") is not None
    )


def _write(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Run an operation that writes. A deferred tensor that it writes into then stores the new values."""
    target = args[0] if args else kwargs["input"]
    if kwargs.get("out") is not None:
        target = kwargs["out"]
    if not isinstance(target, DeferredTensor):
        return _on_values(func, args, kwargs)
    values = target.values()
    args = tuple(values if item is target else item for item in args)
    result = _on_values(func, args, {name: values if item is target else item for name, item in kwargs.items()})
    stored = deferred(values, type(target))
    if stored is None or values.shape != target.shape4():
        raise RuntimeError(
            f"{func.__name__}: shape and type of an activation between integer products cannot be changed in place"
        )
    target.rows, target.epilogue = stored.rows, stored.epilogue
    return target if result is values else result


def plain_output(_module: nn.Module, _inputs: tuple, output: Any) -> Any:
    """Forward hook of a whole network that makes its results ordinary tensors.

    Args:
        output: a tensor, or tensors in nested lists, tuples and dictionaries.
    """
    if isinstance(output, Tensor):
        return _plain(output).contiguous()
    if isinstance(output, dict):
        for key, value in output.items():
            output[key] = plain_output(_module, _inputs, value)
    elif isinstance(output, list | tuple):
        items = [plain_output(_module, _inputs, item) for item in output]
        return output if all(new is old for new, old in zip(items, output, strict=True)) else rebuilt(output, items)
    return output


def _plain(value: Any) -> Any:
    """New tensors in the place of deferred ones."""
    return plain(value, copy=True)


def deferred(x: Tensor, kind: type[DeferredTensor] = DeferredTensor) -> DeferredTensor | None:
    """Make `x` a deferred tensor with an empty epilogue; None if shape, type or device do not allow it."""
    return x if isinstance(x, DeferredTensor) else kind.wrap(x)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    kind: type[DeferredTensor] = DeferredTensor,
) -> Tensor:
    """`F.group_norm` that computes the statistics now and defers the normalization.

    Args:
        x: [N, C, H, W].
        groups: the number of groups.
        weight: [C].
        bias: [C].
        eps: added to the variance.
        kind: what an ordinary tensor becomes.
    """
    source = deferred(x, kind)
    if (
        source is None
        or weight is None
        or bias is None
        or weight.numel() != source.shape4()[1]
        or source.epilogue.affine is not None
        or source.epilogue.silu
    ):
        return F.group_norm(_plain(x), groups, weight, bias, eps)
    if source.rows.data is x:  # the network's own tensor, which the network may change before the values are computed
        # a change of other parts of the storage would count as a change of this one
        part = x.untyped_storage().nbytes() != x.numel() * x.element_size()
        if part or x.is_inference():
            source = deferred(x.clone(), kind)
            assert source is not None  # the clone has the same shape, type and device
        else:
            source.rows.version = x._version
    return source.then(replace(source.epilogue, affine=source.normalization(groups, weight, bias, eps)))


def _contiguous(func: Callable) -> Callable:
    """Make a rule that runs `func` on the values in contiguous memory, where networks expect them."""

    def rule(x: Tensor, *args: Any, **named: Any) -> Tensor:
        with _no_override():
            return func(_plain(x).contiguous(), *map(_plain, args), **named)

    return rule


def _conv2d(*args: Any, **named: Any) -> Tensor:
    """A convolution in full precision. Its result can be viewed like that of a quantized one, see `_contiguous`."""
    y: Tensor = _on_values(F.conv2d, args, named)
    x = args[0] if args else named["input"]
    result = deferred(y, type(x)) if isinstance(x, DeferredTensor) else None
    return y if result is None else result


def _silu(x: DeferredTensor, inplace: bool = False) -> DeferredTensor | None:
    return None if x.epilogue.silu else x.then(replace(x.epilogue, silu=True))


def _dropout(x: DeferredTensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> DeferredTensor | None:
    return None if training else x


def _per_channel(value: Any, shape: torch.Size) -> Tensor | None:
    """`value` as float32 [N, C] if it is one number for each image and channel, else None."""
    if isinstance(value, Tensor) and not isinstance(value, DeferredTensor) and value.shape == (*shape[:2], 1, 1):
        return value.flatten(1).float()
    return None


def _add(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Tensor | None:
    if alpha != 1:
        return None
    x, other = (input, other) if isinstance(input, DeferredTensor) else (other, input)
    if not isinstance(other, Tensor):
        return None
    if isinstance(other, DeferredTensor) and other.awaits_product:
        x, other = other, x  # the addition becomes part of the product
    epilogue: Epilogue = x.epilogue
    if (shift := _per_channel(other, x.shape4())) is not None and not epilogue.silu:
        if epilogue.affine is not None:
            a, b = epilogue.affine
            return x.then(replace(epilogue, affine=(a, b + shift)))
        return x.then(replace(epilogue, shift=shift.clone() if epilogue.shift is None else epilogue.shift + shift))
    other = plain(other)
    if other.shape != x.shape4() or other.dtype not in x.dtypes:
        return None
    return x.values(other.to(x.dtype))


def _mul(input: Any, other: Any, *, out: None = None) -> Tensor | None:
    x, other = (input, other) if isinstance(input, DeferredTensor) else (other, input)
    factor = _per_channel(other, x.shape4())
    epilogue: Epilogue = x.epilogue
    if factor is None or epilogue.silu or epilogue.affine is None:
        return None
    a, b = epilogue.affine
    return x.then(replace(epilogue, affine=(a * factor, b * factor)))


# Operations that extend the epilogue or need their input in another layout. A rule returns None if it does not apply.
_RULES: dict[Callable, Callable] = {
    F.conv2d: _conv2d,
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
_FRESH = {torch.cat, F.conv2d, F.interpolate}  # operations whose result never shares memory with their arguments
_METADATA = {  # what a tensor can answer without its values
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad")),
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
}
