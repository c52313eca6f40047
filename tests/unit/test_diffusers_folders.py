"""Folders of diffusers: networks, settings and weights against the library's own."""

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ddim import diffusers_format as pixel_format
from ddim.weights import load_unet
from ldm import diffusers_format as latent_format
from ldm.checkpoint import LatentCheckpoint
from ldm.unet import UNetModel, unet_config
from qdiff.checkpoint.diffusers_folder import DiffusersFolder, needed_files, weight_files
from qdiff.errors import CheckpointError, ConfigError
from tests.support import tiny_diffusers as made
from tests.support.tiny_diffusers import change

UNET_WEIGHTS = "diffusion_pytorch_model"


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def inputs(channels: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, channels, 8, 8, dtype=torch.float64, generator=generator)
    context = torch.randn(2, made.TOKENS, 16, dtype=torch.float64, generator=generator)
    return x, torch.tensor([7, 700]), context


def pixel_network(folder: Path):
    return load_unet(pixel_format.resolve_config(None, folder), folder).double()


@torch.no_grad()
def pixel_error(pipeline, folder: Path) -> float:
    x, t, _ = inputs(3)
    expected = pipeline.unet.double()(x, t).sample
    pipeline.unet.float()
    return relative(pixel_network(folder)(x, t), expected)


# --- networks


def test_a_pixel_network_is_that_of_diffusers(pipelines, folders):
    assert pixel_error(pipelines["pixel"], folders["pixel"]) < 1e-6  # frequencies of time steps are float32 in both


@pytest.mark.parametrize("name", ["latent", "text", "text2"])
@torch.no_grad()
def test_latent_networks_are_those_of_diffusers(pipelines, folders, name):
    pipeline, config = pipelines[name], latent_format.resolve_config(None, folders[name])
    checkpoint = LatentCheckpoint(folders[name], config)
    unet, parts = checkpoint.unet().double(), checkpoint.model_parts().double()
    x, t, context = inputs(config.channels)
    contexts = () if name == "latent" else (context,)
    assert relative(unet(x, t, *contexts), pipeline.unet.double()(x, t, *contexts).sample) < 1e-12
    stage = (pipeline.vqvae if name == "latent" else pipeline.vae).double()
    assert relative(parts.first_stage_model.decode(x), stage.decode(x).sample) < 1e-12
    images = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    encoded = stage.encode(images)
    expected = encoded.latents if name == "latent" else encoded.latent_dist.mean
    assert relative(parts.first_stage_model.encode(images), expected) < 1e-12
    assert config.scale_factor == stage.config.scaling_factor
    if name != "latent":
        tokens = pipeline.tokenizer(["red heart", ""], padding="max_length", max_length=made.TOKENS)["input_ids"]
        text = parts.cond_stage_model
        assert text.tokenize(["red heart", ""]).tolist() == tokens
        assert torch.equal(text.encode(["red heart", ""]), pipeline.text_encoder.double()(torch.tensor(tokens))[0])
    for part in (pipeline.unet, stage, getattr(pipeline, "text_encoder", stage)):
        part.float()


def test_heads_that_differ_at_each_resolution(folders):
    config = latent_format.resolve_config(None, folders["text2"]).unet
    assert config.num_heads == (2, 4, 2) and [config.heads(level) for level in range(3)] == [2, 4, 2]
    json_values = json.loads(json.dumps(vars(config)))  # as a packed file has them
    assert unet_config(json_values) == config and UNetModel(unet_config(json_values)).config == config


def test_a_constant_width_of_heads_is_named_as_the_published_files_name_it(copy):
    folder = copy("text2")
    change(folder / "unet/config.json", attention_head_dim=[1, 2, 2])
    config = latent_format.read_config(DiffusersFolder(folder)).unet
    assert (config.num_heads, config.num_head_channels) == (-1, 16)


def test_v_prediction_and_the_schedule_come_from_the_folder(folders):
    config = latent_format.resolve_config(None, folders["text2"])
    assert config.parameterization == "v" and (config.linear_start, config.linear_end) == (0.00085, 0.012)
    assert pixel_format.resolve_config(None, folders["pixel"]).clip_x0 == 1.0


# --- layouts and files of weights


def test_files_at_the_top_of_the_folder(pipelines, tmp_path):
    assert pixel_error(pipelines["pixel"], made.flat(tmp_path, pipelines["pixel"])) < 1e-6


@pytest.mark.parametrize("options", [{"safe_serialization": False}, {"max_shard_size": "20KB"}])
def test_pickles_and_shards(pipelines, tmp_path, options):
    folder = made.saved(pipelines["pixel"], tmp_path, **options)
    assert "max_shard_size" not in options or len(list((folder / "unet").glob("*-of-*"))) > 2
    assert pixel_error(pipelines["pixel"], folder) < 1e-6


