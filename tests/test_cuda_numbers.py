"""What the layers compute on a GPU, beyond the tests that every `backend` runs: against cuDNN and float64 on the CPU,
under torch's TF32 switches and autocast, and where a 32-bit index or a dimension of the grid would not reach."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from parity import (
    CELLS,
    DTYPES,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    RNN,
    RNN_CELL_RELU,
    RNN_RELU,
    Values,
    assert_equal,
    assert_law,
    count_terms,
    leaves,
    make_input,
    make_state,
    make_twins,
    named_outputs,
    pack,
    run,
    tensors_of,
    upcast,
    weights_like,
)
from test_cuda_small import Judged, draw_twins, judge, moved, run_on
from torch import Tensor, nn

from fused_rnn import ops

pytestmark = pytest.mark.cuda

DEVICE = "cuda"

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


@contextlib.contextmanager
def precision(rnn: str, matmul: str | None = None) -> Iterator[None]:
    """torch's switches for float32 on the GPU: "tf32" or "ieee"."""
    operators = {torch.backends.cudnn.rnn: rnn, torch.backends.cuda.matmul: matmul}
    before = {operator: operator.fp32_precision for operator in operators}
    try:
        for operator, value in operators.items():
            operator.fp32_precision = before[operator] if value is None else value
        yield
    finally:
        for operator, value in before.items():
            operator.fp32_precision = value


# ---------------------------------------------------------------------------------------------------- parity


@kinds
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_call_at_once_gives_the_same_bits(kind, dtype, monkeypatch):
    """The short way past Python and the dispatcher, and the same call without it."""
    deep = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
    module = make_twins(kind, 8, 16, device=DEVICE, dtype=dtype, **deep).ours
    x, hx = leaves(module, 5, 5)
    name = "cell_at_once" if kind in CELLS else "layer_at_once"
    way, taken = getattr(ops, name), []

    def short(*arguments):
        taken.append(way(*arguments))
        return taken[-1]

    monkeypatch.setattr(ops, name, short)
    found = run(module, x, hx)
    with torch.no_grad():
        inferred = named_outputs(module, module(x, hx))
    assert len(taken) == 2 and all(result is not None for result in taken)
    monkeypatch.setattr(ops, name, lambda *_: None)
    assert_equal(found, run(module, x, hx))
    with torch.no_grad():
        assert_equal(inferred, named_outputs(module, module(x, hx)))


PADDED = [pytest.param(kind, None, id=f"padded-{kind}") for kind in KINDS]
PACKED = [pytest.param(kind, (5, 2, 4, 1, 5), id=f"packed-{kind}") for kind in LAYERS]


@pytest.mark.parametrize(("kind", "lengths"), PADDED + PACKED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_against_cudnn_and_float64_on_the_cpu(kind, lengths, dtype):
    """torch.nn's layers go through cuDNN here; its cells have kernels of torch's own."""

    def draw(seed: int) -> Judged:
        deep = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
        twins = draw_twins(kind, seed, 8, 16, dtype=dtype, **deep)
        x, hx = leaves(twins.ours, 5, 5)
        if kind in (RNN_RELU, RNN_CELL_RELU):
            x = x.detach().abs().requires_grad_()
        how = {"form": pack(lengths)} if lengths else {}
        ours, theirs = (run_on(DEVICE, module, x, hx, **how) for module in (twins.ours, twins.theirs))
        return (ours, theirs, run(twins.exact, upcast(x), upcast(hx), **how)), count_terms(twins.ours, x)

    with precision("ieee"):
        judge(draw, 6)


# ---------------------------------------------------------------------------------------------------- TF32


def errors(module: nn.Module, x: Tensor, hx, exact: Values) -> dict[str, float]:
    """The largest error of each output and gradient, as a part of the largest value."""
    found = run(module, x, hx)
    return {
        name: ((found[name] - value).abs().max() / value.abs().max()).item() for name, value in exact.items()
    }


needs_tf32 = pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0), reason="needs a GPU with TF32"
)


