"""Official checkpoint files, configurations and the text tower of the latent family."""

import pytest
import torch
import yaml
from safetensors.torch import save_file

from ldm.checkpoint import CONDITIONING, EMA_PREFIX, STAGE, TEXT, UNET_PREFIX, LatentCheckpoint
from ldm.config import load_config
from ldm.encoders import FrozenCLIPEmbedder, clip_merges, make_tokenizer, merges_for
from qdiff.errors import CheckpointError, ConfigError
from tests.support import commands, tiny_latent
from tests.support.commands import fails


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    return tiny_latent.model_folder(tmp_path_factory.mktemp("text") / "model", "text")


def saved(folder, tensors, name="other.ckpt"):
    path = folder / name
    save_file(tensors, path) if name.endswith("safetensors") else torch.save({"state_dict": tensors}, path)
    return path


@pytest.mark.parametrize("kind", ["none", "class", "text"])
def test_every_weight_arrives(tmp_path, kind):
    folder = tiny_latent.model_folder(tmp_path / "m", kind, scale_by_std=True)
    config, tensors = load_config(folder / "config.yaml"), tiny_latent.state(folder / "config.yaml")
    checkpoint = LatentCheckpoint(folder, config)
    unet, model_parts = checkpoint.unet(), checkpoint.model_parts()
    for name, tensor in unet.state_dict().items():
        assert torch.equal(tensor, tensors[f"{UNET_PREFIX}{name}"])
    for name, tensor in model_parts.state_dict().items():
        assert torch.equal(tensor, tensors[name])
    assert model_parts.scale_factor == pytest.approx(0.7)
    assert not any(p.is_meta for p in [*unet.parameters(), *model_parts.parameters()])


def test_ema_weights_are_used_where_the_configuration_says_so(tmp_path, caplog):
    folder = tiny_latent.model_folder(tmp_path / "m", use_ema=True)
    config, tensors = load_config(folder / "config.yaml"), tiny_latent.state(folder / "config.yaml")
    name = "out.2.weight"
    assert torch.equal(LatentCheckpoint(folder, config).unet().state_dict()[name], tensors[f"{EMA_PREFIX}out2weight"])
    pruned = {key: tensor for key, tensor in tensors.items() if not key.startswith("model_ema.")}
    unet = LatentCheckpoint(saved(tmp_path, pruned), config).unet()
    assert torch.equal(unet.state_dict()[name], tensors[f"{UNET_PREFIX}{name}"]) and "no EMA weights" in caplog.text
    only_ema = {key: tensor for key, tensor in tensors.items() if not key.startswith(UNET_PREFIX)}
    assert torch.equal(
        LatentCheckpoint(saved(tmp_path, only_ema), config).unet().state_dict()[name],
        tensors[f"{EMA_PREFIX}out2weight"],
    )
    del tensors[f"{EMA_PREFIX}out2weight"]
    with pytest.raises(CheckpointError, match="EMA weights are not complete"):
        LatentCheckpoint(saved(tmp_path, tensors), config).unet()


def test_an_export_without_the_full_precision_file_says_so(text_model, tmp_path):
    options = [
        "--config",
        str(text_model / "config.yaml"),
        "--cali_ckpt",
        "q.safetensors",
        "-o",
        str(tmp_path / "q.pth"),
    ]
    fails(commands.run("export.py", *options, "--use_pretrained"), "--ckpt")


@pytest.mark.parametrize("name", ["other.ckpt", "other.safetensors"])
def test_both_spellings_of_the_text_tower(text_model, tmp_path, name):
    config, tensors = load_config(text_model / "config.yaml"), tiny_latent.state(text_model / "config.yaml")
    expected = LatentCheckpoint(text_model, config).model_parts().cond_stage_model.encode(["red heart"])
    newer = {
        key.replace(f"{TEXT}text_model.", TEXT): tensor
        for key, tensor in tensors.items()
        if not key.endswith("position_ids")
    }
    found = LatentCheckpoint(saved(tmp_path, newer, name), config).model_parts().cond_stage_model.encode(["red heart"])
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("part", "words"), [(STAGE, "first_stage_model is missing"), (CONDITIONING, "cond_stage_model is missing")]
)
def test_a_missing_part_is_an_error(text_model, tmp_path, part, words):
    config, tensors = load_config(text_model / "config.yaml"), tiny_latent.state(text_model / "config.yaml")
    lacking = {key: tensor for key, tensor in tensors.items() if not key.startswith(part)}
    with pytest.raises(CheckpointError, match=words):
        LatentCheckpoint(saved(tmp_path, lacking), config).model_parts()


