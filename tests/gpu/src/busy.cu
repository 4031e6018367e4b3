// The compute of an engine in the pipeline benchmark: chains of multiply-adds that access no memory.
//
//     nvcc --ptx --gpu-architecture=compute_70 -o busy.ptx busy.cu

template <int CHAINS>
__device__ __forceinline__ void compute(float *out, unsigned int rounds) {
    float chain[CHAINS];
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) chain[k] = threadIdx.x + k;
#pragma unroll 1
    for (unsigned int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int k = 0; k < CHAINS; ++k) chain[k] = chain[k] * 1.0000001f + 0.5f;
    }
    float sum = 0;
#pragma unroll
    for (int k = 0; k < CHAINS; ++k) sum += chain[k];
    // This is never true, but the compiler cannot know that.
    if (sum == -1.0f) *out = sum;
}

// Two blocks of this kernel take so many registers that no other block fits beside them, as with a matrix product.
extern "C" __global__ void __launch_bounds__(256, 2)
swiftcache_busy_full(float *out, unsigned int rounds) {
    compute<104>(out, rounds);
}

// Keeps every multiplier just as busy, but leaves room for other blocks on the multiprocessor.
extern "C" __global__ void __launch_bounds__(256)
swiftcache_busy_light(float *out, unsigned int rounds) {
    compute<8>(out, rounds);
}
