"""OpenVINO's side of the worker process: a compiled model and one request, its inputs bound once."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import openvino

_PRECISION = {"fp32": "f32", "bf16": "bf16"}


def open_session(
    model: bytes, feeds: dict[str, np.ndarray], threads: int, dtype: str
) -> tuple[Callable, Callable]:
    """The call to time, and the function that reads the outputs of the latest call."""
    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "INFERENCE_NUM_THREADS": threads,
        # Left to itself OpenVINO computes in bf16 on a CPU that can.
        "INFERENCE_PRECISION_HINT": _PRECISION[dtype],
    }
    compiled = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", settings)
    request = compiled.create_infer_request()
    for name, value in feeds.items():
        request.set_tensor(name, openvino.Tensor(value, shared_memory=True))

    def read() -> dict[str, np.ndarray]:
        return {port.any_name: np.array(request.get_tensor(port).data) for port in compiled.outputs}

    return request.infer, read
