"""The tables that `reproduce.py` fills: their rows, the commands behind them, the published numbers."""

import shlex
from dataclasses import dataclass, field
from pathlib import Path

from qdiff_cli.bundled import NAMES, SHOWN_PROMPTS, folder_of, quantization_options, sampling_command

FULL, LINEAR, QDIFF = "full precision", "linear", "Q-Diffusion"
# [r]: reported from memory of the paper's tables, not read in a stored source
FROM_MEMORY = "*: from memory of the paper's tables; check it there"


@dataclass(frozen=True)
class Row:
    """A setting of a table. published: its figures there, as text."""

    method: str
    weight_bit: int = 32
    act_bit: int = 32
    published: dict[str, str] = field(default_factory=dict, hash=False)

    @property
    def name(self) -> str:
        return self.method if self.method == FULL else f"{self.method} W{self.weight_bit}A{self.act_bit}"

    @property
    def slug(self) -> str:
        return self.name.lower().replace(" ", "-")

    @property
    def file(self) -> str:
        """The calibrated checkpoint that this row looks for, without its suffix."""
        return f"w{self.weight_bit}a{self.act_bit}"


@dataclass(frozen=True)
class PaperTable:
    """A table of the paper, or the one of a bundled model.

    command: the sampling command in full precision, but for number, seed and folder of the images. weights, acts: the options that
    quantize weights, and activations beside them. calibration: the options of a calibration. count, logdir, steps: the options for
    the number of images, for the folder, for the sampling steps. reference: what images are compared with (None: other samples of full
    precision). images: how many the published figures come from. metrics: those of evaluate.py.
    checkpoints: a folder of calibrated checkpoints that come with the model. crop: to what size reference images are cut. prompts:
    images carry theirs, for the CLIP score.
    """

    name: str
    title: str
    command: str
    weights: str
    acts: str
    calibration: str
    count: str
    seed: int
    logdir: str
    steps: str
    rows: list[Row]
    metrics: tuple[str, ...]
    images: int
    reference: str | None = None
    crop: int | None = None
    checkpoints: Path | None = None
    images_each: int = 1  # images that one of `count` stands for
    prompts: bool = False

    @property
    def bundled(self) -> bool:
        return self.checkpoints is not None


def _rows(full: dict, linear: list[dict], qdiff: list[dict]) -> list[Row]:
    """Rows in the order W8A32, W4A32, W8A8, W4A8."""
    settings = [(8, 32), (4, 32), (8, 8), (4, 8)]
    rows = [Row(FULL, published=full)]
    for (weight, act), first, second in zip(settings, linear, qdiff, strict=True):
        rows += [Row(LINEAR, weight, act, first), Row(QDIFF, weight, act, second)]
    return rows


def _fid_is(fid: str, score: str) -> dict[str, str]:
    return {"fid": fid, "is": score}


def _fid(*values: str) -> list[dict[str, str]]:
    return [{"fid": value} if value else {} for value in values]


def _cifar10() -> PaperTable:
    linear = [
        _fid_is("4.71*", "8.93*"),
        _fid_is("141.47*", "4.20*"),
        _fid_is("118.26*", "5.23*"),
        _fid_is("188.11", "2.45"),
    ]
    qdiff = [_fid_is("4.27*", "9.15*"), _fid_is("5.09", "8.78*"), _fid_is("3.75", "9.48*"), _fid_is("4.93", "9.12*")]
    return PaperTable(
        name="cifar10",
        title="CIFAR-10, DDIM, 100 quad steps",
        command="sample_diffusion_ddim.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --eta 0 --skip_type quad",
        weights="--split",
        acts="--quant_act --act_bit 8 --a_sym",
        calibration="--cali_st 20 --cali_batch_size 32 --cali_n 256",
        count="--max_images",
        seed=1234,
        logdir="-l",
        steps="--timesteps",
        rows=_rows(_fid_is("4.22", "9.12*"), linear, qdiff),
        metrics=("fid", "is", "kid", "pr"),
        images=50_000,
        reference="cifar10-train",
    )


