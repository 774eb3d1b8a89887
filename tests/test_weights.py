"""Weights that are replaced, shared, lent or swapped: the layer computes with what its names hold now.

Each test does the same thing to ours and to torch.nn's and reads results and gradients of both, in float64.
"""

from __future__ import annotations

import pytest
import torch
from following import assert_follows, compare, make, name
from parity import (
    CELLS,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_PROJ,
    RNN,
    assert_law,
    count_terms,
    make_input,
    make_state,
    make_twins,
    run,
    tensors_of,
    weights_like,
)
from torch import nn
from torch.func import functional_call

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)


# --------------------------------------------------------------------------------------------------- replaced


@kinds
def test_a_new_parameter_by_assignment(kind):
    twins = make(kind)
    new = nn.Parameter(torch.randn_like(getattr(twins.ours, name(twins.ours, "weight_hh"))))
    assert_follows(twins, lambda m: setattr(m, name(m, "weight_hh"), nn.Parameter(new.detach().clone())))


@kinds
@pytest.mark.parametrize("stem", ["weight_ih", "weight_hh", "bias_ih", "bias_hh"])
def test_data_by_assignment_and_in_place(kind, stem):
    twins = make(kind)

    def assign(module):
        weight = getattr(module, name(module, stem))
        weight.data = weight.data * 1.5 + 0.1

    def edit(module):
        with torch.no_grad():
            getattr(module, name(module, stem)).mul_(-0.7)

    assert_follows(twins, assign)
    assert_follows(twins, edit)


@kinds
def test_optimizer_steps(kind):
    """Five steps of Adam, as torch.nn takes them."""
    twins = make(kind)
    x = make_input(twins.ours)

    def train(module):
        optimizer, losses = torch.optim.Adam(module.parameters(), lr=0.05), []
        for _ in range(5):
            optimizer.zero_grad()
            loss = sum((out - 0.3).pow(2).sum() for out in tensors_of(module(x)))
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    ours, theirs = train(twins.ours), train(twins.theirs)
    assert ours[0] > ours[-1]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=0)
    for mine, its in zip(twins.ours.parameters(), twins.theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-7, atol=1e-9)


@kinds
def test_weights_without_gradients(kind):
    """requires_grad of a single parameter, switched off and on between calls."""
    twins = make(kind)
    for flag in (False, True):
        twins.apply(lambda m, flag=flag: getattr(m, name(m, "weight_hh")).requires_grad_(flag))
        compare(twins)


@layers
def test_a_plain_tensor_as_weight(kind):
    twins = make(kind)
    value = torch.randn_like(twins.ours.weight_ih_l0)

    def replace(module):
        del module._parameters["weight_ih_l0"]
        module.weight_ih_l0 = value

    assert_follows(twins, replace)
    assert "weight_ih_l0" not in dict(twins.ours.named_parameters())


@layers
def test_flat_weights_follow(kind):
    """`_flat_weights` is what other libraries read, in the order of `_flat_weights_names`."""
    ours = make(kind).ours
    ours.weight_hh_l1 = nn.Parameter(torch.zeros_like(ours.weight_hh_l1))
    ours.double()
    ours(make_input(ours))
    assert [id(w) for w in ours._flat_weights] == [id(getattr(ours, n)) for n in ours._flat_weights_names]


@layers
@pytest.mark.parametrize("whole", [False, True], ids=["one", "list"])
def test_what_is_put_into_flat_weights_is_used(kind, whole):
    """As adapters do it: the sum of a weight and something that trains, call by call, and the parameter stays."""
    twins = make(kind)
    step = torch.randn_like(twins.ours.weight_hh_l1)
    index = twins.ours._flat_weights_names.index("weight_hh_l1")
    x = make_input(twins.ours)
    found = []
    for module in (twins.ours, twins.theirs):
        adapter = step.clone().requires_grad_()
        for scale in (1.0, 0.5):  # the second call sees the second change
            adapted = module.weight_hh_l1 + scale * adapter
            if whole:
                module._flat_weights = [
                    *module._flat_weights[:index],
                    adapted,
                    *module._flat_weights[index + 1 :],
                ]
            else:
                module._flat_weights[index] = adapted
            output, _ = module(x)
            found.append((output, *torch.autograd.grad(output.sum(), [adapter, module.weight_hh_l1])))
    for ours, theirs in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(ours, theirs)
    new = nn.Parameter(torch.randn_like(step))
    assert_follows(twins, lambda m: setattr(m, "weight_hh_l1", nn.Parameter(new.detach().clone())))


