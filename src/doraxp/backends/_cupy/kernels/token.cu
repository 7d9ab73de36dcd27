// One token.

enum {
    TOKEN_ROWS = 2,  // rows of a warp: it reads x once for them
    BATCH = 4        // packs of each of these rows that a lane loads before it uses them
};
// Memory of 4.8 TB/s that answers after 0.8 µs needs 3.8 MB of loads on their way, 29 kB for each of
// 132 processors. 4096 rows are 15 warps for each, and 15·32·TOKEN_ROWS·BATCH·16 bytes are 63 kB.
// Four rows of a warp with two packs of each would be 32 kB.

// Load 16 bytes that no other thread reads: L1 keeps its lines for x.
template <typename T> __device__ inline Pack<T> load_once(const T* from) {
#ifdef DORAXP_HOST
    return *(const Pack<T>*)from;
#else
    uint4 bits;
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
        : "l"(from));
    return (const Pack<T>&)bits;
#endif
}

// sums += Σ m_k x_k of COUNT·PER_THREAD numbers of each row, a pack every `step` numbers.
template <int ROWS, int COUNT, typename M, typename X>
__device__ inline void add_packs(const M* const (&m)[ROWS], const X* x, index_t k, index_t step,
                                 compute_t (&sums)[ROWS][PER_THREAD]) {
    enum { EACH = 16 / sizeof(M), PACKS = PER_THREAD / EACH };
    Pack<M> held[COUNT][ROWS][PACKS];
#pragma unroll
    for (int c = 0; c < COUNT; ++c)
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int p = 0; p < PACKS; ++p) held[c][r][p] = load_once(m[r] + k + c * step + p * EACH);
#pragma unroll
    for (int c = 0; c < COUNT; ++c) {
        compute_t right[PER_THREAD];
        load(x + k + c * step, right, PER_THREAD, true);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                sums[r][j] += (compute_t)wide(held[c][r][j / EACH].item[j % EACH]) * right[j];
    }
}

// total = this thread's part of Σ m_k x_k for each of the rows m, where `team` threads share a sum.
template <int ROWS, typename M, typename X>
__device__ inline void dot(const M* const (&m)[ROWS], const X* x, index_t length, int team,
                           compute_t (&total)[ROWS]) {
    const index_t first = (int)threadIdx.x % team;
    if (length % PER_THREAD == 0 && aligned(m[0], x)) {
        compute_t sums[ROWS][PER_THREAD] = {};
        const index_t step = (index_t)team * PER_THREAD;
        index_t k = first * PER_THREAD;
        for (; k + (BATCH - 1) * step < length; k += BATCH * step)
            add_packs<ROWS, BATCH>(m, x, k, step, sums);
#pragma unroll 1
        for (; k < length; k += step) add_packs<ROWS, 1>(m, x, k, step, sums);
#pragma unroll
        for (int r = 0; r < ROWS; ++r)
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j) total[r] += sums[r][j];
    } else {
#pragma unroll 2
        for (index_t k = first; k < length; k += team)
#pragma unroll
            for (int r = 0; r < ROWS; ++r)
                total[r] += (compute_t)wide(m[r][k]) * (compute_t)wide(x[k]);
    }
}

// total = this thread's part of Σ m_k x_k for ROWS rows of a matrix, from `row` on. A row from `end`
// on is the last row once more.
template <int ROWS, typename M, typename X>
__device__ inline void dot_rows(const M* matrix, const X* x, index_t row, index_t end,
                                index_t length, int team, compute_t (&total)[ROWS]) {
    const M* m[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) m[r] = matrix + (row + r < end ? row + r : end - 1) * length;
    dot(m, x, length, team, total);
}

template <int ROWS>
__device__ inline void dot_any(const void* matrix, int matrix_is_stored, const void* x,
                               int x_is_stored, index_t row, index_t end, index_t of_x,
                               index_t length, int team, compute_t (&total)[ROWS]) {
    const storage_t *m_s = (const storage_t*)matrix, *x_s = (const storage_t*)x + of_x;
    const compute_t *m_c = (const compute_t*)matrix, *x_c = (const compute_t*)x + of_x;
    if (matrix_is_stored && x_is_stored) dot_rows(m_s, x_s, row, end, length, team, total);
    else if (matrix_is_stored) dot_rows(m_s, x_c, row, end, length, team, total);
    else if (x_is_stored) dot_rows(m_c, x_s, row, end, length, team, total);
    else dot_rows(m_c, x_c, row, end, length, team, total);
}

