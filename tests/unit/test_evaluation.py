"""Images, features, figures of merit and cost against their definitions and against torch-fidelity."""

import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from qdiff.architecture import Architecture
from qdiff.config import QuantConfig
from qdiff.errors import CheckpointError, ConfigError
from qdiff.evaluation import metrics
from qdiff.evaluation.cost import measure_cost
from qdiff.evaluation.explain import Activations, observe, split_gains
from qdiff.evaluation.features import Extractor, extract, load_extractor
from qdiff.evaluation.images import Selected, center_crop, open_images
from qdiff.evaluation.lite0 import load_lite0, perceptual_distance, to_input
from qdiff.evaluation.trajectory import Trajectories
from qdiff.model import init_weights, quantize_model
from qdiff.utils.compat import make_torchvision_importable
from tests.support import pictures, tiny
from tests.support.quantized import Payload

CPU = torch.device("cpu")
COUNT, BATCH = 40, 16


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return [pictures.save(pictures.make(COUNT, seed), root / name) for seed, name in enumerate("ab")]


@pytest.fixture(scope="module")
def quick():
    """An extractor that costs nothing: colors of 16 parts of the image, and ten of them as logits."""

    def run(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        colors = nn.functional.adaptive_avg_pool2d(images.float(), 4).flatten(1)
        return colors, colors[:, :10] / 50

    return Extractor("quick", "0" * 64, "", run)


@pytest.fixture(scope="module")
def both(folders, quick, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return [extract(Selected(open_images(folder)), quick, cache, BATCH) for folder in folders]


def fidelity(folders, name, extractor, **options):
    """torch-fidelity's own figures of the same folders."""
    make_torchvision_importable()
    import torch_fidelity

    layers = {f"feature_layer_{metric}": "features" for metric in ("fid", "kid", "prc")} if name == "quick-test" else {}
    if name == "quick-test":
        from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

        class Registered(torch_fidelity.FeatureExtractorBase):
            def __init__(self, name, features_list, **kwargs):
                super().__init__(name, features_list)

            @staticmethod
            def get_provided_features_list():
                return "features", "logits"

            def forward(self, x):
                found = dict(zip(("features", "logits"), extractor.run(x), strict=True))
                return tuple(found[name] for name in self.features_list)

        FEATURE_EXTRACTORS_REGISTRY[name] = Registered
        layers["feature_layer_isc"] = "logits"
    return torch_fidelity.calculate_metrics(
        input1=str(folders[0]),
        input2=str(folders[1]),
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        feature_extractor=name,
        kid_subset_size=COUNT,
        batch_size=BATCH,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        **layers,
        **options,
    )


def agrees(ours, theirs):
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-12)
    assert ours["is"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert (ours["precision"], ours["recall"]) == pytest.approx((theirs["precision"], theirs["recall"]), rel=1e-6)


def test_figures_are_those_of_torch_fidelity(folders, both, quick):
    agrees(metrics.compute(*both, metrics.METRICS), fidelity(folders, "quick-test", quick))


@pytest.mark.slow
def test_inception_figures_are_those_of_torch_fidelity(folders, tmp_path, monkeypatch):
    """With random weights: the real ones cannot be had offline."""
    make_torchvision_importable()
    from torch_fidelity import feature_extractor_inceptionv3 as module

    monkeypatch.setattr(
        module.FeatureExtractorInceptionV3,
        "load_state_dict",
        lambda self, state: nn.Module.load_state_dict(self, state, False),
    )
    torch.manual_seed(0)
    torch.save({}, tmp_path / "empty.pth")
    network = module.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(tmp_path / "empty.pth")
    )
    weights = tmp_path / "inception.pth"
    torch.save(network.state_dict(), weights)
    monkeypatch.undo()
    few = [pictures.save(pictures.make(8, seed), tmp_path / name) for seed, name in enumerate("ab")]
    inception = load_extractor("inception", CPU, weights)
    assert "other weights" in inception.note
    found = [extract(Selected(open_images(folder)), inception, tmp_path / "cache", 8) for folder in few]
    ours = metrics.compute(*found, ("fid", "kid"))
    make_torchvision_importable()
    import torch_fidelity

    theirs = torch_fidelity.calculate_metrics(
        input1=str(few[0]),
        input2=str(few[1]),
        fid=True,
        kid=True,
        kid_subset_size=8,
        batch_size=8,
        cuda=False,
        cache=False,
        verbose=False,
        save_cpu_ram=True,
        feature_extractor_weights_path=str(weights),
    )
    assert ours["fid"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6, abs=1e-9)
    assert ours["kid"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6, abs=1e-12)


def test_weights_that_want_to_run_code_are_refused(tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "evil.pth")
    with pytest.raises(CheckpointError):
        load_extractor("inception", CPU, tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_fid_is_the_formula(both):
    """Heusel et al. 2017 with a symmetric square root in NumPy, on so few features that covariances have full rank."""
    columns = torch.cat([found.features for found in both]).var(0).topk(24).indices
    x, y = (found.features[:, columns].double().numpy() for found in both)
    logits, name = both[0].logits, both[0].extractor
    short = [metrics.Features(torch.from_numpy(values), logits, name, "") for values in (x, y)]
    first, second = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(values**0.5) @ vectors.T
    trace = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(first + second) - 2 * trace
    assert metrics.compute(*short, ("fid",))["fid"] == pytest.approx(expected, rel=1e-4)


def test_fid_grows_with_noise(folders, both, quick, tmp_path):
    clean = pictures.make(COUNT, 0)
    distances = []
    for sd in (10, 40):
        noisy = (
            (clean + sd * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)))
            .clamp(0, 255)
            .to(torch.uint8)
        )
        found = extract(
            Selected(open_images(pictures.save(noisy, tmp_path / str(sd)))), quick, tmp_path / "cache", BATCH
        )
        distances.append(metrics.compute(found, both[0], ("fid",))["fid"])
    assert 1 < distances[0] < distances[1]


