"""Contexts larger than local HBM: vLLM's KV cache as a stitched pool, local memory first and leased neighbours' HBM
behind it.

* `worker`: vLLM's worker of this platform, which reports local and leased bytes, and lets nothing move while it
  computes.
* `pool`: the stitched pool of this process: opened by the worker, taken for vLLM's KV cache through the connector.
* `staging`: in prefill, a layer's blocks are read through a local window; `gather` fills it, `segments` is for contexts
  that are longer than a window.
* `placement`: in the scheduler, which free block a request gets: local ones first.
* `inside`: what all of this needs of vLLM beyond its documented extension points, looked for when the engine starts.
* `refusals`: what is not served, by name.
"""
