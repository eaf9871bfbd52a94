"""The core of RAPID: models, KV caches, the batching engine, verification rules and the decode loop; free of Ray."""

import os

# PyTorch's CPU threads busy-wait between operators. With two models on the same cores, as target and drafter are on one
# machine, they burn each other's time slices: a prefill took 26 times as long as with threads that sleep. The variable
# is read when torch loads, so it has to be set before.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")
