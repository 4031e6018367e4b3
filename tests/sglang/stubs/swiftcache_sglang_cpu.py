"""A plugin of SGLang: several ranks, and LoRA, without an accelerator. For tests only."""


def plugin() -> None:
    import sglang.srt.distributed.parallel_state as parallel
    import torch

    original = parallel.init_model_parallel_group

    def without_nccl(*args, **kwargs):
        kwargs["use_pynccl"] = False
        return original(*args, **kwargs)

    parallel.init_model_parallel_group = without_nccl

    # No driver, no pinned memory; SGLang asks for it all the same.
    for name in ("tensor", "empty", "zeros", "full"):
        setattr(torch, name, _unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *_, **__: self


def _unpinned(make):
    def made(*args, pin_memory=False, **kwargs):
        return make(*args, **kwargs)

    return made
