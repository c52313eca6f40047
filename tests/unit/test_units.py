"""Units of every form: several tensors in and out, several calls, tensors without samples, effects beside the output.

Every capture is compared with a whole pass of the network as it is at that time, while the units that are finished have
other weights than before.
"""

from collections import Counter, namedtuple
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import qdiff
from ddim.family import PIXEL
from qdiff.calibration.blockwise import BlockwiseRunner, comparable, output_rows
from qdiff.calibration.cache import Cache
from qdiff.calibration.collate import collate
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.trace import trace_execution
from qdiff.calls import named_leaves
from qdiff.config import QuantConfig
from qdiff.layers import QuantMatMul
from qdiff.model import quantize_model, units
from tests.support import tiny
from tests.support.foreign import QUICK

CPU = torch.device("cpu")


class Recorder:
    """The tensors that go into and come out of every call of a unit in whole passes, in order of the samples."""

    def __init__(self, network: nn.Module, unit: str, data: CalibrationData, batch: int) -> None:
        module, self.calls = network.get_submodule(unit), []
        handles = [
            module.register_forward_pre_hook(self.before, with_kwargs=True),
            module.register_forward_hook(self.after),
        ]
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[object] = []
        with torch.no_grad():
            for part in data.batches(batch):
                self.calls.append((part, [], []))
                data.run(network, slice(part.start, part.stop) if isinstance(part, range) else part, CPU)
        for handle in handles:
            handle.remove()

    def before(self, _, args, kwargs):
        self.calls[-1][1].append([leaf.clone() for _, leaf in named_leaves([args, kwargs]) if isinstance(leaf, Tensor)])

    def after(self, _, args, output):
        self.calls[-1][2].append(output)


def check(
    network: nn.Module, paths: Sequence[str], data: CalibrationData, batch: int = 3, left_out: Sequence[str] = ()
):
    """Go through all units; returns their order."""
    network.eval().requires_grad_(False)
    order = trace_execution(network, paths, data, CPU)
    assert set(order.left_out) == set(left_out)
    cache = Cache()
    runner = BlockwiseRunner(network, order, data, batch, CPU, cache)
    for unit in order.units:
        expected = Recorder(network, unit, data, batch)
        call, arguments = runner.arguments(unit)
        check_call(network, unit, call, arguments, expected)
        for parameter in network.get_submodule(unit).parameters():
            parameter.mul_(1.1)
        output = runner.finish(unit, call, arguments)
        again = call(network.get_submodule(unit), [x.read(slice(None), CPU) for x in arguments])
        assert torch.allclose(output.read(slice(None), CPU), again, atol=1e-5)
        for stored in arguments:
            stored.release()
        assert cache.used <= order.peak_elements * len(data) * 4
    runner.release()
    assert cache.used == 0
    return order


def check_call(network, unit, call, arguments, expected):
    for part, inputs, outputs in expected.calls:
        index = slice(part.start, part.stop) if isinstance(part, range) else part
        assert len(inputs) == len(call.forms)
        seen: list[list[Tensor]] = []
        handle = network.get_submodule(unit).register_forward_pre_hook(
            lambda _, args, kwargs, seen=seen: seen.append(
                [leaf.clone() for _, leaf in named_leaves([args, kwargs]) if isinstance(leaf, Tensor)]
            ),
            with_kwargs=True,
        )
        found = call(network.get_submodule(unit), [x.read(index, CPU) for x in arguments])
        handle.remove()
        for tensors, others in zip(seen, inputs, strict=True):
            assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(tensors, others, strict=True))
        rows = [output_rows(form, output) for form, output in zip(call.forms, outputs, strict=True)]
        assert torch.allclose(found, comparable(call.forms, rows), atol=1e-5)


def samples(count: int = 7, width: int = 8) -> CalibrationData:
    generator = torch.Generator().manual_seed(0)
    return CalibrationData((torch.randn(count, 4, width, generator=generator), torch.rand(count, generator=generator)))


class Layers(nn.Module):
    """Linear layers a, b, c, ..., used as `body` says."""

    def __init__(self, body, names="abc", width=8, **modules) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in names:
            setattr(self, name, nn.Linear(width, width))
        for name, module in modules.items():
            setattr(self, name, module)
        self.body = body

    def forward(self, x, t):
        return self.body(self, x, t[:, None, None])


