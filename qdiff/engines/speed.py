"""Where integer products on the CPU are faster than simulated ones: measured, by class of shape and kind of processor.

Nothing is timed at run time, because two processes could then choose differently, and images would depend on the number
of processes. `benchmarks/cpu_table.py` measures a row: one thread, CPU time, W4A8, median of runs in turn. Rows of AVX2
and VNNI were measured on a processor with AMX whose oneDNN was limited to these instructions (`ONEDNN_MAX_CPU_ISA`).
"""

from typing import NamedTuple

from qdiff.engines import probe

# Mean number of weights of a product below which a network is not faster on integers, because most of the time is spent
# between the layers. At 42,000, integers take 0.85 to 0.98 of the time of the simulation (the mean of one and four
# images), on all kinds of processor below, and 1.06 to 1.15 with one image.
MIN_WEIGHTS = 50_000


class Row(NamedTuple):
    """What was measured on one kind of processor: time on integers relative to the simulation.

    Attributes:
        processor: where it was measured, as the system names it; empty: by emulation alone.
        convolutions: of 3 x 3 convolutions from 82,944 weights on.
        maps: of linear layers, and convolutions of one pixel, from 65,536 weights and 512 rows on.
        deep, flat: of attention matmuls that sum at least `min_depth` products for each element of the result, and
            less; None: attention matmuls are not exact.
        min_depth: below it most of the time goes into reading and writing the result.
    """

    processor: str
    convolutions: float
    maps: float
    deep: float | None = None
    flat: float | None = None
    min_depth: int = 0


ROWS: dict[probe.Kind, Row] = {
    "AMX": Row("Intel(R) Xeon(R) Processor", 0.40, 0.43, 0.69, 3.26, 128),
    "VNNI": Row("", 0.51, 0.45, 0.70, 2.78, 128),
    "AVX2": Row("", 0.82, 0.92),
}


def row() -> Row:
    """The row of this processor's instructions."""
    return ROWS[probe.kind()]


def origin() -> str:
    """The instructions that the choice is made for, and whether their row was measured on this very processor."""
    measured = "" if row().processor == probe.processor() else ", not measured on this processor"
    return f"{probe.kind()}{measured}"