def test_npz_and_lmdb_hold_the_same_images(folders, both, quick, tmp_path):
    images = pictures.make(COUNT, 0)
    array = images.permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "plain.npz", arr_0=array)
    np.savez_compressed(tmp_path / "packed.npz", arr_0=array)
    lmdb = pytest.importorskip("lmdb")
    with lmdb.open(str(tmp_path / "db"), map_size=1 << 24) as database, database.begin(write=True) as transaction:
        for i, pixels in enumerate(array):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, format="PNG")
            transaction.put(f"{i:04d}".encode(), buffer.getvalue())
    hashes = {}
    for name in ("plain.npz", "packed.npz", "db"):
        source = Selected(open_images(tmp_path / name))
        assert torch.equal(source.read(range(COUNT)), images)
        assert torch.equal(extract(source, quick, tmp_path / "cache", BATCH).features, both[0].features)
        hashes[name] = source.hash
    assert hashes["db"] == Selected(open_images(folders[0])).hash  # the same files
    assert len(set(hashes.values())) == 3


def test_crop_is_that_of_the_latent_diffusion_loader(tmp_path):
    pixels = np.arange(40 * 61 * 3, dtype=np.uint8).reshape(40, 61, 3)
    expected = Image.fromarray(pixels[:, 10:50]).resize((16, 16), Image.Resampling.BICUBIC)
    assert np.array_equal(np.asarray(center_crop(Image.fromarray(pixels), 16)), np.asarray(expected))


def test_features_are_made_once_and_belong_to_their_images(folders, quick, tmp_path):
    calls = []
    counted = Extractor(
        quick.name, quick.weights_sha256, "", lambda images: calls.append(len(images)) or quick.run(images)
    )
    first = extract(Selected(open_images(folders[0])), counted, tmp_path, BATCH)
    again = extract(Selected(open_images(folders[0])), counted, tmp_path, BATCH)
    assert torch.equal(first.features, again.features) and calls == [16, 16, 8]
    changed = pictures.make(COUNT, 0)
    changed[3, 0, 0, 0] ^= 1
    extract(Selected(open_images(pictures.save(changed, tmp_path / "changed"))), counted, tmp_path, BATCH)
    assert sum(calls) == 2 * COUNT and len(list(tmp_path.glob("*.safetensors"))) == 2


def test_an_interrupted_extraction_continues(folders, quick, tmp_path):
    calls = []

    def broken(images):
        calls.append(len(images))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return quick.run(images)

    interrupted = Extractor(quick.name, quick.weights_sha256, "", broken)
    with pytest.raises(KeyboardInterrupt):
        extract(Selected(open_images(folders[0])), interrupted, tmp_path, BATCH)
    found = extract(Selected(open_images(folders[0])), interrupted, tmp_path, BATCH)
    assert calls == [16, 16, 16, 8] and len(found) == COUNT
    assert torch.equal(
        found.features, extract(Selected(open_images(folders[0])), quick, tmp_path / "other", BATCH).features
    )