def test_the_units_of_a_unet():
    network = tiny.unet()
    wrapped = quantize_model(network, PIXEL, QuantConfig())
    data = tiny.rows(network, steps=2, samples=4)
    check(network, units(wrapped, PIXEL), data, 3)


def test_a_layer_that_runs_several_times_is_one_unit():
    tied = Layers(lambda net, x, t: net.b(F.silu(net.a(F.silu(net.a(x + t))) + net.a(x))))
    order = check(tied, ["a", "b"], samples())
    assert order.units == ["a", "b"] and order.dependencies.calls == {"a": 3, "b": 1}


def test_first_and_last_layer_may_be_one():
    order = check(Layers(lambda net, x, t: net.a(net.c(F.silu(net.b(net.a(x) + t))))), "abc", samples())
    assert order.units == ["a", "b", "c"]


def test_calls_of_other_shapes_are_one_unit_too():
    net = Layers(lambda net, x, t: net.b(net.a(x) + net.a(x[:, :1] + t)))
    check(net, ["a", "b"], samples())


def test_a_network_that_runs_twice_for_guidance():
    def guided(net, x, t):
        return 3 * net.inner(x, t[:, 0, 0]) - 2 * net.inner(x, -t[:, 0, 0])

    runs = Counter()

    class Counted(nn.Linear):
        def forward(self, x):
            runs.update([self.name])
            return super().forward(x)

    layers = {name: Counted(8, 8) for name in "abc"}
    for name, layer in layers.items():
        layer.name = name
    inner = Layers(lambda net, x, t: net.c(F.silu(net.b(F.silu(net.a(x) + t))) + x), "", **layers)
    net, data = Layers(guided, "", inner=inner).requires_grad_(False), samples(6)
    order = trace_execution(net, ["inner.a", "inner.b", "inner.c"], data, CPU)
    runs.clear()
    runner = BlockwiseRunner(net, order, data, 3, CPU, Cache())
    for unit in order.units:
        runner.finish(unit)
    assert runs == {"a": 4, "b": 4, "c": 4}, "once for each call and batch"
    check(net, order.units, samples())


Pair = namedtuple("Pair", "first second")


@dataclass
class Streams:
    image: Tensor
    text: Tensor
    note: str = "note"


class Joint(nn.Module):
    """Two streams in, two streams out, in the containers that `make` makes."""

    def __init__(self, make) -> None:
        super().__init__()
        self.image, self.text, self.make = nn.Linear(8, 8), nn.Linear(8, 8), make

    def forward(self, streams, *, mask=None, scale=1.0):
        image, text = streams["image"], streams["text"][0]
        joint = torch.cat([self.image(image), self.text(text)], dim=1).tanh() * scale
        return self.make(image + joint[:, : image.shape[1]], text + 10 * joint[:, image.shape[1] :])


CONTAINERS = {
    "tuple": (lambda a, b: (a, b), lambda out: out),
    "list": (lambda a, b: [a, None, [b]], lambda out: (out[0], out[2][0])),
    "dict": (lambda a, b: {"a": a, "b": b, "count": len(a)}, lambda out: (out["a"], out["b"])),
    "named tuple": (Pair, lambda out: (out.first, out.second)),
    "dataclass": (Streams, lambda out: (out.image, out.text)),
}


@pytest.mark.parametrize("kind", CONTAINERS)
def test_blocks_with_several_tensors_in_and_out(kind):
    make, take = CONTAINERS[kind]

    def body(net, x, t):
        image, text = net.a(x), net.b(x[:, :2] + t)
        for block in net.blocks:
            image, text = take(block({"image": image, "text": [text]}, scale=0.5))
        return net.c(image) + text.mean(1, keepdim=True)

    net = Layers(body, blocks=nn.ModuleList(Joint(make) for _ in range(3)))
    order = check(net, ["a", "b", "c", "blocks.0", "blocks.1", "blocks.2"], samples())
    assert len(order.forms["blocks.1", 0].parts) == 2


def test_every_output_counts_in_the_comparison():
    net = Layers(
        lambda net, x, t: sum(net.block({"image": x, "text": [x]})), "", block=Joint(lambda a, b: (a, 1000 * b))
    )
    data = samples()
    order = trace_execution(net, ["block"], data, CPU)
    target = BlockwiseRunner(net, order, data, 3, CPU, Cache()).finish("block").read(slice(None), CPU)
    assert target.shape == (7, 64)
    first, second = target.square().mean(0).chunk(2)
    assert 0.3 < first.mean() < 3 and 0.3 < second.mean() < 3


