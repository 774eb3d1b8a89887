"""Gradients: of every input and weight, through any outputs, to any order; accuracy by the tolerance law."""

from __future__ import annotations

import itertools

import pytest
import torch
from parity import (
    DTYPES,
    GRU,
    KINDS,
    LAYERS,
    LSTM,
    LSTM_CELL,
    RNN,
    assert_law,
    assert_parity,
    count_terms,
    leaves,
    make_input,
    make_state,
    make_twins,
    run,
    run_all,
    tensors_of,
    weights_like,
)

dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
layers = pytest.mark.parametrize("kind", LAYERS, ids=str)
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def assert_gradients(kind, sizes, steps, batch, **options) -> None:
    assert_parity(kind, sizes, steps, batch, gradients=True, **options)


# ----------------------------------------------------------------------------------------------- the ordinary


@kinds
@dtypes
@pytest.mark.parametrize("bias", [False, True], ids="bias={}".format)
def test_one_layer(kind, dtype, bias, backend):
    assert_gradients(kind, (6, 10), 5, 4, dtype=dtype, device=backend, bias=bias)


@layers
@dtypes
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 4]], ids=["padded", "packed"])
def test_layers_and_directions(kind, dtype, lengths, backend):
    options = {"num_layers": 2, "bidirectional": True, "dtype": dtype, "device": backend}
    assert_gradients(kind, (6, 10), 5, 4, lengths=lengths, **options)


@layers
@pytest.mark.parametrize("batch", [None, 1, 2, 17], ids="batch={}".format)
@pytest.mark.parametrize("batch_first", [False, True])
def test_batches(kind, batch, batch_first, backend):
    assert_gradients(kind, (3, 9), 4, batch, bidirectional=True, batch_first=batch_first, device=backend)


@kinds
@pytest.mark.parametrize("hidden_size", [1, 2, 4, 7, 8, 15, 16, 17, 31, 32, 33, 65])
def test_hidden_sizes(kind, hidden_size, backend):
    options = {"proj_size": hidden_size // 2} if kind.options.get("proj_size") else {}
    draws = 16 if hidden_size < 4 else 4
    assert_gradients(kind, (5, hidden_size), 3, 3, draws=draws, device=backend, **options)


@kinds
@pytest.mark.parametrize("input_size", [1, 8, 17, 65])
def test_input_sizes(kind, input_size, backend):
    assert_gradients(kind, (input_size, 11), 3, 3, device=backend)


@layers
@pytest.mark.parametrize(("steps", "batch", "size"), [(40, 3, 24), (15, 33, 40), (1, 130, 48)], ids=str)
@pytest.mark.parametrize("threads", [2, 3])
def test_threads(kind, steps, batch, size, threads, backend):
    torch.set_num_threads(threads)
    assert_gradients(kind, (size, size), steps, batch, draws=1, device=backend)


@layers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_sequence(kind, dtype, backend):
    assert_gradients(kind, (4, 12), 150, 2, draws=4, dtype=dtype, device=backend)


@layers
@pytest.mark.parametrize("lengths", [[6, 6, 6], [6, 1, 1, 1], [1, 1, 6], [4, 2, 6, 3, 3]], ids=str)
@pytest.mark.parametrize("with_hx", [False, True], ids="hx={}".format)
def test_packed(kind, lengths, with_hx, backend):
    assert_gradients(
        kind, (6, 9), 6, len(lengths), lengths=lengths, with_hx=with_hx, bidirectional=True, device=backend
    )


# --------------------------------------------------------------------------------------- through some outputs


SUBSETS = [names for count in (1, 2) for names in itertools.combinations(("output", "h_n", "c_n"), count)]


@layers
@pytest.mark.parametrize("through", SUBSETS, ids="+".join)
@pytest.mark.parametrize("lengths", [None, [2, 5, 1, 4]], ids=["padded", "packed"])
def test_loss_through_some_outputs(kind, through, lengths, device):
    through = [name for name in through if name != "c_n" or kind.is_lstm] or ["h_n"]
    options = {"num_layers": 2, "bidirectional": True, "device": device, "dtype": torch.float64}
    assert_gradients(kind, (4, 6), 5, 4, draws=1, lengths=lengths, through=through, **options)


@pytest.mark.parametrize("through", [["h_1"], ["c_1"]], ids=str)
def test_loss_through_one_output_of_a_cell(through, device):
    assert_gradients(LSTM_CELL, (4, 6), 1, 3, draws=1, through=through, device=device, dtype=torch.float64)


@kinds
def test_loss_through_no_output_reaches_nothing(kind):
    ours = make_twins(kind).ours
    x, hx = leaves(ours, 4, 3)
    result = tensors_of(ours(x, hx))
    unused = torch.autograd.grad(
        [tensor.sum() * 0 for tensor in result], [x, *ours.parameters()], allow_unused=True
    )
    assert all(grad is not None and not grad.any() for grad in unused)


@kinds
@pytest.mark.parametrize("layout", ["expanded", "transposed"])
def test_layout_of_incoming_gradients(kind, layout, device):
    """sum() sends back one value with strides of zero; a transposition, a transposed one."""
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x, hx = leaves(twins.ours, 4, 3)

    def gradients(module):
        outputs = tensors_of(module(x, hx))
        if layout == "expanded":
            loss = sum(out.sum() for out in outputs)
        else:
            flipped = [out.transpose(0, -1) for out in outputs]
            loss = sum((out.contiguous() * weights_like(out)).sum() for out in flipped)
        named = dict(module.named_parameters()) | {"x": x, **dict(enumerate(tensors_of(hx)))}
        return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))

    ours, theirs = gradients(twins.ours), gradients(twins.theirs)
    assert_law((ours, theirs, theirs), terms=count_terms(twins.ours, x))


