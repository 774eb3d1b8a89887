"""How the layers behave on a GPU: CUDA graphs, streams, what they launch, what they allocate, what is left after an
error. What they compute there is in test_cuda_numbers.py, and in every test that asks for a `backend` or `device`."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch
from parity import (
    CELLS,
    CLASSES,
    DTYPES,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    Kind,
    Values,
    assert_equal,
    leaves,
    make_input,
    make_state,
    make_twins,
    named_outputs,
    pack,
    run,
    tensors_of,
    upcast,
)
from torch import Tensor, nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import fused_rnn
from fused_rnn import ops

pytestmark = pytest.mark.cuda

DEVICE = "cuda"
CYCLES = 300_000_000  # of a kernel that only waits: a seventh of a second or more

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
classes = pytest.mark.parametrize("kind", CLASSES, ids=str)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
# through the fused kernel and through matrix products
batches = pytest.mark.parametrize("batch", [3, 20], ids="B={}".format)


def make(kind: Kind, inputs: int = 12, hidden: int = 20, **options) -> nn.Module:
    deep = {} if kind in CELLS else {"num_layers": 2, "bidirectional": True}
    return make_twins(kind, inputs, hidden, **{"device": DEVICE, **deep, **options}).ours


def outputs(module: nn.Module, *arguments) -> Values:
    """What a call returns, without a graph."""
    with torch.no_grad():
        return named_outputs(module, module(*arguments))


def redraw(*tensors: Tensor) -> None:
    """New numbers in place, of the size of the old ones."""
    with torch.no_grad():
        for tensor in tensors:
            tensor.copy_(torch.randn_like(tensor) / 4)


def cloned(values: Values) -> Values:
    return {name: None if value is None else value.clone() for name, value in values.items()}


# ---------------------------------------------------------------------------------------------------- CUDA graphs


def captured(call: Callable[[], Values]) -> Callable[[], Values]:
    """The call in a CUDA graph; what is returned replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()  # cuBLAS makes its handles, and torch its workspaces, outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()

    def replay() -> Values:
        graph.replay()
        return cloned(result)

    return replay


@kinds
@dtypes
@batches
def test_a_graph_of_inference(kind, dtype, batch):
    """A graph reads input, state and weights anew each time that it is replayed."""
    module = make(kind, dtype=dtype).requires_grad_(False)
    x, hx = make_input(module, 6, batch), make_state(module, batch)
    replay = captured(lambda: outputs(module, x, hx))
    for changed in ([], [x], tensors_of(hx), list(module.parameters())):
        redraw(*changed)
        assert_equal(replay(), outputs(module, x, hx))


@kinds
@dtypes
@batches
def test_a_graph_of_a_training_step(kind, dtype, batch):
    module = make(kind, dtype=dtype)
    x, hx = leaves(module, 6, batch)
    replay = captured(lambda: run(module, x, hx))
    for changed in ([], [x], tensors_of(hx), list(module.parameters())):
        redraw(*changed)
        assert_equal(replay(), cloned(run(module, x, hx)))


@layers
def test_a_graph_of_packed_input(kind):
    """The lengths are those of the capture: they are known to the host alone."""
    module = make(kind)
    x, hx = leaves(module, 6, 4)
    packed = pack([6, 5, 3, 1], enforce_sorted=True)(x)
    rows = packed.data.detach().requires_grad_()
    how = {"form": lambda rows: packed._replace(data=rows)}
    replay = captured(lambda: run(module, rows, hx, **how))
    for changed in ([], [rows], tensors_of(hx)):
        redraw(*changed)
        assert_equal(replay(), cloned(run(module, rows, hx, **how)))


@kinds
@batches
def test_graphed_callables(kind, batch):
    """torch.cuda.make_graphed_callables: forward and backward in a graph each, with autograd between them."""
    module = make(kind)
    x, hx = leaves(module, 6, batch)
    graphed = torch.cuda.make_graphed_callables(copy.deepcopy(module), (x, hx))
    for changed in ([], [x], tensors_of(hx), [*module.parameters()]):
        redraw(*changed)
        with torch.no_grad():
            for mine, its in zip(graphed.parameters(), module.parameters(), strict=True):
                mine.copy_(its)
        assert_equal(cloned(run(graphed, x, hx)), cloned(run(module, x, hx)))


# ---------------------------------------------------------------------------------------------------- determinism


@kinds
@dtypes
@batches
def test_the_same_bits_every_time(kind, dtype, batch):
    """With the allocator's memory moved about and other work between the calls."""
    module = make(kind, 64, 96, dtype=dtype)
    x, hx = leaves(module, 20, batch)
    first = run(module, x, hx)
    kept = []
    for size in range(1, 9):
        kept.append(torch.full((size * 100_003,), float("nan"), device=DEVICE))
        torch.mm(torch.randn(100 * size, 300, device=DEVICE), torch.randn(300, 200, device=DEVICE))
        assert_equal(run(module, x, hx), first)


