"""Weights in MXFP4 as gpt-oss's checkpoints hold them, and as GGUF files do: the same numbers in another order.

Source: OCP Microscaling Formats 1.0, section 5.2 (E2M1 values with an E8M0 scale for 32 of them); the integration
`mxfp4` of transformers 5.23; `block_mxfp4` of ggml.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

MXFP4_VALUES, MXFP4_BYTES = 32, 16  # of a block, without its scale
MAX_SCALE = 252
"""The largest exponent, 127 above its own, with which the largest value, 6, is below infinity in float32."""

Bytes = npt.NDArray[np.uint8]


def gguf_rows(blocks: Bytes, scales: Bytes) -> Bytes:
    """Rows (R, bytes) of GGUF's blocks from stored ones (R, blocks, 16) and their scales (R, blocks).

    Neighbours share a stored byte, the first in its low half. In a GGUF block the scale comes first, and a byte has
    value j in its low half and value j + 16 in its high half.
    """
    values = np.empty((*blocks.shape[:2], MXFP4_VALUES), np.uint8)
    values[..., 0::2], values[..., 1::2] = blocks & 0x0F, blocks >> 4
    rows = np.empty((*blocks.shape[:2], 1 + MXFP4_BYTES), np.uint8)
    rows[..., 0] = scales
    rows[..., 1:] = values[..., :MXFP4_BYTES] | values[..., MXFP4_BYTES:] << 4
    return rows.reshape(len(rows), rows.shape[1] * rows.shape[2])