// One token x. If `by_block`, each block makes one number of z = matrix x. This is for L = A x,
// where the matrix has few rows.
// grid (rows)                        2 or 4 bytes of the matrix; x comes from the cache
// Else each warp makes TOKEN_ROWS numbers of z = ρ⊙(W x) + b L and of y = g⊙z + bias, with
// W = `matrix`.
// grid (out / TOKEN_ROWS · stack / WARPS)                2 bytes of W, 5 of (out, rank)
// A suspect row is formed and multiplied by x instead: see suspects.cu. `matrix` is an array of
// storage_t if `matrix_is_stored`, else of compute_t; x and y are of storage_t if `x_is_stored`,
// else of compute_t.
extern "C" __global__ void token(
    const void* matrix, int matrix_is_stored, const void* x, int x_is_stored,
    const compute_t* a /* or null */, const compute_t* b /* or null */,
    const compute_t* row_scale /* or null */, const unsigned char* suspect /* or null */,
    const compute_t* low_rank /* or null */, const compute_t* gain /* or null */,
    const compute_t* bias /* or null */, product_t* z, void* y /* or null */, index_t rows,
    index_t out, index_t inner, index_t rank, int by_block) {
    if (by_block) {
        const index_t row = blockIdx.x;
        compute_t total[1] = {};
        dot_any(matrix, matrix_is_stored, x, x_is_stored, row, rows, row / out * inner, inner,
                THREADS, total);
        const compute_t value = block_sum(total[0]);
        if (threadIdx.x == 0) z[row] = narrow<product_t>(value);
        return;
    }
    const index_t warp = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    const index_t each = (out + TOKEN_ROWS - 1) / TOKEN_ROWS, e = warp / each;
    const index_t first = e * out + warp % each * TOKEN_ROWS, end = (e + 1) * out;
    if (first >= rows) return;
    const int lane = threadIdx.x % WARP;

    // The small arrays are loaded before W: nothing waits for them at the end.
    compute_t g[TOKEN_ROWS], shift[TOKEN_ROWS], scale[TOKEN_ROWS], left[TOKEN_ROWS];
    const compute_t right = lane < rank ? low_rank[e * rank + lane] : (compute_t)0;
    unsigned marks = 0;  // of suspect rows
#pragma unroll
    for (int r = 0; r < TOKEN_ROWS; ++r) {
        const index_t row = first + r < end ? first + r : end - 1;
        g[r] = gain[row];
        shift[r] = bias ? bias[row] : (compute_t)0;
        scale[r] = row_scale ? row_scale[row] : (compute_t)1;
        left[r] = lane < rank ? b[row * rank + lane] : (compute_t)0;
        marks |= (suspect[row] != 0) << r;
    }

    compute_t total[TOKEN_ROWS] = {};
    dot_any(matrix, matrix_is_stored, x, x_is_stored, first, end, e * inner, inner, WARP, total);
#pragma unroll
    for (int r = 0; r < TOKEN_ROWS; ++r) {
        const index_t row = first + r < end ? first + r : end - 1;
        total[r] = scale[r] * total[r] + left[r] * right;
        for (index_t k = lane + WARP; k < rank; k += WARP)
            total[r] += b[row * rank + k] * low_rank[e * rank + k];
    }
#pragma unroll 1
    for (int r = 0; r < TOKEN_ROWS && marks >> r != 0; ++r) {
        if ((marks >> r & 1) == 0) continue;
        const index_t row = first + r < end ? first + r : end - 1;
        compute_t value = 0;
#pragma unroll 1
        for (index_t k = lane; k < inner; k += WARP) {
            const index_t at = e * inner + k;
            const compute_t one = x_is_stored ? (compute_t)wide(((const storage_t*)x)[at])
                                              : ((const compute_t*)x)[at];
            value += one * (matrix_is_stored
                                ? formed((const storage_t*)matrix, 0, a, b, row_scale, row, k, out,
                                         inner, rank)
                                : formed((const compute_t*)matrix, 0, a, b, row_scale, row, k, out,
                                         inner, rank));
        }
#pragma unroll
        for (int j = 0; j < TOKEN_ROWS; ++j) total[j] = j == r ? value : total[j];
    }
#pragma unroll
    for (int r = 0; r < TOKEN_ROWS; ++r) {
        const compute_t value = warp_sum(total[r]), result = g[r] * value + shift[r];
        if (lane != 0 || first + r >= end) continue;
        z[first + r] = narrow<product_t>(value);
        if (x_is_stored) ((storage_t*)y)[first + r] = narrow<storage_t>(result);
        else ((compute_t*)y)[first + r] = result;
    }
}
