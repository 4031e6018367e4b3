#!/usr/bin/env bash
# Builds a folder of Python packages that runs vLLM on a GPU machine that has PyTorch's CUDA libraries and Python 3.12, but no
# package registry. Where there is one, `pip install vllm==0.32.0` and SwiftCache's wheel do the same.
#
#     tests/gpu/vllm/site.sh OUT [WHEEL [VERSION]]   needs uv, zstd and 8 GB of disk; makes OUT (2.9 GB) and OUT.tzst (1 GB)
#
# There, with zstd, which such a machine may lack: zstd -dc OUT.tzst | tar xf - -C SITE, and tests/gpu/vllm/run.sh SITE PROGRAMS REPORT
set -euo pipefail
out=$1
wheel=${2:-}
version=${3:-0.32.0}
target=(--python-version 3.12 --python-platform x86_64-manylinux_2_35)
# The machine's own PyTorch environment has these, or only other models and kernels use them.
present='nvidia-|cuda-|numpy|networkx|sympy|setuptools|pillow|numba|llvmlite|grpcio|nvtx|nccl'
unused='tilelang|z3-solver|humming|tokenspeed|flashinfer|opencv|pynvvideo|fastsafetensors|instanttensor|hf-xet'
unused+='|mistral-common|sentry|agent-detector|detect-installer|fastapi-cloud'
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cat >"$work/overrides" <<END
torchaudio ; sys_platform == 'never'
torchcodec ; sys_platform == 'never'
END
printf '%s\n' "vllm==$version" >"$work/wanted"
uv pip compile "$work/wanted" --override "$work/overrides" "${target[@]}" --quiet --output-file "$work/all"
# CUTLASS's Python is NVIDIA's too, but not there: DeepSeek V3.2 is written in it.
{
    grep -vE '^ *#' "$work/all" | grep -vE "^($present|$unused)"
    grep -E '^nvidia-cutlass-dsl' "$work/all"
} >"$work/needed"
uv pip install --target "$out" "${target[@]}" --no-deps --quiet --requirement "$work/needed"
# This PyTorch needs symbols of its own NCCL even on one GPU.
uv pip install --target "$work/nccl" "${target[@]}" --no-deps --quiet "$(grep -oE '^nvidia-nccl-cu13==[^ ]+' "$work/all")"
mkdir -p "$out/nvidia/nccl/lib"
cp "$work"/nccl/nvidia/nccl/lib/libnccl.so.2 "$out/nvidia/nccl/lib/"
cd "$out"
# Headers, tests and kernels for other hardware: half of the bytes.
rm -rf torch/include torch/test torch/bin torch/lib/*.a triton/backends/nvidia/lib/cupti \
    triton/backends/nvidia/bin/ptxas-blackwell vllm/vllm_flash_attn/_vllm_fa2_C.abi3.so vllm/vllm-rs vllm/_flashmla*.so \
    vllm/_qutlass_C.abi3.so anthropic nvidia_cutlass_dsl/cu12 \
    nvidia_cutlass_dsl/dsl_packages/cutlass/_mlir/_mlir_libs/_cutlass_ir.cu12.*
# A `.pth` file, which says where CUTLASS's packages are, counts in an installation only.
cat >sitecustomize.py <<'END'
import os
import sys

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), "nvidia_cutlass_dsl", "dsl_packages"))
END
mkdir torch/bin
printf '#!/bin/sh\nexit 0\n' >torch/bin/torch_shm_manager
chmod +x torch/bin/torch_shm_manager
find . -name '*.pyc' -delete
[ -z "$wheel" ] || python3 -m zipfile --extract "$wheel" .
tar --create --file - . | zstd -9 -T0 --quiet --force -o "$out.tzst"
