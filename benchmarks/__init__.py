"""Commands that measure, and write their results under benchmarks/results: `python -m benchmarks.NAME`."""
