"""What SGLang imports from vLLM's kernels on a platform that it has none for; in PyTorch."""

import torch


def rms_norm(out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    out.copy_((wide * weight.float()).to(out.dtype))


def fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, epsilon: float) -> None:
    residual.add_(x)
    rms_norm(x, residual, weight, epsilon)


def rotary_embedding(
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor | None,
    head_size: int,
    cos_sin_cache: torch.Tensor,
    is_neox: bool,
) -> None:
    cos, sin = cos_sin_cache.index_select(0, positions.flatten()).chunk(2, dim=-1)
    for rotated in (query, key):
        if rotated is None:
            continue
        width = cos.shape[-1] * 2
        heads = rotated.view(positions.numel(), -1, head_size)
        part = heads[..., :width].float()
        c, s = cos.float().unsqueeze(1), sin.float().unsqueeze(1)
        if is_neox:
            a, b = part.chunk(2, dim=-1)
            turned = torch.cat((a * c - b * s, b * c + a * s), dim=-1)
        else:
            a, b = part[..., ::2], part[..., 1::2]
            turned = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
        heads[..., :width].copy_(turned.to(heads.dtype))
