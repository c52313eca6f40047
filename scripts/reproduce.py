"""Fill a table of the paper, or that of the bundled models: calibrate or load, sample, evaluate, each row beside its published numbers.

    python scripts/reproduce.py --table bundled
    python scripts/reproduce.py --table cifar10 --checkpoints calibrated --device cuda
    python scripts/reproduce.py --table cifar10 --checkpoints calibrated --check

Every stage is kept below --output, and the same command goes on after an interruption. Calibrated checkpoints are looked
for in --checkpoints as w8a8, w4a8, ... with .safetensors or .pth; a row without one calibrates (the published recipe; --preset fast takes
a small part of its time). `--check` needs no reference images: it tells in minutes whether the weights, the
checkpoints and the options fit together. Words after `--` go to every sampling command. `torchrun` shares all work.
"""

from qdiff_cli.commands.reproduce import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
