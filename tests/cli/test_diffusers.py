"""Pipelines of diffusers: quantized by one call, saved, loaded, and used as their users use them."""

import copy
import importlib
import inspect
import json
import logging
import re
import shutil
import subprocess
import sys
from functools import cache

import diffusers
import pytest
import torch
from diffusers.utils import hub_utils
from safetensors.torch import load_file
from torch import nn

import qdiff
import qdiff.diffusers
from ddim.config import load_config
from ddim.weights import load_unet
from qdiff.calls import map_leaves
from qdiff.checkpoint.packed import PackedFile
from qdiff.diffusers import export_network, quantize_pipeline
from qdiff.engines import probe
from qdiff.engines.onnx import NestedCall
from qdiff.engines.select import apply_engine
from qdiff.errors import CheckpointError, ConfigError, MissingExtra
from qdiff.layers import LAYER_TYPES
from qdiff.model import enable_activations, quant_layers
from qdiff.structure import describe
from tests.cli.test_docs import blocks
from tests.support import commands
from tests.support.commands import REPOSITORY, fails, succeeded
from tests.support.pipelines import CASES, LENGTH, PROMPTS, QUICK, quantized

NAMES = list(CASES)


@cache
def original(name: str) -> diffusers.DiffusionPipeline:
    """The full-precision pipeline; tests must not change it."""
    return CASES[name].pipeline()


@cache
def shared(name: str) -> diffusers.DiffusionPipeline:
    """The quantized pipeline; tests must not change it."""
    return quantized(name)


def network(name: str, pipe: diffusers.DiffusionPipeline) -> nn.Module:
    return getattr(pipe, CASES[name].network)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """All quantized pipelines, saved, each in the folder of its name."""
    folder = tmp_path_factory.mktemp("pipelines")
    for name in NAMES:
        shared(name).save_pretrained(folder / name)
    return folder


# --- quantize ---------------------------------------------------------------------------------------


def joined_layers(model: nn.Module) -> int:
    """The number of layers whose input is a concatenation, by what is known of the networks."""
    if isinstance(model, diffusers.FluxTransformer2DModel):
        return len(model.single_transformer_blocks)
    blocks = getattr(model, "up_blocks", [])
    return sum(resnet.conv_shortcut is not None for block in blocks for resnet in block.resnets)


