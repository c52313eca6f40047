"""Attention matmuls that a network computes by function calls: `scaled_dot_product_attention`, einsum, matmul, bmm.

A module whose forward pass makes such calls is an owner. In a quantized network its forward pass runs under a function
mode that knows the calls by their order and lets child modules compute the matmuls (`matmul_0`, `matmul_1`, ...). So
calibration, files and engines meet ordinary `QuantMatMul` modules. A call is rewritten as one or two matmuls of the
form [..., M, K] x [..., K, N], which an engine can compute on integers.
"""

import copy
import inspect
import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from qdiff.layers import MatMul, attend_sparingly

MatMulFunction = Callable[[Tensor, Tensor], Tensor]

SDPA = "scaled_dot_product_attention"
SLICE_BYTES = 2**28  # the largest tensor of attention probabilities that is in memory at a time

# {function: the kind of call}. A kind has one rewriting, see `rewrite`.
KINDS: dict[Callable, str] = {
    torch.matmul: "matmul",
    torch.linalg.matmul: "matmul",
    Tensor.matmul: "matmul",
    Tensor.__matmul__: "matmul",
    torch.bmm: "matmul",
    Tensor.bmm: "matmul",
    torch.mm: "matmul",
    Tensor.mm: "matmul",
    torch.baddbmm: "baddbmm",
    Tensor.baddbmm: "baddbmm",
    torch.einsum: "einsum",
    F.scaled_dot_product_attention: SDPA,
}


@dataclass(frozen=True)
class AttentionCall:
    """A function call that multiplies activations, as a traced forward pass made it.

    Attributes:
        name: the kind of call; for einsum followed by the equation.
        probabilities: for each of its matmuls the operand that holds attention probabilities: 0, 1, or None.
        reason: why it stays in full precision; empty: it can be quantized.
    """

    name: str
    probabilities: tuple[int | None, ...] = ()
    reason: str = ""


def call_name(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """The name of a call of one of `KINDS`, by which it is known again."""
    kind = KINDS[func]
    if kind != "einsum":
        return kind
    equation = args[0] if args else kwargs["equation"]
    return f"einsum {equation.replace(' ', '')}" if isinstance(equation, str) else "einsum"


def count_matmuls(name: str) -> int:
    """The number of matmuls of a call, by its name."""
    return 2 if name == SDPA else 1


def matmul_names(calls: Sequence[str]) -> list[tuple[str, ...]]:
    """For each call of an owner the attribute names of its matmuls: `matmul_0`, `matmul_1`, ... in order.

    Args:
        calls: the names of the calls, in order.
    """
    names: list[tuple[str, ...]] = []
    number = 0
    for call in calls:
        names.append(tuple(f"matmul_{number + i}" for i in range(count_matmuls(call))))
        number += count_matmuls(call)
    return names


# --- calls as matmuls -------------------------------------------------------------------------------


def rewrite(
    func: Callable, matmuls: Sequence[MatMulFunction], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Tensor:
    """Compute a call with other functions in the place of its matmuls.

    Args:
        func: one of `KINDS`.
        matmuls: compute the matmuls [..., M, K] x [..., K, N] of the call.
        args: the positional arguments of the call.
        kwargs: its keyword arguments.

    Raises:
        ValueError: the call has no such form.
    """
    return _REWRITINGS[KINDS[func]](matmuls, *args, **kwargs)


def _matmul(matmuls: Sequence[MatMulFunction], *args: Any, **kwargs: Any) -> Tensor:
    factors = [*args, *kwargs.values()]
    if len(factors) != 2 or not all(isinstance(factor, Tensor) and factor.dim() >= 2 for factor in factors):
        raise ValueError("not a product of two matrices")
    return matmuls[0](*factors)


def _baddbmm(
    matmuls: Sequence[MatMulFunction],
    input: Tensor,
    batch1: Tensor,
    batch2: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
) -> Tensor:
    product = matmuls[0](batch1, batch2)
    if alpha != 1:
        product = product * alpha
    return product + beta * input if beta else product  # with beta 0, `input` may be uninitialized memory


class WholeAttention(Protocol):
    """What an engine computes a whole attention with."""

    def takes(self, q: Tensor, k: Tensor) -> bool:
        """Whether it knows the form of these queries and keys, [N, T, heads, d] and [N, S, heads, d]."""
        ...

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, scale: float, operand_scale: float) -> Tensor:
        """See `qdiff.layers.fused_attention`."""
        ...


def _attention(
    matmuls: Sequence[MatMulFunction],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    core: WholeAttention | None = None,
) -> Tensor:
    """softmax(q k^T scale + mask) v, by `core` if it can; else in slices whose probabilities fit into SLICE_BYTES."""
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3) for part in (key, value))
    if is_causal:
        shape = (query.shape[-2], key.shape[-2])
        attn_mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril()
    query = query * (query.shape[-1] ** -0.5 if scale is None else scale)  # before the product: float16 ends at 65504
    if core is not None and attn_mask is None and not dropout_p:
        output = _attend_at_once(core, query, key, value)
        if output is not None:
            return output

    def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        probabilities = _probabilities(matmuls[0](q, k.transpose(-2, -1)), mask)
        return matmuls[1](F.dropout(probabilities, dropout_p) if dropout_p else probabilities, v)

    def sparingly(*parts: Tensor | None) -> Tensor:
        return attend(*parts) if dropout_p else attend_sparingly(attend, *parts)  # type: ignore[arg-type]  # q, k, v, mask

    size = _slice_size(query, key, value, matmuls)
    if size >= len(query):
        return sparingly(query, key, value, attn_mask)
    slices = []
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        sliced_mask = attn_mask is not None and attn_mask.dim() == query.dim() and len(attn_mask) > 1
        mask = attn_mask[part] if sliced_mask and attn_mask is not None else attn_mask
        slices.append(sparingly(query[part], key[part], value[part], mask))
    return torch.cat(slices)


