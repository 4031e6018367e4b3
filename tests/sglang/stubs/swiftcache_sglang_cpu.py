"""A plugin of SGLang: several ranks without an accelerator. For tests only."""


def plugin() -> None:
    import sglang.srt.distributed.parallel_state as parallel

    original = parallel.init_model_parallel_group

    def without_nccl(*args, **kwargs):
        kwargs["use_pynccl"] = False
        return original(*args, **kwargs)

    parallel.init_model_parallel_group = without_nccl