def count_attentions(model: nn.Module) -> int:
    names = ("Attention", "FluxAttention")
    return sum(type(module).__name__ in names for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_one_call_quantizes_a_pipeline(name):
    full, found = network(name, original(name)), describe(network(name, shared(name)))
    assert len(found.layers) == sum(type(module) in LAYER_TYPES for module in full.modules())
    assert len(found.matmuls) == 2 * count_attentions(full) > 0
    assert len(found.splits) == joined_layers(full)
    assert found.blocks and not found.kept_layers and not found.kept_matmuls and not found.unsplit


def test_the_networks_have_the_expected_number_of_joined_layers():
    counts = {name: joined_layers(network(name, original(name))) for name in NAMES}
    assert counts == {"ddpm": 4, "ddim": 4, "sd": 4, "sdxl": 4, "dit": 0, "pixart": 0, "sd3": 0, "flux": 2}


def test_the_report_says_that_there_are_no_split_shortcuts(caplog):
    caplog.set_level(logging.INFO)
    describe(shared("dit").transformer).log(activations=True)
    assert "quantized: 21 layers, 4 attention matmuls, 0 split shortcuts" in caplog.text


@pytest.mark.parametrize("name", NAMES)
def test_the_quantized_pipeline_samples_almost_the_same(name):
    case = CASES[name]
    full, found, other = case.sample(original(name)), case.sample(shared(name)), case.sample(original(name), seed=1)
    assert 0 < relative_error(found, full) < 0.5 * relative_error(other, full)  # of other noise


def test_widths_reach_the_network():
    case, full = CASES["dit"], CASES["dit"].sample(original("dit"))
    fine = quantized("dit", weight_bit=8, act_bit=None, policy={"*.proj": "W16"})
    assert relative_error(case.sample(fine), full) < 0.1 * relative_error(case.sample(shared("dit")), full)
    assert fine.transformer.pos_embed.proj.weight_quantizer.n_bits == 16


# --- calibration samples ----------------------------------------------------------------------------


class Recorded(Exception):
    pass


@pytest.fixture
def recorded(monkeypatch):
    """What `quantize_pipeline` hands to `quantize`: (calls, settings)."""

    def record(pipe, **arguments):
        seen = []

        def stop(model, calls, **settings):
            seen.append((calls, settings))
            raise Recorded

        monkeypatch.setattr(qdiff.diffusers, "quantize", stop)
        with pytest.raises(Recorded):
            quantize_pipeline(pipe, **arguments)
        return seen[0]

    return record


def test_samples_are_spread_over_the_time_steps(recorded):
    calls, _ = recorded(
        original("ddim"), n=5, images_per_call=2, timesteps=3, call={"num_inference_steps": 10, "eta": 0.0}
    )
    assert [len(args[0]) for args, _ in calls] == [2] * 6 + [1] * 3
    assert [int(args[1]) for args, _ in calls] == [900, 600, 300] * 3
    starts = torch.cat([calls[run][0][0] for run in (0, 3, 6)])
    assert len(starts.flatten(1).unique(dim=0)) == 5  # no image begins with the noise of another


def test_two_calls_of_a_time_step_are_both_recorded():
    class Network(nn.Module):
        def forward(self, x, timestep):
            return x

    model, progress = Network(), qdiff.diffusers.tqdm(disable=True)
    recorder = qdiff.diffusers._Recorder(model, 2, lambda: 4, progress)
    model.register_forward_pre_hook(recorder, with_kwargs=True)
    for t in (9, 6, 4, 1):
        for condition in (0.0, 1.0):
            model(torch.tensor([condition]), timestep=torch.tensor(t))
    assert [(float(args[0]), int(kwargs["timestep"])) for args, kwargs in recorder.calls] == [
        *((0.0, 9), (1.0, 9), (0.0, 4), (1.0, 4))
    ]


def test_guidance_gives_both_halves(recorded):
    calls, _ = recorded(original("sd"), prompts=PROMPTS[:2], call=CASES["sd"].call)
    first = calls[0][1]["encoder_hidden_states"]
    assert len(calls) == 3 and first.shape == (4, LENGTH, 16)
    assert torch.equal(first[0], first[1]) and not torch.equal(first[2], first[3])  # the empty text, then the prompts


def test_embedded_texts_serve_as_well(recorded):
    pipe = original("sdxl")
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    embeds = dict(zip(names, pipe.encode_prompt(list(PROMPTS[:2])), strict=True))
    by_text, by_embeds = (
        recorded(pipe, **source, call=CASES["sdxl"].call)[0]
        for source in ({"prompts": PROMPTS[:2]}, {"prompt_embeds": embeds})
    )
    assert len(by_text) == len(by_embeds) == 3
    for (args, kwargs), (others, other_kwargs) in zip(by_text, by_embeds, strict=True):
        assert torch.equal(args[0], others[0])
        assert torch.equal(kwargs["encoder_hidden_states"], other_kwargs["encoder_hidden_states"])


def test_inputs_without_samples_are_shared(recorded):
    """Also if there are as many of them as samples."""
    calls, settings = recorded(original("flux"), prompts=PROMPTS, call=CASES["flux"].call | {"max_sequence_length": 4})
    assert settings["shared"] == ["img_ids", "txt_ids"] and len(calls[0][1]["txt_ids"]) == len(PROMPTS)


def test_the_pipeline_keeps_its_progress_bar(recorded):
    pipe = CASES["ddim"].pipeline()
    pipe.set_progress_bar_config(desc="mine")
    recorded(pipe, n=2, call={"num_inference_steps": 2})
    assert pipe._progress_bar_config == {"desc": "mine"}


WRONG = {
    "neither": ("ddim", {}, "expected one of prompts, prompt_embeds and n"),
    "both": ("sd", {"n": 4, "prompts": PROMPTS}, "expected one of prompts, prompt_embeds and n"),
    "a text": ("sd", {"prompts": "a red heart"}, "prompts: expected a list of texts"),
    "images of texts": ("sd", {"n": 4}, "n: StableDiffusionPipeline samples from texts: expected prompts"),
    "texts without texts": ("ddim", {"prompts": PROMPTS}, "prompt: DDIMPipeline takes none"),
    "no images": ("ddim", {"n": 0}, "0 for batch_size: expected the same number of each, 1 or more"),
    "an unknown argument": ("ddim", {"n": 4, "call": {"steps": 3}}, "call: DDIMPipeline takes no steps"),
    "an unknown setting": ("ddim", {"n": 4, "iterations": 3}, "unknown settings of the recipe: iterations"),
    "a width": ("ddim", {"n": 4, "weight_bit": 1}, "weight_bit 1: expected a width of 2 to 16 bits"),
    "a preset": ("ddim", {"n": 4, "preset": "quick"}, "preset 'quick': expected one of published, fast, best"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_arguments_are_refused_before_any_work(kind, monkeypatch):
    name, arguments, message = WRONG[kind]
    monkeypatch.setattr(qdiff.diffusers, "_record", lambda *_: pytest.fail("the pipeline has begun to sample"))
    with pytest.raises(ConfigError) as error:
        quantize_pipeline(original(name), **arguments)
    assert str(error.value) == message


def test_networks_in_another_form_are_refused():
    with pytest.raises(ConfigError, match="pipe: expected a DiffusionPipeline, found UNet2DModel"):
        quantize_pipeline(original("ddim").unet, n=4)
    with pytest.raises(ConfigError, match="pipe: its unet is quantized already"):
        quantize_pipeline(shared("ddim"), n=4)
    pipe = CASES["ddim"].pipeline()
    pipe.unet = torch.compile(pipe.unet)
    with pytest.raises(ConfigError, match=r"expected torch\.compile after quantize_pipeline"):
        quantize_pipeline(pipe, n=4)
    pipe = CASES["ddim"].pipeline()
    pipe.enable_model_cpu_offload(device="cpu")
    with pytest.raises(ConfigError, match="expected enable_model_cpu_offload after quantize_pipeline"):
        quantize_pipeline(pipe, n=4)


def test_the_extra_is_asked_for_in_one_line(monkeypatch):
    monkeypatch.delitem(sys.modules, "qdiff.diffusers")
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None)
    message = 'diffusers is not installed: expected the extra "diffusers" (pip install "qdiff[diffusers]")'
    with pytest.raises(MissingExtra) as error:
        import qdiff.diffusers  # noqa: F401
    assert str(error.value) == message


# --- save and load ----------------------------------------------------------------------------------


@pytest.mark.multiprocess
def test_a_new_process_loads_the_same_bits(saved):
    command = [sys.executable, "-m", "tests.support.pipelines", str(saved)]
    process = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    for name in NAMES:
        expected = CASES[name].sample(shared(name))
        assert torch.equal(torch.load(saved / f"{name}.pt"), expected), name
    assert "newly initialized" not in process.stderr and "were not used" not in process.stderr


@pytest.mark.parametrize("name", NAMES)
def test_no_weights_in_full_precision_are_saved(name, saved):
    folder = saved / name / CASES[name].network
    tensors, found = load_file(folder / "diffusion_pytorch_model.safetensors"), describe(network(name, shared(name)))
    assert not any(f"{path}.weight" in tensors for path in found.layers)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["quantization_config"] == {"quant_method": "qdiff", "weight_bit": 4, "act_bit": 8}
    integers = sum(tensor.nbytes for key, tensor in tensors.items() if key.endswith(".integers"))
    weights = sum(layer.shape.numel() for layer in quant_layers(network(name, shared(name))).values())
    assert integers == pytest.approx(weights / 2, rel=1e-3)


def test_the_file_is_one_of_qdiff(saved):
    file = saved / "sd" / "unet" / "diffusion_pytorch_model.safetensors"
    again = qdiff.load(file, model=original("sd").unet, engine="simulated")
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor(500), torch.randn(2, LENGTH, 16)
    with torch.no_grad():
        expected, found = (model(x, t, context).sample for model in (shared("sd").unet, again))
    assert torch.equal(found, expected)


def test_shards_and_variants(tmp_path):
    shared("sd").save_pretrained(tmp_path, variant="small", max_shard_size="50KB")
    files = sorted((tmp_path / "unet").glob("*.safetensors"))
    assert len(files) > 2 and all(".small" in file.name for file in files)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, variant="small")
    assert torch.equal(CASES["sd"].sample(again), CASES["sd"].sample(shared("sd")))
    again.unet.save_pretrained(tmp_path / "again")  # what was loaded can be saved
    file = tmp_path / "again" / "diffusion_pytorch_model.safetensors"
    assert PackedFile.open(file).info.config.weight_bit == 4


def test_damage_is_found(saved, tmp_path):
    shared("dit").transformer.save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="does not match its sha256"):
        diffusers.DiTTransformer2DModel.from_pretrained(tmp_path)


