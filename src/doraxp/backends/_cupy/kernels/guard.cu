// The guard: suspect rows are formed.

enum { TILE = 8 };  // tokens, or ranks, that a thread works on at once: it forms V once for them

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

__device__ inline compute_t item(const void* array, index_t i, bool stored) {
    return stored ? (compute_t)wide(((const storage_t*)array)[i]) : ((const compute_t*)array)[i];
}

// z[:, i] = x Vᵢᵀ and y[:, i] = gᵢ z[:, i] + biasᵢ, for the listed rows i.      grid (any, any)
// The number for element e, token t and row i is z[e·z_element + t·z_token + i·z_row]. x and y are
// arrays of storage_t if `x_is_stored`, else of compute_t.
extern "C" __global__ void guard_outputs(
    const int* listed, const int* listed_count, const storage_t* weight, int turned,
    const compute_t* a /* or null */, const compute_t* b /* or null */,
    const compute_t* row_scale /* or null */, const void* x, int x_is_stored, product_t* z,
    index_t z_element, index_t z_token, index_t z_row, void* y /* or null */,
    const compute_t* gain /* or null */, const compute_t* bias /* or null */, index_t tokens,
    index_t out, index_t inner, index_t rank) {
    for (int s = blockIdx.x; s < *listed_count; s += gridDim.x) {
        const index_t row = listed[s], e = row / out, i = row % out;
        for (index_t t0 = (index_t)blockIdx.y * TILE; t0 < tokens;
             t0 += (index_t)gridDim.y * TILE) {
            compute_t sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t k = threadIdx.x; k < inner; k += THREADS) {
                const compute_t v =
                    formed(weight, turned, a, b, row_scale, row, k, out, inner, rank);
                for (int j = 0; j < TILE; ++j)
                    if (t0 + j < tokens)
                        sums[j] += item(x, (e * tokens + t0 + j) * inner + k, x_is_stored) * v;
            }
            for (int j = 0; j < TILE; ++j) {
                const compute_t value = block_sum(sums[j]);
                const index_t t = t0 + j;
                if (threadIdx.x != 0 || t >= tokens) continue;
                z[e * z_element + t * z_token + i * z_row] = narrow<product_t>(value);
                if (!y) continue;
                const compute_t result = bias ? gain[row] * value + bias[row] : gain[row] * value;
                const index_t at = (e * tokens + t) * out + i;
                if (x_is_stored) ((storage_t*)y)[at] = narrow<storage_t>(result);
                else ((compute_t*)y)[at] = result;
            }
        }
    }
}

// result = Σ d[:, i] Vᵢ over the listed rows i. If no row is listed, result is not written.
// grid (in / THREADS, any, stack)
extern "C" __global__ void guard_inputs(const int* listed, const int* listed_count,
                                        const storage_t* weight, int turned,
                                        const compute_t* a /* or null */,
                                        const compute_t* b /* or null */,
                                        const compute_t* row_scale /* or null */,
                                        const product_t* d, product_t* result, index_t tokens,
                                        index_t out, index_t inner, index_t rank) {
    const index_t k = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (*listed_count == 0 || k >= inner) return;
    for (index_t t0 = (index_t)blockIdx.y * TILE; t0 < tokens; t0 += (index_t)gridDim.y * TILE) {
        compute_t sums[TILE];
        for (int j = 0; j < TILE; ++j) sums[j] = 0;
        for (int s = 0; s < *listed_count; ++s) {
            const index_t row = listed[s];
            if (row / out != e) continue;
            const compute_t v = formed(weight, turned, a, b, row_scale, row, k, out, inner, rank);
            for (int j = 0; j < TILE; ++j)
                if (t0 + j < tokens)
                    sums[j] += (compute_t)wide(d[(e * tokens + t0 + j) * out + row % out]) * v;
        }
        for (int j = 0; j < TILE; ++j)
            if (t0 + j < tokens)
                result[(e * tokens + t0 + j) * inner + k] = narrow<product_t>(sums[j]);
    }
}

// d[:, i] = 0 for the listed rows i: a product of d with W then leaves them out.    grid (any, any)
extern "C" __global__ void guard_hide(const int* listed, const int* listed_count, product_t* d,
                                      index_t tokens, index_t out) {
    for (int s = blockIdx.y; s < *listed_count; s += gridDim.y) {
        const index_t e = listed[s] / out, i = listed[s] % out;
        for (index_t t = (index_t)blockIdx.x * blockDim.x + threadIdx.x; t < tokens;
             t += (index_t)gridDim.x * blockDim.x)
            d[(e * tokens + t) * out + i] = narrow<product_t>(0);
    }
}

// low = d b, computed again if any row is listed, since guard_hide has changed d.
// A warp makes each token: grid (any, stack)
extern "C" __global__ void guard_low(const int* listed_count, const product_t* d,
                                     const compute_t* b, compute_t* low, index_t tokens,
                                     index_t out, index_t rank) {
    if (*listed_count == 0) return;
    const index_t e = blockIdx.y;
    for (index_t t = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP; t < tokens;
         t += (index_t)gridDim.x * WARPS)
        for (index_t r0 = 0; r0 < rank; r0 += TILE) {
            compute_t sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t i = threadIdx.x % WARP; i < out; i += WARP) {
                const compute_t value = (compute_t)wide(d[(e * tokens + t) * out + i]);
                for (int j = 0; j < TILE; ++j)
                    if (r0 + j < rank) sums[j] += value * b[(e * out + i) * rank + r0 + j];
            }
            for (int j = 0; j < TILE; ++j) {
                const compute_t total = warp_sum(sums[j]);
                if (threadIdx.x % WARP == 0 && r0 + j < rank)
                    low[(e * tokens + t) * rank + r0 + j] = total;
            }
        }
}
