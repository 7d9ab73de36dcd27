// The rows of a packed weight.

// The product, rounded. Without this, the compiler would make one rounding of it and a sum.
#ifdef DORAXP_HOST
__device__ inline compute_t rounded_product(compute_t a, compute_t b) { return a * b; }
#else
__device__ inline float rounded_product(float a, float b) { return __fmul_rn(a, b); }
__device__ inline double rounded_product(double a, double b) { return __dmul_rn(a, b); }
#endif

// result = table[code]·scale + bias: `size` numbers of W, flattened, from the number `first` on.
// grid (size / (UNPACK_RUN PER_THREAD THREADS))          2 + 1/2 bytes for codes of 4 bits
// A byte of `codes` stands for 2^`shift` numbers, and `table` is (256, 2^shift). A group of numbers
// that share a scale has `height` rows and `width` columns, and `across` groups lie side by side.
// With `across` = 0, groups of `width` numbers follow one another along the flattened W.
enum { UNPACK_RUN = 4, BYTES = 256, MOST_OF_BYTE = 4 };
extern "C" __global__ void unpack(const unsigned char* codes, const compute_t* table,
                                  const compute_t* scale, const compute_t* bias /* or null */,
                                  storage_t* result, index_t first, index_t size, index_t inner,
                                  int shift, index_t height, index_t width, index_t across) {
    __shared__ compute_t values[BYTES * MOST_OF_BYTE];
    for (int k = threadIdx.x; k < BYTES << shift; k += THREADS) values[k] = table[k];
    __syncthreads();
    const bool packed = aligned(result);
    // Neighbours that a thread takes are then in one row and in one group.
    const bool together = inner % PER_THREAD == 0 && width % PER_THREAD == 0;
    for (int run = 0; run < UNPACK_RUN; ++run) {
        const index_t at =
            (((index_t)blockIdx.x * UNPACK_RUN + run) * THREADS + threadIdx.x) * PER_THREAD;
        if (at >= size) return;
        const int count = size - at < PER_THREAD ? (int)(size - at) : PER_THREAD;
        compute_t value[PER_THREAD], factor = 0, offset = 0;
        unsigned code = 0;
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            if (j >= count) break;
            const index_t i = first + at + j;
            const int part = (int)(i & ((1 << shift) - 1));
            if (j == 0 || part == 0) code = codes[i >> shift];
            if (j == 0 || !together) {
                const index_t group =
                    across ? i / inner / height * across + i % inner / width : i / width;
                factor = scale[group];
                if (bias) offset = bias[group];
            }
            value[j] = rounded_product(values[(code << shift) + part], factor);
            if (bias) value[j] += offset;
        }
        store(result + at, value, count, packed && count == PER_THREAD);
    }
}
