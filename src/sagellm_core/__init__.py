"""One engine: scheduler, KV cache, models, text."""
