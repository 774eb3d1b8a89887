"""RNNCell, GRUCell and LSTMCell: drop-ins for the classes of the same names in ``torch.nn``, one kernel call a step.

Parameters and their initialisation are those of ``torch.nn.RNNCellBase``; a ``state_dict`` loads either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from . import functional, ops, scripting


class _Cell(nn.RNNCellBase):
    """What the three cells share: input forms and checks."""

    __prepare_scriptable__ = scripting.refuse

    def _check_input(self, input: Tensor) -> None:
        if input.dim() not in (1, 2):
            raise ValueError(
                f"{type(self).__name__}: Expected input to be 1D or 2D, got {input.dim()}D instead"
            )

    def _bad_state(self, k: int, state: Tensor, batch: int) -> str:
        if state.size(0) != batch:
            return f"Input batch size {batch} doesn't match hidden{k} batch size {state.size(0)}"
        return f"hidden{k} has inconsistent hidden_size: got {state.size(1)}, expected {self.hidden_size}"

    def _step(self, cell: str, input: Tensor, states: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """One step of input (B, I) or (I,) and states of the same rank, sizes checked as torch checks them."""
        batched = input.dim() == 2
        if not batched:
            input, states = input.unsqueeze(0), [state.unsqueeze(0) for state in states]
        batch, features = input.shape
        if features != self.input_size:
            raise RuntimeError(
                f"input has inconsistent input_size: got {features} expected {self.input_size}"
            )
        for k, state in enumerate(states):
            if state.shape != (batch, self.hidden_size):
                raise RuntimeError(self._bad_state(k, state, batch))
        h0, c0 = (*states, None, None)[:2]
        # in this order: an exported program lists its parameters as they were asked for
        w_ih, w_hh, b_ih, b_hh = self.weight_ih, self.weight_hh, self.bias_ih, self.bias_hh
        if (b_ih is None) != (b_hh is None):  # the kernels take both or none
            b_ih, b_hh = (torch.zeros_like(b_hh), b_hh) if b_ih is None else (b_ih, torch.zeros_like(b_ih))
        h, c = functional.cell_step(cell, input, h0, c0, (w_ih, w_hh, b_ih, b_hh))
        return (h, c) if batched else (h.squeeze(0), None if c is None else c.squeeze(0))


class RNNCell(_Cell):
    r"""One step of an Elman network, drop-in for ``torch.nn.RNNCell``.

    :math:`h' = \tanh(W_{ih} x + b_{ih} + W_{hh} h + b_{hh})`, or relu for tanh (documentation of
    ``torch.nn.RNNCell``).

    Args:
        input_size, hidden_size: features of input and state.
        bias: whether there are b_ih and b_hh.
        nonlinearity: "tanh" or "relu"; another one raises RuntimeError in forward, as in torch.
        device, dtype: of the parameters.

    Example::

        cell = fused_rnn.RNNCell(10, 20)
        h = cell(torch.randn(3, 10), torch.zeros(3, 20))  # (3, 20)
    """

    __constants__ = ["input_size", "hidden_size", "bias", "nonlinearity"]  # noqa: RUF012  (torch's name and form)
    nonlinearity: str

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: str = "tanh",
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=1, device=device, dtype=dtype)
        self.nonlinearity = nonlinearity

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, I) or (I,), hx (B, H) or (H,), zero if absent; returns h' in the form of hx."""
        if self.nonlinearity in ("tanh", "relu") and not is_compiling():
            h = ops.cell_at_once(f"rnn_{self.nonlinearity}", self._parameters, input, hx)
            if h is not None:
                return h
            if (node := scripting.node_of_call(self, input, hx)) is not None:
                return node
        self._check_input(input)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"RNNCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        if self.nonlinearity not in ("tanh", "relu"):
            raise RuntimeError(f"Unknown nonlinearity: {self.nonlinearity}")
        return self._step(f"rnn_{self.nonlinearity}", input, () if hx is None else (hx,))[0]


class GRUCell(_Cell):
    r"""One step of a gated recurrent unit, drop-in for ``torch.nn.GRUCell`` (formulas: its documentation).

    Arguments as in :class:`RNNCell`, without ``nonlinearity``.

    Example::

        cell = fused_rnn.GRUCell(10, 20)
        h = cell(torch.randn(3, 10), torch.zeros(3, 20))  # (3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=3, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Tensor | None = None) -> Tensor:
        """input (B, I) or (I,), hx (B, H) or (H,), zero if absent; returns h' in the form of hx."""
        if not is_compiling():
            h = ops.cell_at_once("gru", self._parameters, input, hx)
            if h is not None:
                return h
            if (node := scripting.node_of_call(self, input, hx)) is not None:
                return node
        self._check_input(input)
        if hx is not None and hx.dim() not in (1, 2):
            raise ValueError(f"GRUCell: Expected hidden to be 1D or 2D, got {hx.dim()}D instead")
        return self._step("gru", input, () if hx is None else (hx,))[0]


class LSTMCell(_Cell):
    r"""One step of long short-term memory, drop-in for ``torch.nn.LSTMCell`` (formulas: its documentation).

    Arguments as in :class:`RNNCell`, without ``nonlinearity``.

    Example::

        cell = fused_rnn.LSTMCell(10, 20)
        h, c = cell(torch.randn(3, 10), (torch.zeros(3, 20), torch.zeros(3, 20)))  # (3, 20), (3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, num_chunks=4, device=device, dtype=dtype)

    def forward(self, input: Tensor, hx: Sequence[Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """input (B, I) or (I,), hx a pair of (B, H) or (H,), zero if absent; returns (h', c') in the form of hx."""
        if not is_compiling():
            both = ops.cell_at_once("lstm", self._parameters, input, hx)
            if both is not None:
                return both
            if (node := scripting.node_of_call(self, input, hx)) is not None:
                return node
        self._check_input(input)
        if hx is not None:
            for k, state in enumerate(hx):
                if state.dim() not in (1, 2):
                    raise ValueError(f"LSTMCell: Expected hx[{k}] to be 1D or 2D, got {state.dim()}D instead")
            if len(hx) != 2:
                raise RuntimeError("lstm_cell expects two hidden states")
        h, c = self._step("lstm", input, () if hx is None else hx)
        assert c is not None
        return h, c