def test_full_precision_wins_and_the_log_says_so(pipelines, copy, caplog):
    folder = copy("pixel")
    weights = folder / "unet" / f"{UNET_WEIGHTS}.safetensors"
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_file(halves, folder / "unet" / f"{UNET_WEIGHTS}.fp16.safetensors")
    assert pixel_error(pipelines["pixel"], folder) < 1e-6
    assert f"{UNET_WEIGHTS}.safetensors (beside it: {UNET_WEIGHTS}.fp16.safetensors)" in caplog.text
    weights.unlink()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert 1e-6 < pixel_error(pipelines["pixel"], folder) < 1e-2
    assert f"{UNET_WEIGHTS}.fp16.safetensors" in caplog.text


def test_a_whole_pipeline_in_half_precision(pipelines, tmp_path):
    folder = made.saved(pipelines["text"].to(torch.float16), tmp_path, variant="fp16")
    pipelines["text"].to(torch.float32)
    config = latent_format.resolve_config(None, folder)
    checkpoint = LatentCheckpoint(folder, config)
    assert all(
        p.dtype == torch.float32 for p in (*checkpoint.unet().parameters(), *checkpoint.model_parts().parameters())
    )


def test_attention_names_of_older_files(pipelines, folders, copy):
    older = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    for name in ("pixel", "latent"):
        folder = copy(name)
        for part in ("unet", "vqvae"):
            file = folder / part / f"{UNET_WEIGHTS}.safetensors"
            if file.is_file():
                state = load_file(file)
                for new, old in older.items():
                    state = {key.replace(new, old): tensor for key, tensor in state.items()}
                assert any(".proj_attn." in key for key in state)
                save_file(state, file)
    assert pixel_error(pipelines["pixel"], folder.parent / "pixel") < 1e-6
    config = latent_format.resolve_config(None, folder)
    older_state, state = (LatentCheckpoint(path, config).state for path in (folder, folders["latent"]))
    assert older_state.keys() == state.keys() and all(torch.equal(older_state[key], state[key]) for key in state)


def test_the_order_of_preference():
    names = ["a.txt", "pytorch_model.bin", "model.fp16.safetensors", "model.non_ema.safetensors", "model.safetensors"]
    order = ["model.safetensors", "pytorch_model.bin", "model.fp16.safetensors", "model.non_ema.safetensors"]
    assert [file.name for file in weight_files(names)] == order


def test_only_what_is_read_is_downloaded():
    unet = [f"unet/{UNET_WEIGHTS}{end}" for end in (".bin", ".safetensors", ".fp16.safetensors", ".non_ema.bin")]
    sharded = [f"model{middle}.safetensors" for middle in ("-00001-of-00002", "-00002-of-00002", ".fp16")]
    text = [f"text_encoder/{name}" for name in (*sharded, "model.safetensors.index.json", "config.json")]
    others = ["v1-5-pruned.ckpt", "safety_checker/model.safetensors", "README.md", "unet/flax_model.msgpack"]
    needed = needed_files(["model_index.json", "unet/config.json", "tokenizer/merges.txt", *unet, *text, *others])
    expected = {"model_index.json", "unet/config.json", "tokenizer/merges.txt", f"unet/{UNET_WEIGHTS}.safetensors"}
    assert set(needed) == expected | set(text) - {"text_encoder/model.fp16.safetensors"}


def test_a_missing_shard_is_named(pipelines, tmp_path):
    folder = made.saved(pipelines["pixel"], tmp_path, max_shard_size="20KB")
    shard = sorted((folder / "unet").glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name}, which is missing"):
        pixel_network(folder)


def test_a_shard_elsewhere_is_refused(pipelines, tmp_path):
    folder = made.saved(pipelines["pixel"], tmp_path, max_shard_size="20KB")
    index = folder / "unet" / f"{UNET_WEIGHTS}.safetensors.index.json"
    change(index, weight_map={"conv_in.bias": "../secret.safetensors"})
    with pytest.raises(CheckpointError, match="beside the index"):
        pixel_network(folder)


