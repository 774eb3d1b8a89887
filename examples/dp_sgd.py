"""Differentially private training (DP-SGD) of a recurrent model with Opacus: each sample's gradient is clipped by
itself, then noise is added to their sum.

    python examples/dp_sgd.py                   # needs `pip install opacus`
    python examples/dp_sgd.py --layer GRU --noise 0.5

Opacus takes a layer of ours as it takes any module: it maps the gradient over the samples with torch.func, which the
kernels answer with batched calls. It wants a module of one tensor in, one tensor out: hence :func:`encoder`.

The task: does a sequence of letters hold the letter 0?
"""

from __future__ import annotations

import argparse
import warnings

import torch
from char_lm_parts import positive
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_rnn

LETTERS, STEPS = 10, 6


def encoder(layer: str) -> type[nn.Module]:
    """One of our layers that returns its last state alone. Opacus follows the first tensor that a module returns: of
    the layer itself that would be `output`, and a loss through h_n would have no gradient there."""
    base: type[nn.Module] = getattr(fused_rnn, layer)

    class Encoder(base):
        def forward(self, x: Tensor) -> Tensor:
            _, hn = super().forward(x)
            return (hn[0] if layer == "LSTM" else hn)[-1]

    return Encoder


class Model(nn.Module):
    def __init__(self, layer: str, hidden: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LETTERS, 8)
        self.encoder = encoder(layer)(8, hidden, batch_first=True)
        self.head = nn.Linear(hidden, 2)

    def forward(self, letters: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(letters)))


def make_data(samples: int, seed: int) -> TensorDataset:
    letters = torch.randint(LETTERS, (samples, STEPS), generator=torch.Generator().manual_seed(seed))
    return TensorDataset(letters, (letters == 0).any(1).long())


def accuracy(model: nn.Module, data: TensorDataset) -> float:
    letters, labels = data.tensors
    with torch.no_grad():
        return (model(letters).argmax(-1) == labels).float().mean().item()


def train(
    layer: str,
    *,
    epochs: int = 5,
    samples: int = 2048,
    batch: int = 128,
    noise: float = 0.8,
    clip: float = 1.0,
    seed: int = 0,
) -> tuple[float, float]:
    """Returns the accuracy on unseen data, and the epsilon spent at delta = 1e-5."""
    torch.manual_seed(seed)
    model = Model(layer)
    engine = PrivacyEngine()
    model, optimizer, loader = engine.make_private(
        module=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
        data_loader=DataLoader(make_data(samples, seed), batch_size=batch),
        noise_multiplier=noise,
        max_grad_norm=clip,
    )
    unseen = make_data(1024, seed + 1)
    for epoch in range(epochs):
        for letters, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(letters), labels).backward()
            optimizer.step()
        epsilon = engine.get_epsilon(delta=1e-5)
        print(f"{layer} epoch {epoch + 1:2d}: accuracy {accuracy(model, unseen):.3f}, epsilon {epsilon:.2f}")
    return accuracy(model, unseen), epsilon


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--layer", choices=["RNN", "LSTM", "GRU"], default="LSTM")
    parser.add_argument("--epochs", type=positive(int), default=5)
    parser.add_argument("--noise", type=float, default=0.8, help="standard deviation, in units of --clip")
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of one sample's gradient")
    options = parser.parse_args()
    # Opacus' remarks about its random numbers and its accountant; torch's about hooks on a first layer.
    warnings.filterwarnings("ignore", category=UserWarning)
    train(options.layer, epochs=options.epochs, noise=options.noise, clip=options.clip)


if __name__ == "__main__":
    main()
