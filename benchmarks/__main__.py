"""`python -m fused_rnn_bench` is the same command as `fused-rnn-bench`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
