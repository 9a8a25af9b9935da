"""Generation: the engine, executors, KV caches and sampling."""
