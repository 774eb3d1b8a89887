"""What the parity tests share: the classes in pairs, twins with the same weights, and the tolerance law.

The law stands in place of hand-picked tolerances: against torch.nn in float64 with the same weights upcast,
our largest error is at most twice that of torch.nn in the dtype under test, plus one rounding (`assert_law`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

import fused_rnn

Values = dict[str, "Tensor | None"]  # outputs and gradients by name; None is a gradient that does not exist


@dataclass(frozen=True, eq=False)
class Kind:
    """One recurrence: a class of ours, torch.nn's that it stands for, and the options that select it."""

    name: str
    cls: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ours(self) -> type[nn.Module]:
        return getattr(fused_rnn, self.cls)

    @property
    def theirs(self) -> type[nn.Module]:
        return getattr(nn, self.cls)

    @property
    def is_cell(self) -> bool:
        return self.cls.endswith("Cell")

    @property
    def is_lstm(self) -> bool:
        return self.cls.startswith("LSTM")

    def __str__(self) -> str:
        return self.name


RNN, GRU, LSTM = Kind("RNN", "RNN"), Kind("GRU", "GRU"), Kind("LSTM", "LSTM")
RNN_RELU = Kind("RNN-relu", "RNN", {"nonlinearity": "relu"})
LSTM_PROJ = Kind("LSTM-proj", "LSTM", {"proj_size": 3})
RNN_CELL, GRU_CELL, LSTM_CELL = (
    Kind("RNNCell", "RNNCell"),
    Kind("GRUCell", "GRUCell"),
    Kind("LSTMCell", "LSTMCell"),
)
RNN_CELL_RELU = Kind("RNNCell-relu", "RNNCell", {"nonlinearity": "relu"})

CLASSES = (RNN, GRU, LSTM, RNN_CELL, GRU_CELL, LSTM_CELL)  # the six, once each
LAYERS = (RNN, RNN_RELU, GRU, LSTM, LSTM_PROJ)
CELLS = (RNN_CELL, RNN_CELL_RELU, GRU_CELL, LSTM_CELL)
KINDS = LAYERS + CELLS

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


# ------------------------------------------------------------------------------------------------------ twins


@dataclass
class Twins:
    """The same weights three times: ours, torch.nn's in the same dtype, and torch.nn's in float64."""

    kind: Kind
    ours: nn.Module
    theirs: nn.Module
    exact: nn.Module

    def __iter__(self):
        return iter((self.ours, self.theirs, self.exact))

    def apply(self, change: Callable[[nn.Module], Any]) -> Twins:
        """Do the same thing to all three."""
        for module in self:
            change(module)
        return self


def make_twins(
    kind: Kind,
    input_size: int = 5,
    hidden_size: int = 7,
    *,
    dtype=torch.float32,
    device="cpu",
    seed=0,
    **options,
) -> Twins:
    torch.manual_seed(seed)
    options = {**kind.options, **options}
    theirs = kind.theirs(input_size, hidden_size, dtype=dtype, device=device, **options)
    ours = kind.ours(input_size, hidden_size, dtype=dtype, device=device, **options)
    ours.load_state_dict(theirs.state_dict())
    exact = copy.deepcopy(theirs).to(torch.complex128 if dtype.is_complex else torch.float64)
    return Twins(kind, ours, theirs, exact)


def make_input(module: nn.Module, steps: int = 4, batch: int | None = 3, *, dtype=None) -> Tensor:
    """A random input of the module's layout; `batch=None`: without a batch dimension. Cells have no steps."""
    weight = next(module.parameters())
    if isinstance(module, nn.RNNCellBase):
        shape = (module.input_size,) if batch is None else (batch, module.input_size)
    elif batch is None:
        shape = (steps, module.input_size)
    else:
        shape = (batch, steps, module.input_size) if module.batch_first else (steps, batch, module.input_size)
    return torch.randn(shape, dtype=dtype or weight.dtype, device=weight.device)


def make_state(module: nn.Module, batch: int | None = 3, *, dtype=None):
    """A random hx of the module's layout: a tensor, or a pair for the LSTM kinds."""
    weight = next(module.parameters())

    def state(size: int) -> Tensor:
        shape = (size,) if batch is None else (batch, size)
        if not isinstance(module, nn.RNNCellBase):
            shape = (module.num_layers * (1 + bool(module.bidirectional)), *shape)
        return torch.randn(shape, dtype=dtype or weight.dtype, device=weight.device)

    if isinstance(module, (nn.LSTM, nn.LSTMCell, fused_rnn.LSTM, fused_rnn.LSTMCell)):
        return state(getattr(module, "proj_size", 0) or module.hidden_size), state(module.hidden_size)
    return state(module.hidden_size)


def leaves(module: nn.Module, steps: int, batch: int | None, *, with_hx: bool = True):
    """An input and hx that require grad."""
    x = make_input(module, steps, batch).requires_grad_()
    hx = make_state(module, batch) if with_hx else None
    for h in tensors_of(hx if hx is not None else ()):
        h.requires_grad_()
    return x, hx


