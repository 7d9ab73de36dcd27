// The guard: suspect rows are formed.

// norm = ‖V‖ for the suspect rows, from V itself and without overflow or underflow. If `gain` is
// not null, also gain = m / n and unit = V Aᵀ / n, both 0 where n = 0. A block makes each row.
// grid (any)
extern "C" __global__ void guard_norms(const unsigned char* suspect, index_t rows,
                                       const storage_t* weight, int turned,
                                       const compute_t* a /* or null */,
                                       const compute_t* b /* or null */,
                                       const compute_t* row_scale /* or null */, compute_t* norm,
                                       const compute_t* magnitude /* or null */,
                                       compute_t* gain /* or null */, compute_t* unit /* or null */,
                                       index_t out, index_t inner, index_t rank) {
    for (index_t row = blockIdx.x; row < rows; row += gridDim.x) {
        if (!suspect[row]) continue;
        compute_t most = 0;
        for (index_t k = threadIdx.x; k < inner; k += THREADS)
            most = larger(most,
                          fabs(formed(weight, turned, a, b, row_scale, row, k, out, inner, rank)));
        most = block_max(most);
        const compute_t peak = most > 0 ? most : (compute_t)1;
        compute_t total = 0;
        for (index_t k = threadIdx.x; k < inner; k += THREADS) {
            const compute_t v =
                formed(weight, turned, a, b, row_scale, row, k, out, inner, rank) / peak;
            total += v * v;
        }
        total = block_sum(total);
        const compute_t n = peak * sqrt(total);  // NaN where V has a NaN
        if (threadIdx.x == 0) norm[row] = n;
        if (!gain) continue;
        if (threadIdx.x == 0) gain[row] = n != 0 ? magnitude[row] / n : (compute_t)0;
        for (index_t r0 = 0; r0 < rank; r0 += TILE) {
            compute_t sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t k = threadIdx.x; k < inner && n != 0; k += THREADS) {
                const compute_t v =
                    formed(weight, turned, a, b, row_scale, row, k, out, inner, rank);
                for (int j = 0; j < TILE; ++j)
                    if (r0 + j < rank) sums[j] += a[(row / out * rank + r0 + j) * inner + k] * v;
            }
            for (int j = 0; j < TILE; ++j) {
                const compute_t value = block_sum(sums[j]);
                if (threadIdx.x == 0 && r0 + j < rank)
                    unit[row * rank + r0 + j] = n != 0 ? value / n : (compute_t)0;
            }
        }
    }
}

enum { LISTERS = 1024 };  // threads

// List the suspect rows with n ≠ 0, in order, and count them. The gain of a row of zeros is 0, so
// its product has no effect: the kernel takes it out of `suspect`.
// grid (1), one block of LISTERS threads                                2 bytes of (out,)
// `switches` gets {1, listed_count > 0}: the factors of a product that adds to the guard's result.
extern "C" __global__ void list_suspects(unsigned char* suspect, const compute_t* norm, int* listed,
                                         int* listed_count, compute_t* switches, index_t rows) {
    bool any = false;
#pragma unroll 8
    for (index_t row = threadIdx.x; row < rows; row += LISTERS) {
        const bool own = suspect[row] && norm[row] != 0;
        if (suspect[row] && !own) suspect[row] = 0;
        any |= own;
    }
    any = __syncthreads_or(any);
    if (threadIdx.x == 0) {
        switches[0] = 1;
        switches[1] = any;
        if (!any) *listed_count = 0;
    }
    if (!any) return;
    __shared__ int before[LISTERS];
    const index_t share = (rows + LISTERS - 1) / LISTERS;
    const index_t first = threadIdx.x * share;
    const index_t end = first + share < rows ? first + share : rows;
    int own = 0;
    for (index_t row = first; row < end; ++row) own += suspect[row] != 0;
    before[threadIdx.x] = own;
    __syncthreads();
    int at = 0;
    for (int t = 0; t < (int)threadIdx.x; ++t) at += before[t];
    if (threadIdx.x == LISTERS - 1) *listed_count = at + own;
    for (index_t row = first; row < end; ++row)
        if (suspect[row]) listed[at++] = (int)row;
}