def test_what_cannot_be_saved_or_loaded_is_refused(tmp_path, monkeypatch):
    pipe = shared("ddim")
    with pytest.raises(ConfigError, match="safe_serialization False: packed weights need safetensors"):
        pipe.save_pretrained(tmp_path, safe_serialization=False)
    monkeypatch.setattr(probe, "why_unavailable", lambda: None)
    fast = apply_engine(pipe.unet, "integer")
    with pytest.raises(ConfigError, match="expected it to be saved before apply_engine"):
        fast.save_pretrained(tmp_path)
    original("ddim").unet.save_pretrained(tmp_path)
    config = qdiff.diffusers.QDiffConfig(4, 8)
    with pytest.raises(ConfigError, match="qdiff needs calibration; expected quantize_pipeline"):
        diffusers.UNet2DModel.from_pretrained(tmp_path, quantization_config=config)


def test_a_device_map_of_one_device(saved):
    model = diffusers.DiTTransformer2DModel.from_pretrained(saved / "dit" / "transformer", device_map="cpu")
    assert model.device == torch.device("cpu") and quant_layers(model)
    with pytest.raises(ConfigError, match="expected one device for the whole network"):
        diffusers.DiTTransformer2DModel.from_pretrained(saved / "dit" / "transformer", device_map="auto")


