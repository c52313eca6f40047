import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
for folder in (ROOT, ROOT / "scripts", ROOT / "tests"):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402

torch.set_num_threads(1)  # the networks are tiny: more threads only wait for one another
