"""What a graph keeps alive, what it must not let be edited, and that nothing piles up.

Lifetimes are read off the memory itself: a tensor laid over an array of Python's, which dies when the last
storage that refers to it does, whichever views, copies of handles or saved variables there were.
"""

from __future__ import annotations

import array
import gc
import math
import subprocess
import sys
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from parity import (
    CLASSES,
    KINDS,
    LAYERS,
    LSTM,
    make_input,
    make_state,
    make_twins,
    named_outputs,
    pack,
    run,
    tensors_of,
    weights_like,
)
from torch import Tensor, nn

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)


def tracked(like: Tensor) -> tuple[Tensor, weakref.ref]:
    """A copy of a float64 tensor, and a reference that is dead once its memory is free."""
    memory = array.array("d", like.detach().flatten().tolist())
    return torch.frombuffer(memory, dtype=torch.float64).view(like.shape), weakref.ref(memory)


@contextmanager
def no_collector():
    """Whatever dies in here dies of its last reference, not of the collector of cycles."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def tracked_call(ours: nn.Module, *, x_grad: bool, hx_grad: bool, form=lambda x: x):
    """The results of a call, and whether the memory of x and of each state is still there."""
    x, x_memory = tracked(make_input(ours))
    states, memories = zip(*map(tracked, tensors_of(make_state(ours))), strict=True)
    x.requires_grad_(x_grad)
    for state in states:
        state.requires_grad_(hx_grad)
    outputs = tensors_of(ours(form(x), states if len(states) == 2 else states[0]))
    return outputs, lambda: [memory() is not None for memory in (x_memory, *memories)]


def make(kind, **options) -> nn.Module:
    return make_twins(kind, dtype=torch.float64, **options).ours


# ----------------------------------------------------------------------------------------- what is kept alive


@kinds
def test_nothing_is_kept_without_a_graph(kind):
    ours = make(kind)
    with no_collector(), torch.no_grad():
        outputs, alive = tracked_call(ours, x_grad=False, hx_grad=False)
        assert not any(alive())
    with no_collector():
        ours.requires_grad_(False)
        outputs, alive = tracked_call(ours, x_grad=False, hx_grad=False)
        assert not any(alive())
    assert not any(out.requires_grad for out in outputs)


@kinds
def test_a_graph_dies_with_its_outputs(kind):
    """At once, without the collector: no cycle between a graph and its outputs."""
    ours = make(kind)
    with no_collector():
        outputs, alive = tracked_call(ours, x_grad=True, hx_grad=True)
        assert all(alive())
        del outputs
        assert not any(alive())


@kinds
def test_backward_lets_go(kind):
    ours = make(kind)
    with no_collector():
        outputs, alive = tracked_call(ours, x_grad=False, hx_grad=False)
        sum(out.sum() for out in outputs).backward()
        assert not any(alive()), "kept after backward, with the outputs still here"
        outputs, alive = tracked_call(ours, x_grad=False, hx_grad=False)
        sum(out.sum() for out in outputs).backward(retain_graph=True)
        sum(out.sum() for out in outputs).backward()
        assert not any(alive())


@kinds
@pytest.mark.parametrize("form", ["padded", "packed"])
def test_input_is_kept_only_for_the_weight_it_multiplies(kind, form):
    """No grad of its own and weight_ih frozen: nobody will ask for it."""
    ours = make(kind)
    call = pack([4, 4, 4], enforce_sorted=True) if form == "packed" and not kind.is_cell else (lambda x: x)
    for frozen in (False, True):
        for name, weight in ours.named_parameters():
            weight.requires_grad_(not (frozen and "weight_ih" in name))
        with no_collector():
            outputs, alive = tracked_call(ours, x_grad=False, hx_grad=False, form=call)
            if form == "padded" or kind.is_cell:  # packing makes a copy of its own
                assert alive()[0] is not frozen
            elif frozen:
                assert not alive()[0]
        del outputs


@kinds
def test_saved_bytes_do_not_depend_on_who_asks(kind):
    """A gradient for the input or for hx costs nothing to remember beyond what the weights' do."""
    ours = make(kind, **({} if kind.is_cell else {"bidirectional": True}))

    def saved(x_grad: bool, hx_grad: bool) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x, hx = make_input(ours).requires_grad_(x_grad), make_state(ours)
        for state in tensors_of(hx):
            state.requires_grad_(hx_grad)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours(x, hx)
        return sum(storages.values())

    assert saved(True, True) == saved(False, True) == saved(True, False) == saved(False, False) > 0