@pytest.mark.parametrize("kind", CELLS, ids=str)
@pytest.mark.parametrize("absent", ["bias_ih", "bias_hh"])
def test_one_bias_of_a_cell(kind, absent):
    twins = make(kind)
    assert_follows(twins, lambda module: setattr(module, absent, None))
    assert absent not in dict(twins.ours.named_parameters())


# ----------------------------------------------------------------------------------------------------- shared


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_layers_tied_to_one_another(kind):
    """One weight in two layers: its gradient is the sum of both uses."""
    twins = make(kind)

    def tie(module):
        module.weight_hh_l1 = module.weight_hh_l0
        module.bias_hh_l1 = module.bias_hh_l0

    assert_follows(twins, tie)
    assert twins.ours.weight_hh_l1 is twins.ours.weight_hh_l0
    assert len(list(twins.ours.parameters())) == 6


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_directions_tied_to_one_another(kind):
    twins = make_twins(kind, bidirectional=True, dtype=torch.float64)

    def tie(module):
        for stem in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            setattr(module, f"{stem}_l0_reverse", getattr(module, f"{stem}_l0"))

    assert_follows(twins, tie)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, *CELLS], ids=str)
def test_one_tensor_as_both_biases(kind):
    twins = make_twins(kind, dtype=torch.float64)
    assert_follows(twins, lambda m: setattr(m, name(m, "bias_hh"), getattr(m, name(m, "bias_ih"))))


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, *CELLS], ids=str)
def test_one_tensor_as_both_weights(kind):
    """Where the input is as wide as the state."""
    twins = make_twins(kind, 7, 7, dtype=torch.float64)
    assert_follows(twins, lambda m: setattr(m, name(m, "weight_hh"), getattr(m, name(m, "weight_ih"))))


@kinds
def test_tied_double_backward(kind):
    """Where a parameter is used twice, a recorded backward pass counts it twice, not four times."""
    twins = make_twins(kind, dtype=torch.float64)
    twins.apply(lambda m: setattr(m, name(m, "bias_hh"), getattr(m, name(m, "bias_ih"))))
    x = make_input(twins.ours)

    def penalty(module):
        weights = list(module.parameters())
        outputs = tensors_of(module(x))
        first = torch.autograd.grad(outputs, weights, [weights_like(o) for o in outputs], create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), weights)
        return {i: g.detach() for i, g in enumerate((*first, *second))}

    ours, theirs = penalty(twins.ours), penalty(twins.theirs)
    assert_law((ours, theirs, theirs), terms=4 * count_terms(twins.ours, x))


@kinds
def test_two_modules_share_a_weight(kind):
    twins = [make(kind, seed=seed) for seed in (1, 2)]
    for first, second in zip(*twins, strict=True):
        setattr(second, name(second, "weight_hh"), getattr(first, name(first, "weight_hh")))
    x = make_input(twins[0].ours)

    def gradient(first, second):
        outputs = [*tensors_of(first(x)), *tensors_of(second(x))]
        shared = getattr(first, name(first, "weight_hh"))
        return {"shared": torch.autograd.grad(outputs, shared, [weights_like(o) for o in outputs])[0]}

    ours, theirs = gradient(*(t.ours for t in twins)), gradient(*(t.theirs for t in twins))
    assert_law((ours, theirs, theirs), terms=2 * count_terms(twins[0].ours, x))


@kinds
def test_weights_that_are_parts_of_one_tensor(kind):
    """As an optimizer that flattens all parameters leaves them: views, at any offset."""
    twins = make(kind)

    def flatten(module):
        flat = torch.cat(
            [torch.zeros(1, dtype=torch.float64), *(w.detach().flatten() for w in module.parameters())]
        )
        offset = 1
        for weight in module.parameters():
            weight.data = flat[offset : offset + weight.numel()].view_as(weight)
            offset += weight.numel()

    compare(twins.apply(flatten))


# ----------------------------------------------------------------------------------------------- from outside


