"""Train a bundled model on emoji and write its EMA weights in half precision.

    npm pack emoji-datasource-google@16.0.0
    python scripts/train_bundled.py --config configs/emoji32.yml --emoji emoji-datasource-google-16.0.0.tgz
    python scripts/train_bundled.py --config models/ldm/emoji64/config.yaml --part first_stage --emoji ...
    python scripts/train_bundled.py --config models/ldm/emoji64/config.yaml --emoji ...
    python scripts/train_bundled.py --config models/ldm/emoji64-text/config.yaml --emoji ...

The state is kept beside the output (<output>.state) and the same command continues from it. The
autoencoder (`first_stage`) comes first; the text model takes that of the unconditional one.
"""

from qdiff_cli.commands.train_bundled import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
