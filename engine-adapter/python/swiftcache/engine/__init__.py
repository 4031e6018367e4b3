"""What every engine's adapter needs, whatever the engine. Nothing here imports an engine, or PyTorch.

* `settings`: what operators set, read and checked.
* `fingerprint`: the namespace that makes two KV blocks of equal hash interchangeable, and what tells weights apart.
* `layout`: where the blocks of each layer lie in an engine's KV pool.
* `keys`: the keys of blocks, from an engine's own block hashes.
* `opener`: a worker's session and cache, opened from all of the above.
* `lending`, `loans`: when an engine lends part of its pool, and the way of a loan there and back.
* `events`: which blocks are kept, for cache-aware routers.
* `metrics`: counters and gauges, and what they mean.
* `quiet`: trouble with the cache is a line in the log, and not one each step.
"""
