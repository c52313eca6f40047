"""The Python API: `save` and `load`, families of other packages, errors that name arguments, new scale rules."""

import copy
import json
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import qdiff
from ddim.family import PIXEL, unet_config_dict
from qdiff import architecture
from qdiff.architecture import Architecture, AttentionMatMulSpec, family_names, find_architecture, register_family
from qdiff.calibration import ranges
from qdiff.calibration.data import CalibrationData
from qdiff.calibration.ranges import init_activation_ranges
from qdiff.checkpoint import PackedFile, PackedInfo, save_packed, save_published
from qdiff.config import CalibrationConfig, QuantConfig
from qdiff.engines.cpu import to_integer
from qdiff.errors import CheckpointError, ConfigError, WriteError
from qdiff.layers import MatMul
from qdiff.model import act_quantizers, init_weights, quant_layers, quantize_model
from qdiff.quantizers import qparams_from_range
from qdiff.scale_rules import SCALE_RULES
from tests.support import commands, quantized, tiny
from tests.support.foreign import QUICK

FROZEN = Path(__file__).parent / "frozen"
CPU = torch.device("cpu")


class Attention(nn.Module):
    """A foreign attention block whose matmuls are modules. It computes one head after the other, in slices."""

    def __init__(self, width, heads=2):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Conv1d(width, 3 * width, 1), nn.Conv1d(width, width, 1)
        self.qk, self.av = MatMul(), MatMul()

    def forward(self, x):
        q, k, v = self.qkv(x.flatten(2)).unflatten(1, (3, self.heads, -1)).unbind(1)
        results = []
        for head in range(self.heads):
            weights = torch.softmax(self.qk(q[:, head].transpose(1, 2), k[:, head]), dim=-1)
            results.append(self.av(v[:, head], weights.transpose(1, 2)))
        return x + self.out(torch.cat(results, dim=1)).view_as(x)


class Network(nn.Module):
    """A foreign network with everything that a file must give back."""

    def __init__(self, width=8, kernel=3, joins=True, tied=False):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, kernel, padding="same")
        self.norm, self.last_norm, self.time = nn.BatchNorm2d(width), nn.BatchNorm2d(width), nn.Linear(4, width)
        self.position = nn.Parameter(torch.randn(1, width, 1, 1))
        self.attention = Attention(width)
        self.join = nn.Conv2d(2 * width, width, 1) if joins else nn.Identity()
        for norm in (self.norm, self.last_norm):  # weights and statistics of a network that was trained
            norm.weight.data.uniform_(0.5, 2)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            norm.num_batches_tracked.fill_(7)
        if tied:
            self.last_norm.weight = self.norm.weight

    def forward(self, x, t):
        emb = torch.cos(t[:, None] * torch.arange(1, 5) / 50)
        h = self.norm(self.stem(x)) + self.time(emb)[:, :, None, None] + self.position
        h = self.join(torch.cat([self.attention(h), h], dim=1))
        return self.head(torch.relu(self.last_norm(h)))


INPUTS = (torch.randn(12, 3, 4, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12.0))
MATMULS = {
    Attention: {
        "qk": AttentionMatMulSpec(("q", "k")),
        "av": AttentionMatMulSpec(("v", "w"), softmax="w", always_zero=True, follows_a_sym=False),
    }
}
OPTIONS = {
    "weight_bit": 4,
    "blocks": {Attention: "out"},
    "keep": ["position"],
    "attention_matmuls": MATMULS,
    "splits": {"join": 8},
    "timestep_groups": 3,
}


def network_of(seed, **changes):
    torch.manual_seed(seed)
    return Network(**changes)


def quantize(seed=0, tied=False, **changes):
    return qdiff.quantize(network_of(seed, tied=tied), INPUTS, **QUICK, **{**OPTIONS, **changes})


@torch.no_grad()
def outputs(network):
    """Outputs for samples of one timestep group, of several, and for one sample."""
    parts = (slice(0, 3), slice(2, 9), slice(11, 12))
    return [network(*(tensor[part].clone() for tensor in INPUTS)) for part in parts]


