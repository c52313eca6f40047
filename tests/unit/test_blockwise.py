"""Running a network unit by unit: the same numbers as whole passes, and each layer only once."""

import copy
import sys

import pytest
import torch
from torch import nn

from ddim.family import PIXEL
from qdiff.architecture import Architecture
from qdiff.calibration.blockwise import BlockwiseRunner
from qdiff.calibration.cache import Cache
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.trace import trace_execution
from qdiff.config import QuantConfig
from qdiff.errors import ConfigError
from qdiff.model import init_weights, quantize_model, units
from qdiff.utils.memory import halving, working_memory

CPU = torch.device("cpu")


def order_of(network, rows):
    wrapped = quantize_model(network, PIXEL, QuantConfig())
    return trace_execution(wrapped, units(wrapped, PIXEL), rows, CPU)


@torch.no_grad()
@pytest.mark.parametrize("budget", [None, 0])
def test_every_unit_sees_what_it_sees_in_a_whole_pass(network, rows, budget, tmp_path):
    order = order_of(network, rows)
    seen = {}
    handles = [
        network.get_submodule(unit).register_forward_hook(
            lambda _, args, out, unit=unit: seen.update({unit: (args, out)})
        )
        for unit in order.units
    ]
    final = network(*rows.inputs)
    for handle in handles:
        handle.remove()
    runner = BlockwiseRunner(network, order, rows, len(rows), CPU, Cache(budget, tmp_path))
    for unit in order.units:
        call, arguments = runner.arguments(unit)
        for found, expected in zip(arguments, seen[unit][0], strict=True):
            assert torch.equal(found.read(slice(None), CPU), expected)
        output = runner.finish(unit, call, arguments)
        assert torch.equal(output.read(slice(None), CPU), seen[unit][1])
    assert torch.equal(output.read(slice(None), CPU), final)
    assert not list(tmp_path.iterdir())  # mapped files have no names


def test_the_cost_of_a_calibration_is_linear_in_the_number_of_units(network, rows):
    """Whatever the number of units, a layer runs once for each batch of rows."""
    order = order_of(network, rows)
    runs = {path: 0 for path, module in network.named_modules() if isinstance(module, nn.Conv2d)}

    def counted(path, convolve):
        def run(*args):
            runs[path] += 1
            return convolve(*args)

        return run

    network = copy.deepcopy(network)
    for path in runs:
        module = network.get_submodule(path)
        module._conv_forward = counted(path, module._conv_forward)
    runner = BlockwiseRunner(network, order, rows, 16, CPU, Cache())
    for unit in order.units:
        runner.finish(unit)
    batches = -(-len(rows) // 16)
    # a convolution before a separate time projection inside a block runs once more, to reach that projection
    assert set(runs.values()) <= {batches, 2 * batches} and min(runs.values()) == batches


def test_outputs_are_dropped_when_no_unit_needs_them(network, rows):
    order = order_of(network, rows)
    cache = Cache()
    runner = BlockwiseRunner(network, order, rows, 16, CPU, cache)
    for unit in order.units:
        runner.finish(unit)
        assert cache.used <= order.peak_elements * len(rows) * 4
    runner.release()
    assert cache.used == 0 and not runner.stored


def test_calls_by_keyword_and_constants(tmp_path):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x, *, scale, shift=None):
            return self.inner(x) * scale[:, None] if shift is None else x

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Block()

        def forward(self, x, t):
            return self.block(x.relu_(), scale=t, shift=None).add_(1)

    net = Net().requires_grad_(False)
    rows = CalibrationData((torch.randn(5, 4), torch.rand(5)))
    order = trace_execution(net, ["block"], rows, CPU)
    runner = BlockwiseRunner(net, order, rows, 2, CPU, Cache(0, tmp_path))
    call, arguments = runner.arguments("block")
    expected = net.block(rows.inputs[0].relu(), scale=rows.inputs[1])
    assert torch.allclose(runner.finish("block", call, arguments).read(slice(None), CPU), expected)


def test_units_that_are_never_reached_are_all_named():
    net = nn.Module()
    net.a, net.b, net.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    net.forward = lambda x: net.b(x)
    with pytest.raises(RuntimeError, match=r"units never reached by a forward pass: a, c; .* among `keep`"):
        trace_execution(net, ["a", "b", "c"], CalibrationData((torch.randn(3, 4),)), CPU)


