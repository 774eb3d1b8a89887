"""PackedSequence <-> what the kernels take: rows, batch sizes, and the order of the sequences."""

from __future__ import annotations

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from .functional import States


def reorder(states: States | None, order: Tensor | None) -> States | None:
    """Hidden states with their batch (dimension 1) in another order; None leaves them as they are."""
    if states is None or order is None:
        return states
    return tuple(state.index_select(1, order) for state in states)


def repack(rows: Tensor, like: PackedSequence) -> PackedSequence:
    """New rows in the form of another packed sequence."""
    return PackedSequence(rows, like.batch_sizes, like.sorted_indices, like.unsorted_indices)
