"""A pretended CUDA device with real numbers, on a build of PyTorch without CUDA.

A tensor "on cuda" is a wrapper whose device says cuda:0 and that holds a CPU tensor. Every operator is checked by the
rules of CUDA (all operands on one device, except for CPU scalars in pointwise operators, CPU indices and copies), then
run on the CPU tensors inside. So a mixture of devices raises, and synchronizations, copies between devices, launches,
the memory formats of convolutions and live memory are counted.

With `sizes_only` the tensors inside are on the meta device: nothing is computed, so full-size networks can be counted.
Every number that reaches the CPU is then 1, and `any` is false: nothing differs, and nothing is not a number.
"""

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Iterator

import torch
import torch._dynamo  # looks at the functions of torch.cuda, which must still be its own
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from ldm import unet

CUDA = torch.device("cuda", 0)
WAITS = {"_local_scalar_dense", "nonzero", "_unique2", "unique_dim", "masked_select", "unique_consecutive", "equal"}
TAKES_CPU_SCALARS = {"where", "fill_", "masked_fill", "masked_fill_", "full_like", "index_put_", "lerp", "lerp_"} | {
    f"{name}{end}"
    for name in ("clamp", "clamp_min", "clamp_max", "addcmul", "addcdiv", "_foreach_mul")
    for end in ("", "_")
}
INDEXED = {"index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"}
NO_LAUNCH = {
    *("detach", "alias", "_unsafe_view", "lift_fresh", "set_", "_reshape_alias"),
    *("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided"),
}


class DeviceMismatch(RuntimeError):
    """An operator of CUDA would have refused these operands."""