class InPlace(nn.Module):
    """Changes its input, what a unit returned, and what goes into a unit."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            [nn.Sequential(nn.SiLU(inplace=True), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(6)]
        )

    def forward(self, x, shift):
        x /= 2
        h = x
        for layer in self.layers:
            h = layer(h)
            h += shift
        return h


@torch.no_grad()
def test_operations_in_place_change_nothing_that_is_kept():
    torch.manual_seed(0)
    network, x = InPlace(), torch.randn(7, 4, 6, 6)
    rows = CalibrationData((x.clone(), torch.ones(7, 1, 1, 1)))
    order = trace_execution(network, [f"layers.{i}" for i in range(6)], rows, CPU)
    runner = BlockwiseRunner(network, order, rows, 3, CPU, Cache())
    for unit in order.units:
        call, arguments = runner.arguments(unit)
        for start in (0, 3):  # as the fit of a unit reads them, twice
            call(network.get_submodule(unit), [part.read(slice(start, start + 3), CPU) for part in arguments])
        output = runner.finish(unit, call, arguments)
    seen = []
    network.layers[5].register_forward_hook(lambda _, args, result: seen.append(result.clone()))
    network(x.clone(), torch.ones(7, 1, 1, 1))
    assert torch.equal(rows.inputs[0], x)
    assert torch.allclose(output.read(slice(0, 7), CPU), seen[0], rtol=1e-5, atol=1e-6)


def test_a_forward_of_a_module_s_own_is_kept():
    network = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    network[0].forward = lambda x: nn.functional.linear(x, network[0].weight) + 100
    rows = CalibrationData((torch.randn(4, 3),))
    order = trace_execution(network, ["0", "1"], rows, CPU)
    first = BlockwiseRunner(network, order, rows, 2, CPU, Cache()).finish("0")
    assert first.read(slice(0, 4), CPU).min() > 50
    assert network[0](torch.zeros(1, 3)).min() > 50


def test_a_network_that_returns_no_tensor_is_named_before_work():
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x):
            return {"mean": self.layer(x).mean(), "count": torch.arange(len(x))}

    with pytest.raises(TypeError, match=r"the network returns dict \(\(\), \(3,\)\) for 3 samples: expected"):
        trace_execution(Pair(), ["layer"], CalibrationData((torch.randn(4, 3),)), CPU)


def test_whole_trajectories_are_the_validation_split():
    trajectories = torch.arange(8).repeat(5)
    rows = CalibrationData((torch.randn(40, 2), torch.arange(40.0)), trajectories)
    found = rows.split(0.25, 3)
    assert found.train == range(30) and found.validation == range(30, 40)
    validates = set(found.trajectories[30:].tolist())
    assert len(validates) == 2 and not validates & set(found.trajectories[:30].tolist())
    assert sorted(found.inputs[1].tolist()) == list(range(40))
    assert torch.equal(trajectories[found.inputs[1].long()], found.trajectories)
    alone = CalibrationData((torch.randn(40, 2),)).split(0.25, 3)
    assert len(alone) == 40 and alone.train == range(30) and alone.validation == range(30, 40)


def test_too_little_room_is_an_error_before_work(tmp_path):
    with pytest.raises(ConfigError, match=r"GB free in .*take fewer samples"):
        Cache(0, tmp_path).check_space(10**18, 0)
    with pytest.raises(ConfigError, match=r"0.0 GB for activations and 1000000000.0 GB for its files"):
        Cache(0, tmp_path).check_space(1, 10**18)


def test_a_batch_halves_itself_where_memory_does_not_suffice():
    done = []

    def work(rows):
        if len(rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        done.append(list(rows))

    halving(work, range(10))
    assert [row for rows in done for row in rows] == list(range(10)) and max(map(len, done)) <= 3
    with pytest.raises(torch.OutOfMemoryError):
        halving(lambda rows: (_ for _ in ()).throw(torch.OutOfMemoryError()), range(2))
    with pytest.raises(ValueError, match="another"):
        halving(lambda rows: (_ for _ in ()).throw(ValueError("another")), range(2))


@pytest.mark.skipif(sys.platform != "linux", reason="memory of the CPU is measured on Linux")
def test_working_memory_is_what_the_work_held_at_its_peak():
    peaks: list[int] = []
    torch.ones(40_000_000)  # freed: hides nothing
    for size in (20_000_000, 5_000_000):
        with working_memory(torch.device("cpu"), peaks):
            torch.ones(size)
    pages = 1e6  # memory is counted in pages, and a few of the allocator's own come and go
    assert 80e6 - pages <= peaks[0] < 100e6 and 20e6 - pages <= peaks[1] < 40e6


def test_quantized_weights_do_not_disturb_the_plan(network, rows):
    wrapped = quantize_model(network, PIXEL, QuantConfig(weight_bit=4))
    init_weights(wrapped, "max")
    assert trace_execution(wrapped, units(wrapped, PIXEL), rows, CPU) == order_of(network, rows)


def test_an_unknown_family_of_blocks_needs_no_output_layer(network):
    architecture = Architecture("odd", make_unet=lambda _: network, blocks={type(network.mid.block_1): None})
    assert (
        architecture.output_layer("mid.block_1", network.mid.block_1) is None
        and architecture.output_layer("conv_in", network.conv_in) is network.conv_in
    )