@layers
def test_saved_bytes_grow_with_the_sequence(kind):
    """Linearly, by what a step has to remember: the input, the output, and the gates with what else they
    need, no more than eight values of a unit's; weights and states once."""
    hidden, batch, inputs = 16, 4, 8
    ours = make_twins(kind, inputs, hidden, dtype=torch.float32).ours

    def saved(steps: int) -> int:
        storages = {}

        def keep(tensor: Tensor) -> Tensor:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ours(make_input(ours, steps, batch))
        return sum(storages.values())

    a_step = (saved(40) - saved(20)) / 20
    assert 0 < a_step <= 4 * batch * (inputs + hidden + 8 * hidden)
    assert saved(20) - 20 * a_step <= sum(4 * p.numel() for p in ours.parameters()) + 4 * 8 * batch * hidden


@kinds
def test_saved_tensors_may_be_moved_away(kind):
    """save_on_cpu, and hooks that pack to another form: what is saved is saved through autograd."""
    twins = make_twins(kind, dtype=torch.float64)
    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    expected = run(twins.ours, x, hx)

    def call(*args):
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.clone().numpy(force=True), torch.from_numpy
        ):
            return twins.ours(*args)

    found = run(twins.ours, x, hx, call=call)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@layers
def test_backward_writes_over_nothing_that_is_read_again(kind):
    """It may put its results where the gates were saved: not if the graph is kept, nor if a hook has seen them."""
    ours = make(kind)
    x = make_input(ours).requires_grad_()
    wanted = [x, *ours.parameters()]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(tensor: Tensor) -> Tensor:
        seen.append((tensor, tensor.clone()))
        return tensor

    output, _ = ours(x)
    kept = [torch.autograd.grad(output.sum(), wanted, retain_graph=True) for _ in range(2)]
    last = torch.autograd.grad(output.sum(), wanted)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), wanted)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output, _ = ours(x)
    hooked = torch.autograd.grad(output.sum(), wanted)
    for found in (kept[1], last, hooked):
        assert all(map(torch.equal, found, kept[0]))
    assert seen and all(torch.equal(now, before) for now, before in seen)


@pytest.mark.parametrize("kind", CLASSES, ids=str)
def test_no_memory_is_lost_from_call_to_call(kind):
    """Thirty training steps leave as many live tensors as three did."""
    ours = make(kind)
    x = make_input(ours)

    def live() -> int:
        gc.collect()
        return sum(issubclass(type(obj), Tensor) for obj in gc.get_objects())

    def train(steps: int) -> None:
        for _ in range(steps):
            ours.zero_grad()
            sum(out.sum() for out in tensors_of(ours(x))).backward()

    train(3)
    before = live()
    train(30)
    assert live() == before
    assert math.isfinite(next(ours.parameters()).grad.sum().item())


# ------------------------------------------------------------------------------------------- edits in between


def gradients(module: nn.Module, x: Tensor, hx, through: str | None, edit=None) -> dict[str, Tensor]:
    """Of the outputs but the one that `edit` is done to, after it."""
    outputs = named_outputs(module, module(x, hx))
    kept = {name: out for name, out in outputs.items() if name != through}
    loss = sum((out * weights_like(out)).sum() for out in kept.values())
    if edit is not None:
        edit(outputs.get(through))
    wrt = {"x": x} | {f"hx[{i}]": h for i, h in enumerate(tensors_of(hx))} | dict(module.named_parameters())
    wrt = {name: leaf for name, leaf in wrt.items() if leaf.requires_grad}
    grads = torch.autograd.grad(loss, list(wrt.values()), allow_unused=True)
    return {name: g for name, g in zip(wrt, grads, strict=True) if g is not None}


EDITED = "modified by an inplace operation"


@kinds
@pytest.mark.parametrize("through", ["output", "h_n", "c_n", "h_1", "c_1"])
def test_an_edited_output_never_corrupts(kind, through):
    """An error if the output was saved for backward; the right gradients if it was not."""
    ours = make_twins(kind, dtype=torch.float64).ours
    x, hx = make_input(ours).requires_grad_(), make_state(ours)
    outputs = named_outputs(ours, ours(x, hx))
    if through not in outputs or len(outputs) == 1:
        through = next(iter(outputs))
    if len(outputs) == 1:  # a cell's only output: the loss is of the result of the edit
        expected = run(ours, x, hx)
        out = ours(x, hx)
        try:
            found = torch.autograd.grad(out.add_(1.0), x, weights_like(out))[0]
        except RuntimeError as error:
            assert EDITED in str(error)
        else:
            assert torch.equal(found, expected["grad x"])
        return
    expected = gradients(ours, x, hx, through)
    try:
        found = gradients(ours, x, hx, through, edit=lambda out: out.mul_(3.0))
    except RuntimeError as error:
        assert EDITED in str(error)
    else:
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@layers
@pytest.mark.parametrize("bidirectional", [False, True])
def test_an_edited_output_that_was_saved_raises(kind, bidirectional):
    """The sequence of outputs is what a layer remembers of its states."""
    ours = make(kind, bidirectional=bidirectional)
    output, _ = ours(make_input(ours))
    loss = output.sum()
    with torch.no_grad():
        output.add_(1.0)
    with pytest.raises(RuntimeError, match=EDITED):
        loss.backward()


