"""Calibrations that are interrupted, damaged, or run by two processes; the Python call."""

import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import asdict, replace

import pytest
import torch
from torch import nn

import qdiff
from ddim.family import PIXEL
from qdiff.calibration.directory import MANIFEST, CalibrationDir, read_records
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.errors import ConfigError
from qdiff.layers import QuantConv2d, QuantLinear
from qdiff.model import enable_activations, quant_layers, quantize_model
from tests.support import commands, golden, tiny
from tests.support.foreign import INPUTS, QUICK, Denoiser, Residual

W4A8 = QuantConfig(weight_bit=4, quant_act=True, a_sym=True, split=True)
SHORT = CalibrationConfig(num_timesteps=4, samples=16, batch_size=8, iters=2, lr=1e-2, iters_a=2, iters_tune=2)


@pytest.fixture(scope="module")
def reference(network, rows, tmp_path_factory):
    """An uninterrupted calibration, and its folder."""
    folder = tmp_path_factory.mktemp("calibration")
    return Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(folder)).run().state_dict(), folder


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def cut(folder, target, lines):
    """A copy of a calibration of which only the first `lines` lines of the manifest were written."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    text = (target / MANIFEST).read_text().splitlines(keepends=True)
    (target / MANIFEST).write_text("".join(text[:lines]))
    return target


def written(folder):
    """When the file of each step was written."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("[0-9]*.safetensors")}


def kept(before, folder):
    """The number of steps, from the first on, whose files were used and not written again."""
    after = written(folder)
    same_files = [after[name] == time for name, time in sorted(before.items())]
    return same_files.index(False)


SLOW_LINES = [pytest.param(lines, marks=pytest.mark.slow) for lines in (1, 27, 29, 40)]


@pytest.mark.parametrize("lines", [9, 28, 54, 55, *SLOW_LINES])
def test_a_calibration_continues_with_the_same_bits(network, rows, reference, tmp_path, lines):
    state, folder = reference
    target = cut(folder, tmp_path / "cut", lines)
    found = (
        Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(target, cache_bytes=0))
        .run()
        .state_dict()
    )
    assert same(found, state)
    assert len(read_records(target / MANIFEST)) == len(read_records(folder / MANIFEST)) == 54


@pytest.mark.parametrize("change", [{"iters": 5}, {"seed": 1}, {"lr_a": 1.0}])
def test_changed_settings_are_refused_with_both_values(network, rows, reference, change):
    (name, value) = next(iter(change.items()))
    with pytest.raises(ConfigError, match=f"{name} is {value} now, but was {getattr(SHORT, name)}"):
        Calibration(network, PIXEL, W4A8, replace(SHORT, **change), rows, directory=CalibrationDir(reference[1])).run()


def test_a_calibration_of_another_version_of_the_recipe_is_refused(network, rows, reference, monkeypatch):
    monkeypatch.setattr("qdiff.calibration.run.RECIPE_VERSION", 1000)
    with pytest.raises(ConfigError, match="recipe_version is 1000 now, but was "):
        Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(reference[1])).run()


def test_other_weights_and_other_rows_are_refused(rows, network, reference):
    with pytest.raises(ConfigError, match="weights_sha256"):
        Calibration(tiny.unet(seed=1), PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(reference[1])).run()
    other = type(rows)((rows.inputs[0] + 1, rows.inputs[1]))
    with pytest.raises(ConfigError, match="rows_sha256"):
        Calibration(network, PIXEL, W4A8, SHORT, other, directory=CalibrationDir(reference[1])).run()


def test_damage_is_named_and_what_is_before_it_is_used(network, rows, reference, tmp_path, caplog):
    state, folder = reference
    target = cut(folder, tmp_path / "cut", 100)
    shard = target / "0020.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    before = written(target)
    assert same(
        Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(target)).run().state_dict(), state
    )
    assert "0020.safetensors" in caplog.text
    assert kept(before, target) == 20
    text = (target / MANIFEST).read_text().splitlines(keepends=True)
    (target / MANIFEST).write_text("".join([*text[:30], text[30][:-9] + "\n", *text[31:]]))
    before = written(target)
    assert same(
        Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(target)).run().state_dict(), state
    )
    assert "line 31" in caplog.text and kept(before, target) == 29


def test_unreadable_settings_are_an_error(network, rows, reference, tmp_path):
    target = cut(reference[1], tmp_path / "cut", 100)
    (target / MANIFEST).write_text("x" + (target / MANIFEST).read_text())
    with pytest.raises(ConfigError, match="line 1"):
        Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(target)).run()


def test_no_unit_ends_worse_than_it_began(reference):
    """Weights against nearest rounding, activations against the first scales, and the fine-tuning at the end."""
    steps = [entry for entry in read_records(reference[1] / MANIFEST) if "before" in entry]
    assert len(steps) == 26 + 26 + 1
    assert all(entry["after"] <= entry["before"] for entry in steps)


