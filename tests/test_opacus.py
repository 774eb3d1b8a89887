"""Opacus on our layers: the gradient of each sample is right, and the example trains."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import nn

opacus = pytest.importorskip("opacus", reason="Opacus is not installed; requirements.txt names its version")

pytestmark = [
    pytest.mark.filterwarnings("ignore:Full backward hook is firing"),
    pytest.mark.filterwarnings("ignore:Secure RNG turned off"),
    pytest.mark.filterwarnings("ignore:Optimal order is the largest alpha"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script"),
]


@pytest.fixture(autouse=True)
def _switches_may_be_set():
    """Opacus sets a switch of cuDNN's. torch's own test helpers, once imported by any other test, forbid that."""
    with torch.backends.__allow_nonbracketed_mutation():
        yield


@pytest.fixture
def dp_sgd(monkeypatch: pytest.MonkeyPatch):
    """The example's module, imported as its own folder sees it."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "examples"))
    import dp_sgd

    yield dp_sgd
    for name in ("dp_sgd", "char_lm_parts"):
        sys.modules.pop(name, None)


names = pytest.mark.parametrize("layer", ["RNN", "GRU", "LSTM"])


@names
def test_gradient_of_each_sample(dp_sgd, layer):
    """Against one backward pass a sample, through every parameter of the example's model."""
    torch.manual_seed(0)
    model = dp_sgd.Model(layer).double()
    letters, labels = dp_sgd.make_data(5, seed=0).tensors
    expected = []
    for letter, label in zip(letters, labels, strict=True):
        loss = nn.functional.cross_entropy(model(letter[None]), label[None])
        expected.append(torch.autograd.grad(loss, list(model.parameters())))

    followed = opacus.GradSampleModule(model)
    nn.functional.cross_entropy(followed(letters), labels).backward()
    for name, parameter, *gradients in zip(
        *zip(*followed.named_parameters(), strict=True), *expected, strict=True
    ):
        assert parameter.grad_sample.shape == (5, *parameter.shape), name
        torch.testing.assert_close(parameter.grad_sample, torch.stack(gradients), rtol=1e-10, atol=1e-12)
        assert parameter.grad_sample.abs().amax(tuple(range(1, parameter.dim() + 1))).min() > 0, name


@names
def test_opacus_finds_nothing_to_object_to(dp_sgd, layer):
    assert opacus.validators.ModuleValidator.validate(dp_sgd.Model(layer)) == []


@names
def test_the_example_trains(dp_sgd, layer, capsys):
    """Half of the answers are right before it does; the noise is there."""
    accuracy, epsilon = dp_sgd.train(layer, epochs=3, samples=1024, batch=64, noise=0.6)
    assert accuracy > 0.8
    assert 1 < epsilon < 50
    assert "epoch  3" in capsys.readouterr().out


def test_no_epochs(dp_sgd, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["dp_sgd.py", "--epochs", "0"])
    with pytest.raises(SystemExit) as caught:
        dp_sgd.main()
    assert caught.value.code == 2
    assert "argument --epochs: 0 is not above zero" in capsys.readouterr().err


def test_a_batch_of_nobody(dp_sgd):
    """Poisson sampling draws one now and then."""
    followed = opacus.GradSampleModule(dp_sgd.Model("LSTM"))
    letters, labels = (t[:0] for t in dp_sgd.make_data(1, seed=0).tensors)
    nn.functional.cross_entropy(followed(letters), labels, reduction="sum").backward()
    for parameter in followed.parameters():
        assert parameter.grad_sample.shape == (0, *parameter.shape)
