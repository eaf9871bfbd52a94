"""Commands that measure and write what they saw under benchmarks/results: `python -m benchmarks.NAME`."""
