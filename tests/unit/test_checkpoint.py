"""Both checkpoint formats: round trips, damage, foreign files, wrong options."""

import json
import logging
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from ddim.family import PIXEL
from qdiff import architecture
from qdiff.checkpoint import (
    PackedInfo,
    load_packed,
    load_published,
    midpoint_weights,
    published_shapes,
    read_tensors,
    save_packed,
    save_published,
    state_hash,
)
from qdiff.checkpoint.published import infer_act_bits
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.model import enable_activations, set_mode_parameters
from tests.support import tiny
from tests.support.quantized import UNET_CONFIG, Payload, T, X, quantized


@pytest.fixture
def files(tmp_path):
    unet, model, quant = quantized()
    save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    save_packed(
        tmp_path / "q.safetensors",
        model,
        PackedInfo("pixel", UNET_CONFIG, quant, {"iters": 1}, state_hash(unet.state_dict())),
    )
    return tmp_path, model, quant


@pytest.mark.parametrize(
    "settings",
    [{}, {"weight_bit": 8}, {"weight_bit": 3, "split": False}, {"a_sym": False, "sm_abit": 16}, {"weight_bit": 12}],
)
def test_round_trips_give_the_same_bits(tmp_path, settings):
    unet, model, quant = quantized(**settings)
    expected = model(X, T)
    save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    save_packed(tmp_path / "q.safetensors", model, PackedInfo("pixel", UNET_CONFIG, quant, {}, ""))
    if quant.sm_abit != 16:  # random scales are no 16-bit ones, and are refused as such
        assert torch.equal(load_published(tmp_path / "q.pth", UNET_CONFIG, PIXEL, quant)(X, T), expected)
    packed, info = load_packed(tmp_path / "q.safetensors")
    assert torch.equal(packed(X, T), expected) and info.config == quant
    # published again, without the full-precision weights
    save_published(tmp_path / "again.pth", packed, PIXEL, midpoint_weights(packed), activations=True)
    weights_only = QuantConfig(**{**quant.to_dict(), "quant_act": False})
    again = load_published(tmp_path / "again.pth", UNET_CONFIG, PIXEL, weights_only)
    enable_activations(packed, False)
    assert torch.equal(again(X, T), packed(X, T))


def test_full_precision_weights_of_another_network_are_refused(tmp_path):
    _, model, _ = quantized()
    with pytest.raises(CheckpointError, match=r"temb\.dense\.0: .* full-precision weights"):
        save_published(tmp_path / "q.pth", model, PIXEL, tiny.unet(seed=1).state_dict(), activations=True)
    assert not (tmp_path / "q.pth").exists()


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ((("conv_out", "W8"),), "conv_out has 8 bits and others have 4"),
        ((("*", "A16"), ("conv_in", "A8")), "conv_in.act_quantizer has 8 bits and others have 16"),
        ((("mid.attn_1.av", "A16"),), "mid.attn_1.av.act_quantizer_v has 16 bits and others have 8"),
        ((("mid.*.conv1", "keep"),), "no layers in full precision, but mid.block_1.conv1 is one"),
        ((("mid.attn_1.qk", "keep"),), "no layers in full precision, but mid.attn_1.qk is one"),
    ],
)
def test_the_published_format_refuses_a_policy(policy, words, tmp_path):
    unet, model, _ = quantized(policy=policy)
    with pytest.raises(CheckpointError, match=f"the published format holds .*{words}"):
        save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    assert not list(tmp_path.iterdir())


def test_the_published_format_refuses_smoothing(tmp_path):
    unet, model, _ = quantized()
    model.conv_in.smoothing = torch.ones(3)
    with pytest.raises(CheckpointError, match=r"no smoothing, but conv_in has one"):
        save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)


@pytest.mark.parametrize("activations", [True, False])
def test_a_published_file_holds_the_parameters_of_its_mode(activations, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    unet, model, quant = quantized()
    set_mode_parameters(model, {"conv_in.bias": torch.ones(16)})
    for mode in (activations, not activations):  # whatever mode the network is in
        enable_activations(model, mode)
        save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations)
    assert f"for use {'with' if activations else 'without'} quantized activations" in caplog.text
    enable_activations(model, activations)
    formats = replace(quant, quant_act=activations)
    assert torch.equal(load_published(tmp_path / "q.pth", UNET_CONFIG, PIXEL, formats)(X, T), model(X, T))
    assert torch.equal(model.conv_in.bias, unet.conv_in.bias) == activations


