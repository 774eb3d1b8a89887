"""Turn the recurrent layers of a finished model into ours, and back; build a model with ours from the start.

``convert`` and ``revert`` assign ``module.__class__``, the way ``torch.nn.utils.parametrize`` does, rather
than build a second module and put it in the first one's place. Our classes keep exactly torch's attributes,
so the class is all that differs, and the object stays the object. Whoever holds it sees the change: a
parent, a second parent it is tied to, a closure, a hook, ``torch.compile``'s wrapper. Parameters, buffers,
hooks, the training flag and attributes of the user's own need no copying, so none can be forgotten. And a
model that *is* a layer works like one that holds it.
"""

from __future__ import annotations

import reprlib
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import TypeVar

from torch import nn
from torch.nn.utils import parametrize

from .cells import GRUCell, LSTMCell, RNNCell
from .modules import GRU, LSTM, RNN

__all__ = ["convert", "patch", "revert"]

ModelT = TypeVar("ModelT", bound=nn.Module)
Classes = Mapping[type[nn.Module], type[nn.Module]]

_OURS: tuple[type[nn.Module], ...] = (RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell)
# Looked up once, on import: inside patch() torch.nn's names are ours.
_TORCH_TO_OURS: Classes = {getattr(nn, ours.__name__): ours for ours in _OURS}
_OURS_TO_TORCH: Classes = {ours: theirs for theirs, ours in _TORCH_TO_OURS.items()}


def convert(model: ModelT) -> ModelT:
    """Make every ``torch.nn`` recurrent layer and cell in ``model`` ours, in place, and return ``model``.

    Parameters stay the same objects, so an optimizer made before goes on training after, and ``state_dict``
    does not change. Parametrised, weight-normed, spectral-normed and pruned layers are converted too. To
    keep the original as it was, convert a ``copy.deepcopy`` of it.

    Left alone, because they may compute something of their own:

    - subclasses of torch's classes (FSDP2's ``fully_shard`` makes one: convert before it);
    - a layer whose ``forward`` was replaced on the instance;
    - quantised and scripted layers, which are other classes.

    As with every method of ``nn.Module``, a layer kept in a plain list or dict is not seen. Ours are
    subclasses of ``nn.RNNBase`` and ``nn.RNNCellBase``, not of ``nn.LSTM`` and its siblings:
    ``isinstance(layer, nn.LSTM)`` is ``False`` after converting.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return _swap_classes(model, _TORCH_TO_OURS, "convert")


def revert(model: ModelT) -> ModelT:
    """Make every layer and cell of ours in ``model`` torch's own again, in place, and return ``model``.

    The counterpart of :func:`convert`, with the same rules. A layer that was ours from the start is no
    exception.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.
    """
    return _swap_classes(model, _OURS_TO_TORCH, "revert")


@contextmanager
def patch() -> Iterator[None]:
    """Make the names ``RNN``, ``LSTM``, ``GRU`` and their cells ours in ``torch.nn`` while a model is built.

    Used as ``with fused_rnn.patch(): model = build()`` or as a decorator, ``@fused_rnn.patch()``. It serves
    code that looks a class up when it runs (``nn.LSTM(...)``), in ``torch.nn``, ``torch.nn.modules`` or
    ``torch.nn.modules.rnn``. A name bound earlier by ``from torch.nn import LSTM`` is out of its reach: use
    :func:`convert` there. Unpickling a whole model inside the block makes its layers ours; pickling a layer
    of torch's own inside it fails, because its class is no longer found under its name.

    The names are the process's, not the thread's: other threads see them too while any block is open.
    Blocks may nest and overlap; the names are put back, also on an exception, when the last one closes.
    """
    _open_patch()
    try:
        yield
    finally:
        _close_patch()


def _swap_classes(model: ModelT, classes: Classes, caller: str) -> ModelT:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{caller}() expects a torch.nn.Module, got {type(model).__name__}: {reprlib.repr(model)}"
        )
    for module in model.modules():
        cls = type(module)
        # register_parametrization gives the module a subclass made on the spot, with the layer's own class
        # as its only base. The Python module it is defined in tells it from a subclass written by a user.
        parametrized = cls.__module__ == parametrize.__name__
        target = classes.get(cls.__bases__[0] if parametrized else cls)
        if target is None or "forward" in vars(module):
            continue
        module.__class__ = _rebased(cls, target) if parametrized else target
        if isinstance(module, nn.RNNBase):
            # For revert: cuDNN wants the weights in one chunk, and ours move to the GPU each on its own.
            module.flatten_parameters()
    return model


def _rebased(cls: type[nn.Module], base: type[nn.Module]) -> type[nn.Module]:
    """A copy of a parametrised class with another base.

    A copy, for ``copy.deepcopy`` of a parametrised module shares its class: changing ``cls.__bases__`` would
    convert modules that nobody asked to convert.
    """
    namespace = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
    return type(cls.__name__, (base,), namespace)


_NAMESPACES: tuple[ModuleType, ...] = (nn, nn.modules, nn.modules.rnn)
# One count and one list of what was displaced, not a list a block: blocks of two threads may close in any
# order.
_patch_lock = threading.Lock()
_open_patches = 0
_displaced: list[tuple[ModuleType, str, type]] = []


def _open_patch() -> None:
    global _open_patches
    with _patch_lock:
        _open_patches += 1
        if _open_patches > 1:
            return
        for namespace in _NAMESPACES:
            for ours in _OURS:
                _displaced.append((namespace, ours.__name__, getattr(namespace, ours.__name__)))
                setattr(namespace, ours.__name__, ours)


def _close_patch() -> None:
    global _open_patches
    with _patch_lock:
        _open_patches -= 1
        if _open_patches > 0:
            return
        while _displaced:
            setattr(*_displaced.pop())