class Hub:
    """A local stand-in of the client of the hub: repositories are folders."""

    def __init__(self, root, monkeypatch):
        self.root = root
        monkeypatch.setattr(hub_utils, "create_repo", self.create_repo)
        monkeypatch.setattr(hub_utils, "upload_folder", self.upload_folder)
        monkeypatch.setattr(hub_utils.ModelCard, "load", self.load_card)

    def create_repo(self, repo_id, **_):
        (self.root / repo_id).mkdir(parents=True)
        return type("Repo", (), {"repo_id": repo_id})()

    def upload_folder(self, repo_id, folder_path, **_):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)

    def load_card(self, *_, **__):
        return hub_utils.ModelCard("---\n---\n")


def test_push_to_hub_is_the_same_code(tmp_path, monkeypatch):
    Hub(tmp_path, monkeypatch)
    shared("ddim").push_to_hub("someone/quantized")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "someone" / "quantized")
    assert torch.equal(CASES["ddim"].sample(again), CASES["ddim"].sample(shared("ddim")))


# --- what users do with a pipeline ------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_an_engine_runs_the_network(name, monkeypatch):
    monkeypatch.setattr(probe, "why_unavailable", lambda: None)
    case, pipe = CASES[name], copy.copy(shared(name))
    expected = case.sample(shared(name))
    setattr(pipe, case.network, apply_engine(network(name, pipe), "integer"))
    assert relative_error(case.sample(pipe), expected) < 0.01  # values on the edge between two integers