def equal(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.fixture(scope="module")
def calibrated():
    """The network that `qdiff.quantize` returns; tests must not change it."""
    return quantize()


@pytest.fixture(scope="module")
def saved(calibrated, tmp_path_factory):
    """The packed file of `calibrated`; tests must not change it."""
    path = tmp_path_factory.mktemp("saved") / "network.safetensors"
    qdiff.save(path, calibrated)
    return path


# --- save and load ------------------------------------------------------------------------------------


def test_a_saved_network_is_loaded_bit_for_bit(calibrated, saved, tmp_path):
    layers = quant_layers(calibrated)
    assert layers["join"].split == 8 and len(calibrated.timestep_groups) == 3
    assert {path.rpartition("_")[2] for path in act_quantizers(calibrated) if ".qk." in path or ".av." in path} == set(
        "qkvw"
    )
    model = network_of(1).train()  # other weights, other statistics
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = qdiff.load(saved, model=model, device="cpu")
    assert equal(outputs(loaded), outputs(calibrated)) and not loaded.training
    state, expected = loaded.state_dict(), calibrated.state_dict()
    assert set(state) == set(expected)
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype and torch.equal(tensor, expected[name]), name
    assert not torch.equal(before["norm.running_mean"], state["norm.running_mean"])
    qdiff.save(tmp_path / "again.safetensors", loaded)
    assert (tmp_path / "again.safetensors").read_bytes() == saved.read_bytes()


def test_the_model_given_to_load_is_not_changed(saved):
    model = network_of(1).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    kinds = {path: type(module) for path, module in model.named_modules()}
    expected = model(*INPUTS)  # in training mode, which moves the statistics
    model.load_state_dict(before)
    loaded = qdiff.load(saved, model=model, device="cpu")
    with torch.no_grad():
        loaded.position.add_(1)
        loaded.norm.running_mean.add_(1)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert {path: type(module) for path, module in model.named_modules()} == kinds
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(model(*INPUTS), expected)


@pytest.mark.parametrize(
    "changes",
    [
        {"act_bit": None, "timestep_groups": 1},
        {"timestep_groups": 1, "splits": None, "attention_matmuls": None, "blocks": [Attention]},
        {"weight_bit": 3, "act_bit": 6, "symmetric": True, "keep": ["position", "head"]},
        {"tied": True},
    ],
)
def test_every_way_to_quantize_can_be_loaded(tmp_path, changes):
    calibrated = quantize(**changes)
    qdiff.save(tmp_path / "q.safetensors", calibrated)
    model = network_of(1, tied=changes.get("tied", False))
    loaded = qdiff.load(tmp_path / "q.safetensors", model=model, device="cpu")
    assert equal(outputs(loaded), outputs(calibrated))


def test_a_copy_of_a_quantized_network_can_be_saved(calibrated, saved, tmp_path):
    qdiff.save(tmp_path / "copy.safetensors", copy.deepcopy(calibrated))
    assert (tmp_path / "copy.safetensors").read_bytes() == saved.read_bytes()


def test_a_loaded_network_of_a_family_can_be_saved(tmp_path):
    network = qdiff.load(FROZEN / "tiny_w4a8.safetensors", device="cpu", engine="simulated")
    qdiff.save(tmp_path / "q.safetensors", network)
    again = qdiff.load(tmp_path / "q.safetensors", device="cpu", engine="simulated")
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([5.0, 700.0])
    with torch.no_grad():
        assert torch.equal(again(x, t), network(x, t))


def test_a_file_of_quantize_needs_its_model_and_no_other_does(saved):
    with pytest.raises(ConfigError, match=r"^model: .*network\.safetensors was made by qdiff\.quantize") as error:
        qdiff.load(saved)
    assert error.value.field == "model"
    with pytest.raises(ConfigError, match=r"^model: .*tiny_w4a8\.safetensors holds the structure of its") as error:
        qdiff.load(FROZEN / "tiny_w4a8.safetensors", model=tiny.unet())
    assert error.value.field == "model"


class PlainAttention(Attention):
    """The attention block with matmuls that are no modules."""

    def __init__(self, width):
        super().__init__(width)
        del self.qk, self.av


class Without(Network):
    """The network with a module in the place of another one."""

    def __init__(self, path, other):
        super().__init__()
        setattr(self, path, other)


@pytest.mark.parametrize(
    "model",
    [
        lambda: Network(joins=False),  # a missing layer
        lambda: Network(width=16),  # other shapes
        lambda: Network(kernel=1),
        lambda: Without("attention", nn.Identity()),  # missing attention matmuls
        lambda: Without("time", nn.Linear(8, 4)),  # as many weights, but of another shape
        lambda: Without("last_norm", nn.Identity()),  # a missing norm
        lambda: Without("last_norm", nn.GroupNorm(4, 8)),  # missing statistics
        lambda: Without("last_norm", nn.Sequential(nn.BatchNorm2d(8), nn.BatchNorm2d(8, affine=False))),
        lambda: Without("attention", PlainAttention(8)),
        tiny.unet,
        lambda: nn.Linear(3, 3),
        nn.Identity,
    ],
)
def test_another_network_is_named(saved, model):
    with pytest.raises(CheckpointError, match=r"^.*network\.safetensors: .*another network") as error:
        qdiff.load(saved, model=model(), device="cpu")
    assert "\n" not in str(error.value)


def with_hook():
    model = Network()
    model.stem.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (lambda: Without("stem", nn.Conv2d(3, 8, 3, padding=2, dilation=2)), "stem is Conv2d.*dilation"),
        (lambda: Without("stem", nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect")), "stem is Conv2d.*reflect"),
        (with_hook, "stem has a hook"),
    ],
)
def test_layers_of_another_geometry_or_with_hooks_are_named(saved, model, words):
    with pytest.raises(CheckpointError, match=f"another network .*{words}"):
        qdiff.load(saved, model=model(), device="cpu")


def test_a_damaged_tensor_is_named(saved, tmp_path):
    content = bytearray(saved.read_bytes())
    content[-1] ^= 1  # the end of a file is the end of its last tensor
    (tmp_path / "damaged.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged\.safetensors: damaged: .* does not match its sha256"):
        qdiff.load(tmp_path / "damaged.safetensors", model=Network())
    with safe_open(saved, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["stem.weight_quantizer.delta"][0] *= 2
    save_file(tensors, tmp_path / "changed.safetensors", metadata=metadata)
    with pytest.raises(CheckpointError, match=r"damaged: stem\.weight_quantizer\.delta does not match its sha256"):
        qdiff.load(tmp_path / "changed.safetensors", model=Network())


def test_other_files_are_named(tmp_path):
    unet, model, _ = quantized.quantized()
    save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    save_file({"a": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("q.pth", "not a packed quantized checkpoint"),
        ("plain.safetensors", "a safetensors file without our header"),
        ("folder", "no such file"),
        ("missing", "no such file"),
    ):
        with pytest.raises(CheckpointError, match=f"{name}: {message}"):
            qdiff.load(tmp_path / name)


def test_networks_that_cannot_be_saved_are_refused(calibrated, tmp_path):
    path = tmp_path / "q.safetensors"
    _, wrapped, _ = quantized.quantized()
    for network in (Network(), wrapped, nn.Identity()):
        with pytest.raises(ConfigError, match=r"^network: expected what qdiff\.quantize or qdiff\.load returned"):
            qdiff.save(path, network)
    with pytest.raises(ConfigError, match=r"^network: runs on an engine; expected one loaded with engine='simulated'"):
        qdiff.save(path, to_integer(calibrated))
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_is_named(calibrated, tmp_path):
    (tmp_path / "file").write_text("a file, and no folder")
    with pytest.raises(WriteError, match="file"):
        qdiff.save(tmp_path / "file" / "q.safetensors", calibrated)


def run_python(code):
    """What `code` prints as JSON in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=commands.REPOSITORY)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.multiprocess
def test_a_fresh_process_imports_a_family_when_a_file_asks_for_it():
    code = """
import json, sys
import qdiff
before = sorted(name for name in ("ddim", "ldm", "qdiff_cli") if name in sys.modules)
network = qdiff.load("models/ddim/emoji32/w4a8.safetensors", device="cpu")
after = sorted(name for name in ("ddim", "ldm", "qdiff_cli") if name in sys.modules)
print(json.dumps([before, type(network).__name__, after]))
"""
    assert run_python(code) == [[], "UNet", ["ddim"]]


# --- families of other packages -----------------------------------------------------------------------


class OwnUNet(nn.Module):
    """The network of another package."""

    def __init__(self, width):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x, t):
        return self.last(torch.relu(self.first(x) + torch.cos(t)[:, None, None, None]))


OWN = Architecture("own", make_unet=lambda config: OwnUNet(**config), blocks={})


@pytest.fixture
def families(monkeypatch):
    """The registered families; a test may add some of its own."""
    monkeypatch.setattr(architecture, "_FAMILIES", dict(architecture._FAMILIES))


def save_own(path):
    quant = QuantConfig(weight_bit=4)
    network = quantize_model(OwnUNet(8), OWN, quant).requires_grad_(False)
    init_weights(network, "max")
    save_packed(path, network, PackedInfo("own", {"width": 8}, quant, {}, ""))
    return network


def expect_loaded(path, network):
    loaded = qdiff.load(path, device="cpu")
    assert isinstance(loaded, OwnUNet)
    with torch.no_grad():
        assert torch.equal(loaded(*INPUTS), network(*INPUTS))


def test_a_family_that_is_registered_by_a_line(families, tmp_path):
    network = save_own(tmp_path / "own.safetensors")
    with pytest.raises(CheckpointError, match="of the own family, expected latent or pixel or custom"):
        qdiff.load(tmp_path / "own.safetensors")
    register_family("own", OWN)
    assert family_names() == ["latent", "own", "pixel"] and find_architecture("own") is OWN
    expect_loaded(tmp_path / "own.safetensors", network)


@pytest.mark.parametrize("registered", ["by name", "by entry point"])
def test_a_family_of_another_package_is_imported_when_it_is_needed(families, monkeypatch, tmp_path, registered):
    network = save_own(tmp_path / "own.safetensors")
    module = ModuleType("own_package")
    module.OWN = OWN
    if registered == "by name":
        register_family("own", "own_package:OWN")
    else:
        points = [EntryPoint("own", "own_package:OWN", "qdiff.families")]

        def entry_points(group, name=None):
            assert group == "qdiff.families"
            return [point for point in points if name in (None, point.name)]

        monkeypatch.setattr(architecture, "entry_points", entry_points)
    assert "own" in family_names()
    with pytest.raises(ConfigError, match=r"^family 'own': its architecture cannot be imported .*own_package"):
        find_architecture("own")  # only now is it imported
    assert [found.name for found in architecture.architectures()] == ["latent", "pixel"]  # the others still serve
    monkeypatch.setitem(sys.modules, "own_package", module)
    expect_loaded(tmp_path / "own.safetensors", network)
    assert find_architecture("own") is OWN


def test_an_unknown_family_is_named():
    with pytest.raises(ConfigError, match=r"^family 'own': expected one of latent, pixel$") as error:
        find_architecture("own")
    assert error.value.field == "family"


@pytest.mark.parametrize("name", ["pixel", "custom"])
def test_a_name_that_is_taken_is_refused(families, name):
    with pytest.raises(ConfigError, match=f"^family '{name}': this name is taken"):
        register_family(name, OWN)


def test_an_architecture_of_another_name_is_refused(families, monkeypatch):
    module = ModuleType("own_package")
    module.OWN = OWN
    monkeypatch.setitem(sys.modules, "own_package", module)
    register_family("other", "own_package:OWN")
    with pytest.raises(ConfigError, match=r"^family 'other': expected an Architecture of this name"):
        find_architecture("other")


def test_the_families_of_this_project():
    assert find_architecture("pixel") is PIXEL and PIXEL.name == "pixel"
    assert isinstance(PIXEL.make_unet(unet_config_dict(tiny.MODEL)), type(tiny.unet()))
    assert find_architecture("latent").name == "latent"


# --- errors name arguments ----------------------------------------------------------------------------


def quantize_with(**options):
    return lambda: qdiff.quantize(Network(), INPUTS, **{**QUICK, **OPTIONS, **options})


def load_with(**options):
    return lambda: qdiff.load(FROZEN / "tiny_w4a8.safetensors", **options)


WRONG = [
    ("weight_bit", quantize_with(weight_bit=1)),
    ("weight_bit", quantize_with(weight_bit=17)),
    ("act_bit", quantize_with(act_bit=0)),
    ("blocks", quantize_with(blocks=[nn.LSTM])),
    ("blocks", quantize_with(blocks={Attention: "outt"})),
    ("separate", quantize_with(separate=["emb"])),
    ("keep", quantize_with(keep=["position", "haed"])),
    ("attention_matmuls", quantize_with(attention_matmuls={nn.LSTM: {}})),
    ("splits", quantize_with(splits={"join": 16})),
    ("splits", quantize_with(splits={"jion": 8})),
    ("splits", quantize_with(keep=["position", "join"])),
    ("timestep_groups", quantize_with(timestep_groups=13)),
    ("timestep_groups", quantize_with(running_stat=True)),
    ("preset", quantize_with(preset="slow")),
    ("lr", quantize_with(lr=0.0)),
    ("batch_size", quantize_with(batch_size=0)),
    ("model", lambda: qdiff.quantize(Network, INPUTS)),
    ("model", lambda: qdiff.quantize(Network().double(), INPUTS)),
    ("inputs", lambda: qdiff.quantize(Network(), INPUTS[0])),
    ("inputs", lambda: qdiff.quantize(Network(), (INPUTS[0], INPUTS[1][:3]))),
    ("inputs", lambda: qdiff.quantize(Network(), (INPUTS[0] / 0, INPUTS[1]))),
    ("weight_bit", lambda: QuantConfig(weight_bit=1).validate()),
    ("act_bit", lambda: QuantConfig(act_bit=99).validate()),
    ("sm_abit", lambda: QuantConfig(sm_abit=0).validate()),
    ("weight_scale_method", lambda: QuantConfig(weight_scale_method="mean").validate()),
    ("act_scale_method", lambda: QuantConfig(act_scale_method="mean").validate()),
    ("quant_mode", lambda: QuantConfig(quant_mode="adaround").validate()),
    ("time_bounds", lambda: QuantConfig(time_bounds=(5.0, 1.0)).validate()),
    ("num_timesteps", lambda: CalibrationConfig(num_timesteps=0).validate()),
    ("samples", lambda: CalibrationConfig(samples=0).validate()),
    ("batch_tune", lambda: CalibrationConfig(batch_tune=0).validate()),
    ("iters", lambda: CalibrationConfig(iters=-1).validate()),
    ("unit_samples", lambda: CalibrationConfig(unit_samples=-1).validate()),
    ("iters", quantize_with(iters=2.5)),
    ("validation_fraction", quantize_with(validation_fraction=2.0)),
    ("warmup", lambda: CalibrationConfig(warmup=-0.5).validate()),
    ("lr_a", lambda: CalibrationConfig(lr_a=0.0).validate()),
    ("p", lambda: CalibrationConfig(p=-2.0).validate()),
    ("engine", load_with(device="cpu", engine="integers")),
    ("device", load_with(device="gpu")),
    ("model", load_with(model=Network())),
    ("model", load_with(model=Network)),
]


@pytest.mark.parametrize(("field", "call"), WRONG, ids=[f"{number}-{field}" for number, (field, _) in enumerate(WRONG)])
def test_errors_name_the_argument(field, call):
    with pytest.raises(ConfigError) as error:
        call()
    message = str(error.value)
    assert error.value.field == field and message.startswith(field)
    assert "--" not in message and "\n" not in message
    assert error.value.with_options({field: "--an_option"}) == f"--an_option{message.removeprefix(field)}"


def test_errors_of_a_file_name_the_file_and_then_the_argument():
    packed = PackedFile.open(FROZEN / "tiny_w4a8.safetensors")
    with pytest.raises(CheckpointError) as error:
        packed.check("pixel", packed.info.unet_config, QuantConfig(weight_bit=8, split=True))
    assert error.value.field == "weight_bit"
    assert str(error.value) == f"{packed.path}: weight_bit: the file has 4, called with 8"
    assert error.value.with_options({"weight_bit": "--weight_bit"}).startswith(f"{packed.path}: --weight_bit: ")


def test_errors_about_a_setting_of_the_recipe_that_does_not_exist():
    with pytest.raises(ConfigError, match="unknown settings of the recipe: iterations") as error:
        quantize_with(iterations=5)()
    assert "--" not in str(error.value)


# --- new scale rules ----------------------------------------------------------------------------------


@pytest.fixture
def seen(monkeypatch):
    """What a new rule was given, by the names of the quantizers. The rule is forgotten afterwards."""
    monkeypatch.setattr(SCALE_RULES, "_entries", dict(SCALE_RULES._entries))
    found = {}

    @SCALE_RULES.register("new")
    def new(values, n_bits, symmetric, always_zero, name=""):
        found.setdefault(name, []).append(values.clone())
        low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
        return qparams_from_range(low, high, n_bits, symmetric, always_zero)

    return found


def test_a_new_rule_sees_the_weights_of_every_channel(seen):
    quant = QuantConfig(weight_bit=4, split=True, weight_scale_method="new").validate()
    network = network_of(0)
    family = Architecture("own", lambda _: network, {}, keep=("position",), split_points=lambda _: {"join": 8})
    init_weights(quantize_model(network, family, quant), "new")
    stem, join = network.stem.weight, network.join.weight
    assert torch.equal(seen["stem.weight_quantizer"][0], stem.flatten(1))
    assert torch.equal(seen["join.weight_quantizer"][0], join[:, :8].flatten(1))
    assert torch.equal(seen["join.weight_quantizer_0"][0], join[:, 8:].flatten(1))
    assert all(values.dtype == torch.float32 and len(found) == 1 for found in seen.values() for values in found)


def sorted_values(tensor):
    return tensor.flatten().sort().values


@torch.no_grad()
@pytest.mark.parametrize("elements", [2**18, 100])
def test_a_new_rule_sees_the_activations(seen, monkeypatch, elements):
    """All values or a random sample, of which the least and the greatest value are always part.

    The attention calls its matmuls once for each head: the second call adds to what the rule saw in the first one.
    """
    monkeypatch.setattr(ranges, "RULE_ELEMENTS", elements)
    quant = QuantConfig(quant_act=True, act_scale_method="new").validate()
    network = network_of(0).eval()
    family = Architecture("own", lambda _: network, {}, keep=("position",), attention_matmuls=MATMULS)
    model = quantize_model(network, family, quant)
    init_activation_ranges(model, CalibrationData(INPUTS), "new", CalibrationConfig(), CPU)
    assert set(seen) == set(act_quantizers(model))
    assert all(len(found) == (2 if ".act_quantizer_" in name else 1) for name, found in seen.items())
    assert all(values.shape[0] == 1 and values.shape[1] > 2 for found in seen.values() for values in found)
    (values,) = seen["stem.act_quantizer"]
    if elements > INPUTS[0].numel():
        assert torch.equal(sorted_values(values), sorted_values(INPUTS[0]))
    else:
        assert values.shape == (1, elements + 2) and torch.isin(values, INPUTS[0]).all()
    assert values.min() == INPUTS[0].min() and values.max() == INPUTS[0].max()
    for name in ("attention.av.act_quantizer_w", "attention.qk.act_quantizer_q", "attention.av.act_quantizer_v"):
        first, second = seen[name]
        assert second.unique().numel() > 50 and second.min() <= first.min() and second.max() >= first.max()
        assert torch.isin(second, first).any() and not torch.isin(second, first).all()  # values of both heads


@torch.no_grad()
def test_a_new_rule_sees_the_activations_of_each_timestep_group(seen):
    quant = QuantConfig(quant_act=True, act_scale_method="new", time_bounds=(3.5, 7.5)).validate()
    network = network_of(0).eval()
    family = Architecture("own", lambda _: network, {}, keep=("position",), attention_matmuls=MATMULS)
    model = quantize_model(network, family, quant)
    init_activation_ranges(model, CalibrationData(INPUTS), "new", CalibrationConfig(), CPU)
    groups = [INPUTS[0][part] for part in (slice(0, 4), slice(4, 8), slice(8, 12))]
    for values, expected in zip(seen["stem.act_quantizer"], groups, strict=True):
        assert torch.equal(sorted_values(values), sorted_values(expected))
    assert all(len(found) == (6 if ".act_quantizer_" in name else 3) for name, found in seen.items())
    assert all(values.shape[0] == 1 and values.shape[1] > 2 for found in seen.values() for values in found)
    scales = model.stem.act_quantizer.scale
    expected = [(part.max() - part.min()) / 255 for part in groups]
    assert torch.allclose(scales, torch.stack(expected), rtol=1e-6)


def test_a_new_rule_can_be_named_by_a_whole_calibration(seen):
    quant = QuantConfig(weight_scale_method="new", act_scale_method="new")
    assert quant.validate() is quant
    with pytest.raises(ValueError, match="scale_method 'new': already registered"):
        SCALE_RULES.register("new", lambda *_: None)


def test_the_rule_of_the_test_is_gone():
    with pytest.raises(ConfigError, match="act_scale_method 'new': expected one of max, max_scale, mse"):
        QuantConfig(act_scale_method="new").validate()
