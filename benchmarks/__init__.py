"""fused_rnn_bench: the benchmark command of fused_rnn.

The folder is `benchmarks/` in the source tree and the package `fused_rnn_bench` once installed. README.md
beside this file is the map of its modules and says how every figure is made.
"""

RESULT_FORMAT = "fused-rnn-bench/1"
