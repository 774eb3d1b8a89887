"""RNN, LSTM and GRU: parameters, input forms and errors of the classes of the same names in ``torch.nn``.

Parameters, their names, their initialisation and the bookkeeping of replaced weights are those of
``torch.nn.RNNBase``; a ``state_dict`` loads either way. Only the computation is ours.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils._expanded_weights import ExpandedWeight
from torch.nn.utils.rnn import PackedSequence

from . import functional, ops, packed, scripting
from .functional import States

_PROJ_ONLY_LSTM = "proj_size argument is only supported for LSTM, not RNN or GRU"

#: By mode; looked up once, on import: inside patch() torch.nn's names are ours.
_OF_TORCH = {"LSTM": nn.LSTM, "GRU": nn.GRU, "RNN_TANH": nn.RNN, "RNN_RELU": nn.RNN}

#: The methods of torch's interface that check the arguments of a call.
_CHECKS = (
    "check_input",
    "check_hidden_size",
    "check_forward_args",
    "get_expected_hidden_size",
    "get_expected_cell_size",
)


class _Recurrent(nn.RNNBase):
    """What the three layers share: from any form of input to the stack and back."""

    __prepare_scriptable__ = scripting.refuse

    #: Whether the backward pass computes the gates once more in place of keeping them. May be set at any time. Of the
    #: class, so that an instance without has the attributes of torch.nn's and no more, wherever it comes from.
    recompute: bool = False

    #: Whether the checks of the arguments are those that a call at once may skip, not a subclass's own.
    _checks_are_known: bool = True

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ours = next(base for base in cls.__mro__ if base.__module__ == __name__)
        cls._checks_are_known = all(getattr(cls, name, None) is getattr(ours, name, None) for name in _CHECKS)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", recompute=True" if self.recompute else "")

    def flatten_parameters(self) -> None:
        """Does nothing: the kernels take weights as they lie. Kept for code that calls it."""

    def _weights_have_changed(self) -> bool:
        """Part of torch.nn's bookkeeping of ``_flat_weights``. torch's own asks weak references, some microseconds, and
        decides where a parameter was replaced, where a weight is computed (each look at one that is parametrized has
        an effect: as often as torch.nn), and where one was put into ``_flat_weights``, to be used."""
        parameters = self._parameters
        flat = zip(self._flat_weights, self._flat_weights_names, strict=False)
        if all(parameters.get(name) is weight is not None for weight, name in flat):
            return False
        return super()._weights_have_changed()

    # Hidden states: the user's form, a tensor or (LSTM) a pair, and the inner one, a tuple.

    def _states(self, hx: Any, batched: bool) -> States:
        if hx.dim() != (3 if batched else 2):
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx should also be "
                f"{3 if batched else 2}-D but got {hx.dim()}-D tensor"
            )
        return (hx,)

    def _hidden(self, states: States) -> Any:
        return states[0]

    def _bad_rank(self, dim: int) -> str:
        return f"{type(self).__name__}: Expected input to be 2D or 3D, got {dim}D instead"

    def check_input(self, input: Tensor, batch_sizes: Tensor | None) -> None:
        """Part of torch's interface. torch's own compares with ``_flat_weights``, which in a graph are the weights of
        the last call outside of one; here it is the weights that the call will use."""
        weight = self._weights()[0]
        if input.dtype != weight.dtype and not torch._C._is_any_autocast_enabled():
            raise ValueError(
                f"RNN input dtype ({input.dtype}) does not match weight dtype ({weight.dtype}). "
                f"Convert input: input.to({weight.dtype}), or convert model: model.to({input.dtype})"
            )
        expected_dim = 3 if batch_sizes is None else 2
        if input.dim() != expected_dim:
            raise RuntimeError(f"input must have {expected_dim} dimensions, got {input.dim()}")
        if input.size(-1) != self.input_size:
            raise RuntimeError(
                f"input.size(-1) must be equal to input_size. Expected {self.input_size}, got {input.size(-1)}"
            )

    def _check(self, input: Tensor, states: States | None, batch_sizes: Tensor | None) -> None:
        if states is None:
            self.check_input(input, batch_sizes)
        else:
            self.check_forward_args(input, self._hidden(states), batch_sizes)
        for kind, tensors in (("hidden", states or ()), ("parameter", self._weights())):
            for tensor in tensors:
                if tensor is None:
                    raise TypeError(f"a {kind} is None; bias=False makes a layer without biases")
                if tensor.device != input.device:
                    raise RuntimeError(
                        f"Input and {kind} tensors are not at the same device, found input tensor at {input.device} "
                        f"and {kind} tensor at {tensor.device}"
                    )
        if batch_sizes is None and input.size(1 if self.batch_first else 0) == 0:
            raise RuntimeError("Expected sequence length to be larger than 0 in RNN")

    def _check_packed_in_graph(self, input: PackedSequence, states: States) -> None:
        """As _check; but batch_sizes[0] is data, on which no branch of a graph may depend. The operator compares it
        with hx when the graph runs, unless the sequences' order has chosen rows of hx before: so that counts here."""
        self.check_input(input.data, input.batch_sizes)
        batch = states[0].size(1) if input.sorted_indices is None else input.sorted_indices.size(0)
        layers = self.num_layers * (2 if self.bidirectional else 1)
        for state, size in zip(states, (self.proj_size or self.hidden_size, self.hidden_size), strict=False):
            self.check_hidden_size(state, (layers, batch, size))

    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> tuple[Any, Any]:
        """Runs the layers over a batch of sequences.

        Args:
            input: (T, B, I); (B, T, I) with ``batch_first``; (T, I) for one sequence; or a ``PackedSequence``.
            hx: initial hidden state (D * num_layers, B, H), or (D * num_layers, H) for one sequence; for the LSTM a
                pair (h0, c0), h0 of ``proj_size`` if that is set. Zero if absent.

        Returns:
            Output (T, B, D * H) in the form of ``input``, and the final states in the form of ``hx``.

        Raises:
            ValueError, RuntimeError: as ``torch.nn`` does, for wrong ranks, sizes and dtypes.
        """
        if not is_compiling():
            if self._checks_are_known:
                found = ops.layer_at_once(self, input, hx)
                if found is not None:
                    return found
            if (node := scripting.node_of_call(self, input, hx)) is not None:
                return node
            self._update_flat_weights()  # in a graph that would be a side effect; _weights does without
            if any(isinstance(weight, ExpandedWeight) for weight in self._flat_weights):
                return _OF_TORCH[self.mode].forward(self, input, hx)  # they know torch's own operators alone
        if isinstance(input, PackedSequence):
            return self._forward_packed(input, hx)
        if input.dim() not in (2, 3):
            raise ValueError(self._bad_rank(input.dim()))
        batched = input.dim() == 3
        batch_dim = 0 if self.batch_first else 1
        if not batched:
            input = input.unsqueeze(batch_dim)
        states = None if hx is None else self._states(hx, batched)
        if states is not None and not batched:
            states = tuple(state.unsqueeze(1) for state in states)
        self._check(input, states, None)
        output, states = self._run(input.transpose(0, 1) if self.batch_first else input, None, states)
        if self.batch_first:
            output = output.transpose(0, 1)
        if not batched:
            output, states = output.squeeze(batch_dim), tuple(state.squeeze(1) for state in states)
        return output, self._hidden(states)

    def _forward_packed(self, input: PackedSequence, hx: Any) -> tuple[PackedSequence, Any]:
        states = None if hx is None else self._states(hx, batched=True)
        if states is not None and is_compiling():
            self._check_packed_in_graph(input, states)
        else:
            self._check(input.data, states, input.batch_sizes)
        states = packed.reorder(states, input.sorted_indices)
        if states is None and is_compiling() and input.sorted_indices is not None:
            states = self._zeros(input.data, input.sorted_indices.size(0))
        rows, states = self._run(input.data, input.batch_sizes, states)
        return packed.repack(rows, input), self._hidden(packed.reorder(states, input.unsorted_indices))

    def _zeros(self, data: Tensor, batch: int) -> States:
        """What None stands for. With it a graph knows how many sequences there are: batch_sizes[0] is data, at which
        torch.compile breaks the graph unless told not to."""
        sizes = (self.proj_size or self.hidden_size, self.hidden_size)[: 2 if self.mode == "LSTM" else 1]
        layers = self.num_layers * (2 if self.bidirectional else 1)
        return tuple(data.new_zeros(layers, batch, size) for size in sizes)

    def _weights(self) -> list[Tensor]:
        """All weights, in the order of torch's flat list. In a graph the list is not brought up to date; but what was
        put into it, in the place of a parameter that is still the same, is used there too."""
        if is_compiling():
            named = [getattr(self, name) for name in self._flat_weights_names]
            known = zip(named, self._flat_weights, self._flat_weight_refs, strict=True)
            return [
                flat if ref is not None and ref() is now and flat is not now else now
                for now, flat, ref in known
            ]
        return self._flat_weights

    def _run(self, input: Tensor, batch_sizes: Tensor | None, states: States | None) -> tuple[Tensor, States]:
        layers = functional.split_weights(
            self._weights(),
            self.num_layers,
            2 if self.bidirectional else 1,
            self.bias,
            self.proj_size > 0,
        )
        dropout = self.dropout if self.training else 0.0
        return functional.stack(
            self.mode.lower(), input, batch_sizes, states, layers, dropout, self.recompute
        )


