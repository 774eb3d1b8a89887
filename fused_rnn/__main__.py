"""`python -m fused_rnn`: prints what this installation is made of."""

from __future__ import annotations

import argparse
import json

from .info import build_info, describe


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m fused_rnn",
        description="Versions, CPU instruction set in use, CUDA architectures compiled, GPU found.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    arguments = parser.parse_args()
    info = build_info()
    print(json.dumps(info, indent=2) if arguments.json else describe(info))


if __name__ == "__main__":
    main()