@needs_tf32
@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
@pytest.mark.parametrize("matmul", ["ieee", "tf32"])
def test_tf32_is_switched_by_the_switch_of_recurrent_layers(kind, matmul):
    """And by no other: the errors are those of nn.LSTM through cuDNN, or smaller, and TF32's are a hundred times those
    of float32."""
    twins = make_twins(kind, 256, 256, device=DEVICE)
    x, hx = leaves(twins.ours, 8, 64)
    exact = run(twins.exact, upcast(x), upcast(hx))
    with precision("ieee", matmul):
        ours, theirs = errors(twins.ours, x, hx, exact), errors(twins.theirs, x, hx, exact)
    with precision("tf32", matmul):
        ours_tf32, theirs_tf32 = errors(twins.ours, x, hx, exact), errors(twins.theirs, x, hx, exact)
    for name in exact:
        assert ours[name] <= 2 * theirs[name] + 2**-23, name
        assert ours_tf32[name] <= 2 * theirs_tf32[name] + 2**-10, name
        assert ours_tf32[name] > 10 * ours[name], f"{name}: TF32 was asked for, and its error is not there"
    assert max(theirs_tf32.values()) > 10 * max(theirs.values()), "this shape does not show what TF32 costs"


@needs_tf32
def test_tf32_is_on_unless_told_and_the_older_switch_works():
    """torch.backends.cudnn.allow_tf32, as for nn.LSTM."""
    twins = make_twins(LSTM, 256, 256, device=DEVICE)
    x, hx = leaves(twins.ours, 8, 64)
    exact = run(twins.exact, upcast(x), upcast(hx))
    assert torch.backends.cudnn.allow_tf32, "torch's default"
    on = errors(twins.ours, x, hx, exact)
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        off = errors(twins.ours, x, hx, exact)
    assert min(on.values()) > 10 * max(off.values())


def switches() -> dict[str, object]:
    """All that torch says of its precision in float32."""
    get = torch._C._get_fp32_precision_getter
    told: dict[str, object] = {f"cuda {op}": get("cuda", op) for op in ("all", "conv", "rnn", "matmul")}
    told["generic"] = get("generic", "all")
    for name, ask in (
        ("older matmul", lambda: torch.backends.cuda.matmul.allow_tf32),
        ("older cudnn", lambda: torch.backends.cudnn.allow_tf32),
        ("float32_matmul_precision", torch.get_float32_matmul_precision),
    ):
        try:
            told[name] = ask()
        except RuntimeError as error:  # where older and newer switches contradict each other
            told[name] = str(error)
    return told


@pytest.mark.parametrize("rnn", ["ieee", "tf32"])
@pytest.mark.parametrize("matmul", ["none", "ieee", "tf32", "highest", "high", "medium"])
def test_torchs_switches_are_left_as_they_were(rnn, matmul):
    a = torch.randn(256, 256, device=DEVICE)
    with precision(rnn):
        if matmul in ("none", "ieee", "tf32"):
            torch.backends.cuda.matmul.fp32_precision = matmul
        else:
            torch.set_float32_matmul_precision(matmul)
        try:
            before, product = switches(), a @ a
            for kind in (LSTM, LSTM_CELL):
                module = make_twins(kind, 16, 16, device=DEVICE).ours
                run(module, *leaves(module, 4, 20))
                assert switches() == before
            assert torch.equal(a @ a, product)
        finally:
            torch.set_float32_matmul_precision("highest")  # torch's default


# ---------------------------------------------------------------------------------------------------- autocast