def test_two_extractions_of_the_same_images_at_once(folders, quick, tmp_path):
    """The one that comes second finds the parts merged and gone, and must not merge what it has made itself."""
    images = Selected(open_images(folders[0]))
    expected = extract(images, quick, tmp_path / "other", BATCH)
    calls = []

    def run(batch):
        calls.append(len(batch))
        if len(calls) == 2:  # the other one comes, finds a part, makes the rest, merges
            extract(images, quick, tmp_path, BATCH)
        return quick.run(batch)

    found = extract(images, Extractor(quick.name, quick.weights_sha256, quick.note, run), tmp_path, BATCH)
    assert calls == [16, 16, 8]
    assert torch.equal(found.features, expected.features)
    assert torch.equal(extract(images, quick, tmp_path, BATCH).features, expected.features)


def test_a_wrong_cache_is_named(folders, quick, tmp_path):
    for folder in folders:
        extract(Selected(open_images(folder)), quick, tmp_path, BATCH)
    first, second = sorted(tmp_path.glob("*.safetensors"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(ConfigError, match=f"{second.name}: made from other images: images_sha256"):
        for folder in folders:
            extract(Selected(open_images(folder)), quick, tmp_path, BATCH)
    second.write_bytes(b"\x10" * 100)
    with pytest.raises(ConfigError, match=f"{second.name}: a damaged cache file"):
        for folder in folders:
            extract(Selected(open_images(folder)), quick, tmp_path, BATCH)


def test_a_cache_with_too_few_features_is_named(folders, quick, tmp_path):
    extract(Selected(open_images(folders[0])), quick, tmp_path, BATCH)
    (path,) = tmp_path.glob("*.safetensors")
    with safe_open(path, "pt") as file:
        metadata, shorter = (
            file.metadata(),
            {name: file.get_tensor(name)[:-1].clone() for name in ("features", "logits")},
        )
    save_file(shorter, path, metadata=metadata)
    with pytest.raises(ConfigError, match=f"{path.name}: features of 39 images, expected 40"):
        extract(Selected(open_images(folders[0])), quick, tmp_path, BATCH)


def test_numbers_in_names_are_ordered_by_value(tmp_path):
    batch = pictures.make(12, 0)
    for i, image in enumerate(batch):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    images = Selected(open_images(tmp_path), 11)
    assert images.names() == [str(i) for i in range(11)]
    assert torch.equal(images.read(range(11)), batch[:11])


def test_bad_images_are_named(folders, tmp_path):
    pictures.save(pictures.make(3, 0), tmp_path / "broken")
    (tmp_path / "broken" / "0001.png").write_bytes((tmp_path / "broken" / "0001.png").read_bytes()[:60])
    with pytest.raises(ConfigError, match=r"0001\.png: a broken image"):
        Selected(open_images(tmp_path / "broken")).read(range(3))
    mixed = pictures.save(pictures.make(3, 0), tmp_path / "mixed")
    Image.new("RGB", (16, 24)).save(mixed / "0002.png")
    with pytest.raises(ConfigError, match="image 2 is 16x24, the first one 32x32"):
        Selected(open_images(mixed)).read(range(3))
    assert Selected(open_images(mixed), crop=8).read(range(3)).shape == (3, 3, 8, 8)
    with pytest.raises(ConfigError, match="40 images, expected at least 50"):
        Selected(open_images(folders[0]), 50)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="no images"):
        open_images(tmp_path / "empty")
    with pytest.raises(ConfigError, match="expected a folder of images"):
        open_images(tmp_path / "nothing")
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((2, 8, 8, 3)))
    with pytest.raises(ConfigError, match=r"float64 \[2, 8, 8, 3\], expected uint8"):
        open_images(tmp_path / "floats.npz")
    np.savez(tmp_path / "objects.npz", arr_0=np.array([{}], dtype=object))
    with pytest.raises(ConfigError):
        open_images(tmp_path / "objects.npz")


