"""CUDA graphs: the launches of a forward pass, recorded once for each shape and replayed.

A quantized network has hundreds of small launches, and the CPU needs longer to start them than a fast card to run them.
The sampler's own arithmetic stays outside. The kernels read the timestep group on the card, so one graph serves all
groups, unless a part of the network that is simulated has chosen its scales on the CPU.
"""

import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from qdiff.engines.gpu.card import first_line
from qdiff.engines.gpu.layers import GroupIndex, plain_result
from qdiff.engines.proxy import ModuleProxy
from qdiff.layers import has_own_behavior
from qdiff.model import act_quantizers, set_timesteps

log = logging.getLogger(__name__)

WARM_UP = 2  # passes before a recording: kernels are compiled and memory is found
MAX_GRAPHS = 8  # shapes of inputs that are recorded; others run eagerly


@contextlib.contextmanager
def _no_autocast_cache() -> Iterator[None]:
    """Weights that autocast converts during a recording lie in its memory, and must not be kept for later passes."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class Recording:
    """One recorded forward pass.

    Args:
        run: the forward pass; takes the tensors of the inputs, returns the tensors of the output.
        inputs: the tensors of the first inputs.
        pool: the memory that the recordings of a network share, which never run at the same time.
    """

    def __init__(self, run: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], pool: Any) -> None:
        self.inputs = [x.clone() for x in inputs]
        with torch.cuda.device(self.inputs[0].device), _no_autocast_cache():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    run(self.inputs)
            torch.cuda.current_stream().wait_stream(stream)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, pool=pool, stream=stream):
                self.outputs = run(self.inputs)

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Replay the pass on other inputs of the same shapes; the results are copies."""
        for mine, x in zip(self.inputs, inputs, strict=True):
            mine.copy_(x)
        self.graph.replay()
        return [y.clone() for y in self.outputs]


class GraphedNetwork(ModuleProxy):
    """A network whose forward passes are recorded and replayed.

    A pass that cannot be recorded runs eagerly from then on, after one line in the log.

    Args:
        network: the network that `to_integer` has prepared.
    """

    network: nn.Module
    proxied = "network"

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.index: GroupIndex = network.group_index  # type: ignore[assignment]  # `to_integer` has put it there
        self.quantizers = list(act_quantizers(network).values())
        self.recordings: dict[Any, Any] = {}
        self.pool: Any = None
        self.fails = False
        self.by_group = False  # whether each timestep group needs a recording of its own

    def _apply(self, fn: Callable, recurse: bool = True) -> Self:
        self.recordings = {}  # they read the memory that the network had
        return super()._apply(fn, recurse)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if self.index.groups is not None:
            set_timesteps(self.network, args, kwargs)
        leaves, structure = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        key = self._key(leaves, structure)
        if self.fails or key is None or self._is_hooked():
            return self.network(*args, **kwargs)
        if (key, self._group()) not in self.recordings:
            if len(self.recordings) >= MAX_GRAPHS:
                return self.network(*args, **kwargs)
            self.index.update()
            try:
                recorded = self._record(leaves, structure, tensors)
            except Exception as error:  # whatever a capture or a compiler raises, the pass also runs without a graph
                log.warning("engine: no CUDA graphs (%s)", first_line(error))
                self.fails, self.recordings = True, {}
                return self.network(*args, **kwargs)
            self.recordings[key, self._group()] = recorded
        recording, output = self.recordings[key, self._group()]
        self.index.update()
        return pytree.tree_unflatten(recording(tensors), output)

    def _group(self) -> int | None:
        """The current timestep group, if a recording serves that one alone."""
        groups = self.index.groups
        return groups.current if self.by_group and groups is not None and isinstance(groups.current, int) else None

    def _is_hooked(self) -> bool:
        """Whether the network has hooks besides ours, which a recording would not run."""
        ours = 1 + (self.index.groups is not None)
        return len(self.network._forward_pre_hooks) > ours or len(self.network._forward_hooks) > 1

    def _key(self, leaves: list[Any], structure: Any) -> Any:
        """What decides which recording serves these inputs; None: none can."""
        if torch.is_grad_enabled() or not self.index.is_one_group():
            return None
        parts: list[Any] = [torch.is_inference_mode_enabled(), *(quantizer.enabled for quantizer in self.quantizers)]
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                if leaf.device != self.index.index.device:
                    return None
                parts.append((tuple(leaf.shape), leaf.dtype))
            elif leaf is None or isinstance(leaf, bool | int | float | str):
                parts.append(leaf)
            else:
                return None
        kind = self.index.index.device.type
        autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        return (*parts, str(structure), autocast)

    def _record(self, leaves: list[Any], structure: Any, tensors: list[Tensor]) -> tuple[Any, Any]:
        """A recording, and the structure of its output."""
        inner = (module for module in self.network.modules() if module is not self.network)
        if any(has_own_behavior(module) for module in inner):
            raise RuntimeError("hooks inside the network")
        log.info("engine: recording a pass; kernels are compiled when they run for the first time, which takes minutes")
        found: list[Any] = []

        def run(inputs: list[Tensor]) -> list[Tensor]:
            fresh = iter(inputs)
            filled = [next(fresh) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            args, kwargs = pytree.tree_unflatten(filled, structure)
            output, shape = pytree.tree_flatten(plain_result(self.network.forward(*args, **kwargs)))
            if not all(isinstance(part, Tensor) for part in output):
                raise RuntimeError("the network returns more than tensors")
            found[:] = [shape]
            return output

        groups = self.index.groups
        picked = groups.picked if groups is not None else 0
        if self.pool is None and self.index.index.is_cuda:
            self.pool = torch.cuda.graph_pool_handle()
        recording = Recording(run, tensors, self.pool)
        self.by_group = self.by_group or (groups is not None and groups.picked > picked)
        return recording, found[0]