@kinds
@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_autocast_computes_in_its_dtype(kind, autocast, form):
    """As if module, input and states had been converted, bit for bit; gradients arrive in float32."""
    module = make_twins(kind, 12, 20, device=DEVICE).ours
    x, hx = leaves(module, 5, 4)
    how = {"form": pack([5, 2, 4, 1])} if form == "packed" and kind not in CELLS else {}
    low = copy.deepcopy(module).to(autocast)
    low_x, *low_states = [value.detach().to(autocast).requires_grad_() for value in (x, *tensors_of(hx))]
    expected = run(low, low_x, tuple(low_states) if kind.is_lstm else low_states[0], **how)
    with torch.autocast(DEVICE, dtype=autocast):
        found = run(module, x, hx, **how)
    names = [name for name in found if name.startswith("grad")]
    assert {found[name].dtype for name in names} == {torch.float32}
    assert_equal(found, expected | {name: expected[name].float() for name in names})


# ---------------------------------------------------------------------------------------------------- large shapes


def assert_last_rows(
    kind, sizes: tuple[int, int], steps: int, batch: int, gigabytes: float, dtype: torch.dtype
):
    """The last eight sequences of a large batch, and the gradients of a loss that only they contribute to, are those of
    these sequences alone."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < gigabytes * 1e9:
            pytest.skip(f"needs {gigabytes} GB of free GPU memory")
    twins = make_twins(kind, *sizes, dtype=dtype)
    small, hx = leaves(twins.ours, steps, 8)
    x = torch.zeros(steps, batch, sizes[0], dtype=dtype, device=DEVICE)
    states = [torch.zeros(h.size(0), batch, h.size(2), dtype=dtype, device=DEVICE) for h in tensors_of(hx)]
    with torch.no_grad():
        for large, few in ((x, small), *zip(states, tensors_of(hx), strict=True)):
            large[:, -8:] = few.to(DEVICE)
    module = copy.deepcopy(twins.ours).to(DEVICE)
    leaf_list = [x.requires_grad_(), *(h.requires_grad_() for h in states)]
    result = tensors_of(module(x, tuple(states) if kind.is_lstm else states[0]))
    wanted = [*leaf_list, *module.parameters()]
    last = [out[:, -8:] for out in result]
    grads = torch.autograd.grad(last, wanted, [weights_like(out) for out in last])
    names = ["x", *(f"hx[{i}]" for i in range(len(states))), *(name for name, _ in module.named_parameters())]
    ours = dict(zip(("output", "h_n", "c_n"), last, strict=False))
    for name, grad in zip(names, grads, strict=True):
        ours[f"grad {name}"] = grad[:, -8:] if grad.dim() == 3 else grad
        assert grad.dim() < 3 or not grad[:, :-8].any(), (
            f"{name}: the other sequences had no part in the loss"
        )
    theirs = run_on(DEVICE, twins.theirs, small, hx)
    exact = run(twins.exact, upcast(small), upcast(hx))
    assert_law((moved(ours, "cpu"), theirs, exact))


def test_more_gates_than_a_32_bit_index_reaches():
    """2.35e9 of them, and 2.9e9 saved values."""
    assert_last_rows(LSTM, (8, 512), 70, 1 << 14, 30, torch.bfloat16)


@pytest.mark.parametrize("kind", LAYERS[:4], ids=str)
def test_more_rows_than_a_grid_has(kind):
    """65535 blocks are the most in the grid's second dimension."""
    with precision("ieee"):
        assert_last_rows(kind, (8, 512), 2, (1 << 16) + 77, 8, torch.float32)


def test_a_large_batch_of_a_cell():
    twins = make_twins(LSTM_CELL, 8, 512, device=DEVICE)
    x, hx = make_input(twins.ours, batch=(1 << 16) + 77), make_state(twins.ours, (1 << 16) + 77)
    with precision("ieee"), torch.no_grad():
        ours, few = tensors_of(twins.ours(x, hx)), tensors_of(twins.ours(x[-20:], tuple(h[-20:] for h in hx)))
    for large, small in zip(ours, few, strict=True):
        torch.testing.assert_close(large[-20:], small)