# ---------------------------------------------------------------------------------------------------- streams


@kinds
@batches
def test_everything_is_in_the_order_of_the_current_stream(kind, batch):
    """On a stream of its own, behind a kernel that waits: a call that used another stream would read the input before
    it is there, and one that waited for the GPU would find the stream empty when it returns."""
    module = make(kind)
    x, hx = leaves(module, 6, batch)
    expected = run(module, x, hx)
    late = torch.full_like(x, float("nan")).requires_grad_()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(CYCLES)
        with torch.no_grad():
            late.copy_(x)
        found = run(module, late, hx)
        waited = side.query()
    side.synchronize()
    assert_equal(found, expected)
    assert not waited, "the call waited for the GPU"


@kinds
@batches
def test_two_streams_at_once(kind, batch):
    """Two modules, and one module twice, each on a stream; all begin together."""
    first, second = make(kind, seed=1), make(kind, seed=2)
    calls = [(module, *leaves(module, 6, batch)) for module in (first, second, second)]
    expected = [run(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    found: list[list[Values]] = [[] for _ in calls]
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(CYCLES // 10)
    for _ in range(3):
        for call, stream, results in zip(calls, streams, found, strict=True):
            with torch.cuda.stream(stream):
                results.append(run(*call))
    torch.cuda.synchronize()
    for results, values in zip(found, expected, strict=True):
        for result in results:
            assert_equal(result, values)


# ---------------------------------------------------------------------------------------------------- launches


def launches(call: Callable[[], object]) -> tuple[list[str], list[str]]:
    """What a call does: names of the operations on the host, and of all work on the GPU."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    events = profiler.events()
    on_gpu = [event.name for event in events if event.device_type == DeviceType.CUDA]
    return [event.name for event in events if event.device_type == DeviceType.CPU], on_gpu


def recurrent_kernels_of_others(host: list[str], gpu: list[str]) -> list[str]:
    """cuDNN's and torch's own recurrent operators and kernels."""
    operators = r"aten::(_?cudnn|_thnn|_?miopen|mkldnn_rnn|lstm|gru|rnn|quantized)"
    kernels = r"cudnn|rnn|lstm|gru"
    found = [name for name in host if re.match(operators, name)]
    return found + [name for name in gpu if re.search(kernels, name, re.IGNORECASE) and "frnn::" not in name]


@kinds
@batches
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_the_kernels_are_ours(kind, batch, form):
    how = {}
    if form == "packed" and kind not in CELLS:
        how = {"form": pack([1 + row % 6 for row in range(batch)])}
    twins = make_twins(kind, 12, 20, device=DEVICE)
    x, hx = leaves(twins.ours, 6, batch)
    host, gpu = launches(lambda: run(twins.ours, x, hx, **how))
    assert not recurrent_kernels_of_others(host, gpu)
    assert any("frnn::" in name for name in gpu) or DEVICE == "cpu"
    assert recurrent_kernels_of_others(*launches(lambda: run(twins.theirs, x, hx, **how))), (
        "the check sees torch.nn's"
    )


@pytest.mark.parametrize("kind", CELLS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_cell_is_one_launch(kind, dtype):
    """And nothing else: no copy, no fill."""
    module = make(kind, dtype=dtype)
    calls = [(make_input(module, batch=batch),) for batch in (None, 1, 5, 8)]
    calls += [(x, make_state(module, x.size(0) if x.dim() == 2 else None)) for (x,) in calls]
    _, gpu = launches(lambda: [outputs(module, *call) for call in calls])
    assert len(gpu) == len(calls) and all("frnn::" in name for name in gpu), gpu


# ---------------------------------------------------------------------------------------------------- memory


def allocations(call: Callable[[], object]) -> tuple[int, int]:
    """How many allocations a call makes, and the most bytes that it holds beyond what it returns."""
    call()  # the workspaces of cuBLAS stay
    torch.cuda.synchronize()
    before, count = torch.cuda.memory_allocated(), torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    peak, kept = torch.cuda.max_memory_allocated() - before, torch.cuda.memory_allocated() - before
    del result
    return torch.cuda.memory_stats()["allocation.all.allocated"] - count, peak - kept


@layers
@dtypes
def test_inference_needs_no_memory_that_grows_with_the_sequence(kind, dtype):
    """Beyond the output. 4000 steps more would be 33 MB more of the narrowest thing that could be kept for a step; the
    allocator gives out blocks that are up to a megabyte too large. Of the step kernels: a persistent one takes up to a
    thousandth of the GPU's memory, as far as the sequence needs it."""
    module = make(kind, 64, 256, dtype=dtype, num_layers=1, bidirectional=False)
    short, long = make_input(module, 2000, 16), make_input(module, 6000, 16)
    with fused_rnn.force_plan("step"):
        _, for_short = allocations(lambda: outputs(module, short))
        _, for_long = allocations(lambda: outputs(module, long))
    assert for_long - for_short < 8 << 20


@layers
@dtypes
@batches
@pytest.mark.parametrize("training", [False, True], ids="training={}".format)
def test_nothing_is_allocated_in_the_loop_over_time(kind, dtype, batch, training):
    module = make(kind, dtype=dtype)

    def count(steps: int) -> int:
        x, hx = leaves(module, steps, batch)
        call = (lambda: run(module, x, hx)) if training else (lambda: outputs(module, x, hx))
        return allocations(call)[0]

    assert count(50) == count(95)  # by the same strategy


# ---------------------------------------------------------------------------------------------------- errors, devices


@contextmanager
def usable_after():
    """The device computes as before when the block is left."""
    module = make(LSTM)
    x, hx = leaves(module, 4, 3)
    before = run(module, x, hx)
    yield
    torch.cuda.synchronize()
    assert_equal(run(module, x, hx), before)


@classes
@pytest.mark.parametrize("elsewhere", ["input", "state", "weights", "one weight"])
def test_tensors_on_two_devices(kind, elsewhere):
    module = make(kind)
    x, hx = make_input(module), make_state(module)
    if elsewhere == "weights":
        module.cpu()
    elif elsewhere == "one weight":
        weight = list(module.parameters())[-1]
        weight.data = weight.data.cpu()
    with usable_after(), pytest.raises(RuntimeError, match="device") as caught:
        module(
            x.cpu() if elsewhere == "input" else x,
            (tuple(h.cpu() for h in hx) if isinstance(hx, tuple) else hx.cpu())
            if elsewhere == "state"
            else hx,
        )
    assert "cuda" in str(caught.value) and "cpu" in str(caught.value)


def raw_arguments() -> dict:
    module = make(LSTM_CELL)
    h, c = make_state(module)
    w_ih, w_hh, b_ih, b_hh = (p.detach() for p in module.parameters())
    return {
        "input": make_input(module),
        "h0": h,
        "c0": c,
        "w_ih": w_ih,
        "w_hh": w_hh,
        "b_ih": b_ih,
        "b_hh": b_hh,
    }


@pytest.mark.parametrize("name", ["input", "h0", "c0", "w_ih", "w_hh", "b_ih", "b_hh"])
@pytest.mark.parametrize("damage", ["shape", "device", "dtype"])
def test_a_raw_operator_refuses_what_it_could_not_read(name, damage):
    arguments = raw_arguments()
    tensor = arguments[name]
    arguments[name] = {"shape": tensor[..., :-1], "device": tensor.cpu(), "dtype": tensor.double()}[damage]
    with usable_after(), pytest.raises(RuntimeError):
        ops.cell_forward("lstm", *arguments.values(), False)
    ops.cell_forward("lstm", *raw_arguments().values(), False)


@kinds
def test_what_cudnn_refuses(kind):
    """Backward in eval mode, a derivative of a derivative, states that are not contiguous: torch.nn's layers raise an
    error when they go through cuDNN, which is how they go here."""
    module = make(kind, dtype=torch.float64).eval()
    exact = copy.deepcopy(module).cpu()
    x, hx = leaves(module, 4, 3)
    strided = [torch.stack((h, h), -1).detach()[..., 0].requires_grad_() for h in tensors_of(hx)]
    hx = tuple(strided) if kind.is_lstm else strided[0]
    assert not strided[0].is_contiguous()

    def second(module: nn.Module, x: Tensor, hx) -> Tensor:
        (grad,) = torch.autograd.grad(tensors_of(module(x, hx))[0].pow(2).sum(), x, create_graph=True)
        (grad,) = torch.autograd.grad(grad.pow(2).sum(), x)
        return grad.cpu()

    on_cpu = [value.cpu() for value in map(upcast, (x, *strided))]
    expected = second(exact, on_cpu[0], tuple(on_cpu[1:]) if kind.is_lstm else on_cpu[1])
    torch.testing.assert_close(second(module, x, hx), expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs, and this machine has fewer")
@kinds
def test_a_module_on_another_gpu_than_the_current_one(kind):
    module = make(kind)
    x, hx = leaves(module, 6, 3)
    expected = run(module, x, hx)
    there = copy.deepcopy(module).to("cuda:1")
    on_other = [value.detach().to("cuda:1").requires_grad_() for value in (x, *tensors_of(hx))]
    found = run(there, on_other[0], tuple(on_other[1:]) if kind.is_lstm else on_other[1])
    assert torch.cuda.current_device() == 0
    assert all(value.device == torch.device("cuda:1") for value in found.values())
    assert_equal({name: value.to("cuda:0") for name, value in found.items()}, expected)
