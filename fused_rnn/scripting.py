"""What ``torch.jit.script`` is told: TorchScript compiles no layer of ours, and ``revert`` gives it one it compiles."""

from __future__ import annotations

from typing import NoReturn

from torch import nn


def refuse(module: nn.Module) -> NoReturn:
    """The hook by which torch.jit.script asks a module, before anything else, for one that it can compile.

    It puts the answer in the module's place for good. A layer of torch.nn's with the same weights would do, but the
    model would then hold that one after, and nobody asked for it.
    """
    raise RuntimeError(
        f"torch.jit.script cannot compile fused_rnn.{type(module).__name__}. Script a copy of the model with layers of "
        "torch.nn's, which have the same weights: torch.jit.script(fused_rnn.revert(copy.deepcopy(model))). "
        "torch.compile and torch.export take the model as it is."
    )
