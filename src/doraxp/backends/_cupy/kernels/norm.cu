// The norm of a weight, and division by it.

// ‖V[row]‖ from V itself, without overflow or underflow. A block makes it, and every thread gets it.
__device__ inline compute_t formed_norm(const storage_t* weight, int turned, const compute_t* a,
                                        const compute_t* b, const compute_t* row_scale, index_t row,
                                        index_t out, index_t inner, index_t rank) {
    compute_t most = 0;
    for (index_t k = threadIdx.x; k < inner; k += THREADS)
        most = larger(most, fabs(formed(weight, turned, a, b, row_scale, row, k, out, inner, rank)));
    most = block_max(most);
    if (most == 0) return 0;
    compute_t total = 0;
    for (index_t k = threadIdx.x; k < inner; k += THREADS) {
        const compute_t v =
            formed(weight, turned, a, b, row_scale, row, k, out, inner, rank) / most;
        total += v * v;
    }
    return most * sqrt(block_sum(total));  // NaN where V has a NaN
}

// norm = ‖V‖ by rows, from the chunks of ‖V‖²; and with `magnitude`, gain = m / n, 0 where n = 0.
// A row whose square is not in floor..∞ is measured on V itself.
// grid (out / NORM_ROWS, 1, stack)                     4 `chunks` + 4 bytes of (out,), and 8 for g
// The sums of neighbouring rows of a chunk are neighbours: a block reads 32 bytes of each chunk.
enum { NORM_ROWS = 8 };  // rows of a block
extern "C" __global__ void norms(const compute_t* partial, const storage_t* weight, int turned,
                                 const compute_t* a /* or null */,
                                 const compute_t* b /* or null */,
                                 const compute_t* row_scale /* or null */,
                                 const compute_t* magnitude /* or null */, compute_t* norm,
                                 compute_t* gain /* or null */, index_t chunks, index_t out,
                                 index_t inner, index_t rank, compute_t floor) {
    enum { GROUPS = THREADS / NORM_ROWS };  // each adds up every GROUPS-th chunk
    __shared__ compute_t sums[GROUPS][NORM_ROWS];
    const index_t e = blockIdx.z, first = (index_t)blockIdx.x * NORM_ROWS;
    const int own = threadIdx.x % NORM_ROWS, group = threadIdx.x / NORM_ROWS;
    compute_t total = 0;
#pragma unroll 8
    for (index_t c = group; c < chunks; c += GROUPS)
        if (first + own < out) total += partial[(e * chunks + c) * out + first + own];
    sums[group][own] = total;
    __syncthreads();
    for (int r = 0; r < NORM_ROWS && first + r < out; ++r) {
        const index_t row = e * out + first + r;
        compute_t square = 0;
#pragma unroll
        for (int k = 0; k < GROUPS; ++k) square += sums[k][r];
        compute_t n = sqrt(square);
        if (!(square > floor && square < (compute_t)__uint_as_float(0x7f800000u)))
            n = formed_norm(weight, turned, a, b, row_scale, row, out, inner, rank);
        if (threadIdx.x != 0) continue;
        norm[row] = n;
        if (gain) gain[row] = n != 0 ? magnitude[row] / n : (compute_t)0;
    }
}

// result = values / n by rows: 0 where n = 0, NaN where n is NaN.
// grid (size / THREADS)                                             8 bytes
extern "C" __global__ void over_norm(const compute_t* values, const compute_t* norm,
                                     compute_t* result, index_t size, index_t per_row) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const compute_t n = norm[i / per_row];
    result[i] = n != 0 ? values[i] / n : (compute_t)0;
}
