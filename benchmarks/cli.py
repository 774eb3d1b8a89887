"""The command line: `fused-rnn-bench run | report | compare | explain`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from . import commands
from .case import CELLS, DEFAULT_MODES, DTYPES, LAYERS, LENGTHS, MODES
from .errors import BenchError
from .options import names, non_negative, positive_int, shape
from .suites import SUITES

# What fused_rnn.force_plan takes.
PLANS = ("step_fused", "step", "block", "cluster", "grid", "persistent")

# What a usage error and an unreadable file exit with; argparse uses the same.
USAGE_ERROR = 2


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(
        prog="fused-rnn-bench", description="Measures fused_rnn against torch.nn and other libraries."
    )
    verbs = top.add_subparsers(required=True, metavar="run | report | compare | explain")
    _add_run(verbs)
    _add_report(verbs)
    _add_compare(verbs)
    _add_explain(verbs)
    return top


def _add_run(verbs: argparse._SubParsersAction) -> None:
    run = verbs.add_parser(
        "run",
        help="measure a suite or single shapes",
        description="Checks parity, then times. Exits with 1 when fused_rnn was out of tolerance or raised "
        "an error in any case. Ctrl-C ends the run, keeps what is done and exits with 130.",
    )
    run.set_defaults(command=commands.run)
    run.add_argument(
        "--suite", choices=SUITES, help="which table of shapes (default: quick, unless --shape is given)"
    )
    run.add_argument(
        "--shape", type=shape, action="append", default=[], metavar="T,B,I,H", help="one shape; repeatable"
    )
    run.add_argument(
        "--cell", type=names(*CELLS), metavar="NAME,...", help=f"only these of {', '.join(CELLS)}"
    )
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    run.add_argument(
        "--dtype", type=names(*DTYPES), metavar="NAME,...",
        help=f"of {', '.join(DTYPES)} (default: fp32 on a CPU, bf16,tf32 on a GPU)",
    )  # fmt: skip
    run.add_argument(
        "--mode", type=names(*MODES), default=list(DEFAULT_MODES), metavar="NAME,...",
        help="of infer, train, penalty (default: infer,train)",
    )  # fmt: skip
    run.add_argument(
        "--against", type=lambda text: [part.strip() for part in text.split(",")], metavar="NAME,...",
        help="peers: torch (always), onnxruntime, openvino, haste, flashrnn (default: all installed)",
    )  # fmt: skip
    run.add_argument("--layers", type=positive_int, default=1, help="layers of a --shape")
    run.add_argument("--bidirectional", action="store_true", help="both directions for a --shape")
    run.add_argument(
        "--lengths", choices=LENGTHS, default="dense", help="dense input or packed, for a --shape"
    )
    run.add_argument("--threads", type=positive_int, help="CPU threads for everyone (default: torch's)")
    run.add_argument(
        "--isa", help="make fused_rnn use this instruction set: portable, avx2, avx512, avx512_bf16, amx"
    )
    run.add_argument(
        "--graph", action="store_true", help="on a GPU also measure each case captured in a CUDA graph"
    )
    run.add_argument(
        "--plan", choices=PLANS, metavar="STRATEGY",
        help=f"on a GPU make the layers of fused_rnn use this strategy wherever it can run: {', '.join(PLANS)} "
        "(default: the planner's choice)",
    )  # fmt: skip
    run.add_argument(
        "--budget", type=non_negative, metavar="SECONDS",
        help="leave out what does not fit into this time (default: 120 for quick, else 900; 0: no limit)",
    )  # fmt: skip
    run.add_argument(
        "--effort", type=non_negative, default=0.2, metavar="SECONDS",
        help="measure each contender for at least this long in each case (default: 0.2)",
    )  # fmt: skip
    run.add_argument("--out", type=Path, metavar="FILE.json", help="save every sample and the environment")


def _add_report(verbs: argparse._SubParsersAction) -> None:
    report = verbs.add_parser(
        "report", help="show saved results", description="Shows result files as tables and plots."
    )
    report.set_defaults(command=commands.report)
    report.add_argument("files", type=Path, nargs="+", metavar="FILE.json")
    report.add_argument(
        "--markdown", type=Path, metavar="FILE.md", help="write the tables as Markdown, `-` to print them"
    )
    report.add_argument(
        "--plots", type=Path, metavar="FOLDER", help="write PNG plots: speed-up by shape, roofline"
    )


def _add_compare(verbs: argparse._SubParsersAction) -> None:
    compare = verbs.add_parser(
        "compare",
        help="what changed between two result files",
        description="Exits with 1 when a case got slower beyond the noise, or wrong.",
    )
    compare.set_defaults(command=commands.compare)
    compare.add_argument("old", type=Path, metavar="OLD.json")
    compare.add_argument("new", type=Path, metavar="NEW.json")
    compare.add_argument(
        "--threshold", type=non_negative, default=10.0, metavar="PERCENT",
        help="differences up to this are noise (default: 10); a case that varies more has more",
    )  # fmt: skip
    compare.add_argument(
        "--by", choices=("time", "speedup"), default="time",
        help="fused_rnn's time, or its speed-up against torch.nn in the same run, which cancels a slower day",
    )  # fmt: skip


def _add_explain(verbs: argparse._SubParsersAction) -> None:
    explain = verbs.add_parser(
        "explain",
        help="which kernel a shape takes",
        description="Which kernel and tile a shape would take, and why.",
    )
    explain.set_defaults(command=commands.explain)
    explain.add_argument("--cell", choices=LAYERS, required=True)
    explain.add_argument("--shape", type=shape, required=True, metavar="T,B,I,H")
    explain.add_argument("--device", choices=("cpu", "cuda"), required=True)
    explain.add_argument("--arch", metavar="sm_90", help="GPU architecture to plan for; needs no GPU")
    explain.add_argument("--mode", choices=DEFAULT_MODES, default="infer")
    explain.add_argument("--dtype", choices=DTYPES, default="fp32")
    explain.add_argument(
        "--proj", type=positive_int, default=0, metavar="P", help="projection size of an LSTM"
    )
    explain.add_argument("--bidirectional", action="store_true")
    explain.add_argument("--threads", type=positive_int, help="CPU threads (default: torch's)")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    try:
        options = parser().parse_args(arguments)
        return options.command(options)
    except BenchError as error:
        print(f"fused-rnn-bench: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("fused-rnn-bench: interrupted", file=sys.stderr)
        return commands.INTERRUPTED
    except BrokenPipeError:
        # The reader of a pipe (head, less) has seen enough.
        sys.stderr.close()
        return 0
