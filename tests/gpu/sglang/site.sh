#!/usr/bin/env bash
# Builds a folder of Python packages that runs SGLang on a GPU machine that has PyTorch's CUDA libraries and Python 3.12, but no
# package registry. Where there is one, `pip install sglang==0.5.23` and SwiftCache's wheel do the same.
#
#     tests/gpu/sglang/site.sh OUT [WHEEL]   needs uv, zstd, OpenSSL's headers and 8 GB of disk; makes OUT (2.9 GB) and OUT.tzst (1 GB)
#
# There, with zstd, which such a machine may lack: zstd -dc OUT.tzst | tar xf - -C SITE, and tests/gpu/sglang/run.sh SITE PROGRAMS REPORT
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
out=$1
wheel=${2:-}
target=(--python-version 3.12 --python-platform x86_64-manylinux_2_35)
# What SGLang's CPU engine does without (tests/sglang/overrides.txt), the engine on a GPU does without too, but for PyTorch and
# the kernels that a dense model needs.
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
grep -E "sys_platform" "$here/../../sglang/overrides.txt" | grep -v '^sglang-kernel' >"$work/overrides"
echo 'sglang==0.5.23' >"$work/wanted"
uv pip compile "$work/wanted" --override "$work/overrides" "${target[@]}" --quiet --output-file "$work/all"
# The machine's own PyTorch environment has these.
present='nvidia-[a-ln-z]|nvidia-m[a-km-z]|cuda-|numpy|scipy|pandas|pyarrow|pillow|opencv|numba|llvmlite|sympy|networkx|setuptools|nccl'
grep -vE '^ *#' "$work/all" | grep -vE "^($present)" >"$work/needed"
uv pip install --target "$out" "${target[@]}" --no-deps --quiet --requirement "$work/needed"
# This PyTorch needs symbols of its own NCCL even on one GPU.
uv pip install --target "$work/nccl" "${target[@]}" --no-deps --quiet nvidia-nccl-cu13==2.30.7
mkdir -p "$out/nvidia/nccl/lib"
cp "$work"/nccl/nvidia/nccl/lib/libnccl.so.2 "$out/nvidia/nccl/lib/"
# SGLang compiles the hash of its pages when it starts, against OpenSSL, whose headers a GPU machine may lack.
mkdir -p "$out/openssl/include" "$out/openssl/lib"
cp -rL /usr/include/openssl "$out/openssl/include/"
cp -rL /usr/include/x86_64-linux-gnu/openssl/. "$out/openssl/include/openssl/"
cp -L /usr/lib/x86_64-linux-gnu/libcrypto.so* "$out/openssl/lib/"
cd "$out"
# Headers of tests, static libraries and kernels for other hardware: half of the bytes.
rm -rf torch/test torch/lib/*.a triton/backends/nvidia/lib/cupti* triton/backends/nvidia/bin/{nvdisasm,ptxas-blackwell} \
    sgl_kernel/sm100 sgl_kernel/{flash_ops,infllm_ops,flashmla_ops}*.so
# Only Blackwell runs this kernel, and its import needs CUTLASS's Python.
cat >sglang/srt/layers/dual_gemm.py <<'END'
class DualGemm:
    def __init__(self, *arguments):
        pass

    def can_run(self, *arguments):
        return False
END
find . -name '*.pyc' -delete
[ -z "$wheel" ] || python3 -m zipfile --extract "$wheel" .
tar --create --file - . | zstd -9 -T0 --quiet --force -o "$out.tzst"
