"""torch.ao.quantization.quantize_dynamic, the int8 weights of inference on a CPU: by way of fused_rnn.revert."""

from __future__ import annotations

import copy

import pytest
import torch
from parity import GRU, GRU_CELL, LSTM, LSTM_CELL, RNN_CELL, Kind, tensors_of
from torch import Tensor, nn
from torch.ao.quantization import quantize_dynamic

import fused_rnn

pytestmark = [
    # torch's own remarks, about itself
    pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),
    pytest.mark.filterwarnings("ignore:.*torch.jit"),
    pytest.mark.skipif(
        torch.backends.quantized.supported_engines in ([], ["none"]),
        reason="this torch is built without int8",
    ),
]

# torch.nn.RNN has no quantised class
kinds = pytest.mark.parametrize("kind", [LSTM, GRU, LSTM_CELL, GRU_CELL, RNN_CELL], ids=str)


class Model(nn.Module):
    def __init__(self, cls: type[nn.Module], **options) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.recurrent = cls(16, 24, **options)
        self.readout = nn.Linear(48 if options.get("bidirectional") else 24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.readout(tensors_of(self.recurrent(x))[0])


def options_of(kind: Kind) -> dict[str, object]:
    return {} if kind.is_cell else {"num_layers": 2, "bidirectional": True}


@kinds
@pytest.mark.parametrize("start", ["converted", "ours"])
@torch.no_grad()
def test_reverted_model_quantises_as_torchs_does(kind: Kind, start: str):
    """The same classes and the same bits, whether the model was converted once or built of ours."""
    theirs = Model(kind.theirs, **options_of(kind))
    ours = (
        fused_rnn.convert(copy.deepcopy(theirs))
        if start == "converted"
        else Model(kind.ours, **options_of(kind))
    )
    x = torch.randn((7, 16) if kind.is_cell else (9, 7, 16))
    ours(x)
    expected, quantised = quantize_dynamic(theirs), quantize_dynamic(fused_rnn.revert(ours))
    assert "quantized" in type(quantised.recurrent).__module__
    assert type(quantised.recurrent) is type(expected.recurrent)
    assert torch.equal(quantised(x), expected(x))
    error = (quantised(x) - theirs(x)).abs().max()
    assert 0 < error < 0.05  # int8 it is, and the same function


@kinds
@torch.no_grad()
def test_ours_stay_as_they_are(kind: Kind):
    """Without revert the rest of the model is quantised, and our layers go on in float32."""
    model = Model(kind.ours, **options_of(kind))
    x = torch.randn((7, 16) if kind.is_cell else (9, 7, 16))
    quantised = quantize_dynamic(model)
    assert type(quantised.recurrent) is kind.ours
    assert "quantized" in type(quantised.readout).__module__
    assert all(map(torch.equal, tensors_of(quantised.recurrent(x)), tensors_of(model.recurrent(x))))
