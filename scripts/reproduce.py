"""Fill a table of the paper, or the table of the bundled models: calibrate, sample and evaluate each row.

    python scripts/reproduce.py --table bundled
    python scripts/reproduce.py --table cifar10 --checkpoints calibrated --check

The table shows each row beside its published figures. All results are stored below --output, and after an interruption
the same command continues. A row looks for its calibrated checkpoint in --checkpoints under names such as
w8a8.safetensors and w4a8.pth. A row without a checkpoint is calibrated with the published recipe; --preset fast takes a
small part of its time. --check needs no reference images: it checks in minutes whether the weights, the checkpoints and
the options fit together. Options after `--` are given to every sampling command. `torchrun` divides all work among
processes.
"""

from qdiff_cli.commands.reproduce import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
