// One token.

// This thread's part of Σ m_k x_k, where `team` threads share the sum.
template <typename M, typename X>
__device__ inline compute_t dot(const M* m, const X* x, index_t length, int team) {
    const bool packed = length % PER_THREAD == 0 && aligned(m, x);
    compute_t left[PER_THREAD], right[PER_THREAD], sums[PER_THREAD];
    for (int j = 0; j < PER_THREAD; ++j) sums[j] = 0;
#pragma unroll 4
    for (index_t k = (int)threadIdx.x % team * PER_THREAD; k < length; k += team * PER_THREAD) {
        const int count = length - k < PER_THREAD ? (int)(length - k) : PER_THREAD;
        load(m + k, left, count, packed);
        load(x + k, right, count, packed);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) sums[j] += left[j] * right[j];
    }
    compute_t total = 0;
    for (int j = 0; j < PER_THREAD; ++j) total += sums[j];
    return total;
}

// This thread's part of Σ V_k x_k for a suspect row, where a warp shares the sum.
template <typename M, typename X>
__device__ inline compute_t dot_formed(const M* m, const X* x, const compute_t* a,
                                       const compute_t* b, const compute_t* row_scale, index_t row,
                                       index_t out, index_t inner, index_t rank) {
    compute_t total = 0;
    for (index_t k = threadIdx.x % WARP; k < inner; k += WARP)
        total += formed(m, 0, a, b, row_scale, row, k, out, inner, rank) * (compute_t)wide(x[k]);
    return total;
}

// One token x. If `by_block`, each block makes one number of z = matrix x. This is for L = A x,
// where the matrix has few rows.
// grid (rows)                        2 or 4 bytes of the matrix; x comes from the cache
// Else each warp makes one number of z = ρ⊙(W x) + b L and of y = g⊙z + bias, with W = `matrix`.
// grid (rows / WARPS)                2 bytes of W, 5 of (out, rank)
// A suspect row is formed and multiplied by x instead: see the guard. `matrix` is an array of
// storage_t if `matrix_is_stored`, else of compute_t; x and y are of storage_t if `x_is_stored`,
// else of compute_t.
extern "C" __global__ void token(
    const void* matrix, int matrix_is_stored, const void* x, int x_is_stored,
    const compute_t* a /* or null */, const compute_t* b /* or null */,
    const compute_t* row_scale /* or null */, const unsigned char* suspect /* or null */,
    const compute_t* low_rank /* or null */, const compute_t* gain /* or null */,
    const compute_t* bias /* or null */, product_t* z, void* y /* or null */, index_t rows,
    index_t out, index_t inner, index_t rank, int by_block) {
    const index_t row = by_block ? (index_t)blockIdx.x
                                 : (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const int team = by_block ? THREADS : WARP;
    const index_t e = row / out, at = row * inner, of_x = e * inner;
    const storage_t *m_s = (const storage_t*)matrix, *x_s = (const storage_t*)x + of_x;
    const compute_t *m_c = (const compute_t*)matrix, *x_c = (const compute_t*)x + of_x;
    compute_t value;
    if (suspect && suspect[row]) {
        value = matrix_is_stored
                    ? x_is_stored ? dot_formed(m_s, x_s, a, b, row_scale, row, out, inner, rank)
                                  : dot_formed(m_s, x_c, a, b, row_scale, row, out, inner, rank)
                : x_is_stored ? dot_formed(m_c, x_s, a, b, row_scale, row, out, inner, rank)
                              : dot_formed(m_c, x_c, a, b, row_scale, row, out, inner, rank);
    } else {
        value = matrix_is_stored ? x_is_stored ? dot(m_s + at, x_s, inner, team)
                                               : dot(m_s + at, x_c, inner, team)
                : x_is_stored    ? dot(m_c + at, x_s, inner, team)
                                 : dot(m_c + at, x_c, inner, team);
        if (row_scale) value *= row_scale[row];
        for (index_t r = threadIdx.x % WARP; b && r < rank; r += WARP)
            value += b[row * rank + r] * low_rank[e * rank + r];
    }
    value = by_block ? block_sum(value) : warp_sum(value);
    if (threadIdx.x % team != 0) return;
    z[row] = narrow<product_t>(value);
    if (!y) return;
    const compute_t result = bias ? gain[row] * value + bias[row] : gain[row] * value;
    if (x_is_stored) ((storage_t*)y)[row] = narrow<storage_t>(result);
    else ((compute_t*)y)[row] = result;
}
