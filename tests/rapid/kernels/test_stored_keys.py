"""Keys are read back as they were stored, whatever the device's layout and type."""

import pytest
import torch
from running import attended
from torch import Tensor

from rapid.kernels.cpu.attention import RunAttention
from rapid.kernels.cpu.attention_plan import supports_layout
from rapid.kernels.cuda.attention import PagedAttention, gathered_sdpa
from rapid.kernels.interface import AttentionBackend, BatchEntry
from rapid.kernels.stored_keys import stored_keys
from rapid.kv_cache.pool import KVLayout
from rapid.kv_cache.table import PageTable

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


@pytest.mark.parametrize(
    ("backend", "dtype", "kv_dtype", "tolerance"),
    [
        (RunAttention(), torch.float32, None, 0),
        (RunAttention(), BF16, None, 0),
        (RunAttention(), BF16, torch.int8, 0.02),
        (PagedAttention(gathered_sdpa), torch.float32, None, 0),
        (PagedAttention(gathered_sdpa), BF16, FP8, 0.25),
    ],
    ids=["runs-float32", "runs-bfloat16", "runs-int8", "paged-float32", "paged-fp8"],
)
def test_keys_are_read_back(
    backend: AttentionBackend, dtype: torch.dtype, kv_dtype: torch.dtype | None, tolerance: float
) -> None:
    layout = KVLayout(2, 64, dtype, (torch.device("cpu"),), kv_dtype)
    if kv_dtype == torch.int8 and not supports_layout(layout):
        pytest.skip("8-bit pages are for compiled kernels")
    size = backend.pool(layout, 1).page_size
    pool = backend.pool(layout, 6 * size * layout.bytes_per_token)
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    pages, total = [4, 1, 3], 3 * size
    keys = random(total, 2, 64)
    entry = BatchEntry(PageTable(pool, pages, 0), [0] * total, 0)
    attended(backend.batch([entry]), random(total, 4, 64), keys, random(total, 2, 64), 0.125)
    for head in range(2):
        found = stored_keys(pool, 0, head, torch.tensor([3, 4]))
        expected = keys[:, head].unflatten(0, (3, size))[[2, 0]].float()
        assert found.shape == (2, size, 64)
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