class RNN(_Recurrent):
    r"""Elman network, drop-in for ``torch.nn.RNN``.

    :math:`h_t = \tanh(W_{ih} x_t + b_{ih} + W_{hh} h_{t-1} + b_{hh})`, or relu for tanh (formula and arguments:
    documentation of ``torch.nn.RNN``).

    Args:
        input_size, hidden_size: features of input and state.
        num_layers: layers stacked on one another.
        nonlinearity: "tanh" or "relu".
        bias: whether there are b_ih and b_hh.
        batch_first: input and output are (B, T, features) in place of (T, B, features). Never applies to hx.
        dropout: probability of zeroing outputs of every layer but the last, in training.
        bidirectional: adds a second direction; outputs are concatenated.
        device, dtype: of the parameters. float32, float64, float16 and bfloat16 have kernels.
        recompute: training keeps input and output, but not the gates, and backward runs the layer forward once more:
            the same gradients to the last bit, in less memory, for one more forward pass. For one layer at a time the
            gates are there again in the backward pass. Also an attribute, to be set at any time. The transforms of
            ``torch.func`` and ``torch.compile`` decide for themselves what they keep.

    Raises:
        TypeError, ValueError: as ``torch.nn.RNN`` does.

    Example::

        rnn = fused_rnn.RNN(10, 20, num_layers=2)
        output, hn = rnn(torch.randn(5, 3, 10))  # (5, 3, 20), (2, 3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: str = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **unsupported: Any,
    ) -> None:
        _refuse(unsupported)
        if nonlinearity not in ("tanh", "relu"):
            raise ValueError(f"Unknown nonlinearity '{nonlinearity}'. Select from 'tanh' or 'relu'.")
        self.nonlinearity = nonlinearity
        super().__init__(
            f"RNN_{nonlinearity.upper()}",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        if recompute:
            self.recompute = True

    def _bad_rank(self, dim: int) -> str:
        return f"RNN: Expected input to be 2D or 3D, got {dim}D tensor instead"


class GRU(_Recurrent):
    r"""Gated recurrent unit, drop-in for ``torch.nn.GRU``.

    Reset gate applied after the recurrent product, :math:`n_t = \tanh(W_{in} x_t + b_{in} + r_t * (W_{hn} h_{t-1} +
    b_{hn}))` (formulas and arguments: documentation of ``torch.nn.GRU``). Arguments and errors as in :class:`RNN`,
    without ``nonlinearity``.

    Example::

        gru = fused_rnn.GRU(10, 20, bidirectional=True)
        output, hn = gru(torch.randn(5, 3, 10))  # (5, 3, 40), (2, 3, 20)
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
        **unsupported: Any,
    ) -> None:
        _refuse(unsupported)
        super().__init__(
            "GRU",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            device=device,
            dtype=dtype,
        )
        if recompute:
            self.recompute = True


