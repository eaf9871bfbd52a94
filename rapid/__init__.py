"""The core of RAPID: models, KV caches, the batching engine, verification rules and the decode loop; free of Ray.

Its rooms from the lowest to the highest; a room imports itself and the rooms below it (`tests/test_imports.py`):

    errors strategies weights text kv_cache kernels models sampling speculation engine request events output
    backend drafters generate
"""

import ctypes
import os
import sys

# All of this is read when torch loads or first allocates, so it has to be set before; what the user set stays.
#
# PyTorch's CPU threads busy-wait between operators. A decode step is hundreds of short ones, so threads that sleep at
# once are woken hundreds of times; but with two engines on the same cores, as target and drafter are on one machine,
# threads that spin for long burn each other's time slices. So they spin for a short while.
os.environ.setdefault("OMP_WAIT_POLICY", "ACTIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "4000")
# Weights and KV caches in huge pages: a decode step reads hundreds of megabytes, and would miss the TLB all along.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
if sys.platform == "linux":
    # glibc returns a freed activation to the system and faults it in again for the next operator, thousands of pages a
    # step. Let it keep them. (M_MMAP_THRESHOLD, at its largest; M_TRIM_THRESHOLD; other C libraries ignore the call.)
    try:
        _libc = ctypes.CDLL(None)
        _libc.mallopt(-3, 32 * 2**20)
        _libc.mallopt(-1, 512 * 2**20)
    except (OSError, AttributeError):
        pass
