"""Loading weights: `loading.py` is where to begin, and there is one file for each way."""

import logging

# bitsandbytes warns at its import that a package for CPU kernels is absent, which we do not want:
# it would download and run a binary from the hub (backends/cpu/ops.py, 0.50). And int8 says at
# every matrix of every forward pass that its input is cast: 448 lines a step with 64 layers.
for _name in ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions"):
    logging.getLogger(_name).setLevel(logging.ERROR)
