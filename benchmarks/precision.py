"""Names of dtypes, torch's switches behind `fp32` and `tf32`, and what one rounding is worth."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

TORCH_DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

# tf32 keeps float32's range and half precision's ten bits of mantissa.
ROUNDING = {name: torch.finfo(dtype).eps for name, dtype in TORCH_DTYPES.items()} | {"tf32": 2.0**-10}


@contextmanager
def precision(dtype: str, device: str) -> Iterator[None]:
    """Set torch's float32 switches on the GPU for this dtype, and put them back. Nothing to do on a CPU.

    Only the per-operator switches are touched: torch refuses a mix of them with the older `allow_tf32`.
    """
    if device != "cuda":
        yield
        return
    operators = (torch.backends.cudnn.rnn, torch.backends.cuda.matmul)
    before = [operator.fp32_precision for operator in operators]
    try:
        for operator in operators:
            operator.fp32_precision = "tf32" if dtype == "tf32" else "ieee"
        yield
    finally:
        for operator, value in zip(operators, before, strict=True):
            operator.fp32_precision = value
