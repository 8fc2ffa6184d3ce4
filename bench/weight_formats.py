"""What quantising random weights does to them, by format and by how heavy their tails are: the table of docs/models.md.

python bench/weight_formats.py
"""

from __future__ import annotations

import numpy as np
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

ROWS, COLUMNS = 1000, 1024
FORMATS = ("Q8_0", "Q4_1", "Q4_0")


def main() -> None:
    """Print the table."""
    rng = np.random.default_rng(0)
    shape = (ROWS, COLUMNS)
    kinds = {
        "normal": rng.normal(size=shape),
        "Laplace": rng.laplace(size=shape),
        "Student's t, 4 degrees of freedom": rng.standard_t(4, size=shape),
    }
    print(f"| weights | {' | '.join(FORMATS)} |\n|{'---|' * (1 + len(FORMATS))}")
    for name, values in kinds.items():
        plain = values.astype(np.float32)
        errors = []
        for kind in map(GGMLQuantizationType.__getitem__, FORMATS):
            change = dequantize(quantize(plain, kind), kind) - plain
            errors.append(np.sqrt(np.square(change).mean() / np.square(plain).mean()))
        print(f"| {name} | {' | '.join(f'{100 * error:.2f} %' for error in errors)} |")


if __name__ == "__main__":
    main()
