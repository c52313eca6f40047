"""The main job on the bundled models: the same noises in full precision and quantized, one picture and table per family.

    python scripts/demo.py --output demo_output

Writes demo_<model>.png for each bundled model and prints tables: file size, PSNR and SSIM of
the images against full precision, relative error of eps averaged over the trajectory (of the first 4
images), seconds per image. A picture grows by a row as soon as one is sampled.
"""

from qdiff_cli.commands.demo import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
