"""What is counted, as Ray can publish it."""

from __future__ import annotations

from deployments.observability.metrics import COUNTERS, HISTOGRAMS


def test_descriptions_are_ascii_as_ray_requires() -> None:
    for name, (words, *_) in (COUNTERS | HISTOGRAMS).items():
        assert name.isascii() and words.isascii(), name