class Memory:
    """Live memory on the pretended device, in blocks of 512 bytes as PyTorch's allocator for CUDA hands them out.

    What the libraries of CUDA hold themselves (workspaces, kernels) and what fragmentation wastes is not counted.

    Attributes:
        live: bytes now.
        peak: the most bytes since `restart`.
        limit: bytes of the device; a block beyond it is out of memory.
    """

    BLOCK = 512

    def __init__(self) -> None:
        self.blocks: dict[int, int] = {}
        self.live = self.peak = 0
        self.limit: float = float("inf")

    def restart(self) -> None:
        """The peak begins again from here."""
        self.peak = self.live

    def hold(self, inner: Tensor) -> None:
        """Count the storage of a tensor until it is freed; views share one."""
        storage = inner.untyped_storage()
        key = storage._cdata
        if key in self.blocks:
            return
        size = -(-storage.nbytes() // self.BLOCK) * self.BLOCK
        if self.live + size > self.limit:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {size} bytes beyond {self.live} of {self.limit}")
        self.blocks[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.live -= self.blocks.pop(key)


MEMORY = Memory()


class Counts:
    """What was counted.

    Attributes:
        launches: of each operator.
        waits: what makes the CPU wait for the GPU, by (kind, place in the code).
        copies: from the CPU to the GPU without waiting.
        formats: of the outputs of convolutions.
        bytes: that launches read and write.
        sizes_only: tensors have no numbers.
    """

    def __init__(self) -> None:
        self.sizes_only = False
        self.reset()

    def reset(self) -> None:
        """Begin again."""
        self.launches: Counter[str] = Counter()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.formats: Counter[str] = Counter()
        self.copies = self.bytes = 0


COUNTS = Counts()


class Pretended(Tensor):
    """A tensor on the pretended device.

    Attributes:
        inner: the CPU tensor that holds its values.
    """

    inner: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Pretended":
        result = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            layout=inner.layout,
            device=CUDA,
            requires_grad=False,
        )
        result.inner = inner
        MEMORY.hold(inner)
        return result

    def __repr__(self) -> str:
        return f"Pretended({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})

    def record_stream(self, stream) -> None:
        """Nothing runs beside anything here."""

    def tolist(self):
        COUNTS.waits["read", _place()] += 1
        return _to_cpu(self.inner).tolist()

    def __format__(self, form: str) -> str:
        return format(self.item(), form) if self.dim() == 0 else object.__format__(self, form)


def _place() -> str:
    """File and function of the innermost frame of the project."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if "/torch/" not in name and name != __file__ and not name.startswith("<") and "contextlib" not in name:
            return f"{name.rsplit('/', 1)[-1]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


def _unwrap(x):
    if isinstance(x, Pretended):
        return x.inner
    return x.to("meta") if COUNTS.sizes_only and isinstance(x, Tensor) else x


def _on_cpu(x: Tensor) -> Tensor:
    return _to_cpu(x.inner) if isinstance(x, Pretended) else x


def _to_cpu(inner: Tensor) -> Tensor:
    """The numbers of a tensor on the CPU; ones if there are none, zeros for results of `any`."""
    if not inner.is_meta:
        return inner
    return torch.full(inner.shape, 0 if getattr(inner, "is_any", False) else 1, dtype=inner.dtype)


def _wrap(x):
    return Pretended(x) if isinstance(x, Tensor) and not isinstance(x, Pretended) else x


def _size(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _run(func, args: tuple, kwargs: dict):
    name = func._schema.name.split("::")[1]
    if name == "_to_copy":
        return _convert(func, args[0], kwargs)
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    here = [tensor for tensor in tensors if isinstance(tensor, Pretended)]
    if name == "copy_":
        return _copy(func, *args, **kwargs)
    target = kwargs.get("device")
    target = None if target is None else torch.device(target)
    if name == "_local_scalar_dense" and args[0].is_meta and not here:
        return func(_to_cpu(args[0]))  # memory of the CPU that is not counted
    if not here and (target is None or target.type != "cuda"):
        return func(*args, **{key: value for key, value in kwargs.items() if key != "pin_memory"})
    if target is not None and target.type == "cpu":
        return func(*tree_map(_unwrap, args), **kwargs)
    _check_devices(func, name, args, here, [tensor for tensor in tensors if not isinstance(tensor, Pretended)])
    masks = name in INDEXED and any(isinstance(i, Tensor) and i.dtype == torch.bool for i in args[1])
    if name in WAITS or masks or (name == "repeat_interleave" and len(args) == 1):
        COUNTS.waits["wait " + name, _place()] += 1
    named = {key: _unwrap(value) for key, value in kwargs.items() if key not in ("device", "pin_memory")}
    if name == "_local_scalar_dense":
        return func(_to_cpu(args[0].inner))
    if COUNTS.sizes_only and target is not None:
        named["device"] = "meta"
    if COUNTS.sizes_only and name.endswith("_") and torch.Tag.pointwise in func.tags and isinstance(args[0], Pretended):
        return _account(func, name, args, kwargs, here, args[0].inner)  # it would change nothing but numbers
    out = func(*_half_to_float(name, tree_map(_unwrap, args)), **tree_map(_unwrap, named))
    if COUNTS.sizes_only and name == "any":
        out.is_any = True
    return _account(func, name, args, kwargs, here, out)


def _half_to_float(name: str, args: tuple) -> tuple:
    """CUDA's softmax turns half precision to float32 in one launch, the CPU's cannot."""
    return (args[0].float(), args[1], False) if name == "_softmax" and len(args) > 2 and args[2] else args


def _convert(func, source: Tensor, kwargs: dict):
    """`to`: between devices and types."""
    target = torch.device(kwargs.get("device") or source.device)
    named = {key: value for key, value in kwargs.items() if key not in ("device", "non_blocking", "pin_memory")}
    to_cuda, from_cuda = target.type == "cuda", isinstance(source, Pretended)
    out = func(_on_cpu(source) if target.type == "cpu" else _unwrap(source), **named)
    _count_copy(to_cuda, from_cuda, kwargs.get("non_blocking", False), source, out)
    return _wrap(out) if to_cuda else out


def _copy(func, target: Tensor, source: Tensor, non_blocking: bool = False):
    if isinstance(target, Pretended):
        func(target.inner, _unwrap(source))
    else:
        func(target, _on_cpu(source))
    _count_copy(isinstance(target, Pretended), isinstance(source, Pretended), non_blocking, source, target)
    return target


def _count_copy(to_cuda: bool, from_cuda: bool, non_blocking: bool, source: Tensor, target: Tensor) -> None:
    if to_cuda and from_cuda:
        COUNTS.launches["copy"] += 1
        COUNTS.bytes += _size([source, target])
    elif to_cuda and non_blocking:
        COUNTS.copies += 1
    elif to_cuda or from_cuda:
        COUNTS.waits["copy to the GPU" if to_cuda else "copy to the CPU", _place()] += 1


def _check_devices(func, name: str, args: tuple, here: list[Tensor], elsewhere: list[Tensor]) -> None:
    """Raise where CUDA would."""
    if not here or not elsewhere:
        return
    if name in INDEXED:
        bad = here if not isinstance(args[0], Pretended) else []
        if not bad:
            COUNTS.waits["copy of an index", _place()] += 1
    else:
        scalars = torch.Tag.pointwise in func.tags or name in TAKES_CPU_SCALARS
        bad = [tensor for tensor in elsewhere if tensor.dim() > 0 or not scalars]
        if name.endswith("_") and isinstance(args[0], Tensor) and not isinstance(args[0], Pretended):
            bad = here  # a result of CUDA in a tensor of the CPU
    if bad:
        shapes = ", ".join(f"{tensor.device.type} {tuple(tensor.shape)}" for tensor in [*here, *elsewhere])
        raise DeviceMismatch(f"{name}: {shapes} at {_place()}")


def _account(func, name: str, args: tuple, kwargs: dict, here: list[Tensor], out):
    """Count a launch; outputs that alias an argument that was written are that argument."""
    if name == "convolution" and out.dim() == 4:
        out = _in_format(out, args[0].inner, args[1].inner)
    if func.namespace == "qdiff":
        from qdiff.engines.gpu.traffic import TRAFFIC

        traffic = TRAFFIC[name](*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs))
        COUNTS.launches[name] += traffic.launches
        COUNTS.bytes += traffic.distinct
    elif not func.is_view and name not in NO_LAUNCH:
        COUNTS.launches[name] += 1
        COUNTS.bytes += _size([*here, *(leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor))])
    written = {
        frozenset(argument.alias_info.before_set): args[i] if i < len(args) else kwargs.get(argument.name)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    }
    if not written:
        return tree_map(_wrap, out)
    returns = [
        written.get(frozenset(value.alias_info.before_set)) if value.alias_info is not None else None
        for value in func._schema.returns
    ]
    if not returns:
        return None
    if any(value is None for value in returns):
        return tree_map(_wrap, out)
    return returns[0] if len(returns) == 1 else tuple(returns)


def _in_format(out: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """cuDNN gives channels_last memory if the input or the weight has it, else contiguous memory."""
    last = any(
        tensor.is_contiguous(memory_format=torch.channels_last) and not tensor.is_contiguous() for tensor in (x, weight)
    )
    COUNTS.formats["channels_last" if last else "contiguous"] += 1
    return out.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


class _Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _run(func, args, kwargs or {})


def _free_and_total(*_args) -> tuple[int, int]:
    total = min(MEMORY.limit, 80 * 2**30)
    return int(total - MEMORY.live), int(total)


class _Stream:
    """A stream on which nothing waits."""

    def __init__(self, *_args) -> None:
        pass

    def wait_stream(self, other: "_Stream") -> None:
        """Nothing runs beside anything here."""


@contextlib.contextmanager
def pretended_cuda(sizes_only: bool = False, limit: float = float("inf")) -> Iterator[Counts]:
    """Inside, `cuda` is a device that works; what happens is counted from 0.

    Args:
        sizes_only: tensors have no numbers.
        limit: bytes of the device.
    """
    from torch.amp import autocast_mode
    from torch.cuda.amp import common

    def nothing(*_args, **_kwargs) -> int:
        return 0

    def true(*_args, **_kwargs) -> bool:
        return True

    patches = [
        (torch.cuda, "_lazy_init", nothing),
        (torch.cuda, "is_available", true),
        (torch.cuda, "device_count", lambda: 1),
        (torch.cuda, "is_bf16_supported", true),
        (torch.cuda, "is_current_stream_capturing", lambda: False),
        (torch.cuda, "get_device_capability", lambda *_: (7, 5)),
        (torch.cuda, "get_device_name", lambda *_: "pretended card"),
        *((torch.cuda, name, nothing) for name in ("empty_cache", "synchronize", "current_device", "set_device")),
        (torch.cuda, "memory_allocated", lambda *_: MEMORY.live),
        (torch.cuda, "max_memory_allocated", lambda *_: MEMORY.peak),
        (torch.cuda, "reset_peak_memory_stats", lambda *_: MEMORY.restart()),
        (torch.cuda, "Stream", _Stream),
        (torch.cuda, "stream", lambda _: contextlib.nullcontext()),
        (torch.cuda, "current_stream", _Stream),
        (torch.cuda, "mem_get_info", _free_and_total),
        (common, "amp_definitely_not_available", lambda: False),
        (autocast_mode, "amp_definitely_not_available", lambda: False),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches if hasattr(owner, name)]
    for owner, name, value in patches:
        if hasattr(owner, name):
            setattr(owner, name, value)
    overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    lift = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    COUNTS.reset()
    COUNTS.sizes_only, MEMORY.limit = sizes_only, MEMORY.live + limit
    MEMORY.restart()
    try:
        with torch.autograd.set_multithreading_enabled(False), _Mode():
            yield COUNTS
    finally:
        unet._FREQUENCIES.clear()  # tensors of this device, which may have no values
        COUNTS.sizes_only, MEMORY.limit = False, float("inf")
        torch._C._set_only_lift_cpu_tensors(lift)
        torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
        for owner, name, value in before:
            setattr(owner, name, value)
