"""The tables that `reproduce.py` fills: their rows, their sampling commands and the published figures."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from qdiff_cli.bundled import NAMES, folder_of, quantization_options, sampling_command
from qdiff_cli.commands.sample_ddim import PixelCommand
from qdiff_cli.commands.sample_ldm import LatentCommand
from qdiff_cli.commands.txt2img import TextCommand
from qdiff_cli.options import project_file
from qdiff_cli.quantization_options import QuantizationOptions
from qdiff_cli.sampling_run import SamplingCommand

FULL, LINEAR, QDIFF = "full precision", "linear", "Q-Diffusion"
DASH = "\N{EN DASH}"  # stands for a published figure without a source that can be cited


@dataclass(frozen=True)
class Row:
    """A row of a table: a method with its bit widths.

    Attributes:
        method: `FULL`, `LINEAR` or `QDIFF`.
        weight_bit: bits of weights; 32: full precision.
        act_bit: bits of activations; 32: full precision.
        published: the published figures by name, as text.
    """

    method: str
    weight_bit: int = 32
    act_bit: int = 32
    published: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        """The name of the row in the table."""
        return self.method if self.method == FULL else f"{self.method} W{self.weight_bit}A{self.act_bit}"

    @property
    def slug(self) -> str:
        """The name of the row in --rows and in paths."""
        return self.name.lower().replace(" ", "-")

    @property
    def file(self) -> str:
        """The name of the calibrated checkpoint for this row, without its suffix."""
        return f"w{self.weight_bit}a{self.act_bit}"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or the table of a bundled model.

    Attributes:
        name: the name of the table in --table and in paths.
        title: the heading.
        command: the sampling command in full precision, with the options of a calibration. The number, seed and folder
            of the images are set for each row.
        activations: the additional options of rows with quantized activations, by name.
        rows: the rows.
        metrics: the metrics of evaluate.py.
        images: the number of images of the published figures.
        source: the table of the paper with the figures that are a dash here.
        reference: the reference images; None: they are given, or sampled in full precision for a bundled model.
        crop: the size that reference images are cut to, in pixels; None: they are not cut.
        checkpoints: a folder of calibrated checkpoints of a bundled model; None: the table is not of a bundled model.
        captions: images are sampled from COCO captions, one image for each caption.
        prompts: images store their prompts, for the CLIP score.
    """

    name: str
    title: str
    command: SamplingCommand
    activations: dict[str, Any]
    rows: Sequence[Row]
    metrics: tuple[str, ...]
    images: int
    source: str = ""
    reference: str | None = None
    crop: int | None = None
    checkpoints: Path | None = None
    captions: bool = False
    prompts: bool = False

    @property
    def bundled(self) -> bool:
        """Whether this is the table of a bundled model."""
        return self.checkpoints is not None


def _rows(full: dict[str, str], linear: Sequence[dict[str, str]], qdiff: Sequence[dict[str, str]]) -> list[Row]:
    """The usual rows of a table.

    Args:
        full: the published figures of full precision.
        linear: the published figures of nearest rounding, in the order W8A32, W4A32, W8A8, W4A8.
        qdiff: the published figures of Q-Diffusion, in the same order.
    """
    bits = [(8, 32), (4, 32), (8, 8), (4, 8)]
    rows = [Row(FULL, published=full)]
    for (weight_bit, act_bit), of_linear, of_qdiff in zip(bits, linear, qdiff, strict=True):
        rows += [Row(LINEAR, weight_bit, act_bit, of_linear), Row(QDIFF, weight_bit, act_bit, of_qdiff)]
    return rows


def _fid_is(fid: str, score: str) -> dict[str, str]:
    return {"fid": fid, "is": score}


def _fid(*values: str) -> list[dict[str, str]]:
    return [{"fid": value} for value in values]


def _cifar10() -> PaperTable:
    linear = [_fid_is(DASH, DASH), _fid_is(DASH, DASH), _fid_is(DASH, DASH), _fid_is("188.11", "2.45")]
    qdiff = [_fid_is(DASH, DASH), _fid_is("5.09", DASH), _fid_is("3.75", DASH), _fid_is("4.93", DASH)]
    return PaperTable(
        name="cifar10",
        title="CIFAR-10, DDIM, 100 quad steps",
        command=PixelCommand(
            config=project_file("configs/cifar10.yml"),
            use_pretrained=True,
            timesteps=100,
            eta=0.0,
            skip_type="quad",
            quantization=QuantizationOptions(split=True, cali_st=20, cali_batch_size=32, cali_n=256),
        ),
        activations={"quant_act": True, "act_bit": 8, "a_sym": True},
        rows=_rows(_fid_is("4.22", DASH), linear, qdiff),
        metrics=("fid", "is", "kid", "pr"),
        images=50_000,
        source="table 1",
        reference="cifar10-train",
    )