def test_no_weights_at_all(copy):
    folder = copy("pixel")
    (folder / "unet" / f"{UNET_WEIGHTS}.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        pixel_network(folder)


# --- settings

WRONG_PIXEL = {
    "norm_eps": 1e-5,
    "downsample_padding": 1,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
    "attention_head_dim": 8,
    "act_fn": "gelu",
    "center_input_sample": True,
    "mid_block_scale_factor": 2,
    "resnet_time_scale_shift": "scale_shift",
    "time_embedding_type": "fourier",
    "time_embedding_dim": 7,
    "downsample_type": "resnet",
    "upsample_type": "resnet",
    "attn_norm_num_groups": 2,
    "add_attention": False,
    "class_embed_type": "timestep",
    "num_class_embeds": 10,
    "mid_block_type": None,
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
    "down_block_types": ["DownBlock2D", "SkipDownBlock2D"],
    "block_out_channels": [16, 24],
    "sample_size": None,
    "a_setting_of_the_future": 3,
}
WRONG_CONDITION = {
    "norm_eps": 1e-6,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "only_cross_attention": True,
    "dual_cross_attention": True,
    "addition_embed_type": "text_time",
    "encoder_hid_dim": 8,
    "transformer_layers_per_block": [1, 2, 2],
    "layers_per_block": [1, 1, 2],
    "attention_head_dim": [2, 4],
    "num_attention_heads": 2,
    "time_cond_proj_dim": 8,
    "conv_in_kernel": 5,
    "resnet_skip_time_act": True,
    "timestep_post_act": "silu",
    "cross_attention_dim": 24,
}
WRONG_AUTOENCODER = {
    "act_fn": "relu",
    "shift_factor": 0.1,
    "latents_mean": [0.0],
    "use_quant_conv": False,
    "mid_block_add_attention": False,
    "scaling_factor": 0,
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
}
WRONG_TEXT = {"hidden_act": "relu", "hidden_size": 24, "use_attention_mask": True}
WRONG_SCHEDULER = {
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "velocity",
    "thresholding": True,
    "rescale_betas_zero_snr": True,
    "trained_betas": [0.1],
    "variance_type": "learned_range",
    "_class_name": "FlowMatchEulerDiscreteScheduler",
}


def cases(name: str, file: str, wrong: dict) -> list:
    return [pytest.param(name, file, key, value, id=f"{file}-{key}") for key, value in wrong.items()]


@pytest.mark.parametrize(
    ("name", "file", "key", "value"),
    [
        *cases("pixel", "unet/config.json", WRONG_PIXEL),
        *cases("pixel", "scheduler/scheduler_config.json", WRONG_SCHEDULER | {"clip_sample_range": -1}),
        *cases("latent", "unet/config.json", {"norm_eps": 1e-6, "downsample_padding": 0, "freq_shift": 1}),
        *cases("latent", "vqvae/config.json", {"norm_type": "spatial", "lookup_from_codebook": True}),
        *cases("text", "unet/config.json", WRONG_CONDITION),
        *cases("text", "vae/config.json", WRONG_AUTOENCODER),
        *cases("text", "text_encoder/config.json", WRONG_TEXT),
        *cases("text", "scheduler/scheduler_config.json", WRONG_SCHEDULER | {"clip_sample": True}),
    ],
)
def test_settings_that_change_the_function_are_refused_by_name(copy, name, file, key, value):
    folder = copy(name)
    change(folder / file, **{key: value})
    read = (pixel_format if name == "pixel" else latent_format).read_config
    with pytest.raises(ConfigError) as error:
        read(DiffusersFolder(folder))
    shown = value if key == "_class_name" else json.dumps(value)
    other_file = "text_encoder/config.json" if key == "cross_attention_dim" else file
    assert str(folder / other_file) in str(error.value) and shown.strip('"') in str(error.value), error.value
    assert key == "_class_name" or key in str(error.value)


@pytest.mark.parametrize(
    "key", ["norm_eps", "downsample_padding", "freq_shift", "flip_sin_to_cos", "attention_head_dim"]
)
def test_a_missing_setting_means_the_default_of_diffusers(copy, key):
    folder = copy("pixel")
    change(folder / "unet/config.json", **{key: ...})
    with pytest.raises(ConfigError, match=rf"{key} .*missing"):
        pixel_format.read_config(DiffusersFolder(folder))


def test_quantized_folders_are_refused(copy):
    folder = copy("pixel")
    change(folder / "unet/config.json", quantization_config={"quant_method": "qdiff", "weight_bit": 4})
    with pytest.raises(ConfigError, match="weights quantized by qdiff: expected full precision"):
        pixel_format.read_config(DiffusersFolder(folder))


def test_the_factor_of_a_codebook_is_one_where_the_file_has_none(copy):
    folder = copy("latent")
    change(folder / "vqvae/config.json", scaling_factor=...)
    assert latent_format.read_config(DiffusersFolder(folder)).scale_factor == 1.0


def test_what_acts_in_training_or_on_precision_only_is_accepted(copy):
    folder = copy("text")
    change(folder / "unet/config.json", dropout=0.1, upcast_attention=True, unknown_but_off=False, _name_or_path="a/b")
    change(folder / "vae/config.json", force_upcast=True)
    change(folder / "text_encoder/config.json", torch_dtype="float16", dropout=0.1)
    change(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    latent_format.read_config(DiffusersFolder(folder))


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("_class_name", "StableDiffusionXLPipeline", "StableDiffusionXLPipeline"),
        ("_class_name", "LDMTextToImagePipeline", "LDMTextToImagePipeline"),
        ("_class_name", "LDMSuperResolutionPipeline", "LDMSuperResolutionPipeline"),
        ("unet", ["os", "system"], "os.system"),
        ("controlnet", ["diffusers", "ControlNetModel"], "controlnet"),
    ],
)
def test_classes_are_compared_by_name_and_never_imported(copy, part, value, words):
    folder = copy("text")
    change(folder / "model_index.json", **{part: value})
    with pytest.raises(ConfigError, match=words):
        latent_format.read_config(DiffusersFolder(folder))