class LSTM(_Recurrent):
    r"""Long short-term memory, drop-in for ``torch.nn.LSTM``.

    Formulas and arguments: documentation of ``torch.nn.LSTM``. Arguments and errors as in :class:`RNN`, without
    ``nonlinearity``.

    Args:
        proj_size: if positive, h_t is projected to this size (https://arxiv.org/abs/1402.1128).

    Example::

        lstm = fused_rnn.LSTM(10, 20)
        output, (hn, cn) = lstm(torch.randn(5, 3, 10))  # (5, 3, 20), ((1, 3, 20), (1, 3, 20))
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        super().__init__(
            "LSTM",
            input_size,
            hidden_size,
            num_layers,
            bias,
            batch_first,
            dropout,
            bidirectional,
            proj_size,
            device=device,
            dtype=dtype,
        )
        if recompute:
            self.recompute = True

    # A pair of states in the places where the base class has one; these methods are part of torch's interface.

    get_expected_cell_size = nn.LSTM.get_expected_cell_size
    check_forward_args = nn.LSTM.check_forward_args
    permute_hidden = nn.LSTM.permute_hidden

    def _states(self, hx: Any, batched: bool) -> States:
        if len(hx) != 2:
            raise RuntimeError("lstm expects two hidden states")
        h0, c0 = hx
        rank = 3 if batched else 2
        if h0.dim() != rank or c0.dim() != rank:
            raise RuntimeError(
                f"For {'batched 3-D' if batched else 'unbatched 2-D'} input, hx and cx should also be {rank}-D "
                f"but got ({h0.dim()}-D, {c0.dim()}-D) tensors"
            )
        return h0, c0

    def _hidden(self, states: States) -> Any:
        return states


def _refuse(unsupported: dict[str, Any]) -> None:
    """Keyword arguments that RNN and GRU do not have; torch names one of them."""
    if "proj_size" in unsupported:
        raise ValueError(_PROJ_ONLY_LSTM)
    if unsupported:
        name = next(iter(unsupported))
        raise TypeError(f"RNNBase.__init__() got an unexpected keyword argument '{name}'")