class Gated(nn.Module):
    """A block of three layers and what lies between them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.gate, self.down = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.norm(x)
        return x + self.down(F.silu(self.gate(y)) * self.up(y))


def test_modules_whose_units_are_finished_do_not_run_again():
    runs = Counter()
    blocks = nn.ModuleList(nn.Sequential(Gated(), Gated()) for _ in range(4))
    for path, module in blocks.named_modules():
        if isinstance(module, nn.LayerNorm):
            module.register_forward_hook(lambda *_, path=path: runs.update([path]))

    def body(net, x, t):
        for block in net.blocks:
            x = block(x + t)
        return x

    net = Layers(body, "", blocks=blocks)
    data = samples(6)
    paths = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    order = trace_execution(net.requires_grad_(False), paths, data, CPU)
    runs.clear()
    runner = BlockwiseRunner(net, order, data, 6, CPU, Cache())
    for unit in order.units:
        runner.finish(unit)
    # once for each unit inside, and once more for the output of the module
    assert len(runs) == 8 and all(3 <= count <= 4 for count in runs.values())
    check(net, paths, samples())


class Skipping(nn.Module):
    """Blocks with effects beside their output: a list of shortcuts that they lengthen and shorten."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.ModuleList(Gated() for _ in range(3)), nn.ModuleList(Joined() for _ in range(3))
        self.head = nn.Linear(8, 8)

    def forward(self, x, t):
        shortcuts = []
        for block in self.down:
            shortcuts.append(x)
            x = block(x)
        for block in self.up:
            x = block(x, shortcuts)
        return self.head(x)


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, x, shortcuts):
        return self.second(F.silu(self.first(torch.cat([x, shortcuts.pop()], dim=-1))))


def test_modules_with_effects_beside_their_output_run_each_time():
    net = Skipping()
    layers = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    order = check(net, layers, samples())
    cached = {path for path, _ in order.dependencies.output} - set(layers)
    assert cached == {"down.0", "down.1", "down.2", "up.2"}, "nothing comes after the last shortcut"


def test_a_block_with_effects_beside_its_output_is_replaced_by_its_layers():
    wrapped = quantize_model(Skipping(), PIXEL, QuantConfig())
    blocks = ["down.0", "down.1", "down.2", "up.0", "up.1", "up.2", "head"]
    order = trace_execution(wrapped, blocks, samples(), CPU)
    inside = [f"up.{i}.{name}" for i in (0, 1) for name in ("first", "second")]
    assert order.units == [*blocks[:3], *inside, "up.2", "head"], "nothing comes after the last shortcut"
    assert not order.left_out


def test_a_block_that_changes_its_input_for_others_is_noticed():
    class Greedy(Gated):
        def forward(self, x):
            return super().forward(x.mul_(2))

    net = Layers(lambda net, x, t: net.a(net.block(h := net.b(x)) + h), block=Greedy())
    wrapped = quantize_model(net, PIXEL, QuantConfig())
    order = trace_execution(wrapped, ["a", "b", "block"], samples(), CPU)
    assert order.units == ["b", "block.gate", "block.up", "block.down", "a"]


def test_ways_without_a_gradient_are_followed():
    def body(net, x, t):
        h = net.a(x)
        with torch.no_grad():
            order = h.detach().sum(-1).argsort(dim=1)
        kept = torch.zeros_like(h)
        kept[:, 1:] = net.b(x)[:, 1:]
        return net.c(torch.take_along_dim(kept, order[..., None], 1)) + h.round()

    order = check(Layers(body), "abc", samples())
    assert order.dependencies.inputs["c", 0] == {("a", 0), ("b", 0)}