def _lsun(name: str, folder: str, title: str, steps: str, rows: list[Row]) -> PaperTable:
    return PaperTable(
        name=name,
        title=title,
        command=f"sample_diffusion_ldm.py -r models/ldm/{folder}/model.ckpt --batch_size 10 {steps}",
        weights="",
        acts="--quant_act --act_bit 8" + (" --a_sym --a_min_max --running_stat" if name == "lsun-bedroom" else ""),
        calibration="--cali_st 20 --cali_batch_size 32 --cali_n 256",
        count="-n",
        seed=41,
        logdir="-l",
        steps="-c",
        rows=rows,
        metrics=("fid", "kid", "pr"),
        images=50_000,
        crop=256,
    )


def _stable_diffusion() -> PaperTable:
    full, eight, four = (
        {"fid": fid, "clip": clip} for fid, clip in (("13.15", ".3146"), ("13.31", ".3134"), ("14.49", ".3121"))
    )
    return PaperTable(
        name="stable-diffusion",
        title="Stable Diffusion v1.4, PLMS 50 steps, guidance 7.5, COCO captions (published figures: 30,000 images, by TFMQ-DM)",
        command="txt2img.py --plms --cond --n_samples 1 --n_iter 1 --skip_grid --ddim_steps 50 --scale 7.5",
        weights="--split --no_grad_ckpt",
        acts="--quant_act --act_bit 8 --sm_abit 16",
        calibration="--cali_st 25 --cali_batch_size 8 --cali_n 128 --running_stat",
        count="",  # by the number of captions
        seed=42,
        logdir="--outdir",
        steps="--ddim_steps",
        rows=[
            Row(FULL, published=full),
            Row(LINEAR, 8, 8),
            Row(QDIFF, 8, 8, eight),
            Row(LINEAR, 4, 8),
            Row(QDIFF, 4, 8, four),
        ],
        metrics=("fid", "kid", "pr"),
        images=30_000,
        crop=512,
        prompts=True,
    )


def _bundled(name: str) -> PaperTable:
    text = name == "emoji64-text"
    command, options = sampling_command(name, 8), quantization_options(name)
    number = {"emoji32": "--max_images", "emoji64": "-n", "emoji64-text": "--n_samples"}[name]
    for option in (number, "--seed"):
        at = command.index(option)
        del command[at : at + 2]
    return PaperTable(
        name=name,
        title={"emoji32": "Pixel DDPM", "emoji64": "Latent diffusion", "emoji64-text": "Text to image"}[name]
        + f" ({name})",
        command=shlex.join([*command, "--skip_grid"] if text else command),
        weights="--split",
        acts=" ".join(word for word in options if word != "--split"),
        calibration="--preset fast --cali_st 20 --cali_n " + ("32" if text else "64"),
        count=number,
        seed=0,
        logdir="--outdir" if text else "-l",
        steps={"emoji32": "--timesteps", "emoji64": "-c", "emoji64-text": "--ddim_steps"}[name],
        rows=_rows({}, [{}] * 4, [{}] * 4),
        metrics=("fid", "kid", "pr"),
        images=64,
        checkpoints=folder_of(name),
        images_each=SHOWN_PROMPTS if text else 1,
        prompts=text,
    )


def tables(name: str) -> list[PaperTable]:
    """The tables behind a name of `--table`; `bundled` has one for each bundled model."""
    if name == "bundled":
        return [_bundled(model) for model in NAMES]
    bedroom = _rows({"fid": "2.98"}, _fid("", "82.69", "6.69*", "24.86*"), _fid("", "4.86", "4.40*", "5.32"))
    church = _rows({"fid": "4.06"}, _fid("", "32.54", "14.62*", "14.92*"), _fid("", "4.45", "3.65*", "4.12*"))
    return [
        {
            "cifar10": _cifar10,
            "lsun-bedroom": lambda: _lsun(
                name, "lsun_beds256", "LSUN bedrooms, LDM-4, 200 steps, eta 1", "-c 200 -e 1.0", bedroom
            ),
            "lsun-church": lambda: _lsun(
                name, "lsun_churches256", "LSUN churches, LDM-8, 500 steps, eta 0", "-c 400 -e 0.0", church
            ),
            "stable-diffusion": _stable_diffusion,
        }[name]()
    ]


NAMED = ("cifar10", "lsun-bedroom", "lsun-church", "stable-diffusion", "bundled")