# ---------------------------------------------------------------------------------------- some leaves, frozen


@layers
@pytest.mark.parametrize("bidirectional", [False, True])
def test_frozen_subsets_of_weights(kind, bidirectional, device):
    """Each parameter alone, and all but each; what is frozen gets no gradient and changes no other."""
    twins = make_twins(kind, num_layers=2, bidirectional=bidirectional, device=device, dtype=torch.float64)
    x, hx = leaves(twins.ours, 4, 3)
    full = run(twins.ours, x, hx)
    names = [name for name, _ in twins.ours.named_parameters()]
    for chosen in names:
        for alone in (True, False):
            for name, weight in twins.ours.named_parameters():
                weight.requires_grad_((name == chosen) == alone)
            values = run(twins.ours, x, hx)
            expected = {n for n in names if (n == chosen) == alone}
            assert {n[5:] for n in values if n.startswith("grad ")} - {"x", "hx[0]", "hx[1]"} == expected
            for name, value in values.items():
                torch.testing.assert_close(value, full[name], rtol=1e-13, atol=1e-13, msg=name)


@kinds
@pytest.mark.parametrize("wanted", [("x",), ("hx[0]",), ("hx[1]",), ("x", "hx[0]"), ()], ids="+".join)
@pytest.mark.parametrize("weights", [False, True], ids="weights={}".format)
def test_any_of_input_and_state(kind, wanted, weights, device):
    if wanted == ("hx[1]",) and not kind.is_lstm:
        wanted = ("hx[0]",)
    if not wanted and not weights:
        wanted = ("x",)
    twins = make_twins(kind, device=device, dtype=torch.float64).apply(lambda m: m.requires_grad_(weights))
    x, hx = make_input(twins.ours), make_state(twins.ours)
    for name, leaf in {"x": x, **{f"hx[{i}]": h for i, h in enumerate(tensors_of(hx))}}.items():
        leaf.requires_grad_(name in wanted)
    runs = run_all(twins, x, hx)
    got = {name[5:] for name in runs[0] if name.startswith("grad ")}
    assert set(wanted) == {name for name in got if name in ("x", "hx[0]", "hx[1]")}
    assert_law(runs, terms=count_terms(twins.ours, x))


@pytest.mark.parametrize("kind", [LSTM, LSTM_CELL], ids=str)
def test_h0_and_c0_as_one_tensor(kind, device):
    """Its gradient is the sum of the two."""
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x = make_input(twins.ours)
    state = make_state(twins.ours)[0].requires_grad_()
    apart = run(twins.theirs, x, (state.detach().requires_grad_(), state.detach().requires_grad_()))
    outputs = tensors_of(twins.ours(x, (state, state)))
    (grad,) = torch.autograd.grad(outputs, state, [weights_like(out) for out in outputs])
    torch.testing.assert_close(grad, apart["grad hx[0]"] + apart["grad hx[1]"], rtol=1e-13, atol=1e-13)


@layers
def test_learned_initial_state(kind, device):
    """One state for every row, expanded: its gradient is summed over the batch."""
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x = make_input(twins.ours, 4, 3)
    learned = [h[:, :1].detach().clone().requires_grad_() for h in tensors_of(make_state(twins.ours, 3))]

    def gradients(module):
        hx = [h.expand(-1, 3, -1) for h in learned]
        outputs = tensors_of(module(x, tuple(hx) if kind.is_lstm else hx[0]))
        grads = torch.autograd.grad(outputs, learned, [weights_like(out) for out in outputs])
        return dict(enumerate(grads))

    ours, theirs = gradients(twins.ours), gradients(twins.theirs)
    assert_law((ours, theirs, theirs), terms=3 * count_terms(twins.ours, x))


@layers
def test_dropout(kind):
    """The masks of the forward pass are those of the backward pass."""
    twins = make_twins(kind, 6, 10, dtype=torch.float64, num_layers=3, dropout=0.4, bidirectional=True)
    x, hx = leaves(twins.ours, 5, 4)

    def seeded(module):
        torch.manual_seed(5)
        return run(module, x, hx)

    ours, theirs = seeded(twins.ours), seeded(twins.theirs)
    assert_law((ours, theirs, theirs), terms=count_terms(twins.ours, x))


