"""Activations of the CUDA engine whose pointwise work, and whose product itself, is deferred.

A product is launched when its result is needed. Until then a time embedding or a residual that the network adds becomes
part of the launch. `DeviceTensor` is the CPU engine's deferred tensor for images; `DeviceTokens` does the same for the
tokens of transformers, [..., C], with LayerNorm and GEGLU.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from qdiff.engines.cpu_kernels import Affine
from qdiff.engines.deferred import DeferredTensor, Epilogue, group_norm, writes
from qdiff.engines.gpu import launches
from qdiff.engines.proxy import Deferred, plain

_no_override = torch._C.DisableTorchFunctionSubclass

# launches a product; takes shift [N, OC] or None and residual [N, OH, OW, OC] or None, returns [N, OH, OW, OC]
Launch = Callable[[Tensor | None, Tensor | None], Tensor]


def placeholder(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """A tensor that shows shape and type of a result that does not exist yet; the device stands in its rows."""
    return torch.empty(shape, dtype=dtype, device="meta")


class DeviceRows:
    """Values that exist, or that a product will give.

    Args:
        data: the values [N, C, H, W], or [N, C, T], in any memory format; None: they do not exist yet.
        device: the card.
        launch: gives them; None: they exist.

    Attributes:
        version: the version counter of `data` when it was taken, if the network could change it in place; else None.
    """

    version: int | None = None

    def __init__(self, data: Tensor | None, device: torch.device, launch: Launch | None = None) -> None:
        self.data, self.device, self.launch = data, device, launch

    def plain(self) -> Tensor:
        """The values; they are kept."""
        if self.data is None:
            assert self.launch is not None
            self.data, self.launch = self.launch(None, None).permute(0, 3, 1, 2), None
        _check_version(self.data, self.version)
        return self.data


def _check_version(data: Tensor, version: int | None) -> None:
    """Refuse values that the network has changed since a normalization took them; None: they are not the network's."""
    if version is not None and data._version != version:
        raise RuntimeError(
            "an activation was changed in place between its normalization and the product after it: "
            "the integer engine cannot follow that, expected the engine `simulated`"
        )


class DeviceTensor(DeferredTensor):
    """A tensor [N, C, H, W] or [N, C, T] on the card, with deferred work."""

    rows: DeviceRows  # type: ignore[assignment]  # the operations on them are overridden
    dtypes = tuple(launches.DTYPES)

    @classmethod
    def wrap(cls, x: Tensor) -> Self | None:
        if x.dim() not in (3, 4) or x.dtype not in launches.DTYPES or x.numel() == 0:
            return None
        return cls.of(placeholder(x.shape, x.dtype), DeviceRows(x, x.device), Epilogue())

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in _PLACE:
            return _PLACE[func](args[0].rows.device)
        if func in _RESHAPES and not kwargs and (reshaped := args[0].reshaped(args[1:])) is not None:
            return reshaped
        if func in _ADDITIONS and len(args) == 2 and not kwargs:
            x, other = args if isinstance(args[0], DeviceTensor) else args[::-1]
            if (result := x.shifted(plain(other) if isinstance(other, DeviceTokens) else other)) is not None:
                return result
        return super().__torch_function__(func, types, args, kwargs)

    @property
    def awaits_product(self) -> bool:
        return self.rows.data is None and self.epilogue.affine is None and not self.epilogue.silu

    def shifted(self, value: Any) -> Tensor | None:
        """The sum of a product that is awaited and one number for each image and channel; None: it is no such sum."""
        shape = self.shape4()
        fits = isinstance(value, Tensor) and not isinstance(value, DeferredTensor)
        if not (fits and self.awaits_product and self.epilogue.is_empty and value.shape == (*shape[:2], 1, 1)):
            return None
        with _no_override():
            return self.wrap(self._launch(value.flatten(1), None))

    def reshaped(self, sizes: tuple) -> Self | None:
        """The same values where only the pixels have another shape; None: more changes."""
        shape = self.shape4()
        new = tuple(sizes[0]) if len(sizes) == 1 and isinstance(sizes[0], tuple | list) else sizes
        if tuple(new[:2]) != tuple(shape[:2]) or len(new) not in (3, 4) or not all(isinstance(n, int) for n in new):
            return None
        if -1 in new or prod(new) != prod(shape):
            return None
        with _no_override():
            return self.of(placeholder(new, self.dtype), self.rows, self.epilogue)

    def with_data(self) -> Self:
        """The same values, where the product has been launched and a shift been added."""
        shift = self.epilogue.shift
        if shift is None:
            self.rows.plain()
            return self
        with _no_override():
            if self.rows.data is None:
                data = self._launch(shift, None)
            else:
                data = self._reshape(self.rows.plain())
                data = data + shift.to(data.dtype).view(*shift.shape, *[1] * (data.dim() - 2))
            shown = placeholder(data.shape, data.dtype)
            return self.of(shown, DeviceRows(data, data.device), replace(self.epilogue, shift=None))

    def _launch(self, shift: Tensor | None, other: Tensor | None) -> Tensor:
        """The result of the product, which is not kept."""
        assert self.rows.launch is not None
        residual = None if other is None else _as_rows(other).contiguous()
        y = self.rows.launch(None if shift is None else shift.contiguous(), residual).permute(0, 3, 1, 2)
        return self._reshape(y)

    def _reshape(self, x: Tensor) -> Tensor:
        """Values of another shape of the pixels in the shape of this tensor; channels stay the fastest in memory."""
        shape = self.shape4()
        return x if x.shape == shape else x.flatten(2).unflatten(2, shape[2:])

    def normalization(self, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Affine:
        assert self.epilogue.shift is None  # `DeviceGroupNorm` has added it
        return launches.group_norm_map(_as_rows(self.rows.plain()), weight.float(), bias.float(), groups, eps)

    def values(self, other: Tensor | None = None) -> Tensor:
        with _no_override():
            epilogue = self.epilogue
            if self.awaits_product:
                return self._launch(epilogue.shift, other)
            x = self._reshape(self.rows.plain())
            shape = (*x.shape[:2], *[1] * (x.dim() - 2))
            y = x
            if (affine := epilogue.merged()) is not None:
                y = (y.float() * affine[0].view(shape) + affine[1].view(shape)).to(x.dtype)
            if epilogue.silu:
                y = F.silu(y)
            if other is not None:
                y = y + other
            return y.clone() if y is x else y

    def read(self) -> Tensor:
        if not self.epilogue.is_empty:
            return self.values()
        with _no_override():
            return self._reshape(self.rows.plain())

    def operand(self) -> tuple[Tensor, Affine | None, bool]:
        """What a quantization takes: values [N, 1, H, W, C], their affine map, and whether SiLU follows."""
        source = self.with_data()
        with _no_override():
            return (
                _as_rows(source._reshape(source.rows.plain()))[:, None],
                source.epilogue.merged(),
                source.epilogue.silu,
            )


_RESHAPES = {torch.reshape, Tensor.reshape, Tensor.view}
_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}
_PLACE: dict[Callable, Callable[[torch.device], Any]] = {
    getattr(Tensor, "device").__get__: lambda device: device,  # noqa: B009  # mypy takes it for a device
    getattr(Tensor, "is_cuda").__get__: lambda device: device.type == "cuda",  # noqa: B009
}


