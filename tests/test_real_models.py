"""Published recurrent models, with their own weights: converting does not change what they compute.

Needs requirements-models.txt. Where a package imports without more than torch and numpy, its own class is used as it
is; else a plain module of the same layers, written here, takes the weights. The weights' licences allow tests; none
is part of this project. Nothing is asserted of time: `pytest -s` shows it.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import io
import json
import math
import statistics
import tarfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import assert_law
from torch import Tensor, nn

import fused_rnn


def installed(package: str, file: str = "") -> Path:
    """A file of an installed package, found without importing it."""
    try:
        return Path(str(importlib.metadata.distribution(package).locate_file(file)))
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"{package} is not installed: pip install --no-deps -r requirements-models.txt")


# --------------------------------------------------------------------------------------------------------- models


def g2p_fa() -> nn.Module:
    """Persian letters to phonemes: LSTM encoder and decoder of two layers, the package's own class."""
    installed("g2p-fa")
    import g2p_fa

    return g2p_fa.G2P_Fa().model.eval()


WORDS = ("سلام", "کتاب", "خورشید", "دانشگاه", "آسمان", "زندگی", "پنجره", "خ")


def transcribe(model: nn.Module, seed: int) -> Tensor:
    """The package's greedy decoding, 30 steps of one call each; a step is fed the phoneme chosen at the last."""
    from g2p_fa.utils import IPA2tensor, word2tensor

    words = torch.stack([word2tensor(word) for word in WORDS[seed::4]], 1)
    start = torch.stack([IPA2tensor("b")] * words.size(1), 1)
    # the model makes its output tensor in the default dtype; put back after the test
    torch.set_default_dtype(next(model.parameters()).dtype)
    return model(words, start, 0)


class Vad(nn.Module):
    """silero-vad at 16 kHz: spectrum, convolutions, an LSTMCell, the probability of speech."""

    def __init__(self) -> None:
        super().__init__()
        self.stft_conv = nn.Conv1d(1, 258, 256, stride=128, bias=False)
        self.conv1 = nn.Conv1d(129, 128, 3, padding=1)
        self.conv2 = nn.Conv1d(128, 64, 3, stride=2, padding=1)
        self.conv3 = nn.Conv1d(64, 64, 3, stride=2, padding=1)
        self.conv4 = nn.Conv1d(64, 128, 3, padding=1)
        self.lstm_cell = nn.LSTMCell(128, 128)
        self.final_conv = nn.Conv1d(128, 1, 1)

    def forward(self, sound: Tensor) -> Tensor:
        """Each chunk of 512 samples, with the 64 before it; the cell goes on from chunk to chunk."""
        state, odds = None, []
        for chunk in nn.functional.pad(sound, (64, 0)).unfold(1, 64 + 512, 512).unbind(1):
            real, imaginary = self.stft_conv(nn.functional.pad(chunk, (0, 64), "reflect").unsqueeze(1)).chunk(
                2, 1
            )
            x = torch.sqrt(real**2 + imaginary**2)
            for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
                x = conv(x).relu()
            state = self.lstm_cell(x.squeeze(-1), state)
            odds.append(self.final_conv(state[0].relu().unsqueeze(-1)).sigmoid().flatten())
        return torch.stack(odds, 1)


def silero_vad() -> nn.Module:
    model = Vad()
    raw = installed("silero-vad", "silero_vad/data/silero_vad_16k.safetensors").read_bytes()
    model.load_state_dict(read_safetensors(raw))
    return model.eval()


def read_safetensors(raw: bytes) -> dict[str, Tensor]:
    """float32 tensors: the length of a JSON header, the header, the numbers."""

    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    tensors = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        values = np.frombuffer(raw[start + begin : start + end], np.dtype("<f4"))
        tensors[name] = torch.tensor(values).reshape(entry["shape"])
    return tensors