def test_precision_can_change(tmp_path):
    case, pipe = CASES["sd"], copy.deepcopy(shared("sd"))
    pipe.to(torch.bfloat16)
    assert pipe.unet.dtype == torch.bfloat16
    assert next(iter(quant_layers(pipe.unet).values())).weight_quantizer.scale.dtype == torch.float32
    found = case.sample(pipe)
    assert relative_error(found, case.sample(shared("sd"))) < 0.05
    pipe.save_pretrained(tmp_path)
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert torch.equal(case.sample(again), found)
    alone = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "unet")  # the precision that it was saved with
    assert alone.dtype == torch.bfloat16


def test_offloading():
    case, pipe = CASES["sd"], copy.deepcopy(shared("sd"))
    expected = case.sample(pipe)
    pipe.enable_model_cpu_offload(device="cpu")  # what an accelerator would be
    assert torch.equal(case.sample(pipe), expected)


def with_lora(pipe: diffusers.StableDiffusionPipeline, path) -> None:
    """Write LoRA weights for the pipeline, and load them."""
    from peft import LoraConfig  # needs torchvision, which qdiff.diffusers makes importable
    from peft.utils import get_peft_model_state_dict

    other = copy.deepcopy(pipe)
    settings = {"r": 2, "lora_alpha": 2, "init_lora_weights": False}
    torch.manual_seed(5)
    other.unet.add_adapter(LoraConfig(target_modules=["to_q", "to_k", "conv1"], **settings))
    other.text_encoder.add_adapter(LoraConfig(target_modules=["q_proj"], **settings))
    unet, text = map(get_peft_model_state_dict, (other.unet, other.text_encoder))
    pipe.save_lora_weights(path, unet_lora_layers=unet, text_encoder_lora_layers=text)
    pipe.load_lora_weights(path)


def test_a_lora_loaded_before_is_fused_and_one_loaded_after_is_refused(tmp_path):
    case = CASES["sd"]
    pipe = case.pipeline()
    without = case.sample(pipe)
    with_lora(pipe, tmp_path / "lora")
    expected = case.sample(pipe)
    assert relative_error(without, expected) > 0.05
    quantize_pipeline(pipe, **case.source, call=case.call, weight_bit=8, act_bit=None, **QUICK)
    found = case.sample(pipe)
    assert relative_error(found, expected) < 0.01
    with pytest.raises(ConfigError, match="expected it to be loaded before quantize_pipeline, which fuses it"):
        pipe.load_lora_weights(tmp_path / "lora")
    pipe.save_pretrained(tmp_path / "pipe")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "pipe")
    assert torch.equal(case.sample(again), found)
    with pytest.raises(ConfigError, match="a LoRA cannot be added to a quantized network"):
        again.load_lora_weights(tmp_path / "lora")


def test_projections_are_not_fused_afterwards():
    pipe = copy.deepcopy(shared("sd"))
    with pytest.raises(ConfigError, match="expected fuse_qkv_projections before quantize_pipeline"):
        pipe.fuse_qkv_projections()


def recorded_calls(name: str) -> list[tuple[tuple, dict]]:
    """The inputs of the network of a pipeline at each time step, in float64, with a tuple for output."""
    calls, pipe = [], original(name)

    def record(_, args, kwargs):
        calls.append(map_leaves(in_float64, (args, kwargs)))

    hook = network(name, pipe).register_forward_pre_hook(record, with_kwargs=True)
    CASES[name].sample(pipe)
    hook.remove()
    return [(args, kwargs | {"return_dict": False}) for args, kwargs in calls]


def in_float64(leaf: object) -> object:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    leaf = leaf.clone(memory_format=torch.contiguous_format)
    return leaf.double() if leaf.is_floating_point() else leaf


def in_float32(leaf: object) -> object:
    return leaf.float() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float64 else leaf


def twice(leaf: object) -> object:
    return torch.cat([leaf, leaf]) if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf


@torch.no_grad()
def compiled_error(model: nn.Module, call: tuple[tuple, dict], backend: str) -> float:
    """The relative error of the compiled network; a graph break raises."""
    torch._dynamo.reset()
    args, kwargs = call
    (expected,), (found,) = (
        model(*args, **kwargs),
        torch.compile(model, fullgraph=True, backend=backend)(*args, **kwargs),
    )
    return relative_error(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_no_graph_breaks(name):
    model, call = nn.Module.double(copy.deepcopy(network(name, shared(name)))), recorded_calls(name)[1]
    if name in ("ddpm", "ddim"):  # with one sample the full-precision UNet2DModel cannot be traced either
        call = map_leaves(twice, call)
    assert compiled_error(model, call, "aot_eager") < 1e-6


def smallest(name: str) -> tuple[nn.Module, tuple[tuple, dict]]:
    """A quantized network of one block, so that the C++ compiler has little to do, and a call of it."""
    torch.manual_seed(0)
    kwargs = {"timestep": torch.tensor([500, 500]), "return_dict": False}
    if name == "dit":
        model = diffusers.DiTTransformer2DModel(
            num_attention_heads=1,
            attention_head_dim=8,
            in_channels=4,
            out_channels=4,
            num_layers=1,
            norm_num_groups=4,
            sample_size=4,
            patch_size=2,
            num_embeds_ada_norm=10,
        )
        kwargs["class_labels"] = torch.tensor([3, 5])
    else:
        model = diffusers.UNet2DModel(
            sample_size=4,
            in_channels=4,
            block_out_channels=(8,),
            layers_per_block=1,
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            norm_num_groups=4,
        )
    call = (torch.randn(2, 4, 4, 4),), kwargs
    return qdiff.quantize(model.eval(), [call], weight_bit=4, act_bit=8, **QUICK), call


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("name", ["dit", "unet"])
def test_compiled_networks_give_the_same(name, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    model, call = smallest(name)
    assert describe(model).matmuls
    enable_activations(model, False)
    assert compiled_error(model, call, "inductor") < 1e-5
    enable_activations(model, True)
    assert compiled_error(nn.Module.double(model), map_leaves(in_float64, call), "inductor") < 1e-6


SLOW_EXPORTS = [pytest.param(name, marks=pytest.mark.slow) for name in ("ddim", "sd", "sdxl", "pixart", "sd3", "flux")]


@pytest.mark.parametrize("name", ["dit", *SLOW_EXPORTS])
def test_the_network_of_a_saved_pipeline_becomes_onnx(name, tmp_path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    pipe, file = shared(name), tmp_path / "network.onnx"
    pipe.save_pretrained(tmp_path)
    succeeded(commands.run("export.py", "--cali_ckpt", tmp_path, "-o", file))
    options = runtime.SessionOptions()
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL  # node by node, as the file says
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape[0] == "batch" and session.get_outputs()[0].name == "out_sample"
    calls = [map_leaves(in_float32, by_position(name, call)) for call in recorded_calls(name)]
    if CASES[name].network == "unet":  # wider than the calibration samples
        (x, *others), kwargs = calls[0]
        calls.append(([torch.cat([x, x.flip(3)], 3), *others], kwargs))
    errors = [error_of_runtime(session, network(name, pipe), *call) for call in calls]
    assert min(errors) < 1e-5 and max(errors) < 0.05  # a value between two integers may fall to either side


@torch.no_grad()
def error_of_runtime(session, model: nn.Module, args, kwargs) -> float:
    tensors = NestedCall(model, args, kwargs).tensors
    given = {key: tensor if tensor.dim() else tensor.expand(len(args[0])) for key, tensor in tensors.items()}
    assert [entry.name for entry in session.get_inputs()] == list(given)
    (found,) = session.run(None, {key: tensor.numpy() for key, tensor in given.items()})
    return relative_error(torch.from_numpy(found), model(*args, **kwargs)[0])


def by_position(name: str, call: tuple[tuple, dict]) -> tuple[tuple, dict]:
    """The same call with the first input of the network by position, which some pipelines give by name."""
    args, kwargs = call
    first = next(iter(inspect.signature(network(name, original(name)).forward).parameters))
    return (args, kwargs) if args else ((kwargs[first],), {key: kwargs[key] for key in kwargs if key != first})


def test_a_call_is_described_without_its_values():
    call = shared("sdxl").unet.hf_quantizer.call
    sample, time = call["args"]
    assert sample == {"shape": [None, 4, 8, 8], "dtype": "float32"} and time == {"shape": [None], "dtype": "int64"}
    added = {"text_embeds": [None, 16], "time_ids": [None, 6]}
    found = call["kwargs"]["added_cond_kwargs"]
    assert {key: spec["shape"] for key, spec in found.items()} == added and call["kwargs"]["return_dict"] is False
    ids = shared("flux").transformer.hf_quantizer.call["kwargs"]["img_ids"]
    assert ids["shape"] == [16, 3]  # it has no samples


def test_what_cannot_be_exported_is_refused(tmp_path):
    full, folder_of_dit = tmp_path / "full", tmp_path / "dit"
    shared("dit").save_pretrained(folder_of_dit)
    original("ddim").save_pretrained(full)
    (tmp_path / "empty").mkdir()
    shutil.copytree(folder_of_dit / "transformer", tmp_path / "foreign")
    config = tmp_path / "foreign" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace("DiTTransformer2DModel", "DDIMScheduler"))
    for folder, words, message in (
        (full, [], "not quantized: expected a network that quantize_pipeline has quantized"),
        (tmp_path / "empty", [], "expected a file, or the folder of a quantized pipeline"),
        (tmp_path / "foreign", [], "class DDIMScheduler: expected a network of diffusers"),
        (folder_of_dit, ["--weight_bit", 4], "--weight_bit 4: acts only for a calibrated file"),
        (folder_of_dit, ["--H", 32], "--H 32: acts only for a calibrated file"),
    ):
        fails(commands.run("export.py", "--cali_ckpt", folder, *words, "-o", tmp_path / "a.onnx"), message)
    words = ["export.py", "--cali_ckpt", folder_of_dit, "-o", tmp_path / "a.pth"]
    fails(commands.run(*words), "expected a name ending in .onnx")
    assert not list(tmp_path.glob("a.*"))
    with pytest.raises(ConfigError, match="network: its inputs are not known"):
        export_network(tmp_path / "a.onnx", original("dit").transformer)


@torch.no_grad()
def test_a_bundled_model_is_one_of_diffusers(monkeypatch):
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")
    pipeline = importlib.import_module("pipeline")
    unet = load_unet(load_config(REPOSITORY / "configs/emoji32.yml"), None)
    model, x, t = pipeline.make_pipeline(unet).unet, torch.randn(2, 3, 32, 32), torch.tensor([20.0, 900.0])
    assert relative_error(model(x, t).sample, unet(x, t)) < 1e-5


# --- the page ---------------------------------------------------------------------------------------


def test_the_examples_of_the_page_run(tmp_path, monkeypatch):
    """On tiny pipelines in the places of the published ones, with few time steps and nearest rounding."""
    monkeypatch.chdir(tmp_path)
    original("ddim").save_pretrained("google/ddpm-cifar10-32")
    original("sd").save_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
    whole = qdiff.diffusers.quantize_pipeline
    calls = []

    def short(pipe, call, **arguments):
        calls.append(arguments)
        few = {"n": 4} if "n" in arguments else {}
        whole(pipe, **arguments | few | QUICK, call=call | {"num_inference_steps": 2})

    monkeypatch.setattr(qdiff.diffusers, "quantize_pipeline", short)
    page = REPOSITORY / "docs/diffusers.md"
    namespace: dict[str, object] = {"__name__": "example"}
    code = [(first, lines) for language, first, lines in blocks(page) if language == "python"]
    for first, lines in code:
        source = "\n" * (first - 1) + "\n".join(lines)  # so that a traceback has the lines of the page
        source = re.sub("num_inference_steps=[0-9]+", "num_inference_steps=2", source)
        exec(compile(source, str(page), "exec"), namespace)
    assert len(code) == 4 and [arguments["weight_bit"] for arguments in calls] == [4, 4]
    assert quant_layers(namespace["again"]) and (tmp_path / "star.png").is_file()
    assert namespace["found"].kept_layers == ("conv_in", "conv_out")
