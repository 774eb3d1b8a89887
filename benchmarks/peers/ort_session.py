"""ONNX Runtime's side of the worker process: a session of the CPU provider, its inputs bound once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnxruntime


def open_session(
    model: bytes, feeds: dict[str, np.ndarray], threads: int, dtype: str
) -> tuple[Callable, Callable]:
    """The call to time, and the function that reads the outputs of the latest call."""
    del dtype  # float32 is all that is asked of this engine
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    binding = session.io_binding()
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for name in names:
        binding.bind_output(name, "cpu")

    def call() -> None:
        session.run_with_iobinding(binding)

    def read() -> dict[str, np.ndarray]:
        return dict(zip(names, binding.copy_outputs_to_cpu(), strict=True))

    return call, read