def voice(seed: int, batch: int = 3, seconds: float = 1.0) -> Tensor:
    """Something like vowels: harmonics of a wandering pitch, louder and softer four times a second, and noise."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.arange(int(16000 * seconds)) / 16000
    pitch = 110 + 40 * torch.rand(batch, 1, generator=generator)
    phase = 2 * math.pi * (pitch * at + 3 * torch.sin(5 * at))
    tone = sum(torch.sin(k * phase) / k for k in range(1, 20))
    noise = torch.randn(batch, len(at), generator=generator)
    return 0.1 * tone * (1 + torch.sin(2 * math.pi * 4 * at)) + 0.005 * noise


class Encoder(nn.Module):
    """Resemblyzer: three LSTM layers over a mel spectrogram, a unit vector for the speaker."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(40, 256, 3, batch_first=True)
        self.linear = nn.Linear(256, 256)

    def forward(self, mels: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(mels)
        return nn.functional.normalize(self.linear(hidden[-1]).relu())


def resemblyzer() -> nn.Module:
    model = Encoder()
    weights = torch.load(installed("Resemblyzer", "resemblyzer/pretrained.pt"), map_location="cpu")
    left = model.load_state_dict(weights["model_state"], strict=False)
    assert not left.missing_keys and set(left.unexpected_keys) == {"similarity_weight", "similarity_bias"}
    return model.eval()


def beatnet() -> nn.Module:
    """Beats in music: convolution and two LSTM layers, the package's own class; it keeps its state itself."""
    folder = installed("BeatNet", "BeatNet/models")
    from BeatNet.model import BDA

    model = BDA(272, 150, 2, "cpu")
    model.load_state_dict(torch.load(folder / "model_1_weights.pt", map_location="cpu"))
    return model.eval()


def listen(model: nn.Module, seed: int) -> Tensor:
    """A stretch of music, then frame by frame as in live use; the state goes on from call to call."""
    dtype = next(model.parameters()).dtype
    model.hidden = model.cell = torch.zeros(2, 1, 150, dtype=dtype)
    frames = torch.rand(1, 60, 272, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return torch.cat([model(part) for part in frames.split([50, *[1] * 10], 1)], 2)


class Polisher(nn.Module):
    """medaka: a bidirectional GRU of two layers over the counts of bases, odds of the right base."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(10, 128, 2, batch_first=True, bidirectional=True)
        self.linear = nn.Linear(256, 5)

    def forward(self, counts: Tensor) -> Tensor:
        return self.linear(self.gru(counts)[0]).softmax(-1)


def medaka() -> nn.Module:
    model = Polisher()
    archive = installed("medaka", "medaka/data/r1041_e82_400bps_sup_v5.2.0_model_pt.tar.gz")
    with tarfile.open(archive) as opened:
        weights = io.BytesIO(opened.extractfile("model/weights.pt").read())
    model.load_state_dict(torch.load(weights, map_location="cpu"))
    return model.eval()


def random(*shape: int) -> Callable[[nn.Module, int], Tensor]:
    """Runs a model on numbers from 0 to 1."""

    def run(model: nn.Module, seed: int) -> Tensor:
        values = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
        return model(values.to(next(model.parameters()).dtype))

    return run


@dataclass(frozen=True)
class Published:
    name: str
    load: Callable[[], nn.Module]
    run: Callable[[nn.Module, int], Tensor]
    layers: list[str]  # the classes of the recurrent ones

    def __str__(self) -> str:
        return self.name


MODELS = [
    Published("g2p-fa", g2p_fa, transcribe, ["LSTM", "LSTM"]),
    Published(
        "silero-vad",
        silero_vad,
        lambda model, seed: model(voice(seed).to(model.conv1.weight.dtype)),
        ["LSTMCell"],
    ),
    Published("Resemblyzer", resemblyzer, random(4, 160, 40), ["LSTM"]),
    Published("BeatNet", beatnet, listen, ["LSTM"]),
    Published("medaka", medaka, random(4, 100, 10), ["GRU"]),
]


def recurrent(model: nn.Module) -> list[type[nn.Module]]:
    return [type(part) for part in model.modules() if isinstance(part, nn.RNNBase | nn.RNNCellBase)]


@pytest.mark.parametrize("published", MODELS, ids=str)
@torch.no_grad()
def test_same_output_after_converting(published: Published):
    """By the law: at most twice as far from float64 as before converting, plus one rounding. Reverted it gives the
    very bits of before."""
    theirs = published.load()
    exact, ours = copy.deepcopy(theirs).double(), fused_rnn.convert(copy.deepcopy(theirs))
    assert recurrent(theirs) == [getattr(nn, layer) for layer in published.layers]
    assert recurrent(ours) == [getattr(fused_rnn, layer) for layer in published.layers]

    seeds = range(4)
    before, after = ([published.run(model, seed) for seed in seeds] for model in (theirs, ours))
    reference = [published.run(exact, seed) for seed in seeds]
    triples = [
        tuple({"output": value} for value in values) for values in zip(after, before, reference, strict=True)
    ]
    assert_law(*triples)
    assert any(
        not torch.equal(*pair) for pair in zip(before, after, strict=True)
    )  # it did run on our kernels
    assert all(value.std() > 1e-3 * value.abs().max() for value in before)  # and the model says something
    print(f"\n{published}: {times({'before': theirs, 'after': ours}, published)}")

    fused_rnn.revert(ours)
    assert all(
        torch.equal(published.run(ours, seed), value) for seed, value in zip(seeds, before, strict=True)
    )


def times(models: dict[str, nn.Module], published: Published) -> str:
    """Medians, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(5):
        for name, model in models.items():
            start = time.perf_counter()
            published.run(model, 0)
            seconds[name].append(time.perf_counter() - start)
    return ", ".join(f"{name} {1e3 * statistics.median(took):.2f} ms" for name, took in seconds.items())


def test_g2p_end_to_end():
    """The package's own call, from word to word."""
    installed("g2p-fa")
    import g2p_fa

    g2p = g2p_fa.G2P_Fa()
    g2p.model.eval()
    before = [g2p(word) for word in WORDS]
    assert before[0] == "sælɒːm"  # noqa: RUF001
    fused_rnn.convert(g2p.model)
    assert [g2p(word) for word in WORDS] == before


# In the TorchScript file; the weights there are of another training than those of the safetensors file.
VAD_NAMES = {
    "stft_conv.weight": "stft.forward_basis_buffer",
    **{
        f"conv{k + 1}.{part}": f"encoder.{k}.reparam_conv.{part}"
        for k in range(4)
        for part in ("weight", "bias")
    },
    **{
        f"lstm_cell.{part}_{way}": f"decoder.rnn.{part}_{way}"
        for part in ("weight", "bias")
        for way in ("ih", "hh")
    },
    **{f"final_conv.{part}": f"decoder.decoder.2.{part}" for part in ("weight", "bias")},
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@torch.no_grad()
def test_plain_vad_is_the_published_one():
    """Against the TorchScript file of the same package, which keeps state and the end of the last chunk itself."""
    published = torch.jit.load(installed("silero-vad", "silero_vad/data/silero_vad.jit")).eval()
    weights, sound, vad = published._model.state_dict(), voice(0), Vad()
    vad.load_state_dict({ours: weights[theirs] for ours, theirs in VAD_NAMES.items()})
    expected = torch.cat([published(chunk, 16000) for chunk in sound.unfold(1, 512, 512).unbind(1)], 1)
    torch.testing.assert_close(fused_rnn.convert(vad)(sound), expected, rtol=1e-4, atol=1e-5)
    assert expected.max() > 50 * expected.min()  # it hears a difference


# -------------------------------------------------------------------------------------------------------- training


@pytest.mark.slow
def test_recurrent_ppo():
    """sb3-contrib's RecurrentPPO builds its policy inside patch() and trains: losses of the first updates as with
    torch.nn, as long as rounding has not led to another action."""
    installed("sb3-contrib")
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.callbacks import BaseCallback

    class Losses(BaseCallback):
        def _on_rollout_start(self) -> None:
            update = {
                name: float(value) for name, value in self.logger.name_to_value.items() if "loss" in name
            }
            if update:
                updates.append(update)

        def _on_step(self) -> bool:
            return True

    found = []
    for build in (contextlib.nullcontext(), fused_rnn.patch()):
        updates: list[dict[str, float]] = []
        with build:
            agent = RecurrentPPO(
                "MlpLstmPolicy",
                "CartPole-v1",
                n_steps=64,
                batch_size=32,
                n_epochs=2,
                seed=0,
                device="cpu",
                policy_kwargs={"lstm_hidden_size": 32},
            )
        agent.learn(320, callback=Losses())
        found.append((type(agent.policy.lstm_actor), updates))

    (torchs, before), (ours, after) = found
    assert torchs is nn.LSTM and ours is fused_rnn.LSTM
    assert len(before) == len(after) == 4
    for expected, update in zip(before, after, strict=True):
        assert {"train/loss", "train/value_loss", "train/policy_gradient_loss"} <= update.keys()
        assert update == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert len({update["train/loss"] for update in after}) == 4