@layers
def test_an_edit_through_a_view_raises_as_well(kind):
    ours = make(kind)
    output, _ = ours(make_input(ours))
    loss = output.sum()
    with torch.no_grad():
        output[0].zero_()
    with pytest.raises(RuntimeError, match=EDITED):
        loss.backward()


@kinds
@pytest.mark.parametrize("what", ["x", "hx", "weight_ih", "weight_hh"])
def test_an_edited_input_or_weight_never_corrupts(kind, what):
    ours = make_twins(kind, dtype=torch.float64).ours
    x, hx = make_input(ours), make_state(ours)
    expected = gradients(ours, x, hx, None)
    weight = getattr(ours, what if kind.is_cell else f"{what}_l0", None)
    edited = {"x": x, "hx": tensors_of(hx)[0]}.get(what, weight)

    def edit(_):
        with torch.no_grad():
            edited.mul_(2.0)

    try:
        found = gradients(ours, x, hx, None, edit=edit)
    except RuntimeError as error:
        assert EDITED in str(error)
    else:
        assert all(torch.equal(found[name], value) for name, value in expected.items())


@kinds
@pytest.mark.parametrize("stem", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_an_edited_weight_always_raises(kind, stem):
    """Needed or not: here neither the input nor a state requires grad. torch.nn's classes differ among themselves."""
    ours = make(kind)
    loss = sum(out.sum() for out in tensors_of(ours(make_input(ours))))
    with torch.no_grad():
        getattr(ours, stem if kind.is_cell else f"{stem}_l0").mul_(2.0)
    with pytest.raises(RuntimeError, match=EDITED):
        loss.backward()


@kinds
def test_an_edited_input_and_weight_raise_where_torch_raises(kind):
    """Both are needed for the gradient of the other."""
    for stem in ("x", "weight_ih"):
        ours = make_twins(kind, dtype=torch.float64).ours
        x = make_input(ours).requires_grad_()
        held = x * 1  # an intermediate, as a layer below would hand over
        loss = sum(out.sum() for out in tensors_of(ours(held)))
        with torch.no_grad():
            if stem == "x":
                held.mul_(2.0)
            else:
                getattr(ours, stem if kind.is_cell else f"{stem}_l0").mul_(2.0)
        with pytest.raises(RuntimeError, match=EDITED):
            loss.backward()


@kinds
def test_optimizer_step_between_forward_and_backward_raises(kind):
    """The classic mistake: the weights that the graph saw are gone."""
    ours = make_twins(kind).ours
    x = make_input(ours).requires_grad_()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    losses = [sum(out.sum() for out in tensors_of(ours(x))) for _ in range(2)]
    losses[0].backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match=EDITED):
        losses[1].backward()


def _mapping_flags(address: int) -> set[str]:
    """Of the memory mapping around an address, as Linux tells them; empty where it does not."""
    inside = False
    try:
        with Path("/proc/self/smaps").open() as maps:
            for line in maps:
                key, *values = line.split()
                if "-" in key and not key.endswith(":"):
                    first, last = (int(end, 16) for end in key.split("-"))
                    inside = first <= address < last
                elif inside and key == "VmFlags:":
                    return set(values)
    except OSError:
        pass
    return set()


tells_flags = pytest.mark.skipif(
    not _mapping_flags(id(object())), reason="needs Linux, which tells the flags of a mapping"
)


@tells_flags
def test_packed_weights_are_asked_for_in_huge_pages():
    """In a process of their own: this one may have kept the memory of other tests."""
    code = """
import re, torch, fused_rnn

def asked_for() -> int:
    mappings = re.split(r"^(?=[0-9a-f]+-)", open("/proc/self/smaps").read(), flags=re.M)
    asked = [m for m in mappings if re.search(r"^VmFlags:.* hg", m, re.M)]
    return sum(int(re.search(r"^Size: +(\\d+) kB", m, re.M)[1]) for m in asked)

layer, x = fused_rnn.LSTM(512, 512), torch.randn(40, 2, 512)
before = asked_for()
with torch.no_grad():
    layer(x)
print(asked_for() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 4096  # of 8 MB and a little, whole pages of 2 MB


@tells_flags
def test_large_memory_is_asked_for_in_huge_pages():
    ours = make_twins(LSTM, 8, 64).ours
    with torch.no_grad():
        output = ours(torch.randn(600, 64, 8))[0]
    assert output.nbytes >= 8 << 20
    assert "hg" in _mapping_flags(output.data_ptr() + output.nbytes // 2)