def test_published_file_has_exactly_the_published_keys(files):
    folder, model, _ = files
    state = read_tensors(folder / "q.pth")
    assert {name: tensor.shape for name, tensor in state.items()} == published_shapes(model, PIXEL)
    assert state["model.up.0.block.0.nin_shortcut.weight_quantizer.alpha"].shape[1] == 32  # channels of h
    assert "model.mid.attn_1.act_quantizer_w.delta" in state


def test_packed_serves_weights_only_too(files):
    folder, model, _ = files
    enable_activations(model, False)
    alone, info = load_packed(folder / "q.safetensors", activations=False)
    assert torch.equal(alone(X, T), model(X, T)) and not info.config.quant_act


def test_every_flipped_byte_of_a_packed_file_is_noticed(files):
    folder, _, _ = files
    content = (folder / "q.safetensors").read_bytes()
    generator = torch.Generator().manual_seed(0)
    for position in torch.randint(8, len(content), (40,), generator=generator).tolist():
        damaged = bytearray(content)
        damaged[position] ^= 1 << (position % 8)
        (folder / "damaged.safetensors").write_bytes(damaged)
        with pytest.raises((CheckpointError, ConfigError)):
            load_packed(folder / "damaged.safetensors")


@pytest.mark.parametrize("name", ["q.pth", "q.safetensors"])
def test_truncation_is_noticed(files, name):
    folder, _, quant = files
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        load_published(folder / name, UNET_CONFIG, PIXEL, quant) if name.endswith("pth") else load_packed(folder / name)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_legacy_files_are_named(tmp_path):
    """Pickles beside raw storages, as PyTorch before 1.6 wrote them: every damage is one error or goes unnoticed."""
    torch.save(
        {"a": torch.ones(20, 3), "b": torch.arange(5)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False
    )
    content = (tmp_path / "old.pth").read_bytes()
    generator = torch.Generator().manual_seed(0)
    refused = 0
    for position in torch.randint(1, len(content), (200,), generator=generator).tolist():
        for damaged in (content[:position], content[:position] + b"~" + content[position + 1 :]):
            (tmp_path / "damaged.pth").write_bytes(damaged)
            try:
                read_tensors(tmp_path / "damaged.pth")
            except CheckpointError:
                refused += 1
    assert refused > 200


def test_safetensors_of_an_unknown_type_are_damaged(tmp_path):
    header = b'{"a":{"dtype":"F6_E2M3","shape":[4],"data_offsets":[0,3]}}'
    (tmp_path / "q.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(3))
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        read_tensors(tmp_path / "q.safetensors")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"<!DOCTYPE html><html>sign in</html>", "HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git-LFS"),
        (b"", "empty"),
        (b"just some text that is no checkpoint", "damaged or not"),
        (pickle.dumps({"a": [1, 2]}, protocol=2), "damaged or not"),
    ],
)
def test_impostors_are_named(tmp_path, content, words):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=words):
        read_tensors(path)


def test_another_kind_of_object_is_described(tmp_path):
    torch.save({"epoch": 3, "loss": [1.0]}, tmp_path / "log.pth")
    with pytest.raises(CheckpointError, match="expected a state dict of tensors, found a dict with epoch, loss"):
        read_tensors(tmp_path / "log.pth")


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize(("writer", "protocol"), [("torch", 2), ("pickle", 2), ("pickle", 4)])
def test_a_pickle_that_runs_code_does_not(tmp_path, writer, protocol):
    path, mark = tmp_path / "evil.pth", tmp_path / "ran"
    content = {"state_dict": {"w": torch.zeros(1)}, "callback": Payload(f"touch {mark}")}
    if writer == "torch":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps({"callback": Payload(f"touch {mark}")}, protocol=protocol))
    with pytest.raises(CheckpointError, match="refused" if protocol == 2 else "not a PyTorch checkpoint"):
        read_tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weight_bit": 8}, "4-bit"),
        ({"split": False}, "split mismatch"),
        ({"a_sym": False}, "a_sym mismatch"),
        ({"sm_abit": 16}, "sm_abit 16 was given"),
    ],
)
def test_wrong_options_for_a_published_file_are_refused(files, change, words):
    folder, _, quant = files
    with pytest.raises(CheckpointError, match=words):
        load_published(folder / "q.pth", UNET_CONFIG, PIXEL, QuantConfig(**{**quant.to_dict(), **change}))


