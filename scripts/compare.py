"""Compare quantized networks with full precision, and explain: a folder with tables, pictures and an `index.html`.

    python scripts/compare.py --bundled emoji32 -o report
    python scripts/compare.py --checkpoints w8a8.safetensors w4a8.safetensors -o report -- \
        sample_diffusion_ddim.py --config configs/cifar10.yml --use_pretrained --timesteps 100 --skip_type quad

After `--` comes a sampling command in full precision. For each packed checkpoint: as calibrated, with weights alone (A32), and nearest
rounding in the same number formats; all from the same noises.
"""

from qdiff_cli.commands.compare import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