def test_one_missing_tensor_and_foreign_files_are_named(text_model, tmp_path, caplog):
    config, tensors = load_config(text_model / "config.yaml"), tiny_latent.state(text_model / "config.yaml")
    lacking = dict(tensors)
    del lacking[f"{TEXT}text_model.final_layer_norm.bias"]
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.bias"):
        LatentCheckpoint(saved(tmp_path, lacking), config).model_parts()
    with pytest.raises(CheckpointError, match="expected a latent diffusion checkpoint"):
        LatentCheckpoint(saved(tmp_path, {"temb.dense.0.weight": torch.ones(1)}), config)
    LatentCheckpoint(saved(tmp_path, tensors | {"optimizer.step": torch.ones(1)}), config)
    assert "ignored 1 tensors" in caplog.text and "optimizer.step" in caplog.text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"first_stage_config": {"target": "os.system", "params": {}}}, "os.system"),
        ({"cond_stage_config": {"target": "ldm.modules.encoders.modules.Unknown"}}, "modules.Unknown"),
        ({"unet_config": None}, "unet_config"),
        ({"linear_start": None}, "missing linear_start"),
        ({"cond_stage_config": "__is_first_stage__"}, "not supported"),
        (
            {"unet_config": tiny_latent.config()["model"]["params"]["unet_config"] | {"params": {"in_channels": 4}}},
            "missing out_channels",
        ),
    ],
)
def test_bad_configurations_are_one_clear_line(tmp_path, change, words):
    content = tiny_latent.config()
    content["model"]["params"] |= change
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError, match=words) as error:
        load_config(tmp_path / "config.yaml")
    assert "\n" not in str(error.value)


def test_overrides_and_files_that_are_no_yaml(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_latent.config()))
    assert load_config(path, ["model.params.linear_end=0.02"]).linear_end == 0.02
    with pytest.raises(ConfigError, match="key=value"):
        load_config(path, ["nonsense"])
    path.write_text("a: [1\nb")
    with pytest.raises(ConfigError, match="not a YAML file"):
        load_config(path)


def test_tokens_of_clip():
    tokens = FrozenCLIPEmbedder(width=8, layers=1, heads=1).tokenize(["a puppy wearing a hat"])
    assert tokens.shape == (1, 77) and tokens[0, :8].tolist() == [49406, 320, 6829, 3309, 320, 3801, 49407, 49407]
    assert len(clip_merges()) == 48894


def test_a_closed_vocabulary_splits_its_words_as_clip_does():
    words = ["red heart", "smiling face with open mouth"]
    small, whole = make_tokenizer(merges_for(words)), make_tokenizer(clip_merges())
    for text in [*words, "red face with heart"]:
        assert small.tokenize(text) == whole.tokenize(text)


@torch.no_grad()
def test_text_tower_equals_the_library():
    from qdiff.utils.compat import make_torchvision_importable

    make_torchvision_importable()
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    config = CLIPTextConfig(
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="quick_gelu",
        layer_norm_eps=1e-5,
    )
    library = CLIPTextModel(config).eval()
    ours = FrozenCLIPEmbedder(width=64, layers=3, heads=4).eval()
    weights = {name.removeprefix("text_model."): tensor for name, tensor in library.state_dict().items()}
    ours.transformer.text_model.load_state_dict(weights)
    prompts = ["a photograph of an astronaut riding a horse", ""]
    expected = library(ours.tokenize(prompts)).last_hidden_state
    assert (ours.encode(prompts) - expected).abs().max() < 1e-5
