"""The kernels' sigmoid and tanh: every float32 within 1.5 units of the last place, exact zeros, saturation, NaN.

The tests take a sample of all floats; ``python tests/test_activations.py`` (``make accuracy``) takes every one.
"""

from __future__ import annotations

import multiprocessing

import pytest
import torch
from torch import Tensor

from fused_rnn import _C, ops

LIMIT = 1.5  # units of the last place
SMALLEST = 2.0**-126  # below, kernels flush to zero
FLOATS = 1 << 32


def activations(x: Tensor) -> dict[str, Tensor]:
    """Both functions of x, through an LSTM with a unit for each value, which is its only pre-activation."""
    n, absent = x.numel(), [None] * 5
    none, zero = x.new_zeros(4 * n, 0), x.new_zeros(4 * n)
    weights = [none, zero.view(-1, 1), x.repeat(4), zero, x.new_zeros(1, n)]
    saved = ops.layer_forward("lstm", x.new_zeros(1, 1, 0), None, None, None, *weights, *absent, True)[3]
    gates = saved.view(5, n)
    assert torch.equal(gates[0].nan_to_num(9), gates[3].nan_to_num(9))
    return {"sigmoid": gates[0], "tanh": gates[2]}


def worst(found: Tensor, exact: Tensor) -> float:
    """Largest error in units of the last place of the exact value; NaN counts as infinite."""
    size = exact.abs().clamp_min(SMALLEST)
    # What float() rounds up to a power of two gets twice its unit: half an ulp of it, far from the largest errors.
    unit = (size.float().view(torch.int32) & 0x7F800000).view(torch.float32).double() * 2.0**-23
    error = (found.double() - exact).abs() / unit
    error[(exact.abs() < SMALLEST) & (found == 0)] = 0
    return error.nan_to_num(float("inf")).max().item()


def errors(bits: Tensor) -> dict[str, float]:
    """Of the floats with these bit patterns, for each function; NaN must give NaN."""
    x = bits.to(torch.int32).view(torch.float32)
    found = activations(x)
    nan = x.isnan()
    assert all(torch.equal(y.isnan(), nan) for y in found.values())
    x = x[~nan].double()
    exact = {"sigmoid": torch.where(x.abs() < SMALLEST, 0, x).sigmoid(), "tanh": x.tanh()}
    return {name: worst(y[~nan], exact[name]) for name, y in found.items() if len(x)}


def patterns(first: int, last: int, step: int = 1) -> Tensor:
    """Bit patterns as signed integers."""
    return torch.arange(first - FLOATS // 2, last - FLOATS // 2, step)


@pytest.mark.parametrize("isa", _C.isas())
def test_activations_are_accurate(isa: str) -> None:
    _C.set_isa(isa)
    # One float in 2003 of all; then those where the functions bend, closer together.
    bend = torch.cat(
        [torch.linspace(-20, 20, 300_000), torch.linspace(-90, -20, 100_000), torch.randn(100_000)]
    )
    for bits in (patterns(0, FLOATS, 2003), bend.view(torch.int32)):
        assert max(errors(bits).values()) <= LIMIT


@pytest.mark.parametrize("isa", _C.isas())
def test_activations_of_every_bfloat16(isa: str) -> None:
    """Within a hundredth of what rounding to bfloat16 may cost."""
    _C.set_isa(isa)
    x = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    nan = x.isnan()
    exact = x[~nan].double()
    for name, found in activations(x).items():
        assert torch.equal(found.isnan(), nan)
        wanted = getattr(exact, name)()
        error = (found[~nan].double() - wanted).abs()
        assert (error <= 2.0**-16.5 * wanted.abs() + SMALLEST).all(), name


@pytest.mark.parametrize("isa", _C.isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_at_the_edges(dtype: torch.dtype, isa: str) -> None:
    _C.set_isa(isa)
    inf = float("inf")
    x = torch.tensor([0.0, -0.0, inf, -inf, float("nan"), 1e4, -1e4, 1e-30], dtype=dtype)
    found = activations(x)
    tanh, sigmoid = found["tanh"], found["sigmoid"]
    assert tanh[:4].tolist() == [0.0, -0.0, 1.0, -1.0]
    assert tanh[5:].tolist() == [1.0, -1.0, x[7].item()]
    assert sigmoid[:4].tolist() == [0.5, 0.5, 1.0, 0.0]
    assert sigmoid[5:].tolist() == [1.0, 0.0, 0.5]
    assert tanh[4].isnan()
    assert sigmoid[4].isnan()


@pytest.mark.parametrize("isa", _C.isas())
def test_activations_in_double(isa: str) -> None:
    _C.set_isa(isa)
    x = torch.cat([torch.linspace(-30, 30, 100_000), torch.logspace(-30, 0, 10_000)]).double()
    for name, found in activations(x).items():
        torch.testing.assert_close(found, getattr(torch, name)(x), rtol=8 * 2.0**-53, atol=0)


def sweep(isa: str) -> dict[str, float]:
    """Largest errors of one instruction set over every float32, on one thread."""
    torch.set_num_threads(1)
    _C.set_isa(isa)
    chunk = 1 << 17
    largest = {"sigmoid": 0.0, "tanh": 0.0}
    for first in range(0, FLOATS, chunk):
        for name, error in errors(patterns(first, first + chunk)).items():
            largest[name] = max(largest[name], error)
    return largest


if __name__ == "__main__":
    failed = False
    with multiprocessing.get_context("spawn").Pool() as pool:  # an instruction set a process
        for isa, largest in zip(_C.isas(), pool.imap(sweep, _C.isas()), strict=True):
            for name, error in largest.items():
                print(f"{isa:9} {name:8} {error:.4f} ulp", flush=True)
                failed |= error > LIMIT
    raise SystemExit(f"more than {LIMIT} ulp" if failed else 0)