def test_folders_of_another_family(folders):
    with pytest.raises(ConfigError, match="DDPMPipeline: expected StableDiffusionPipeline"):
        latent_format.resolve_config(None, folders["pixel"])
    with pytest.raises(ConfigError, match="LDMPipeline: expected DDPMPipeline"):
        pixel_format.resolve_config(None, folders["latent"])


@pytest.mark.parametrize(
    ("file", "word"),
    [
        ("unet/config.json", "unet"),
        ("scheduler/scheduler_config.json", "scheduler_config.json"),
        ("tokenizer/tokenizer.json", "no tokenizer"),
        ("text_encoder/config.json", "text_encoder"),
        ("vae/config.json", "vae"),
    ],
)
def test_a_missing_or_damaged_file_is_named(copy, file, word):
    folder = copy("text")
    if not file.startswith("tokenizer"):
        (folder / file).write_text("{")
        with pytest.raises(CheckpointError, match="not a JSON file"):
            latent_format.read_config(DiffusersFolder(folder))
    (folder / file).unlink()
    with pytest.raises(CheckpointError, match=word):
        latent_format.read_config(DiffusersFolder(folder))


# --- the structures of published repositories, without weights


def write(folder: Path, **files: dict) -> Path:
    """Write settings; `unet__config` becomes unet/config.json."""
    for name, content in files.items():
        file = folder / f"{name.replace('__', '/')}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("config", "size", "widths", "with_attention"),
    [
        ("configs/cifar10.yml", 32, [128, 256, 256, 256], 1),
        ("configs/church.yml", 256, [128, 128, 256, 256, 512, 512], 4),
    ],
)
def test_published_pixel_structures_agree_with_the_yaml_files(tmp_path, config, size, widths, with_attention):
    down = ["AttnDownBlock2D" if level == with_attention else "DownBlock2D" for level in range(len(widths))]
    up = [kind.replace("Down", "Up") for kind in reversed(down)]
    unet = made.UNET2D | made.PIXEL | {"sample_size": size, "block_out_channels": widths, "layers_per_block": 2}
    unet |= {"down_block_types": down, "up_block_types": up, "norm_num_groups": 32, "_class_name": "UNet2DModel"}
    scheduler = {"_class_name": "DDPMScheduler", "beta_end": 0.02, "beta_start": 1e-4, "beta_schedule": "linear"}
    folder = write(tmp_path, config=unet, scheduler_config=scheduler | {"variance_type": "fixed_small"})
    found = pixel_format.resolve_config(None, folder)
    assert found.model.ch_mult == tuple(width // 128 for width in widths) and found.clip_x0 == 1
    assert pixel_format.resolve_config(Path(config), folder).model.attn_resolutions == (16,)


def test_the_published_latent_structure_agrees_with_the_yaml_file(tmp_path):
    """CompVis/ldm-celebahq-256."""
    down, up = ["DownBlock2D", *["AttnDownBlock2D"] * 3], [*["AttnUpBlock2D"] * 3, "UpBlock2D"]
    unet = made.UNET2D | {"sample_size": 64, "block_out_channels": [224, 448, 672, 896], "layers_per_block": 2}
    unet |= {"down_block_types": down, "up_block_types": up, "norm_num_groups": 32, "attention_head_dim": 32}
    vqvae = {"_class_name": "VQModel", "block_out_channels": [128, 256, 512], "layers_per_block": 2}
    vqvae |= {"latent_channels": 3, "num_vq_embeddings": 8192, "sample_size": 256, "norm_num_groups": 32}
    vqvae |= {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    scheduler = {"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear", "clip_sample": False}
    folder = write(
        tmp_path,
        unet__config=unet | {"_class_name": "UNet2DModel"},
        vqvae__config=vqvae,
        scheduler__scheduler_config=scheduler | {"beta_start": 0.0015, "beta_end": 0.0195, "timestep_values": None},
    )
    config = latent_format.resolve_config(Path("models/ldm/celeba256/config.yaml"), folder)
    assert config.scale_factor == 1.0 and config.unet.num_head_channels == 32
    change(folder / "unet/config.json", attention_head_dim=16)
    with pytest.raises(ConfigError, match="heads of each resolution"):
        latent_format.resolve_config(Path("models/ldm/celeba256/config.yaml"), folder)
