"""The core of RAPID: models, KV caches, the batching engine, verification rules and the decode loop; free of Ray.

Its modules and packages are listed from the lowest to the highest. Each one imports only itself and the ones before it
(`tests/test_imports.py`):

    errors strategies weights text datastore kv_cache kernels models sampling speculation engine request events output
    backend prompt_logprobs drafters speculative_rag generate
"""

import ctypes
import os
import sys

# torch reads these variables when it loads or first allocates, so they are set here. The user's own values stay.
#
# PyTorch's CPU threads busy-wait between operators. A decode step has hundreds of short operators. Threads that sleep
# at once must be woken hundreds of times; threads that spin for long burn the time slices of a second engine on the
# same cores (target and drafter on one machine). So the threads spin for a short while.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
# Weights and KV caches lie in huge pages: a decode step reads hundreds of megabytes; small pages would miss the TLB.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if sys.platform == "linux":
    # By default glibc returns a freed activation to the system and faults it in again for the next operator: thousands
    # of pages a step. These settings make glibc keep the memory (M_MMAP_THRESHOLD at its largest, M_TRIM_THRESHOLD).
    # Other C libraries ignore the call.
    try:
        _libc = ctypes.CDLL(None)
        _libc.mallopt(-3, 32 * 2**20)
        _libc.mallopt(-1, 512 * 2**20)
    except (OSError, AttributeError):
        pass