# ------------------------------------------------------------------------------------------- the graph's uses


@kinds
def test_backward_in_eval_mode(kind, backend):
    assert_gradients(kind, (4, 9), 4, 3, change=lambda module: module.eval(), device=backend)


@kinds
def test_retain_graph(kind, device):
    """Twice gives the same twice, and .grad accumulates."""
    ours = make_twins(kind, device=device).ours
    x, hx = leaves(ours, 4, 3)
    loss = sum((out * weights_like(out)).sum() for out in tensors_of(ours(x, hx)))
    loss.backward(retain_graph=True)
    everything = [x, *tensors_of(hx), *ours.parameters()]
    once = [leaf.grad.clone() for leaf in everything]
    loss.backward()
    for leaf, grad in zip(everything, once, strict=True):
        assert torch.equal(leaf.grad, grad + grad)


@kinds
def test_gradients_own_their_memory(kind, device):
    """bias_ih and bias_hh of most kinds have equal gradients; one written to must not change the other."""
    ours = make_twins(kind, device=device).ours
    x, hx = leaves(ours, 4, 3)
    sum(out.sum() for out in tensors_of(ours(x, hx))).backward()
    grads = [leaf.grad for leaf in (x, *tensors_of(hx), *ours.parameters())]
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == len(grads)


@kinds
def test_incoming_gradients_are_not_written_to(kind, device):
    ours = make_twins(kind, device=device).ours
    x, hx = leaves(ours, 4, 3)
    outputs = tensors_of(ours(x, hx))
    incoming = [weights_like(out) for out in outputs]
    kept = [grad.clone() for grad in incoming]
    torch.autograd.backward(outputs, incoming)
    assert all(torch.equal(a, b) for a, b in zip(incoming, kept, strict=True))


@layers
def test_truncated_backpropagation(kind, device):
    """A state detached between chunks; each chunk's graph is its own."""
    twins = make_twins(kind, device=device, dtype=torch.float64)
    x = make_input(twins.ours, 9, 3)

    def train(module):
        hx, losses = None, []
        for chunk in x.split(3):
            output, hx = module(chunk, hx)
            loss = (output * weights_like(output)).sum()
            loss.backward()
            losses.append(loss.detach())
            hx = tuple(h.detach() for h in hx) if kind.is_lstm else hx.detach()
        return {name: weight.grad for name, weight in module.named_parameters()} | {
            "loss": torch.stack(losses)
        }

    ours, theirs = train(twins.ours), train(twins.theirs)
    # cotangents are up to 1 in size and a loss sums 63 of them
    assert_law((ours, theirs, theirs), terms=count_terms(twins.ours, x) + 63)


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_layers_chained_by_hand(kind, device):
    """Output into the next module's input and state into its state, as an encoder feeds a decoder."""
    twins = [make_twins(kind, 7, 7, device=device, dtype=torch.float64, seed=seed) for seed in (1, 2)]
    x = make_input(twins[0].ours, 4, 3).requires_grad_()

    def gradients(first, second):
        output, hidden = first(x)
        outputs = tensors_of(second(output, hidden))
        wrt = {"x": x} | {f"first.{n}": p for n, p in first.named_parameters()}
        wrt |= {f"second.{n}": p for n, p in second.named_parameters()}
        return dict(
            zip(wrt, torch.autograd.grad(outputs, wrt.values(), map(weights_like, outputs)), strict=True)
        )

    ours, theirs = gradients(*(t.ours for t in twins)), gradients(*(t.theirs for t in twins))
    assert_law((ours, theirs, theirs), terms=2 * count_terms(twins[0].ours, x))


@pytest.mark.parametrize("kind", [RNN, GRU, LSTM], ids=str)
def test_one_module_used_twice_in_a_graph(kind, device):
    twins = make_twins(kind, 7, 7, device=device, dtype=torch.float64)
    x = make_input(twins.ours, 4, 3).requires_grad_()

    def twice(module):
        return lambda x: module(*module(x))

    runs = [run(module, x, call=twice(module)) for module in (twins.ours, twins.theirs)]
    assert_law((runs[0], runs[1], runs[1]), terms=2 * count_terms(twins.ours, x))


@kinds
def test_a_hook_on_an_output_sees_its_gradient(kind):
    ours = make_twins(kind).ours
    x, hx = leaves(ours, 4, 3)
    out = tensors_of(ours(x, hx))[0]
    seen = []
    out.register_hook(lambda grad: seen.append(grad.clone()) or grad * 0)
    (grad,) = torch.autograd.grad(out, x, weights_like(out))
    assert torch.equal(seen[0], weights_like(out)) and not grad.any()
