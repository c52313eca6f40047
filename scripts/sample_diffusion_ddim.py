"""Sample images from a pixel-space DDPM, in full precision or quantized, calibrating it first if needed.

    python scripts/sample_diffusion_ddim.py --config configs/cifar10.yml --use_pretrained \
        --timesteps 100 --eta 0 --skip_type quad --ptq --weight_bit 4 --quant_mode qdiff \
        --quant_act --act_bit 8 --a_sym --split -l results --cali_ckpt ckpt.pth

The images are written to <logdir>/samples/<timestamp>/img/0.png and so on. The same command with --continue samples the
missing ones. Image i depends only on i and --seed. A calibration with --timestep_groups gives each group of time steps
its own activation scales.
"""

from qdiff_cli.commands.sample_ddim import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