@kinds
def test_functional_call(kind):
    twins, others = make(kind), make(kind, seed=4)
    x, hx = make_input(twins.ours).requires_grad_(), make_state(twins.ours)
    before = run(twins.ours, x, hx)

    def with_weights_of(module, other):
        return lambda *args: functional_call(module, dict(other.named_parameters()), args)

    # the gradients asked for are those of the weights put in: `run` reads the parameters of the second module
    runs = [
        run(other, x, hx, call=with_weights_of(module, other))
        for module, other in ((twins.ours, others.ours), (twins.theirs, others.theirs))
    ]
    assert_law((runs[0], runs[1], runs[1]), terms=count_terms(twins.ours, x))
    after = run(twins.ours, x, hx)
    assert all(torch.equal(after[n], value) for n, value in before.items()), (
        "the module kept what it was lent"
    )


@kinds
def test_functional_call_of_a_few(kind):
    twins = make(kind)
    x = make_input(twins.ours)
    lent = {name(twins.ours, "bias_hh"): torch.randn_like(getattr(twins.ours, name(twins.ours, "bias_hh")))}
    mine, its = (tensors_of(functional_call(module, lent, (x,))) for module in (twins.ours, twins.theirs))
    torch.testing.assert_close(mine, its, rtol=1e-13, atol=1e-13)


@kinds
def test_load_by_assignment(kind):
    twins, others = make(kind), make(kind, seed=4)
    state = others.theirs.state_dict(keep_vars=True)
    assert_follows(
        twins,
        lambda m: m.load_state_dict(state, assign=True) if m is twins.ours else m.load_state_dict(state),
    )
    for n, weight in state.items():
        assert getattr(twins.ours, n) is weight


@kinds
def test_from_meta(kind):
    """Built without memory, given some, and filled: by to_empty, or by assignment."""
    twins = make(kind)
    state, options = twins.theirs.state_dict(), {"dtype": torch.float64, "device": "meta", **kind.options}
    if not kind.is_cell:
        options["num_layers"] = 2
    x = make_input(twins.ours)
    expected = tensors_of(twins.ours(x))
    emptied = kind.ours(5, 7, **options).to_empty(device="cpu")
    emptied.load_state_dict(state)
    assigned = kind.ours(5, 7, **options)
    assigned.load_state_dict(state, assign=True)
    for module in (emptied, assigned):
        assert {p.device.type for p in module.parameters()} == {"cpu"}
        assert all(torch.equal(a, b) for a, b in zip(tensors_of(module(x)), expected, strict=True))


@pytest.mark.parametrize("kind", CELLS, ids=str)
def test_swap_tensors(kind):
    """Cells only: torch refuses to swap what has weak references, as its layers' have. Those come next."""
    twins = make(kind)
    new = torch.randn_like(twins.ours.weight_hh)
    assert_follows(twins, lambda m: torch.utils.swap_tensors(m.weight_hh, nn.Parameter(new.clone())))
    assert torch.equal(twins.ours.weight_hh, new)


CONVERSIONS = {
    "as torch does by default": lambda: torch.__future__.set_swap_module_params_on_conversion(False),
    "by new parameters": lambda: torch.__future__.set_overwrite_module_params_on_conversion(True),
    "by swapping": lambda: torch.__future__.set_swap_module_params_on_conversion(True),
}


@kinds
@pytest.mark.parametrize("how", CONVERSIONS)
def test_conversions_of_parameters(kind, how):
    """`module.to(dtype)` may refill a parameter, make a new one, or swap the tensor under it."""
    twins = make_twins(kind)
    x = make_input(twins.ours)
    with torch.no_grad():  # torch refuses to swap a parameter that a graph still refers to
        twins.ours(x), twins.theirs(x)
    try:
        CONVERSIONS[how]()
        for module in (twins.ours, twins.theirs):
            module.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    assert {p.dtype for p in twins.ours.parameters()} == {torch.float64}
    compare(twins)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM, LSTM_PROJ], ids=str)
def test_apply_and_share_memory(kind):
    ours = make(kind).ours
    x = make_input(ours)
    expected = tensors_of(ours(x))
    ours.apply(lambda module: None)
    ours.share_memory()
    ours.to(memory_format=torch.preserve_format)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(ours(x)), expected, strict=True))
