"""What the tests of torch.compile share: capture without a break, and comparison with eager mode."""

from __future__ import annotations

from collections.abc import Callable

import torch
from parity import Values, assert_equal, run
from torch import Tensor, nn


def whole(function: Callable, backend="aot_eager") -> Callable:
    """Compiled without a graph break, or an error."""
    return torch.compile(function, backend=backend, fullgraph=True)


def no_recompiles():
    """A context, or a decorator, in which a second compilation of anything is an error."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def assert_same(found: Values, expected: Values, backend: str = "aot_eager") -> None:
    """The same bits, for ``aot_eager`` runs the same kernels; inductor may reorder what surrounds them."""
    if backend == "aot_eager":
        assert_equal(found, expected)
        return
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, name=name: f"{name}: {text}")


def assert_compiles(module: nn.Module, x: Tensor, hx=None, *, backend: str = "aot_eager", **how) -> None:
    """Outputs and all gradients of the compiled module, and outputs of one that records nothing."""
    compiled = whole(module, backend)
    expected = run(module, x, hx, **how)
    assert_same(run(module, x, hx, call=compiled, **how), expected, backend)
    with torch.no_grad():
        inference = run(module, x, hx, call=compiled, **how)
    assert_same(inference, {name: expected[name] for name in inference}, backend)