def test_statistics_round_trip_and_those_of_another_extractor(both, tmp_path):
    path = tmp_path / "s.npz"
    metrics.save_statistics(path, metrics.statistics_of(both[1]))
    kept = metrics.load_statistics(path)
    assert metrics.compute(both[0], kept, metrics.METRICS)["fid"] == metrics.compute(*both, ("fid",))["fid"]
    other = metrics.Statistics(kept.mu, kept.sigma, "inception 0123", kept.count, "s.npz")
    with pytest.raises(ConfigError, match=r"s\.npz: made with the extractor inception 0123, expected quick"):
        metrics.compute(both[0], other, ("fid",))
    np.savez(tmp_path / "adm.npz", mu=kept.mu, sigma=kept.sigma, mu_s=kept.mu, sigma_s=kept.sigma)
    with pytest.raises(ConfigError, match=r"adm\.npz: mu \[48\] and sigma \[48, 48\], expected \[2048\]"):
        metrics.load_statistics(tmp_path / "adm.npz")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"s\.npz: cannot be read as \.npz"):
        metrics.load_statistics(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    (tmp_path / "array.npy").rename(tmp_path / "array.npz")
    with pytest.raises(ConfigError, match=r"array\.npz: cannot be read as \.npz"):
        metrics.load_statistics(tmp_path / "array.npz")
    np.savez(tmp_path / "reference.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), mu=kept.mu, sigma=kept.sigma)
    assert metrics.load_statistics(tmp_path / "reference.npz") is None


def test_cost_of_a_small_network():
    """By hand: a 3x3 convolution 4 -> 8 at 6x6 (stride 1), then a linear layer 8 -> 5 on 36 tokens."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(4, 8, 3, padding=1), nn.Linear(8, 5)

        def forward(self, x, t):
            return self.linear(self.conv(x).flatten(2).transpose(1, 2))

    family = Architecture("small", lambda _: Network(), {})
    wrapped = quantize_model(Network(), family, QuantConfig(4, quant_act=True))
    init_weights(wrapped, "max")
    inputs = (torch.randn(1, 4, 6, 6), torch.ones(1))
    conv, linear = 36 * 8 * 4 * 9, 36 * 5 * 8
    quantizers = [wrapped.conv.act_quantizer, wrapped.linear.act_quantizer]
    found = measure_cost(wrapped, inputs)
    assert (found.macs, found.bops) == (conv + linear, (conv + linear) * 4 * 32)  # activations are not quantized yet
    for quantizer in quantizers:
        quantizer.scale, quantizer.enabled = torch.tensor(0.1), True
    assert measure_cost(wrapped, inputs).bops == (conv + linear) * 4 * 8
    assert found.size == (288 + 40) / 2 + (8 + 5) * 4
    assert measure_cost(wrapped, inputs, 32, 32).size == (288 + 40 + 8 + 5) * 4


def test_cost_of_what_stays_in_full_precision():
    """By hand: 2 x 3 pixels, upsampled to 4 x 6 in two groups, convolved, attended to by 24 tokens, and two linears."""

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.kept = nn.ConvTranspose2d(4, 8, 2, stride=2, groups=2), nn.Conv2d(8, 8, 3, padding=1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.own, self.head = nn.Parameter(torch.randn(8, 8)), nn.Linear(8, 5)

        def forward(self, x):
            tokens = self.kept(self.up(x)).flatten(2).transpose(1, 2)
            attended, _ = self.attention(tokens, tokens, tokens)
            return self.head(F.scaled_dot_product_attention(attended @ self.own, attended, attended))

    family = Architecture("small", lambda _: Network(), {}, keep=("kept", "MultiheadAttention", "own"))
    wrapped = quantize_model(Network(), family, QuantConfig(4, policy=(("head", "W8"),))).requires_grad_(False)
    init_weights(wrapped, "max")
    up, head = 6 * 2 * (2 * 4 * 4), 24 * 8 * 5
    attention = 4 * 24 * 8 * 8 + 2 * 24 * 24 * 8
    kept = 24 * 8 * 8 * 9 + attention + 24 * 8 * 8 + 2 * 24 * 24 * 8
    found = measure_cost(wrapped, (torch.randn(1, 4, 2, 3),))
    assert found.macs == up + head + kept
    assert found.bops == (up * 4 + head * 8) * 32 + kept * 32 * 32
    parameters = 8 + (8 * 8 * 9 + 8) + (4 * 8 * 8 + 4 * 8) + 8 * 8 + 5
    assert found.size == 64 / 2 + 40 + parameters * 4
    wrapped.head.smoothing = torch.ones(8)
    assert measure_cost(wrapped, (torch.randn(1, 4, 2, 3),)).size == found.size + 8 * 4


def test_perceptual_distance_is_a_distance():
    network, images = load_lite0(), pictures.make(4, 0)
    assert torch.equal(perceptual_distance(network, images, images), torch.zeros(4))
    near = (images.int() + 3).clamp(0, 255).to(torch.uint8)
    first, second = (
        perceptual_distance(network, images, near),
        perceptual_distance(network, images, pictures.make(4, 1)),
    )
    assert (first > 0).all() and (second > first).all()
    assert to_input(images).shape == (4, 3, 224, 224)


def test_x_errors_follow_the_same_noise():
    """A network that is 0 predicts x_t / sqrt(a) for x_0: after step 1 its states differ from full precision."""
    network = tiny.unet()
    trajectories = Trajectories()
    for chunk in (range(0, 3), range(3, 5)):
        tiny.sampler(5)(network, chunk, 0, trajectories.watch({"same": network}))
        tiny.sampler(5)(network, chunk, 0, trajectories.follow("same"))
        tiny.sampler(5)(lambda x, t: torch.zeros_like(x), chunk, 0, trajectories.follow("zero"))
    errors = trajectories.x_errors()
    assert errors["same"].per_step == [0] * 5 and errors["zero"].per_step[0] == 0 < errors["zero"].mean
    assert trajectories.eps_errors()["same"].mean == 0


def test_observed_ranges_and_shortcuts():
    from ddim.family import PIXEL

    network = tiny.unet()
    wrapped = quantize_model(network, PIXEL, QuantConfig(8, split=True))
    found = observe(network, wrapped, PIXEL, lambda callback: tiny.sampler(5)(network, range(2), 0, callback), 5)
    assert len(found.times) == 5 and all(len(steps) == 5 for steps in found.ranges.values())
    assert set(found.shortcuts) == set(PIXEL.split_points(network)) and found.shortcuts
    for quantiles in found.ranges["conv_in"]:
        assert quantiles == sorted(quantiles) and all(map(math.isfinite, quantiles))


def test_splitting_two_ranges_pays_by_their_ratio():
    """Error step^2 / 12: a half of a tenth of the range has a hundredth of it, so both together have (1 + 0.01) / 2."""
    wide = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (gain,) = split_gains(Activations(shortcuts={"layer": (wide, wide.flip(0) / 10)}))
    assert gain.whole == pytest.approx((2 / 255) ** 2 / 12, rel=0.02)
    assert gain.split / gain.whole == pytest.approx(0.505, rel=0.02)


def test_clip_score_of_a_small_model(tmp_path):
    make_torchvision_importable()
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from ldm.encoders import make_tokenizer
    from qdiff.evaluation.clip import ClipScore

    tokenizer = make_tokenizer(["r e", "re d</w>"])
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="missing"):
        ClipScore(tmp_path, CPU)
    (tmp_path / "vocab.json").write_text(json.dumps(tokenizer.get_vocab()))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nr e\nre d</w>\n")
    images = pictures.make(3, 0)
    whole, parts = ClipScore(tmp_path, CPU), ClipScore(tmp_path, CPU)
    whole.add(images, ["red", "a red", "green"])
    for i, prompt in enumerate(["red", "a red", "green"]):
        parts.add(images[i : i + 1], [prompt])
    assert parts.mean == pytest.approx(whole.mean, abs=1e-6) and -1 < whole.mean < 1
    assert whole.tokenizer("a red")["input_ids"] == tokenizer("a red")["input_ids"]


def test_similarity_of_batches_is_that_of_all_images():
    from qdiff.evaluation.similarity import image_similarity, isolated_pixels, psnr

    first, second, network = pictures.make(6, 0), pictures.make(6, 1), load_lite0()
    second[1], second[4] = first[1], first[4]
    second[4, 0, 9:12:2, 20] = 255 - second[4, 0, 9:12:2, 20]  # dots
    found = image_similarity(zip(first.split(4), second.split(4), strict=True), network)
    assert found.psnr == pytest.approx(psnr(first, second), rel=1e-9) and 0 < found.ssim < 1 and found.perceptual > 0
    dots = isolated_pixels(first, second)
    assert found.isolated == dots.sum() and dots[1] == 0 and found.identity == pytest.approx(2 / 6)
    same = image_similarity([(first, first)], network)
    assert (same.psnr, same.perceptual, same.isolated, same.identity) == (float("inf"), 0.0, 0, 1.0)
    assert image_similarity([(first, second)]).perceptual is None
    assert same.ssim > 0.999 > found.ssim  # float32 squares of up to 255 leave it at 0.9997 on flat images
