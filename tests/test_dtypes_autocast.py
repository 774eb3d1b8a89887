"""Dtypes in, dtypes out: the four floating types, conversions of a module, and autocast on the CPU.

The dtypes that torch.nn's layers return under CPU autocast follow from how each is composed, and differ from
class to class. The table below states them; torch.nn is held to it too, so that a new torch that changes its
mind is noticed. Only its padded LSTM is not: what oneDNN computes, and in which dtype, depends on the
machine.
"""

from __future__ import annotations

import copy

import pytest
import torch
from parity import (
    CLASSES,
    DTYPES,
    GRU,
    GRU_CELL,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    LSTM_PROJ,
    RNN,
    RNN_CELL,
    Kind,
    assert_law,
    make_input,
    make_state,
    make_twins,
    pack,
    run,
    tensors_of,
    upcast,
)

# torch's own remark, on switching oneDNN off
pytestmark = pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN")

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
HALVES = (torch.bfloat16, torch.float16)
F32 = torch.float32


def dtypes_of(result) -> list[torch.dtype]:
    return [tensor.dtype for tensor in tensors_of(result)]


# ------------------------------------------------------------------------------------------------ no autocast


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths", [None, [2, 4, 3]], ids=["padded", "packed"])
def test_results_and_gradients_have_the_dtype_of_the_weights(kind, dtype, lengths, device):
    form = pack(lengths) if lengths and not kind.is_cell else (lambda x: x)
    ours = make_twins(kind, dtype=dtype, device=device).ours
    x = make_input(ours).requires_grad_()
    values = run(ours, x, form=form)
    assert {value.dtype for value in values.values()} == {dtype}


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_conversion_of_a_module(kind, dtype):
    """`.to(dtype)` after some use; the weights rounded to the dtype are what then counts."""
    twins = make_twins(kind, dtype=torch.float64)
    x = make_input(twins.ours)
    twins.apply(lambda module: module(x))
    ours, theirs = twins.ours.to(dtype), twins.theirs.to(dtype)
    x = x.to(dtype).requires_grad_()
    assert {p.dtype for p in ours.parameters()} == {dtype}
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(mine, its)
    exact = copy.deepcopy(theirs).double()
    runs = run(ours, x), run(theirs, x), run(exact, upcast(x))
    if dtype == torch.float64:
        torch.testing.assert_close(tensors_of(ours(x)), tensors_of(theirs(x)), rtol=1e-13, atol=1e-13)
    elif not kind.options.get("nonlinearity"):  # the derivative of relu jumps: test_parity_gradients.py
        assert_law(runs)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_shorthands(kind):
    ours = kind.ours(3, 5)
    for method, dtype in (("double", torch.float64), ("half", torch.float16), ("bfloat16", torch.bfloat16)):
        module = getattr(copy.deepcopy(ours), method)()
        assert dtypes_of(module(make_input(module))) == [dtype] * len(dtypes_of(module(make_input(module))))
    assert ours.type(torch.float64)(make_input(ours, dtype=torch.float64)) is not None


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_16_bit_types_are_accumulated_wide(kind, dtype):
    """Products and the state of the cell are float32 inside a step, and rounded once: over a long sequence ours is
    no further from float64 than torch.nn is where it rounds after every operation (without oneDNN, that is)."""
    ours_error = theirs_error = 0.0
    for seed in range(4):
        twins = make_twins(kind, 4, 16, dtype=dtype, seed=seed)
        x = make_input(twins.ours, 120, 4)
        with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):
            ours, theirs, exact = (
                tensors_of(module(value))[0].double()
                for module, value in zip(twins, (x, x, x.double()), strict=True)
            )
        ours_error = max(ours_error, (ours - exact).abs().max().item())
        theirs_error = max(theirs_error, (theirs - exact).abs().max().item())
    assert 0 < ours_error <= theirs_error


# -------------------------------------------------------------------------------------------- autocast on CPU


def expected_dtypes(kind: Kind, autocast: torch.dtype, x: torch.dtype, packed: bool) -> list[torch.dtype]:
    """Without hx. Products are computed in autocast's dtype; what is pointwise promotes it with the state's,
    which is the input's. A fused kernel (padded LSTM) and what ends in a product (RNN, projection) stay narrow.
    """
    wide = torch.promote_types(autocast, x)
    if kind in (RNN, RNN_CELL) or kind.options.get("nonlinearity"):
        return [autocast] * (1 if kind.is_cell else 2)
    if kind is LSTM_PROJ:
        return [autocast, autocast, wide]
    if kind is LSTM and not packed:
        return [autocast] * 3
    return [wide] * {GRU: 2, LSTM: 3, GRU_CELL: 1, LSTM_CELL: 2}[kind]


CASES = [
    (kind, packed)
    for kind in (*LAYERS, RNN_CELL, GRU_CELL, LSTM_CELL)
    for packed in ((False,) if kind.is_cell else (False, True))
]
cases = pytest.mark.parametrize(
    ("kind", "packed"), CASES, ids=[f"{kind}-{'packed' if packed else 'padded'}" for kind, packed in CASES]
)
autocasts = pytest.mark.parametrize("autocast", HALVES, ids="autocast={}".format)


def form_of(packed: bool):
    return pack([2, 4, 3]) if packed else (lambda x: x)