def test_layers_that_see_folded_samples():
    def windows(net, x, t):
        h = net.a(x.unflatten(1, (2, 2)).flatten(0, 1))  # [N * 2, 2, 8]
        return net.b(h.unflatten(0, (-1, 2)).flatten(1, 2) + t)

    def frames(net, x, t):
        h = net.a(x.unflatten(1, (2, 2)).transpose(0, 1).flatten(0, 1))  # [2 * N, 2, 8]
        return net.b(h.unflatten(0, (2, -1)).transpose(0, 1).flatten(1, 2) + t)

    def sequence(net, x, t):
        return net.b(net.a(x.transpose(0, 1)).transpose(0, 1) + t)  # [4, N, 8]

    found = []
    for body in (windows, frames, sequence):
        order = check(Layers(body), "ab", samples())
        found.append(order.forms["a", 0].inputs[0])
    assert [(axis.dim, axis.fold, axis.interleaved) for axis in found] == [(0, 2, False), (0, 2, True), (1, 1, False)]


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, count, table=None):
        assert len(x) == count
        h = self.inner(x).reshape(count, -1, 8)
        return h if table is None else h + table


def test_numbers_and_tables_beside_the_samples():
    table = torch.randn(4, 8)
    net = Layers(lambda net, x, t: net.b(net.block(x + t, len(x), table=table)), block=Scaled())
    check(net, ["block", "b"], samples())


def test_what_differs_between_batches_is_kept_for_each():
    def body(net, x, t):
        shift = t.amax().reshape(1)  # a tensor without samples, and a number, that the samples of a batch decide
        return net.b(net.block(x, float(shift), shift=shift))

    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, factor, shift):
            return self.inner(x) * factor + shift

    check(Layers(body, block=Shifted()), ["block", "b"], samples())


def test_layers_without_samples_are_left_out():
    table = torch.randn(4, 8)
    net = Layers(lambda net, x, t: net.b(x + net.a(table)) + t)
    order = check(net, "ab", samples(), left_out="a")
    assert order.units == ["b"]


def test_one_time_step_for_all_samples():
    class Timed(nn.Module):
        """Its block takes an embedding without samples."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.block, self.head = nn.Linear(1, 8), Modulated(), nn.Linear(8, 8)

        def forward(self, x, t):
            return self.head(self.block(x, self.embed(torch.as_tensor(t, dtype=x.dtype).reshape(1, 1))[:, None]))

    class Modulated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(8, 8)

        def forward(self, x, emb):
            assert emb.shape == (1, 1, 8)
            return self.inner(x) * emb

    x = torch.randn(10, 4, 8)
    calls = [(x[:4], 3.0), (x[4:8], 2.0), (x[8:], 1.0)]
    data = collate(calls, Timed()).split(0.3, 0)
    check(Timed(), ["embed", "block", "head"], data, left_out=["embed"])
    quantized = qdiff.quantize(Timed(), calls, blocks=[Modulated], **QUICK)
    assert quantized(*calls[0]).shape == (4, 4, 8)
    assert quantized.embed.quantized, "it is rounded to nearest"


def test_networks_with_such_units_are_quantized_by_one_call():
    def body(net, x, t):
        image, text = net.a(x), net.a(x[:, :2] + t)
        for block in net.blocks:
            image, text = block({"image": image, "text": [text]})
        return (net.c(image), text)

    net = Layers(body, "ac", blocks=nn.ModuleList(Joint(lambda a, b: (a, b)) for _ in range(2)))
    data = samples(12)
    quantized = qdiff.quantize(net, data.inputs, blocks=[Joint], **QUICK)
    found, expected = quantized(*data.inputs), net(*data.inputs)
    assert isinstance(found, tuple)
    for a, b in zip(found, expected, strict=True):
        assert 0 < (a - b).norm() < 0.05 * b.norm()


def test_calls_of_one_sample_and_one_time_step_each():
    class Attentive(nn.Module):
        """Takes one time step, and has attention, whose calls are counted."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)

        def forward(self, x, t):
            q, k, v = self.qkv(x + float(t)).chunk(3, dim=-1)
            return self.out(F.scaled_dot_product_attention(q, k, v))

    generator = torch.Generator().manual_seed(0)
    calls = [(torch.randn(1, 4, 8, generator=generator), torch.tensor(t / 10)) for t in range(8)]
    quantized = qdiff.quantize(Attentive(), calls, timestep_groups=2, **QUICK)
    matmuls = [path for path, module in quantized.named_modules() if isinstance(module, QuantMatMul)]
    assert matmuls == ["matmul_0", "matmul_1"]
    found, expected = quantized(*calls[3]), Attentive()(*calls[3])
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
