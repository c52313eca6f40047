"""A bundled model as a pipeline of diffusers, quantized by one call, beside the checkpoint that the script made of it.

    pip install -e .[diffusers]
    python benchmarks/pipeline.py --images 64 -o pipeline

emoji32 becomes a `UNet2DModel` in a `DDIMPipeline`. `quantize_pipeline` quantizes it at W4A8 by the recipe that the
script's checkpoint names, with as many samples, unless the folder of the results has it already. The table has the
trajectory error and the PSNR of both along the sampling of the full-precision pipeline, from noise that neither was
calibrated on. The picture has a row of images for each network.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import diffusers
import torch
from torch import Tensor, nn

from ddim.config import load_config
from ddim.weights import load_unet
from qdiff.checkpoint import PackedFile, load_packed
from qdiff.config import CalibrationConfig
from qdiff.diffusers import quantize_pipeline
from qdiff.evaluation.page import markdown_table
from qdiff.evaluation.trajectory import Trajectories
from qdiff_cli.bundled import folder_of
from qdiff_cli.comparison import save_image_rows
from qdiff_cli.runs import log_to

STEPS = 50
LEVELS = 3
SAMPLES = {"images_per_call": 64, "call": {"num_inference_steps": STEPS}}
SETTINGS = {"weight_bit": 4, "act_bit": 8, "symmetric": True}
RECIPE = {field.name for field in fields(CalibrationConfig)} - {"num_timesteps", "samples", "seed"}
NAMES = (  # of our UNet, and of UNet2DModel
    (r"temb\.dense\.0", "time_embedding.linear_1"),
    (r"temb\.dense\.1", "time_embedding.linear_2"),
    (r"norm_out", "conv_norm_out"),
    (r"mid\.block_1", "mid_block.resnets.0"),
    (r"mid\.block_2", "mid_block.resnets.1"),
    (r"mid\.attn_1", "mid_block.attentions.0"),
    (r"down\.(\d)\.downsample", r"down_blocks.\1.downsamplers.0"),
    (r"down\.", "down_blocks."),
    (r"up\.(\d)\.", lambda found: f"up_blocks.{LEVELS - 1 - int(found[1])}."),
    (r"\.upsample\.", ".upsamplers.0."),
    (r"\.block\.", ".resnets."),
    (r"\.attn\.", ".attentions."),
    (r"temb_proj", "time_emb_proj"),
    (r"nin_shortcut", "conv_shortcut"),
)
ATTENTION_NAMES = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}


def name_in_diffusers(name: str) -> str:
    """The name of a parameter in a UNet2DModel."""
    for pattern, replacement in NAMES:
        name = re.sub(rf"(?:(?<=\.)|^){pattern}" if not pattern.startswith(r"\.") else pattern, replacement, name)
    if ".attentions." in name:
        *path, layer, parameter = name.split(".")
        name = ".".join([*path, ATTENTION_NAMES[layer], parameter])
    return name


def make_pipeline(unet: nn.Module) -> diffusers.DDIMPipeline:
    """The pipeline of emoji32 with the weights of our UNet."""
    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(32, 64, 128),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        norm_eps=1e-6,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        attention_head_dim=None,
    )
    state = {name_in_diffusers(name): tensor.float() for name, tensor in unet.state_dict().items()}
    for name, own in model.state_dict().items():
        if name in state and state[name].dim() > own.dim():  # attentions: convolutions of 1x1 as linear layers
            state[name] = state[name].flatten(1)
    model.load_state_dict(state)
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return diffusers.DDIMPipeline(model.eval(), scheduler)


@torch.no_grad()
def sample(
    pipe: diffusers.DDIMPipeline,
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    callback: Callable[[Tensor, Tensor, Tensor], None] | None = None,
) -> Tensor:
    """Sample with the scheduler of a pipeline from the noise `x`; images [N, 3, H, W] from 0 to 1."""
    pipe.scheduler.set_timesteps(STEPS)
    for t in pipe.scheduler.timesteps:
        times = t.expand(len(x))
        eps = network(x, times)
        if callback is not None:
            callback(x, times, eps)
        x = pipe.scheduler.step(eps, t, x).prev_sample
    return (x / 2 + 0.5).clamp(0, 1)


def psnr(images: Tensor, expected: Tensor) -> float:
    """The mean PSNR of images in dB."""
    errors = (images - expected).square().flatten(1).mean(1).clamp(min=1e-10)
    return float((-10 * errors.log10()).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64)
    bundled = folder_of("emoji32") / "w4a8.safetensors"
    parser.add_argument("--checkpoint", type=Path, default=bundled, help="what the script made of emoji32 at W4A8")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("-o", "--output", type=Path, default=Path("pipeline"), help="folder of the results")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    log_to(None, verbose=False)
    pipe = make_pipeline(load_unet(load_config("configs/emoji32.yml"), None))
    original, folder = pipe.unet, args.output / "quantized"
    if not folder.is_dir():
        header = PackedFile.open(args.checkpoint).info.calibration
        settings = SETTINGS | {name: header[name] for name in RECIPE if name in header}
        settings |= {"n": header["samples"], "timesteps": header["steps"], "seed": 1}
        quantize_pipeline(pipe, **SAMPLES, **settings, folder=args.output / "calibration")
        pipe.save_pretrained(folder)
    pipe = diffusers.DDIMPipeline.from_pretrained(folder)
    networks: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "script, W4A8": load_packed(args.checkpoint)[0],
        "pipeline, W4A8": lambda x, t: pipe.unet(x, t).sample,
    }
    noise = torch.randn(args.images, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    trajectories = Trajectories()
    full = sample(pipe, lambda x, t: original(x, t).sample, noise, trajectories.watch(networks))
    errors = trajectories.eps_errors()
    images = {"full precision": full} | {name: sample(pipe, network, noise) for name, network in networks.items()}
    rows = [[name, f"{errors[name].mean:.4f}", f"{psnr(images[name], full):.1f}"] for name in networks]
    print(markdown_table(["network", "trajectory error", "PSNR dB"], rows))
    pixels = {name: (batch * 255).round().byte() for name, batch in images.items()}
    save_image_rows(args.output / "images.png", pixels, count=12)


if __name__ == "__main__":
    main()
