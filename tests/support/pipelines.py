"""Tiny diffusers pipelines with random weights, one for each kind of network that people have."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from qdiff.diffusers import quantize_pipeline

WORDS = ("a", "red", "green", "blue", "heart", "star", "cat", "of")
PROMPTS = ("a red heart", "a green star", "blue cat", "a heart of stars")
LENGTH = 8  # tokens of a prompt


@dataclass(frozen=True)
class Case:
    """A pipeline and how it is called.

    Attributes:
        make: makes the pipeline.
        network: the name of the component that is quantized.
        source: what `quantize_pipeline` samples the calibration samples with.
        call: further arguments of the pipeline's call.
        what: what the pipeline samples for a test.
    """

    make: Callable[[], diffusers.DiffusionPipeline]
    network: str
    source: Mapping[str, Any]
    call: Mapping[str, Any] = field(default_factory=dict)
    what: Mapping[str, Any] = field(default_factory=dict)

    def pipeline(self) -> diffusers.DiffusionPipeline:
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def sample(self, pipe: diffusers.DiffusionPipeline, seed: int = 0) -> torch.Tensor:
        """What the pipeline samples: pixels, float64 [N, H, W, 3]."""
        pipe.set_progress_bar_config(disable=True)
        output = pipe(**self.what, **self.call, generator=torch.Generator().manual_seed(seed), output_type="np")
        return torch.as_tensor(output.images, dtype=torch.float64)


def tokenizer(start: str | None = "<s>") -> transformers.PreTrainedTokenizerFast:
    """A tokenizer of whole words; T5's has no token that starts a text."""
    special = [token for token in ("<pad>", "</s>", "<unk>", start) if token]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()
    frame = f"{start} $A </s>" if start else "$A </s>"
    core.post_processor = TemplateProcessing(
        single=frame, special_tokens=[(token, special.index(token)) for token in special]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=start,
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        model_max_length=LENGTH,
    )


def clip(kind: type = transformers.CLIPTextModel, width: int = 16) -> transformers.PreTrainedModel:
    """A text tower of CLIP."""
    config = transformers.CLIPTextConfig(
        vocab_size=len(WORDS) + 4,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        projection_dim=width,
        eos_token_id=1,
        bos_token_id=3,
        pad_token_id=0,
    )
    return kind(config).eval()


def t5(width: int = 16) -> transformers.T5EncoderModel:
    config = transformers.T5Config(
        vocab_size=len(WORDS) + 4, d_model=width, d_ff=width, d_kv=8, num_layers=1, num_heads=2
    )
    return transformers.T5EncoderModel(config).eval()


def vae(channels: int = 4) -> diffusers.AutoencoderKL:
    """An autoencoder that halves the sides of an image."""
    return diffusers.AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        use_quant_conv=channels == 4,
        use_post_quant_conv=channels == 4,
        shift_factor=0.0,
    ).eval()


def pixel_unet() -> diffusers.UNet2DModel:
    return diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()


def ddpm() -> diffusers.DDPMPipeline:
    return diffusers.DDPMPipeline(pixel_unet(), diffusers.DDPMScheduler())


def ddim() -> diffusers.DDIMPipeline:
    return diffusers.DDIMPipeline(pixel_unet(), diffusers.DDIMScheduler())


def _conditional_unet(**config: Any) -> diffusers.UNet2DConditionModel:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        norm_num_groups=8,
        attention_head_dim=2,
        **config,
    ).eval()


def latent_scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def stable_diffusion() -> diffusers.StableDiffusionPipeline:
    unet = _conditional_unet(
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
    )
    return diffusers.StableDiffusionPipeline(
        vae(), clip(), tokenizer(), unet, latent_scheduler(), None, None, requires_safety_checker=False
    )


def sdxl() -> diffusers.StableDiffusionXLPipeline:
    unet = _conditional_unet(
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        transformer_layers_per_block=(1, 2),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )
    towers = clip(), clip(transformers.CLIPTextModelWithProjection)
    return diffusers.StableDiffusionXLPipeline(vae(), *towers, tokenizer(), tokenizer(), unet, latent_scheduler())


def dit() -> diffusers.DiTPipeline:
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        norm_num_groups=4,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=1000,
    ).eval()
    return diffusers.DiTPipeline(transformer, vae(), diffusers.DDIMScheduler())


def pixart() -> diffusers.PixArtAlphaPipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        norm_num_groups=4,
        cross_attention_dim=16,
        sample_size=8,
        patch_size=2,
        caption_channels=16,
    ).eval()
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return diffusers.PixArtAlphaPipeline(tokenizer(None), t5(), vae(), transformer, scheduler)


def sd3() -> diffusers.StableDiffusion3Pipeline:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        caption_projection_dim=16,
        pooled_projection_dim=32,
        out_channels=4,
        pos_embed_max_size=8,
    ).eval()
    towers = [clip(transformers.CLIPTextModelWithProjection) for _ in range(2)]
    return diffusers.StableDiffusion3Pipeline(
        transformer,
        diffusers.FlowMatchEulerDiscreteScheduler(),
        vae(),
        towers[0],
        tokenizer(),
        towers[1],
        tokenizer(),
        t5(32),
        tokenizer(None),
    )


def flux() -> diffusers.FluxPipeline:
    transformer = diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=16,
        axes_dims_rope=(2, 2, 4),
        guidance_embeds=True,
    ).eval()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    return diffusers.FluxPipeline(scheduler, vae(), clip(), tokenizer(), t5(32), tokenizer(None), transformer)


def _text(make: Callable[[], diffusers.DiffusionPipeline], network: str, **call: Any) -> Case:
    call = {"num_inference_steps": 3, "height": 16, "width": 16} | call
    return Case(make, network, {"prompts": PROMPTS}, call, {"prompt": PROMPTS[0]})


CASES: dict[str, Case] = {
    "ddpm": Case(ddpm, "unet", {"n": 4}, {"num_inference_steps": 4}, {"batch_size": 2}),
    "ddim": Case(ddim, "unet", {"n": 4}, {"num_inference_steps": 4}, {"batch_size": 2}),
    "sd": _text(stable_diffusion, "unet"),
    "sdxl": _text(sdxl, "unet"),
    "dit": Case(dit, "transformer", {"n": 4}, {"num_inference_steps": 3}, {"class_labels": [7]}),
    "pixart": _text(
        pixart, "transformer", max_sequence_length=LENGTH, use_resolution_binning=False, clean_caption=False
    ),
    "sd3": _text(sd3, "transformer", max_sequence_length=LENGTH),
    "flux": _text(flux, "transformer", max_sequence_length=LENGTH),
}
QUICK = {"rounding": "nearest", "iters_tune": 0, "policy_budget": 0, "smoothing": False}


def quantized(name: str, **settings: Any) -> diffusers.DiffusionPipeline:
    """The pipeline of a case, quantized at W4A8 by nearest rounding."""
    case = CASES[name]
    pipe = case.pipeline()
    quantize_pipeline(pipe, **case.source, call=case.call, **{"weight_bit": 4} | QUICK | settings)
    return pipe


def main(folder: Path) -> None:
    """Load every pipeline in `folder`, which is named after its case, and write what it samples beside it."""
    for name in sorted(path.name for path in folder.iterdir() if path.is_dir()):
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder / name)
        torch.save(CASES[name].sample(pipe), folder / f"{name}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(Path(sys.argv[1]))