def _attend_at_once(core: WholeAttention, query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """softmax(q k^T) v by an engine; None: it does not know the form of the operands."""
    shapes = [(*part.shape[:-2], part.shape[-1]) for part in (query, key, value)]
    if query.dim() not in (3, 4) or shapes.count(shapes[0]) != 3:
        return None
    heads = [part[:, None] if part.dim() == 3 else part for part in (query, key, value)]  # one head, or several
    q, k, v = (part.transpose(1, 2) for part in heads)
    return core(q, k, v, 1.0, 1.0).transpose(1, 2).reshape(query.shape) if core.takes(q, k) else None


def _probabilities(logits: Tensor, mask: Tensor | None) -> Tensor:
    """The softmax of masked logits; rows without a single key give 0, as in PyTorch's operator."""
    if mask is None:
        return torch.softmax(logits, dim=-1)
    logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    empty = (logits == -math.inf).all(dim=-1, keepdim=True)
    return torch.softmax(logits, dim=-1).masked_fill(empty, 0)


def _slice_size(query: Tensor, key: Tensor, value: Tensor, matmuls: Sequence[MatMulFunction]) -> int:
    """How many entries of the batch are attended to at once; all if that cannot be changed."""
    same = query.dim() >= 3 and len(query) == len(key) == len(value)
    if not same or any(getattr(matmul, "whole_batch", False) for matmul in matmuls):
        return len(query)
    bytes_per_entry = query[0, ..., 0].numel() * key.shape[-2] * query.element_size()
    return max(1, SLICE_BYTES // max(1, bytes_per_entry))


def _einsum(matmuls: Sequence[MatMulFunction], equation: Any, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or len(operands) != 2:
        raise ValueError("not a product of two matrices")
    a, b = operands
    form = _einsum_form(equation, a.dim(), b.dim())
    sizes = dict(zip(form.first, a.shape, strict=True)) | dict(zip(form.second, b.shape, strict=True))
    left = _arranged(a, form.first, form.batch, form.rows, form.inner)
    right = _arranged(b, form.second, form.batch, form.inner, form.columns)
    product = matmuls[0](left, right)
    product = product.reshape(*product.shape[:-2], *(sizes[index] for index in form.rows + form.columns))
    order = form.batch + form.rows + form.columns
    return product.permute([order.index(index) for index in form.output])


def _arranged(x: Tensor, indices: str, batch: str, rows: str, columns: str) -> Tensor:
    """`x` with its dimensions in the order batch, rows, columns; rows and columns are one dimension each."""
    x = x.permute([indices.index(index) for index in batch + rows + columns])
    if len(rows) == len(columns) == 1:
        return x
    ends = len(batch), len(batch) + len(rows)
    return x.reshape(*x.shape[: ends[0]], math.prod(x.shape[ends[0] : ends[1]]), math.prod(x.shape[ends[1] :]))


@dataclass(frozen=True)
class _EinsumForm:
    """The indices of an einsum that is a matmul: those of both operands and of the output, and what each is there."""

    first: str
    second: str
    output: str
    batch: str
    rows: str
    inner: str
    columns: str


@cache
def _einsum_form(equation: str, first_dims: int, second_dims: int) -> _EinsumForm:
    """Find the matmul in an equation of two operands with these numbers of dimensions.

    Raises:
        ValueError: it is none: an index is summed in one operand alone, or occurs twice in it.
    """
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    first, second = inputs.split(",")
    counts = [dims - len(part.replace("...", "")) for part, dims in ((first, first_dims), (second, second_dims))]
    # the dimensions of an ellipsis are named by digits, aligned at its end as broadcasting does
    ellipses = ["".join(str(number) for number in reversed(range(count))) for count in counts]
    widest = max(ellipses, key=len)
    first, second = (part.replace("...", digits) for part, digits in zip((first, second), ellipses, strict=True))
    if not arrow:
        letters = sorted(index for index in set(first + second) - set(widest) if (first + second).count(index) == 1)
        output = "..." + "".join(letters)
    output = output.replace("...", widest)
    batch = "".join(index for index in first if index in second and index in output)
    rows = "".join(index for index in first if index not in second and index in output)
    columns = "".join(index for index in second if index not in first and index in output)
    inner = "".join(index for index in first if index in second and index not in output)
    complete = len(batch + rows + inner) == len(first) and len(batch + inner + columns) == len(second)
    once = all(len(set(part)) == len(part) for part in (first, second, output))
    if not (complete and once and set(output) == set(batch + rows + columns)):
        raise ValueError("not a product of two matrices")
    return _EinsumForm(first, second, output, batch, rows, inner, columns)


_REWRITINGS: dict[str, Callable[..., Tensor]] = {
    "matmul": _matmul,
    "baddbmm": _baddbmm,
    "einsum": _einsum,
    SDPA: _attention,
}


# --- the forward pass of an owner -------------------------------------------------------------------


class AttentionForward:
    """The forward pass of an owner whose function calls are computed by its attention matmuls.

    It stands in the owner as the attribute `forward`. A copy of the network gets a copy that belongs to the copied
    owner. A forward pass may make the traced calls several times in a row, because networks compute large attentions
    in slices.

    Args:
        owner: the module.
        calls: the names of its calls in a forward pass, in order.
        path: its path in the network, for messages.

    Attributes:
        names: for each call the names of its matmuls.
        cores: what an engine computes a whole attention with, by the number of the call.

    Raises:
        RuntimeError: at run time, if the calls are not those that were traced.
    """

    def __init__(self, owner: nn.Module, calls: Sequence[str], path: str) -> None:
        self.owner, self.calls, self.path = owner, tuple(calls), path or "the network"
        # The forward pass as the network defines it: of the class, or the instance's own. It is no bound method,
        # because torch.compile cannot trace the binding.
        own: Callable[..., Any] | None = vars(owner).get("forward")
        self.function: Callable[..., Any] = own or type(owner).forward
        self.leading: tuple[nn.Module, ...] = () if own else (owner,)
        self.names = matmul_names(calls)
        self.cores: dict[int, WholeAttention] = {}

    @property
    def __code__(self) -> CodeType:
        return self.function.__code__  # `torch.export` looks there for the source of the network

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function.__get__(self.owner) if self.leading else self.function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = _Frame(self) if self._is_active() else None
        with _running(frame):
            output = self.function(*self.leading, *args, **kwargs)
        if frame is not None:
            frame.finish()
        return output

    def attentions(self) -> list[tuple[int, tuple[str, ...]]]:
        """The calls that are whole attentions: their numbers, and the names of their two matmuls."""
        return [(number, self.names[number]) for number, name in enumerate(self.calls) if name == SDPA]

    def matmuls(self, number: int) -> list[MatMulFunction]:
        """What computes the matmuls of a call: attention matmuls, or `torch.matmul` in full precision."""
        return [getattr(self.owner, name, torch.matmul) for name in self.names[number]]

    def _is_active(self) -> bool:
        """Whether a quantizer is on or observed. If none is, the network's own fused functions are faster."""
        children = [getattr(self.owner, name, None) for names in self.names for name in names]
        return any(_is_active(child) for child in children if child is not None)


def _is_active(matmul: nn.Module) -> bool:
    quantizers = getattr(matmul, "act_quantizers", None)  # an engine's form of a matmul may hold none
    return quantizers is None or any(q.enabled or q.observer is not None for q in quantizers)


class _Frame:
    """One forward pass of an owner: how many calls it has made."""

    def __init__(self, forward: AttentionForward) -> None:
        self.forward, self.made = forward, 0

    def call(self, func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Compute the next call."""
        calls, number = self.forward.calls, self.made % len(self.forward.calls)
        if (found := call_name(func, args, kwargs)) != calls[number]:
            raise RuntimeError(
                f"{self.forward.path}: calls {found}, expected {calls[number]} as in the forward pass that was traced"
            )
        self.made += 1
        matmuls = self.forward.matmuls(number)
        if all(matmul is torch.matmul for matmul in matmuls):
            return func(*args, **kwargs)
        if (core := self.forward.cores.get(number)) is not None:
            kwargs = {**kwargs, "core": core}
        return rewrite(func, matmuls, args, kwargs)

    def finish(self) -> None:
        """Check that every call has been made, or none."""
        if self.made % len(self.forward.calls):
            raise RuntimeError(
                f"{self.forward.path}: made {self.made} calls that multiply activations, expected "
                f"{', '.join(self.forward.calls)} as in the forward pass that was traced"
            )


class _CallsMode(TorchFunctionMode):
    """Hands the calls of the innermost owner that runs to its frame; None: they stay as they are."""

    def __init__(self, frame: _Frame | None) -> None:
        super().__init__()
        self.frame = frame

    def __torch_function__(
        self, func: Callable, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is Tensor.unflatten:  # torch.compile cannot trace its Python code
            return args[0].unflatten(*args[1:], **kwargs or {})
        if self.frame is None or func not in KINDS:
            return func(*args, **kwargs or {})
        return self.frame.call(func, args, kwargs or {})


class _Local(threading.local):
    mode: _CallsMode | None = None


_local = _Local()


@contextmanager
def _running(frame: _Frame | None) -> Iterator[None]:
    """Hand calls to `frame` inside the `with`, and not to the owner around it."""
    if (mode := _local.mode) is not None:
        outer, mode.frame = mode.frame, frame
        try:
            yield
        finally:
            mode.frame = outer
    elif frame is None:
        yield
    else:
        _local.mode = _CallsMode(frame)
        try:
            with _local.mode:
                yield
        finally:
            _local.mode = None


def add_matmuls(owner: nn.Module, path: str, calls: Sequence[str], matmuls: Mapping[str, nn.Module]) -> None:
    """Let attention matmuls compute the function calls of `owner`, in place.

    Args:
        owner: the module whose forward pass makes the calls.
        path: its path in the network.
        calls: the names of the calls, in order.
        matmuls: {attribute name: attention matmul}; calls without one stay in full precision.

    Raises:
        AttributeError: no call has a matmul of such a name, or the owner has another attribute of that name.
    """
    known = {name for names in matmul_names(calls) for name in names}
    for name, matmul in matmuls.items():
        if name not in known or hasattr(owner, name):
            raise AttributeError(f"{path or 'the network'} has no place for an attention matmul {name}")
        owner.add_module(name, matmul)
    owner.forward = AttentionForward(owner, calls, path)


def with_called_matmuls(model: nn.Module, quantized: nn.Module) -> nn.Module:
    """A full-precision network whose function calls are computed by modules, at the paths that `quantized` has them.

    Args:
        model: the full-precision network. It is not changed.
        quantized: its quantized form.

    Returns:
        A copy that shares its parameters with `model`; `model` itself if no function calls are quantized.
    """
    forwards = {path: vars(module).get("forward") for path, module in quantized.named_modules()}
    calls = {path: forward for path, forward in forwards.items() if isinstance(forward, AttentionForward)}
    if not calls:
        return model
    result = copy.deepcopy(model, {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]})
    for path, forward in calls.items():
        names = [name for names in forward.names for name in names if hasattr(forward.owner, name)]
        add_matmuls(result.get_submodule(path), path, forward.calls, {name: MatMul() for name in names})
    return result
