"""Recurrent layers for PyTorch on fused kernels: drop-ins for the classes of the same names in ``torch.nn``."""

from . import onnx
from ._version import __version__
from .cells import GRUCell, LSTMCell, RNNCell
from .convert import convert, patch, revert
from .info import build_info
from .modules import GRU, LSTM, RNN
from .plan import force_plan

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "GRUCell",
    "LSTMCell",
    "RNNCell",
    "__version__",
    "build_info",
    "convert",
    "force_plan",
    "onnx",
    "patch",
    "revert",
]