def count_terms(module: nn.Module, x: Tensor) -> int:
    """How many terms are accumulated, at most, to reach one element of an output or a gradient: a dot product
    for every step of every layer, there and back, plus every row of the input in a weight gradient."""
    rows = x.numel() // max(module.input_size, 1)
    layers = getattr(module, "num_layers", 1)
    steps = (
        1 if isinstance(module, nn.RNNCellBase) else x.size(1 if module.batch_first and x.dim() == 3 else 0)
    )
    width = module.input_size + (1 + bool(getattr(module, "bidirectional", False))) * module.hidden_size
    return 2 * layers * steps * width + rows


def pack(lengths: Sequence[int], *, batch_first: bool = False, enforce_sorted: bool = False):
    """The form of input that packs a padded batch, for `run`."""

    def form(x: Tensor) -> PackedSequence:
        return pack_padded_sequence(x, torch.tensor(lengths), batch_first, enforce_sorted)

    return form


# ------------------------------------------------------------------------------------------------- evaluation


def tensors_of(result) -> list[Tensor]:
    """The tensors of any result of any class, in order: output, h_n, c_n."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, PackedSequence):
        return [result.data]
    return [tensor for item in result for tensor in tensors_of(item)]


def named_outputs(module: nn.Module, result) -> Values:
    names = ("h_1", "c_1") if isinstance(module, nn.RNNCellBase) else ("output", "h_n", "c_n")
    return dict(zip(names, tensors_of(result), strict=False))


def upcast(value):
    """The same values as leaves of float64 (or complex128), for the reference."""
    if isinstance(value, Tensor):
        wide = torch.complex128 if value.dtype.is_complex else torch.float64
        return value.detach().to(wide).requires_grad_(value.requires_grad)
    return None if value is None else tuple(upcast(item) for item in value)


def run(
    module: nn.Module,
    x: Tensor,
    hx=None,
    *,
    form: Callable[[Tensor], Any] = lambda x: x,
    through: Iterable[str] | None = None,
    call: Callable[..., Any] | None = None,
) -> Values:
    """Outputs, and gradients of a weighted sum of the outputs named in `through` (all unless told) for what
    requires one. `form` turns x into what the module is called with; `call` stands in for the module."""
    call = module if call is None else call
    result = call(form(x)) if hx is None else call(form(x), hx)
    values = named_outputs(module, result)
    leaves = {"x": x, **{f"hx[{i}]": h for i, h in enumerate(tensors_of(hx if hx is not None else ()))}}
    leaves |= dict(module.named_parameters())
    leaves = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    chosen = {
        name: out
        for name, out in values.items()
        if (through is None or name in through) and out.requires_grad
    }
    if leaves and chosen:
        grads = torch.autograd.grad(
            list(chosen.values()),
            list(leaves.values()),
            [weights_like(out) for out in chosen.values()],
            allow_unused=True,
        )
        values |= {f"grad {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {name: None if value is None else value.detach() for name, value in values.items()}


def weights_like(out: Tensor) -> Tensor:
    """Fixed weights for a loss: different ones, of both signs, exact in every dtype (multiples of 1/16)."""
    return ((torch.arange(out.numel(), device=out.device) * 7 % 33 - 16) / 16).to(out.dtype).view_as(out)


def run_all(twins: Twins, x: Tensor, hx=None, **how) -> tuple[Values, Values, Values]:
    """`run` on all three, the float64 one on upcast input."""
    return (
        run(twins.ours, x, hx, **how),
        run(twins.theirs, x, hx, **how),
        run(twins.exact, upcast(x), upcast(hx), **how),
    )


# -------------------------------------------------------------------------------------------------------- law


def rounding(dtype: torch.dtype, scale: float) -> float:
    return torch.finfo(dtype).eps * scale


def assert_law(*runs: tuple[Values, Values, Values], terms: int = 0) -> None:
    """Our largest error against float64 is at most twice torch.nn's, plus one rounding: for each named
    tensor.

    Several runs are judged together, by the largest errors over all of them: on a tensor of few elements
    torch.nn's error may be zero by luck, and says nothing of its accuracy.

    float64 has no wider reference to measure torch.nn's error by. There ours and torch.nn's may each be off
    by a rounding for every term that was accumulated to reach an element, so they differ by `terms` roundings
    at most; `count_terms` counts. The terms are of the size of states, weights and loss weights, about 1,
    even where their sum is nearly zero; so a rounding is that of the largest value or of 1."""
    for name in runs[0][0]:
        triples = [(ours[name], theirs[name], exact[name]) for ours, theirs, exact in runs]
        _assert_same_form(name, triples)
        triples = [triple for triple in triples if triple[0] is not None and triple[0].numel()]
        if not triples:
            continue
        dtype = triples[0][0].dtype
        scale = max(exact.abs().max().item() for _, _, exact in triples)
        torchs_error = max(
            (theirs.to(exact.dtype) - exact).abs().max().item() for _, theirs, exact in triples
        )
        error = max((ours.to(exact.dtype) - exact).abs().max().item() for ours, _, exact in triples)
        if dtype in (torch.float64, torch.complex128):
            assert terms > 0, "float64 is judged by the number of accumulated terms: pass it"
            bound = rounding(dtype, max(scale, 1.0)) * terms
        else:
            # a reference that torch.nn is nowhere near is not of the same computation, and bounds nothing
            assert torchs_error <= scale / 4, (
                f"{name}: torch.nn's error {torchs_error:.3e}, largest {scale:.3e}"
            )
            bound = 2 * torchs_error + rounding(dtype, scale)
        # max() and the comparison both drop a NaN; a result that is not finite must fail here
        finite = all(torch.isfinite(ours).all() for ours, _, _ in triples)
        assert finite and error <= bound, (
            f"{name} ({dtype}): error {error:.3e} > bound {bound:.3e}; torch.nn's error {torchs_error:.3e}, "
            f"largest value {scale:.3e}, all finite: {finite}, worst at {_worst(triples)}"
        )


def _assert_same_form(name: str, triples: list) -> None:
    for ours, theirs, exact in triples:
        assert (ours is None) == (theirs is None) == (exact is None), (
            f"{name}: ours {ours}, torch.nn's {theirs}"
        )
        if ours is not None:
            assert ours.shape == theirs.shape == exact.shape, (
                f"{name}: {ours.shape}, torch.nn's {theirs.shape}"
            )
            assert ours.dtype == theirs.dtype, f"{name}: {ours.dtype}, torch.nn's {theirs.dtype}"
            assert ours.device == theirs.device, f"{name}: {ours.device}, torch.nn's {theirs.device}"


def _worst(triples: list) -> str:
    errors = [(ours.to(exact.dtype) - exact).abs() for ours, _, exact in triples]
    run_index = max(range(len(errors)), key=lambda i: errors[i].max().item())
    place = tuple(int(i) for i in torch.unravel_index(errors[run_index].argmax(), errors[run_index].shape))
    ours, theirs, exact = (tensor[place].item() for tensor in triples[run_index])
    return f"run {run_index} {list(place)}: ours {ours!r}, torch.nn {theirs!r}, float64 {exact!r}"


def assert_equal(ours: Values, theirs: Values) -> None:
    """Bit for bit, the form too."""
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert (value is None) == (theirs[name] is None), name
        if value is not None:
            assert value.dtype == theirs[name].dtype and torch.equal(value, theirs[name]), name


# ---------------------------------------------------------------------------------------------------- verdict

MORE = 16  # how many times the draws, before the law is said to be broken


def assert_parity(
    kind: Kind,
    sizes: tuple[int, int],
    steps: int,
    batch: int | None,
    *,
    gradients: bool,
    draws: int = 6,
    lengths: Sequence[int] | None = None,
    with_hx: bool = True,
    through: Iterable[str] | None = None,
    change: Callable[[nn.Module], Any] | None = None,
    change_input: Callable[[Tensor], Tensor] | None = None,
    **options,
) -> None:
    """The law over `draws` draws of weights, input and hx: for the outputs, and for every gradient if
    `gradients`.

    `lengths` packs the input; `change` is done to the modules first, `change_input` rewrites the input.
    """
    how: dict[str, Any] = {"through": through} | ({"form": pack(lengths)} if lengths else {})
    at_kink = (
        gradients
        and kind in (RNN_RELU, RNN_CELL_RELU)
        and options.get("dtype") in (torch.bfloat16, torch.float16)
    )

    def draw(seed: int) -> tuple[tuple[Values, Values, Values], int]:
        twins = make_twins(kind, *sizes, seed=seed, **options)
        if at_kink:
            twins.apply(_keep_away_from_zero)
        if change is not None:
            twins.apply(change)
        if not gradients:
            twins.apply(lambda module: module.requires_grad_(False))
        x = make_input(twins.ours, steps, batch)
        x = x.abs() if at_kink else x
        x = x if change_input is None else change_input(x)
        hx = make_state(twins.ours, batch) if with_hx else None
        for leaf in (x, *tensors_of(hx if with_hx else ())):
            leaf.requires_grad_(gradients)
        return run_all(twins, x, hx, **how), count_terms(twins.ours, x)

    runs, terms = zip(*map(draw, range(draws)), strict=True)
    try:
        assert_law(*runs, terms=max(terms))
    except AssertionError:
        # The largest error of a few draws is a matter of luck, torch.nn's as well as ours. Judge by many.
        runs += tuple(draw(seed)[0] for seed in range(draws, MORE * draws))
        assert_law(*runs, terms=max(terms))


def _keep_away_from_zero(module: nn.Module) -> None:
    """Weights that leave every pre-activation of a relu far from zero, for a positive input. Its derivative
    jumps there: whichever side a 16-bit rounding falls to is right, and no law of rounding tells how far off
    it then is."""
    for name, weight in module.named_parameters():
        if "weight_ih" in name:
            sign = torch.where(torch.arange(weight.size(0), device=weight.device) % 2 == 0, 1.0, -1.0)
            weight.data = (weight.data.abs() * sign[:, None]).to(weight.dtype)
        else:
            weight.data = weight.data / 16
