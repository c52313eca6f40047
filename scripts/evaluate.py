"""Evaluate images: FID, Inception score, KID, precision and recall, CLIP score, similarity to full precision.

    python scripts/evaluate.py results/samples/<timestamp>/img --reference cifar10-train
    python scripts/evaluate.py --reference cifar10-train -- sample_diffusion_ddim.py --config configs/cifar10.yml \
        --use_pretrained --timesteps 100 --skip_type quad

Images and references are folders, `.npz` files (key arr_0, also the files of the ADM evaluator), lmdb folders, or
cifar10-train. A reference can also be an `.npz` file that --save_statistics has written. If a sampling command stands
after `--`, its images are sampled (or continued) first. `torchrun --nproc_per_node N` divides the work among processes.
"""

from qdiff_cli.commands.evaluate import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