def _lsun(name: str, folder: str, title: str, custom_steps: int, eta: float, rows: Sequence[Row]) -> PaperTable:
    more_options = {"a_sym": True, "a_min_max": True, "running_stat": True} if name == "lsun-bedroom" else {}
    return PaperTable(
        name=name,
        title=title,
        command=LatentCommand(
            resume_base=project_file(f"models/ldm/{folder}/model.ckpt"),
            batch_size=10,
            custom_steps=custom_steps,
            eta=eta,
            seed=41,
            quantization=QuantizationOptions(cali_st=20, cali_batch_size=32, cali_n=256),
        ),
        activations={"quant_act": True, "act_bit": 8} | more_options,
        rows=rows,
        metrics=("fid", "kid", "pr"),
        images=50_000,
        source="table 2",
        crop=256,
    )


def _bedroom() -> PaperTable:
    rows = _rows({"fid": "2.98"}, _fid(DASH, "82.69", DASH, DASH), _fid(DASH, "4.86", DASH, "5.32"))
    title = "LSUN bedrooms, LDM-4, 200 steps, eta 1"
    return _lsun("lsun-bedroom", "lsun_beds256", title, 200, 1.0, rows)


def _church() -> PaperTable:
    rows = _rows({"fid": "4.06"}, _fid(DASH, "32.54", DASH, DASH), _fid(DASH, "4.45", DASH, DASH))
    title = "LSUN churches, LDM-8, 500 steps, eta 0"
    return _lsun("lsun-church", "lsun_churches256", title, 400, 0.0, rows)


def _stable_diffusion() -> PaperTable:
    figures = (("13.15", ".3146"), ("13.31", ".3134"), ("14.49", ".3121"))
    full, w8a8, w4a8 = ({"fid": fid, "clip": clip} for fid, clip in figures)
    recipe = QuantizationOptions(split=True, cali_st=25, cali_batch_size=8, cali_n=128)
    return PaperTable(
        name="stable-diffusion",
        title="Stable Diffusion v1.4, PLMS 50 steps, guidance 7.5, COCO captions "
        "(published figures: 30,000 images, by TFMQ-DM)",
        command=TextCommand(
            config=project_file("configs/stable-diffusion/v1-inference.yaml"),
            ckpt=project_file("models/ldm/stable-diffusion-v1/model.ckpt"),
            plms=True,
            n_samples=1,
            n_iter=1,
            skip_grid=True,
            ddim_steps=50,
            scale=7.5,
            no_grad_ckpt=True,
            quantization=replace(recipe, cond=True),
        ),
        activations={"quant_act": True, "act_bit": 8, "sm_abit": 16, "running_stat": True},
        rows=[
            Row(FULL, published=full),
            Row(LINEAR, 8, 8),
            Row(QDIFF, 8, 8, w8a8),
            Row(LINEAR, 4, 8),
            Row(QDIFF, 4, 8, w4a8),
        ],
        metrics=("fid", "kid", "pr"),
        images=30_000,
        crop=512,
        captions=True,
        prompts=True,
    )


def _bundled(name: str) -> PaperTable:
    command, options = sampling_command(name, 8), quantization_options(name)
    recipe = QuantizationOptions(split=True, preset="fast", cali_st=20, cali_n=64)
    if isinstance(command, TextCommand):
        recipe, command = replace(recipe, cali_n=32), replace(command, skip_grid=True)
    activations = {"quant_act": True, "a_sym": options.a_sym, "sm_abit": options.sm_abit}
    title = {"emoji32": "Pixel DDPM", "emoji64": "Latent diffusion", "emoji64-text": "Text to image"}[name]
    return PaperTable(
        name=name,
        title=f"{title} ({name})",
        command=replace(command, quantization=recipe),
        activations=activations,
        rows=_rows({}, [{}] * 4, [{}] * 4),
        metrics=("fid", "kid", "pr"),
        images=64,
        checkpoints=folder_of(name),
        prompts=name == "emoji64-text",
    )


TABLES = {
    "cifar10": lambda: [_cifar10()],
    "lsun-bedroom": lambda: [_bedroom()],
    "lsun-church": lambda: [_church()],
    "stable-diffusion": lambda: [_stable_diffusion()],
    "bundled": lambda: [_bundled(name) for name in NAMES],
}