def test_other_channels_and_other_families_are_refused(files):
    folder, _, quant = files
    with pytest.raises(CheckpointError, match="expected"):
        load_published(folder / "q.pth", {**UNET_CONFIG, "ch": 32}, PIXEL, quant)
    save_file({"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(1)}, folder / "latent.safetensors")
    with pytest.raises(CheckpointError, match="latent"):
        load_published(folder / "latent.safetensors", UNET_CONFIG, PIXEL, quant)


def test_weights_only_file_and_activations_asked_for(tmp_path):
    unet, model, quant = quantized()
    save_published(tmp_path / "w.pth", model, PIXEL, unet.state_dict(), activations=False)
    assert not any("act_quantizer" in name for name in read_tensors(tmp_path / "w.pth"))
    with pytest.raises(CheckpointError, match="weights only"):
        load_published(tmp_path / "w.pth", UNET_CONFIG, PIXEL, quant)
    plain = load_published(tmp_path / "w.pth", UNET_CONFIG, PIXEL, QuantConfig(weight_bit=4, split=True))
    enable_activations(model, False)
    assert torch.equal(plain(X, T), model(X, T))


def test_not_finite_values_are_named(files):
    folder, _, quant = files
    state = read_tensors(folder / "q.pth")
    state = {name: tensor.clone() for name, tensor in state.items()}
    state["model.conv_in.weight"][0, 0, 0, 0] = float("nan")
    torch.save(state, folder / "nan.pth")
    with pytest.raises(CheckpointError, match=r"conv_in\.weight"):
        load_published(folder / "nan.pth", UNET_CONFIG, PIXEL, quant)


def test_other_widths_of_asymmetric_activations_are_named(tmp_path):
    unet, model, quant = quantized(a_sym=False)
    save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    load_published(tmp_path / "q.pth", UNET_CONFIG, PIXEL, quant)
    for bits in (4, 6, 7, 9, 16):
        with pytest.raises(
            CheckpointError,
            match=rf"act_bit {bits} was given, but the activation zero points of the file are those of 8",
        ):
            load_published(tmp_path / "q.pth", UNET_CONFIG, PIXEL, replace(quant, act_bit=bits))


def test_symmetric_activations_do_not_tell_their_width_and_the_log_says_so(tmp_path, caplog):
    unet, model, quant = quantized(a_sym=True)
    save_published(tmp_path / "q.pth", model, PIXEL, unet.state_dict(), activations=True)
    load_published(tmp_path / "q.pth", UNET_CONFIG, PIXEL, quant)
    assert "it does not show the width of its activations" in caplog.text


def test_published_files_do_not_hold_their_own_name(files, tmp_path):
    unet, model, _ = quantized()
    for name in "ab":
        save_published(tmp_path / name, model, PIXEL, unet.state_dict(), activations=True)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_family_that_is_not_registered_is_named(files, monkeypatch):
    folder, _, _ = files
    monkeypatch.setattr(architecture, "_FAMILIES", {})
    with pytest.raises(CheckpointError, match=r"of the pixel family, expected custom"):
        load_packed(folder / "q.safetensors")


def test_header_tells_how_it_was_made(files):
    folder, _, quant = files
    _, info = load_packed(folder / "q.safetensors")
    assert info.calibration == {"iters": 1} and info.config == quant and len(info.source_sha256) == 64
    assert json.loads(json.dumps(info.unet_config))["ch"] == tiny.MODEL.ch


def test_2_bit_activations_show_their_width():
    """The middle of the grid is 1.5: zero points of 1 and of 2 belong to 2 bits."""
    for zero in (1.0, 2.0):
        state = {"model.mid.attn_1.act_quantizer_q.zero_point": torch.tensor(zero)}
        assert infer_act_bits(PIXEL, state) == 2
