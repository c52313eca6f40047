"""Compare quantized networks with full precision, and write a report with tables and pictures.

    python scripts/compare.py --bundled emoji32 -o report
    python scripts/compare.py --checkpoints w8a8.safetensors w4a8.safetensors -o report -- \
        sample_diffusion_ddim.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --skip_type quad

A sampling command in full precision stands after `--`. Every packed checkpoint is compared as it was calibrated, with
quantized weights only (A32), and with nearest rounding in the same number formats. All images start from the same
noise samples. The report begins at `index.html`.
"""

from qdiff_cli.commands.compare import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
