"""Generate a calibration set from the sampling trajectory of a model, in the published file format.

    python scripts/make_calibration_set.py --config configs/cifar10.yml --use_pretrained \
        --timesteps 100 --eta 0 --skip_type quad --cali_st 20 --cali_n 256 -o calibration/cifar10.pt
    python scripts/make_calibration_set.py --config configs/stable-diffusion/v1-inference.yaml --ckpt model.ckpt \
        --sample_type plms --timesteps 50 --scale 7.5 --cali_st 25 --cali_n 128 --from-file prompts.txt \
        -o calibration/sd.pt

The file holds lists over time steps: xs ([N, C, H, W] each) and ts ([N] each), and for guided models cs and ucs.
"""

from qdiff_cli.commands.make_calibration_set import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
