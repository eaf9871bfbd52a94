"""What of a stream's silence is not a prefill."""

from __future__ import annotations

from benchmarks.hangs import Stream


def test_the_wait_beyond_a_prefill() -> None:
    """The first prefill is over when the longest silence begins, and the first token may come long after it."""
    resumed = Stream(
        longest_silence_s=30.0, resumed=1, first_token_s=5.0, prefill_s=0.5, resuming_s=24.5, resuming_prefill_s=22.0
    )
    assert [resumed.silence_beyond_prefill_s(from_the_start=start) for start in (False, True)] == [8.0, 8.0]
    stayed = Stream(longest_silence_s=3.0, first_token_s=9.0, prefill_s=2.0)
    assert [stayed.silence_beyond_prefill_s(from_the_start=start) for start in (False, True)] == [3.0, 7.0]
    failed = Stream(longest_silence_s=6.0, first_token_s=9.0, prefill_s=2.0, error="it was lost")
    assert failed.silence_beyond_prefill_s(from_the_start=True) == 6.0