CALIBRATE = """
import torch, torch.distributed as dist
from pathlib import Path
from tests.support import tiny
from ddim.family import PIXEL
from qdiff.calibration.directory import CalibrationDir
from qdiff.calibration.run import Calibration
from qdiff.config import CalibrationConfig, QuantConfig
torch.set_num_threads(1)
if {world} > 1:
    dist.init_process_group("gloo")
network = tiny.unet()
quant, config, place = QuantConfig(**{quant}), CalibrationConfig(**{config}), CalibrationDir(Path({folder!r}))
model = Calibration(network, PIXEL, quant, config, tiny.rows(network), directory=place).run()
torch.save(model.state_dict(), {folder!r} + "/done.pt")
if {world} > 1:
    dist.barrier()
"""


def script(tmp_path, config, world=1, folder="calibration"):
    (tmp_path / folder).mkdir(exist_ok=True)
    path = tmp_path / f"{folder}.py"
    values = {"world": world, "quant": W4A8.to_dict(), "config": asdict(config), "folder": str(tmp_path / folder)}
    path.write_text(CALIBRATE.format(**values))
    return path


def killed_and_continued(tmp_path, reference, times, seed):
    """Kill -9 a calibration at random moments, `times` times, then let it finish; the state it ends with."""
    generator = torch.Generator().manual_seed(seed)
    path, folder = script(tmp_path, SHORT), tmp_path / "calibration"
    total = len(read_records(reference[1] / MANIFEST))
    for kill in range(times):
        process = subprocess.Popen([sys.executable, path], stderr=subprocess.DEVNULL)
        aim = total * (kill + torch.rand(1, generator=generator).item()) / times
        while process.poll() is None:
            manifest = folder / MANIFEST
            if manifest.is_file() and len(manifest.read_text().splitlines()) - 1 >= aim:
                time.sleep(torch.rand(1, generator=generator).item() * 0.1)
                break
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.wait()
    runpy.run_path(str(path))  # what a new process does
    return torch.load(folder / "done.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_kill_and_continue(tmp_path, reference):
    torch.set_num_threads(1)
    assert same(killed_and_continued(tmp_path, reference, 1, 0), reference[0])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_twenty_kills(tmp_path, reference):
    assert same(killed_and_continued(tmp_path, reference, 20, 1), reference[0])


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_calibrate_as_one(tmp_path):
    """The first loss and gradients agree, so does the first unit's result; both runs end alike."""
    config = replace(SHORT, iters=1, iters_a=0, iters_tune=0)
    for world in (1, 2):
        path = script(tmp_path, config, world, f"world{world}")
        command = commands.torchrun(world, path)
        subprocess.run(command, check=True, capture_output=True, timeout=300)
    one, two = (read_records(tmp_path / f"world{world}" / MANIFEST) for world in (1, 2))
    assert one[0]["losses"] == pytest.approx(two[0]["losses"], rel=1e-5)
    assert one[0]["after"] == pytest.approx(two[0]["after"], rel=1e-5)
    assert len(one) == len(two)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_end_within_the_spread_of_seeds(tmp_path, network, rows):
    """The validation error of a calibration by two processes lies within that of three seeds in one process."""
    data = rows.split(SHORT.validation_fraction, SHORT.seed)
    inputs = data[slice(data.validation.start, data.validation.stop)]

    def final(state):
        model = quantize_model(network, PIXEL, W4A8)
        model.load_state_dict(state, assign=True)
        for layer in quant_layers(model).values():
            layer.freeze()
        enable_activations(model, True)
        with torch.no_grad():
            return golden.relative_error(model(*inputs), network(*inputs))

    config = replace(SHORT, iters=200, iters_a=20, iters_tune=20)
    errors = {}
    for world, seeds in ((1, range(3)), (2, [0])):
        for seed in seeds:
            name = f"world{world}_{seed}"
            path = script(tmp_path, replace(config, seed=seed), world, name)
            command = commands.torchrun(world, path)
            subprocess.run(command, check=True, capture_output=True, timeout=600)
            errors[world, seed] = final(torch.load(tmp_path / name / "done.pt", weights_only=True))
    spread = [errors[1, seed] for seed in range(3)]
    print(f"one process {spread}, two {errors[2, 0]}")
    assert min(spread) <= errors[2, 0] <= max(spread)


GRADIENTS = """
import os
import sys
import torch
import torch.distributed as dist
from torch import nn
from qdiff.utils import distributed
from qdiff.calibration.reconstruct import UnitData

world = int(os.environ.get("WORLD_SIZE", "1"))
if world > 1:
    dist.init_process_group("gloo")
torch.manual_seed(0)
layer = nn.Linear(6, 5)
x, target = torch.randn(32, 6), torch.randn(32, 5)
data = UnitData(lambda index: ((x[index],), target[index]), range(28), range(28, 32), 9)
batch = data.random_batch(torch.Generator().manual_seed(0))
loss = data.add_gradients(layer, batch, 2.0, [layer.weight, layer.bias])
path = f"{sys.argv[1]}/{world}-{os.environ.get('RANK', '0')}.pt"
torch.save({"weight": layer.weight.grad, "bias": layer.bias.grad, "loss": loss}, path)
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.multiprocess
def test_gradients_of_two_processes_are_those_of_one(tmp_path, monkeypatch):
    """Each process takes its share of a batch; the sums, on both, are the gradients of the whole batch to 1e-5."""
    path = tmp_path / "gradients.py"
    path.write_text(GRADIENTS)
    monkeypatch.setattr(sys, "argv", [str(path), str(tmp_path)])
    runpy.run_path(str(path))  # one process: this one
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    common = {**os.environ, "MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    started = [
        subprocess.Popen([sys.executable, path, tmp_path], env={**common, "RANK": str(rank)}) for rank in range(2)
    ]
    try:
        assert [process.wait(300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()
    whole = torch.load(tmp_path / "1-0.pt", weights_only=True)
    for rank in range(2):
        found = torch.load(tmp_path / f"2-{rank}.pt", weights_only=True)
        assert found["loss"] == pytest.approx(whole["loss"], rel=1e-5)
        for name in ("weight", "bias"):
            assert golden.relative_error(found[name], whole[name]) < 1e-5


# --- the Python call ----------------------------------------------------------------------------


def test_any_network_is_quantized(tmp_path):
    torch.manual_seed(0)
    model = Denoiser().eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x, t = torch.randn(96, 3, 8, 8), torch.arange(96.0)
    recipe = {"iters": 60, "iters_a": 20, "iters_tune": 10, "batch_size": 16}
    quantized = qdiff.quantize(
        model, (x, t), weight_bit=4, blocks=[Residual], timestep_groups=2, folder=tmp_path, **recipe
    )
    assert all(isinstance(m, QuantConv2d | QuantLinear) for m in quantized.modules() if hasattr(m, "weight"))
    names = [entry["step"].split()[-1] for entry in read_records(tmp_path / MANIFEST)]
    assert names[:4] == ["stem", "blocks.0", "blocks.1", "head"]
    settings = {"rounding": "nearest", "policy_budget": 0.0, "smoothing": False, "iters_tune": 0}
    nearest = qdiff.quantize(model, (x, t), weight_bit=4, **settings)
    with torch.no_grad():
        target = model(x, t)
        assert golden.relative_error(quantized(x, t), target) < 0.8 * golden.relative_error(nearest(x, t), target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_layer_without_quantized_form_is_named_or_kept():
    with pytest.raises(TypeError, match=r'odd: Bilinear has no quantized form; keep=\["odd"\]'):
        qdiff.quantize(Denoiser(odd=True), INPUTS)
    model = Denoiser(odd=True)
    model.register_parameter("position", nn.Parameter(torch.ones(3, 8, 8)))
    quantized = qdiff.quantize(model, INPUTS, keep=[nn.Bilinear, "head"], **QUICK)
    assert type(quantized.head) is nn.Conv2d and torch.equal(quantized.head.weight, model.head.weight)
    assert isinstance(quantized.stem, QuantConv2d) and torch.equal(quantized.position, model.position)


def test_networks_that_read_their_layers_sizes():
    class Curious(Denoiser):
        def forward(self, x, t):
            assert self.stem.in_channels == x.shape[1] and self.stem.kernel_size == (3, 3)
            assert self.blocks[0].time.in_features == 8
            return super().forward(x, t)

    model = Curious()
    assert qdiff.quantize(model, INPUTS, **QUICK)(*INPUTS).shape == INPUTS[0].shape


def test_blocks_with_an_output_layer_and_layers_apart(tmp_path):
    """As the families of the package have them; and the report."""
    qdiff.quantize(Denoiser(), INPUTS, blocks={Residual: "second"}, separate=["time"], folder=tmp_path, **QUICK)
    names = [entry["step"].split()[-1] for entry in read_records(tmp_path / MANIFEST)]
    assert names[:6] == ["stem", "blocks.0.time", "blocks.0", "blocks.1.time", "blocks.1", "head"]
    assert {"layers.csv", "layers.png", "units.png"} <= {path.name for path in tmp_path.iterdir()}
    assert "blocks.1.second" in (tmp_path / "layers.csv").read_text()


def test_what_would_be_lost_is_named():
    model = Denoiser()
    model.stem.register_forward_hook(lambda module, args, output: output * 2)
    with pytest.raises(TypeError, match="stem: Conv2d has a hook or a `forward` of its own, which would be lost"):
        qdiff.quantize(model, INPUTS)
    for words, arguments, changes in (
        ("inputs of type Tensor: expected tensors by position", (Denoiser(), INPUTS[0]), {}),
        ("inputs: 0 holds values that are not finite", (Denoiser(), (INPUTS[0] / 0, INPUTS[1])), {}),
        ("model: expected an nn.Module, found function", (lambda x: x, INPUTS), {}),
        ("no layer that can be quantized", (nn.ReLU(), INPUTS[:1]), {}),
        ("separate: no layer whose path ends with tim", (Denoiser(), INPUTS), {"separate": ["tim"]}),
        (r"blocks: blocks\.0 \(Residual\) has no layer conv9", (Denoiser(), INPUTS), {"blocks": {Residual: "conv9"}}),
    ):
        with pytest.raises(ConfigError, match=words):
            qdiff.quantize(*arguments, **changes)
    with pytest.raises(ConfigError, match=r"blocks: outer\.1 \(Conv\) lies inside outer"):
        qdiff.quantize(Nested(), (torch.randn(4, 3, 8, 8),), blocks=[nn.Sequential, Conv])


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return self.conv(x)


class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.outer = nn.Sequential(nn.Conv2d(3, 3, 1), Conv())

    def forward(self, x):
        return self.outer(x)


def test_other_blocks_do_not_continue_a_calibration(tmp_path):
    qdiff.quantize(Denoiser(), INPUTS, blocks=[], folder=tmp_path, **QUICK)
    with pytest.raises(
        ConfigError, match=r"units is blocks\.0 now, but was blocks\.0\.first when this calibration began"
    ):
        torch.manual_seed(1)
        qdiff.quantize(Denoiser(), INPUTS, blocks=[Residual], folder=tmp_path, **QUICK)


def test_a_lost_line_of_the_manifest_is_noticed(tmp_path, network, rows, reference, caplog):
    folder = cut(reference[1], tmp_path / "cut", 1000)
    text = (folder / MANIFEST).read_text().splitlines(keepends=True)
    (folder / MANIFEST).write_text("".join(text[:30] + text[31:]))
    before = written(folder)
    again = Calibration(network, PIXEL, W4A8, SHORT, rows, directory=CalibrationDir(folder)).run().state_dict()
    assert "line 31" in caplog.text and kept(before, folder) == 29 and same(again, reference[0])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_bit": 1}, "weight_bit"),
        ({"act_bit": 0}, "act_bit"),
        ({"preset": "x"}, "preset"),
        ({"itres": 1}, "itres"),
        ({"samples": 8}, "samples"),
        ({"splits": {"no": 1}}, "no layer no"),
        ({"splits": {"blocks": 1}}, "no layer blocks"),
        ({"splits": {"head": 16}}, "head has 16 input channels"),
        ({"blocks": [nn.GELU]}, "no GELU"),
        ({"keep": [nn.GELU]}, "keep: no GELU"),
        ({"keep": ["tail"]}, "keep: no tail"),
        ({"timestep_groups": 2, "running_stat": True}, "running_stat"),
    ],
)
def test_wrong_settings_are_named(options, words):
    with pytest.raises(ConfigError, match=words):
        qdiff.quantize(Denoiser(), (torch.randn(4, 3, 8, 8), torch.arange(4.0)), **options)


def test_wrong_inputs_are_named():
    with pytest.raises(ConfigError, match="1 samples: expected 2 or more"):
        qdiff.quantize(Denoiser(), (torch.randn(1, 3, 8, 8), torch.zeros(1)))
    with pytest.raises(ConfigError, match="weight is float64: expected float32, bfloat16 or float16"):
        qdiff.quantize(Denoiser().double(), INPUTS)
    with pytest.raises(ConfigError, match="timestep_groups 2: expected the time steps"):
        qdiff.quantize(nn.Sequential(nn.Conv2d(3, 3, 1)), INPUTS[:1], timestep_groups=2)
    with torch.inference_mode(), pytest.raises(ConfigError, match="inference_mode"):
        qdiff.quantize(Denoiser(), INPUTS)


def test_a_network_may_hold_what_it_does_not_use(tmp_path):
    """A norm that never runs, and a buffer that two blocks share."""
    model = Denoiser()
    model.unused = nn.LayerNorm(3)
    table = torch.arange(5.0)
    for block in model.blocks:
        block.register_buffer("table", table)
    model.train()
    quantized = qdiff.quantize(
        model,
        (torch.randn(8, 3, 8, 8), torch.arange(8.0)),
        blocks=[Residual],
        folder=tmp_path,
        iters=1,
        iters_a=1,
        iters_tune=2,
    )
    assert torch.equal(quantized.blocks[1].table, table)
    assert model.training and all(p.requires_grad for p in model.parameters()), "the caller's network is as it was"
