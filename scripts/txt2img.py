"""Sample images from text with Stable Diffusion v1, in full precision or quantized, calibrating it first if needed.

    python scripts/txt2img.py --prompt "a puppy wearing a hat" --plms --cond --ptq --weight_bit 4 --quant_mode qdiff \
        --no_grad_ckpt --split --n_samples 5 --quant_act --act_bit 8 --sm_abit 16 --outdir results --cali_ckpt ckpt.pth

The images are written to <outdir>/<timestamp>/samples, and a grid beside them. Each PNG file stores its prompt, seed
and settings.
"""

from qdiff_cli.commands.txt2img import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