@cases
@autocasts
@pytest.mark.parametrize("dtype", [F32, *HALVES], ids="x={}".format)
@pytest.mark.parametrize("weights", [F32, *HALVES], ids="weights={}".format)
@pytest.mark.parametrize("grad", [False, True], ids="grad={}".format)
def test_autocast_dtypes(kind, packed, autocast, dtype, weights, grad):
    twins = make_twins(kind, dtype=weights)
    x = make_input(twins.ours, dtype=dtype)
    x = form_of(packed)(x)  # out here: torch's packing refuses the other 16-bit type under autocast
    expected = expected_dtypes(kind, autocast, dtype, packed)
    with torch.autocast("cpu", dtype=autocast), torch.set_grad_enabled(grad):
        if kind is not LSTM or packed:
            assert dtypes_of(twins.theirs(x)) == expected, "torch.nn has changed"
        assert dtypes_of(twins.ours(x)) == expected


@cases
@autocasts
@pytest.mark.parametrize("dtype", [F32, "autocast"], ids="x={}".format)
@pytest.mark.parametrize("state", [F32, "autocast"], ids="hx={}".format)
def test_autocast_dtypes_with_hx(kind, packed, autocast, dtype, state):
    """A state of either dtype, as it comes from an earlier call or from outside."""
    twins = make_twins(kind)
    x = make_input(twins.ours, dtype=autocast if dtype == "autocast" else dtype)
    hx = make_state(twins.ours, dtype=autocast if state == "autocast" else state)
    with torch.autocast("cpu", dtype=autocast):
        ours = dtypes_of(twins.ours(form_of(packed)(x), hx))
        if kind is LSTM and not packed:
            assert ours == [autocast] * 3
        else:
            assert ours == dtypes_of(twins.theirs(form_of(packed)(x), hx))


@cases
@autocasts
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_autocast_values_and_gradients(kind, packed, autocast, with_hx):
    """The law against float64 without autocast; gradients of float32 leaves are float32."""
    if kind.options.get("nonlinearity") == "relu":
        kind = RNN  # the derivative of relu jumps: test_parity_gradients.py
    runs = []
    for seed in range(12):
        twins = make_twins(kind, 6, 10, seed=seed)
        x = make_input(twins.ours, 4, 3).requires_grad_()
        hx = make_state(twins.ours, 3) if with_hx else None
        for h in tensors_of(hx if with_hx else ()):
            h.requires_grad_()
        form = form_of(packed)
        with torch.autocast("cpu", dtype=autocast):
            ours = run(twins.ours, x, hx, form=form)
            with torch.backends.mkldnn.flags(enabled=False):  # oneDNN has no such LSTM on most machines
                theirs = run(twins.theirs, x, hx, form=form)
        if kind is LSTM and not packed:
            theirs = {name: value.to(ours[name].dtype) for name, value in theirs.items()}
        exact = run(twins.exact, upcast(x), upcast(hx), form=form)
        assert {value.dtype for name, value in ours.items() if name.startswith("grad ")} == {F32}
        runs.append((ours, theirs, exact))
    assert_law(*runs)


@cases
@autocasts
def test_autocast_leaves_double_alone(kind, packed, autocast):
    twins = make_twins(kind, dtype=torch.float64)
    x = make_input(twins.ours)
    with torch.autocast("cpu", dtype=autocast):
        ours, theirs = (tensors_of(module(form_of(packed)(x))) for module in (twins.ours, twins.theirs))
    assert dtypes_of(ours) == dtypes_of(theirs) == [torch.float64] * len(ours)
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)


@cases
@autocasts
@pytest.mark.parametrize("what", ["x", "weights"])
def test_double_and_single_do_not_mix_under_autocast(kind, packed, autocast, what):
    """torch.nn: "mat1 and mat2 must have the same dtype, but got Double and BFloat16"."""
    twins = make_twins(kind, dtype=torch.float64 if what == "weights" else F32)
    x = make_input(twins.ours, dtype=torch.float64 if what == "x" else F32)
    with torch.autocast("cpu", dtype=autocast):
        for module in (twins.theirs, twins.ours):
            with pytest.raises(RuntimeError, match=r"dtype|unsupported data type"):
                module(form_of(packed)(x))


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@autocasts
def test_autocast_off_inside_on(kind, autocast):
    ours = make_twins(kind).ours
    x = make_input(ours)
    expected = tensors_of(ours(x))
    with torch.autocast("cpu", dtype=autocast):
        ours(x)
        with torch.autocast("cpu", enabled=False):
            inside = tensors_of(ours(x))
    assert all(torch.equal(mine, its) for mine, its in zip(inside, expected, strict=True))


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@autocasts
def test_autocast_for_another_device_changes_nothing(kind, autocast):
    ours = make_twins(kind).ours
    x = make_input(ours)
    expected = tensors_of(ours(x))
    with torch.autocast("xpu", dtype=autocast):
        inside = tensors_of(ours(x))
    assert all(torch.equal(mine, its) for mine, its in zip(inside, expected, strict=True))


@pytest.mark.parametrize("kind", CLASSES, ids=str)
@autocasts
def test_training_step_under_autocast(kind, autocast):
    """Forward twice, backward outside of the context, an optimizer step, again: weights are read anew."""
    twins = make_twins(kind)
    x = make_input(twins.ours)
    optimizer = torch.optim.SGD(twins.ours.parameters(), lr=0.005)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=autocast):
            loss = sum(out.float().pow(2).sum() for _ in range(2) for out in tensors_of(twins.ours(x)))
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > losses[1] > losses[2]
    assert (
        {p.dtype for p in twins.ours.parameters()} == {F32} == {p.grad.dtype for p in twins.ours.parameters()}
    )


@pytest.mark.cuda
@pytest.mark.parametrize("kind", CLASSES, ids=str)
@autocasts
def test_autocast_on_cuda_gives_its_dtype(kind, autocast):
    ours = make_twins(kind, device="cuda").ours
    x = make_input(ours)
    with torch.autocast("cuda", dtype=autocast):
        assert set(dtypes_of(ours(x))) == {autocast}
    assert set(dtypes_of(ours(x))) == {F32}
