"""Sample the bundled models from the same noise samples in full precision and quantized, with pictures and tables.

    python scripts/demo.py --output demo_output

The command writes the picture demo_<model>.png for each bundled model, and prints a table with the file size, the
similarity of the images to full precision (explained below the last table), the relative error of eps (the mean over
the trajectory of the first 4 images) and the seconds for an image. A picture grows by a row whenever a network has
sampled its images.
"""

from qdiff_cli.commands.demo import main
from qdiff_cli.options import run_main

if __name__ == "__main__":
    run_main(main)
