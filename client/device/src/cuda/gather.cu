// Copies many small pieces in one launch: between a slab's extents and an engine's scattered blocks.
//
// gather.ptx, which the client embeds, is this file compiled for the oldest GPU and driver supported
// (`make ptx`, with CUDA 12.1's compiler: PTX 8.1 loads on every driver from 530 on):
//
//     nvcc --ptx --gpu-architecture=compute_70 -o gather.ptx gather.cu

// One piece. `gather.rs` lays it out the same way.
struct Piece {
    unsigned long long from;
    unsigned long long to;
    unsigned long long bytes;
};

// As many pieces as fit a launch's parameters, which reach the GPU with the launch.
#define FEW 1360
struct Few {
    Piece pieces[FEW];
};

// Threads of a block; each group of them copies its own tile.
#define THREADS 512
#define GROUP 128

// Vectors in flight per thread: a group covers 16 KiB, a tile, in one round.
#define DEPTH 8

// Copies `count` elements of T with all threads of the group: a round of loads, then of stores. Each byte is read
// and written once, so that neither side is worth keeping in the caches.
template <int IN_FLIGHT, typename T>
__device__ __forceinline__ void copy_elements(const T *from, T *to, unsigned int count,
                                              unsigned int lane) {
    for (unsigned int first = lane; first < count; first += IN_FLIGHT * GROUP) {
        T held[IN_FLIGHT];
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k)
            if (first + k * GROUP < count) held[k] = __ldcs(from + first + k * GROUP);
#pragma unroll
        for (int k = 0; k < IN_FLIGHT; ++k)
            if (first + k * GROUP < count) __stcs(to + first + k * GROUP, held[k]);
    }
}

// Copies part `part` of a piece that is cut every `tile` bytes. A part behind the piece's end is nothing.
__device__ __forceinline__ void copy_part(const Piece &piece, unsigned int part, unsigned int tile,
                                          unsigned int lane) {
    const unsigned long long done = (unsigned long long)part * tile;
    if (done >= piece.bytes) return;
    const unsigned long long from = piece.from + done, to = piece.to + done;
    const unsigned int bytes = piece.bytes - done < tile ? piece.bytes - done : tile;
    if (((from ^ to) & 15) == 0) {
        // Both sides reach a 16-byte boundary together: bytes up to it, vectors, bytes behind.
        unsigned int head = (16 - (from & 15)) & 15;
        if (head > bytes) head = bytes;
        const unsigned int vectors = (bytes - head) / 16;
        const unsigned int tail = head + vectors * 16;
        copy_elements<DEPTH>((const uint4 *)(from + head), (uint4 *)(to + head), vectors, lane);
        copy_elements<1>((const unsigned char *)from, (unsigned char *)to, head, lane);
        copy_elements<1>((const unsigned char *)(from + tail), (unsigned char *)(to + tail),
                         bytes - tail, lane);
    } else if (((from | to | bytes) & 3) == 0) {
        copy_elements<4>((const unsigned int *)from, (unsigned int *)to, bytes / 4, lane);
    } else {
        copy_elements<4>((const unsigned char *)from, (unsigned char *)to, bytes, lane);
    }
}

// All tiles that are this group's: each piece is `split` of them. Tiles go to blocks before groups, so that few of
// them still spread over all multiprocessors. The next piece is fetched while a tile is copied: `pieces` may lie in
// host memory, a trip over PCIe away.
__device__ __forceinline__ void copy_tiles(const Piece *pieces, unsigned int tiles,
                                           unsigned int split, unsigned int tile) {
    const unsigned int lane = threadIdx.x % GROUP, step = gridDim.x * (THREADS / GROUP);
    unsigned int index = threadIdx.x / GROUP * gridDim.x + blockIdx.x;
    if (index >= tiles) return;
    Piece piece = pieces[index / split];
    for (;;) {
        const unsigned int part = index % split;
        const bool more = tiles - index > step;
        index += step;
        Piece next;
        if (more) next = pieces[index / split];
        copy_part(piece, part, tile, lane);
        if (!more) return;
        piece = next;
    }
}

// Pieces in pinned host memory, any number of them.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
swiftcache_gather(const Piece *pieces, unsigned int tiles, unsigned int split, unsigned int tile) {
    copy_tiles(pieces, tiles, split, tile);
}

// Pieces in the launch's own parameters: nothing is read over PCIe, which a short copy would wait for.
extern "C" __global__ void __launch_bounds__(THREADS, 2)
swiftcache_gather_few(const __grid_constant__ Few few, unsigned int tiles, unsigned int split,
                      unsigned int tile) {
    copy_tiles(few.pieces, tiles, split, tile);
}