def _as_rows(x: Tensor) -> Tensor:
    """[N, C, H, W] or [N, C, T] as [N, H, W, C], without a copy."""
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x.transpose(1, 2)[:, None]


class DeviceGroupNorm(nn.GroupNorm):
    """A GroupNorm that defers its normalization. An existing GroupNorm becomes one by its class, with its hooks."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.with_data() if isinstance(x, DeviceTensor) else plain(x)
        return group_norm(x, self.num_groups, self.weight, self.bias, self.eps, DeviceTensor)


# --- tokens ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenWork:
    """Deferred work on tokens: a LayerNorm, or one of the steps of GEGLU.

    Attributes:
        norm: weight, bias and eps of a LayerNorm over the channels; None: no normalization.
        half: `value` or `gate`, the halves of a projection; `gelu`, the GELU of the gates; `geglu`, the values times
            that; empty: all channels.
        silu: whether SiLU is applied, without any other work.
    """

    norm: tuple[Tensor, Tensor, float] | None = None
    half: str = ""
    silu: bool = False


class TokenRows:
    """Tokens [..., C] that exist, or that a product will give; see `DeviceRows`."""

    def __init__(
        self, data: Tensor | None, shape: torch.Size, device: torch.device, launch: Launch | None = None
    ) -> None:
        self.data, self.shape, self.device, self.launch = data, shape, device, launch
        self.version = None if data is None or data.is_inference() else data._version

    def plain(self) -> Tensor:
        """The values; they are kept."""
        if self.data is None:
            assert self.launch is not None
            self.data, self.launch = self.launch(None, None).view(self.shape), None
        _check_version(self.data, self.version)
        return self.data


class DeviceTokens(Deferred, Tensor):
    """A tensor [..., C] on the card, with deferred work.

    Attributes:
        rows: the stored values.
        work: the work that turns them into the tensor's values.
    """

    rows: TokenRows
    work: TokenWork

    @staticmethod
    def of(rows: TokenRows, work: TokenWork, dtype: torch.dtype) -> "DeviceTokens":
        """Tokens with the values of `rows`, of this type, after `work`."""
        shape = (*rows.shape[:-1], rows.shape[-1] // 2) if work.half else tuple(rows.shape)
        result = torch.Tensor._make_subclass(DeviceTokens, placeholder(shape, dtype))
        result.rows, result.work = rows, work
        return result

    def values(self) -> Tensor:
        x = self.read()
        return x.clone() if x is self.rows.data else x

    def read(self) -> Tensor:
        with _no_override():
            x = self.rows.plain()
            if self.work.norm is not None:
                weight, bias, eps = self.work.norm
                return F.layer_norm(x.float(), weight.shape, weight.float(), bias.float(), eps).to(x.dtype)
            if not self.work.half:
                return F.silu(x) if self.work.silu else x
            value, gate = x.chunk(2, dim=-1)
            if self.work.half == "geglu":
                return value * F.gelu(gate)
            return value if self.work.half == "value" else gate if self.work.half == "gate" else F.gelu(gate)

    @classmethod
    def __torch_function__(cls, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in _PLACE:
            return _PLACE[func](args[0].rows.device)
        if func in _SHAPE:
            with _no_override():
                return func(*args, **kwargs)
        if writes(func, kwargs):
            return _write(func, args, kwargs)
        if (rule := _TOKEN_RULES.get(func)) is not None and (result := rule(*args, **kwargs)) is not None:
            return result
        with _no_override():
            return func(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})


def _write(func: Callable, args: tuple, kwargs: dict) -> Any:
    """Run an operation that writes into tokens; they then store the new values."""
    target = kwargs["out"] if kwargs.get("out") is not None else args[0] if args else kwargs["input"]
    if isinstance(target, DeviceTokens):
        values = target.values()
        target.rows, target.work = TokenRows(values, values.shape, values.device), TokenWork()
    with _no_override():
        result = func(*map(plain, args), **{name: plain(value) for name, value in kwargs.items()})
    if isinstance(target, DeviceTokens):
        target.rows.version = None  # the change is this one
        if target.rows.data is not None and target.rows.data.shape != target.shape:
            raise RuntimeError(f"{func.__name__}: the shape of an activation cannot be changed in place")
        return target if result is target.rows.data else result
    return result


def _chunk(input: DeviceTokens, chunks: int, dim: int = 0) -> tuple[DeviceTokens, DeviceTokens] | None:
    x = input
    if chunks != 2 or dim not in (-1, x.dim() - 1) or x.work != TokenWork() or x.shape[-1] % 2:
        return None
    first, second = (DeviceTokens.of(x.rows, TokenWork(half=half), x.dtype) for half in ("value", "gate"))
    return first, second


def _gelu(input: DeviceTokens, approximate: str = "none") -> DeviceTokens | None:
    x = input
    if x.work.half != "gate" or approximate != "none":
        return None
    return DeviceTokens.of(x.rows, TokenWork(half="gelu"), x.dtype)


def _silu(input: DeviceTokens, inplace: bool = False) -> DeviceTokens | None:
    x = input
    return None if x.work != TokenWork() or inplace else DeviceTokens.of(x.rows, TokenWork(silu=True), x.dtype)


def _mul(input: Any, other: Any, *, out: None = None) -> DeviceTokens | None:
    if not (isinstance(input, DeviceTokens) and isinstance(other, DeviceTokens) and input.rows is other.rows):
        return None
    if {input.work.half, other.work.half} != {"value", "gelu"}:
        return None
    return DeviceTokens.of(input.rows, TokenWork(half="geglu"), input.dtype)


def _add(input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Tensor | None:
    x, other = (input, other) if isinstance(input, DeviceTokens) and input.rows.data is None else (other, input)
    if not isinstance(x, DeviceTokens) or x.rows.data is not None or x.work != TokenWork() or alpha != 1:
        return None
    other = plain(other)
    if not isinstance(other, Tensor) or other.shape != x.shape or other.dtype not in launches.DTYPES:
        return None
    with _no_override():
        assert x.rows.launch is not None
        return x.rows.launch(None, other.contiguous().view(1, 1, -1, other.shape[-1])).view(x.shape)


def _dropout(input: DeviceTokens, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    return None if training else input


_TOKEN_RULES: dict[Callable, Callable] = {
    Tensor.chunk: _chunk,
    torch.chunk: _chunk,
    F.gelu: _gelu,
    F.silu: _silu,
    F.dropout: _dropout,
    Tensor.__add__: _add,
    Tensor.__radd__: _add,
    Tensor.add: _add,
    torch.add: _add,
    Tensor.__mul__: _mul,
    Tensor.__rmul__: _mul,
    Tensor.mul: _mul,
    torch.mul: _mul,
}
_SHAPE = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "requires_grad")),
    Tensor.dim,
    Tensor.size,
    Tensor.numel,
    Tensor.__len__,
    Tensor.is_floating_point,
}


class DeviceLayerNorm(nn.LayerNorm):
    """A LayerNorm over the channels that is deferred. An existing one becomes it by its class, with its hooks."""

    def forward(self, input: Tensor) -> Tensor:
        x = plain(input)
        if (
            len(self.normalized_shape) != 1
            or self.weight is None
            or self.bias is None
            or x.dtype not in launches.DTYPES
        ):
            return super().forward(x)
        rows = TokenRows(x, x.shape, x.device)
        return DeviceTokens.of(rows, TokenWork(norm=(self.weight, self.bias, self.eps)), x.dtype)
