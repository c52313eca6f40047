"""Train a bundled model on emoji, and write its EMA weights in half precision.

    npm pack emoji-datasource-google@16.0.0
    python scripts/train_bundled.py --config configs/emoji32.yml --emoji emoji-datasource-google-16.0.0.tgz
    python scripts/train_bundled.py --config models/ldm/emoji64/config.yaml --part first_stage \
        --emoji emoji-datasource-google-16.0.0.tgz

The autoencoder of a latent model (--part first_stage) is trained before its UNet. The text model uses the autoencoder
of the unconditional one. The state of the training is stored in the output folder (`*.state`), and the same command
continues from it.
"""

from qdiff_cli.commands.train_bundled import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
