"""RAPID's core: models, KV caches, the batching engine, verification and the decode loop."""
