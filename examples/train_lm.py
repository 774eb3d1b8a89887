"""Train the demo's character model with checkpoints, in one process or, with no change, in several.

    python examples/train_lm.py --out out/lm
    torchrun --nproc-per-node 2 examples/train_lm.py --out out/lm

Several processes share the rows of each batch, so they take the steps that one would take, to rounding. A run that
was stopped goes on from its last checkpoint when it is started again: with as many processes as before it ends with
the same bits as a run that was never stopped. Raise --steps to train a finished run further.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from char_lm_parts import CharModel, Contender, State, Text, positive, read_text
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import fused_rnn


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gathered(share: Tensor, dim: int) -> Tensor:
    """The shares of all processes, side by side in the order of their ranks."""
    if processes() == 1:
        return share
    shares = [torch.empty_like(share) for _ in range(processes())]
    dist.all_gather(shares, share.contiguous())
    return torch.cat(shares, dim)


def share_of(whole: Tensor, dim: int) -> Tensor:
    """This process's part of the rows, which lie in dimension `dim`."""
    return whole.chunk(processes(), dim)[rank()].contiguous()


def of_state(change, state: State) -> State:
    """`gathered` or `share_of` on the state of the recurrent layers, whose rows lie in dimension 1."""
    return tuple(change(part, 1) for part in state) if isinstance(state, tuple) else change(state, 1)


def save(path: Path, one: Contender, network: CharModel, settings: dict[str, object]) -> None:
    state = of_state(gathered, one.state)  # every process takes part; the first one writes
    if rank() == 0:
        checkpoint = {
            "settings": settings,
            "model": network.state_dict(),
            "optimizer": one.optimizer.state_dict(),
            "state": state,
            "losses": one.losses,
        }
        unfinished = path.with_suffix(".part")
        torch.save(checkpoint, unfinished)
        unfinished.replace(path)  # at once: a run that dies while it writes leaves the old checkpoint


def resume(path: Path, one: Contender, network: CharModel, settings: dict[str, object]) -> None:
    checkpoint = torch.load(path)
    if checkpoint["settings"] != settings:
        raise SystemExit(f"{path} is of another run: {checkpoint['settings']}; this one: {settings}")
    network.load_state_dict(checkpoint["model"])
    one.optimizer.load_state_dict(checkpoint["optimizer"])
    one.state = of_state(share_of, checkpoint["state"])
    one.losses = checkpoint["losses"]


def train(options: argparse.Namespace) -> None:
    if options.batch % processes():
        raise SystemExit(f"--batch {options.batch} cannot be shared evenly by {processes()} processes")
    text = Text(read_text(options.text))
    torch.manual_seed(options.seed)  # the same in every process, hence the same weights
    network = CharModel(fused_rnn, options.cell, len(text.alphabet), options.hidden, options.layers)
    model = network if processes() == 1 else DistributedDataParallel(network)
    one = Contender("fused_rnn", model, torch.optim.Adam(network.parameters(), lr=options.rate))

    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "checkpoint.pt"
    free = ("steps", "every", "out")  # may change between a run and its continuation
    settings = {name: str(value) for name, value in vars(options).items() if name not in free}
    if path.exists():
        resume(path, one, network, settings)

    batches = text.batches(options.batch, options.length)
    for inputs, targets, fresh in itertools.islice(batches, len(one.losses), options.steps):
        if fresh:
            one.state = None
        one.train_step(share_of(inputs, 1), share_of(targets, 1))
        one.losses[-1] = gathered(torch.tensor([one.losses[-1]]), 0).mean().item()
        step = len(one.losses)
        if step % options.every == 0 or step == options.steps:
            save(path, one, network, settings)
            if rank() == 0:
                print(f"step {step}: loss {one.losses[-1]:.6f} nats a character, saved to {path}", flush=True)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train a character model, with checkpoints.")
    count = positive(int)
    parser.add_argument("--cell", choices=("LSTM", "GRU", "RNN"), default="LSTM", type=str.upper)
    parser.add_argument("--hidden", type=count, default=256, help="units a layer (default: %(default)s)")
    parser.add_argument("--layers", type=count, default=1, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=count, default=400, help="in all, not from here (default: %(default)s)"
    )
    parser.add_argument("--batch", type=count, default=32, help="texts side by side (default: %(default)s)")
    parser.add_argument("--length", type=count, default=64, help="characters a step (default: %(default)s)")
    parser.add_argument("--rate", type=positive(float), default=5e-3, help="Adam's (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=Path, help="a file to learn instead of Python's language reference")
    parser.add_argument(
        "--every", type=count, default=50, help="steps to a checkpoint (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("out/lm"), help="folder of the checkpoint")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    launched = dist.is_torchelastic_launched()  # by torchrun
    if launched:
        dist.init_process_group("gloo")
    try:
        train(options)
    finally:
        if launched:
            # gloo's threads let go of the last tensors a little after the wait for them returned, and need the
            # interpreter for it: one that asks when the interpreter is ending aborts the process.
            time.sleep(0.5)
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
