"""The demo examples/char_lm.py, small: it runs, and its checks of agreement catch a disagreement."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch):
    """The demo's module, imported as its own folder sees it."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    import char_lm

    yield char_lm
    for name in ("char_lm", "char_lm_parts", "char_lm_report"):
        sys.modules.pop(name, None)


SMALL = ["--hidden", "24", "--batch", "4", "--length", "12", "--sample", "40", "--threads", "1"]


@pytest.mark.parametrize("cell", ["LSTM", "GRU", "RNN"])
def test_demo_compares_and_agrees(demo, cell: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    demo.main([*SMALL, "--cell", cell, "--layers", "2", "--steps", "30", "--out", str(tmp_path / "new")])
    shown = capsys.readouterr().out
    assert "30/30" in shown
    assert "first 25 steps against float64" in shown.replace("\n", " ")
    assert "text written by the model" in shown
    assert "speed-up" in shown
    assert (tmp_path / "new" / "char_lm.png").read_bytes().startswith(b"\x89PNG")


def test_demo_alone(demo, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat\n" * 50)
    demo.main([*SMALL, "--no-compare", "--steps", "3", "--text", str(text), "--out", str(tmp_path)])
    shown = capsys.readouterr().out
    assert "fused_rnn" in shown and "torch.nn" not in shown
    assert (tmp_path / "char_lm.png").exists()


def test_demo_learns(demo) -> None:
    """Text that repeats itself is learnt to near certainty, with the state carried from step to step."""
    options = demo.parse([*SMALL, "--steps", "80", "--rate", "0.02"])
    text = demo.Text("abcdefgh" * 200)
    one = demo.contender(demo.OURS, demo.fused_rnn, options, len(text.alphabet))
    demo.train([one], text, options, demo.Console(quiet=True))
    assert one.losses[0] > 1.8
    assert one.losses[-1] < 0.1
    written = text.decode(demo.generate(one.model, 24, temperature=0.1))
    assert written in "abcdefgh" * 5


def test_same_seed_same_start(demo) -> None:
    options = demo.parse(SMALL)
    ours, theirs = (
        demo.contender(name, lib, options, 9) for name, lib in (("a", demo.fused_rnn), ("b", torch.nn))
    )
    for (name, a), b in zip(ours.model.named_parameters(), theirs.model.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_checks_catch_a_difference(demo) -> None:
    exact = [3.0, 2.5, 2.0]
    theirs = [loss + 2e-7 for loss in exact]
    assert "allowed" in demo.check_rounding([loss - 4e-7 for loss in exact], theirs, exact)
    for wrong in (1e-5, float("nan")):
        with pytest.raises(SystemExit, match="more than rounding explains"):
            demo.check_rounding([3.0, 2.5 + wrong, 2.0], theirs, exact)
    falling = [3.0 - 0.01 * step for step in range(100)]
    drifting = [loss + 0.02 * (-1) ** step for step, loss in enumerate(falling)]
    assert "differ by at most" in demo.check_curves(drifting, falling)
    for wrong in (0.5, float("nan")):
        with pytest.raises(SystemExit, match="the loss curves part"):
            demo.check_curves([*falling[:-1], falling[-1] + wrong], falling)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "argument --steps: 0 is not above zero"),
        (["--hidden", "x"], "argument --hidden: invalid positive int value: 'x'"),
        (["--rate", "nan"], "argument --rate: nan is not above zero"),
        (["--cell", "conv"], "argument --cell: invalid choice: 'CONV'"),
    ],
)
def test_bad_arguments(demo, arguments: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as caught:
        demo.main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_bad_texts(demo, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="No such file"):
        demo.main([*SMALL, "--text", str(tmp_path / "none"), "--out", str(tmp_path)])
    (tmp_path / "short").write_text("abc")
    with pytest.raises(SystemExit, match="the text is too short"):
        demo.main([*SMALL, "--text", str(tmp_path / "short"), "--out", str(tmp_path)])
