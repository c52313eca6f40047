"""Evaluate images: FID, Inception score, KID, precision and recall, CLIP score, and likeness to full-precision images.

    python scripts/evaluate.py results/samples/<timestamp>/img --reference cifar10-train
    python scripts/evaluate.py samples.npz --reference lsun_church_train_lmdb --crop 256
    python scripts/evaluate.py --reference cifar10-train -- sample_diffusion_ddim.py --config configs/cifar10.yml ...

Images and references are folders, `.npz` files (key arr_0, also those of the ADM evaluator), lmdb folders, or cifar10-train;
a reference can also be an `.npz` file that --save_statistics wrote. After `--` comes a sampling command, whose images are
made (or continued) first. `torchrun --nproc_per_node N` shares the work among processes.
"""

from qdiff_cli.commands.evaluate import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
