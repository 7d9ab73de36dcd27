// The passes of the backward.

// dz = ρ⊙g⊙dy, with 0 in the columns of suspect rows, and the sums of dy⊙z and of dy over each
// chunk of `per_chunk` tokens.
// grid (out / (PER_THREAD THREADS), chunks, stack)
// 2 (dy) + 2 (z) + 2 (dz) = 6 bytes, and 4 / per_chunk for each of the two sums
// dz has `rows` ≥ tokens rows in each element of the stack. The sums are (stack, chunks, out).
extern "C" __global__ void gradients(const storage_t* __restrict__ dy,
                                     const product_t* __restrict__ z,
                                     const compute_t* __restrict__ gain,
                                     const compute_t* __restrict__ row_scale /* or null */,
                                     const unsigned char* __restrict__ suspect,
                                     product_t* __restrict__ dz, compute_t* sum_dyz,
                                     compute_t* sum_dy /* or null */, index_t tokens, index_t rows,
                                     index_t out, index_t per_chunk) {
    const index_t column = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (column >= out) return;
    const bool packed = out % PER_THREAD == 0 && aligned(dy, z, dz);
    const int count = out - column < PER_THREAD ? (int)(out - column) : PER_THREAD;
    const index_t e = blockIdx.z;
    const index_t first = blockIdx.y * per_chunk;
    const index_t end = first + per_chunk < tokens ? first + per_chunk : tokens;

    compute_t g[PER_THREAD], along[PER_THREAD], total[PER_THREAD];
    load(gain + e * out + column, g, count, out % PER_THREAD == 0 && aligned(gain));
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        along[j] = total[j] = 0;
        if (j < count && row_scale) g[j] *= row_scale[e * out + column + j];
        if (j < count && suspect[e * out + column + j]) g[j] = 0;
    }
#pragma unroll 4
    for (index_t t = first; t < end; ++t) {
        compute_t d[PER_THREAD], value[PER_THREAD];
        load(dy + (e * tokens + t) * out + column, d, count, packed);
        load(z + (e * tokens + t) * out + column, value, count, packed);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            along[j] += d[j] * value[j];
            total[j] += d[j];
            d[j] *= g[j];
        }
        store(dz + (e * rows + t) * out + column, d, count, packed);
    }
    const index_t at = (e * gridDim.y + blockIdx.y) * out + column;
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) {
        if (j < count) sum_dyz[at + j] = along[j];
        if (j < count && sum_dy) sum_dy[at + j] = total[j];
    }
}

// result = Σ partial over the chunks: (stack, chunks, out) -> (stack, out).
// grid (out / WARP, 1, stack), blocks of WARP threads
extern "C" __global__ void sum_chunks(const compute_t* partial, compute_t* result, index_t chunks,
                                      index_t out) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (i >= out) return;
    compute_t total = 0;
#pragma unroll 16
    for (index_t c = 0; c < chunks; ++c) total += partial[(e * chunks + c) * out + i];
    result[e * out + i] = total;
}

__device__ inline compute_t over_chunks(const compute_t* partial, index_t e, index_t chunks,
                                        index_t i, index_t length) {
    compute_t total = 0;
#pragma unroll 8
    for (index_t c = 0; c < chunks; ++c) total += partial[(e * chunks + c) * length + i];
    return total;
}

// The gradients that belong to rows of W:
//     dm = Σ sum_dyz / n      p = g⊙dm      dbias = Σ sum_dy      dB = s (g⊙(dyᵀ L) − p⊙(V Aᵀ / n))
// grid (out / (THREADS per_block), rank / TILE, stack)
// 4 db_chunks (dyᵀ L) + 4 (b) + 4 (unit) + 4 (dB) + 4 (pull) bytes of (out, rank)
// dyᵀ L comes as `db_chunks` sums of (rank, out) if `by_rank`, else as one of (out, rank).
// The rows ρ⊙q⊙b of the gradient through the norm, q = −p / n, are written as `pull` (out, rank), or
// as the transpose below the first `tokens` rows of `rows`. They are 0 for suspect rows. Without
// `exact`, p is 0. `square` gets bᵀ (q⊙b), without suspect rows, summed over the rows of each block:
// (stack, gridDim.x, rank, rank). `over` gets b / ρ.
extern "C" __global__ void row_gradients(
    const compute_t* sum_dyz, const compute_t* sum_dy /* or null */, index_t chunks,
    const compute_t* db_sums, index_t db_chunks, int by_rank, const compute_t* gain,
    const compute_t* norm, const compute_t* b, const compute_t* unit,
    const compute_t* row_scale /* or null */, const unsigned char* suspect, int exact,
    compute_t scaling, compute_t* dm, compute_t* p_result, compute_t* dbias /* or null */,
    compute_t* db, compute_t* pull /* or null */, compute_t* rows /* or null */,
    compute_t* square /* or null */, compute_t* over /* or null */, index_t tokens, index_t out,
    index_t rank, index_t per_block) {
    __shared__ compute_t held_p[THREADS], held_n[THREADS];  // of the block's rows
    const index_t e = blockIdx.z, r0 = (index_t)blockIdx.y * TILE;
    const index_t r_end = r0 + TILE < rank ? r0 + TILE : rank;
    for (index_t s = 0; s < per_block; ++s) {
        const index_t top = ((index_t)blockIdx.x * per_block + s) * THREADS;
        const index_t i = top + threadIdx.x, at = e * out + i;
        held_p[threadIdx.x] = held_n[threadIdx.x] = 0;
        if (i < out) {
            const compute_t n = norm[at], g = gain[at];
            const compute_t m = n != 0 ? over_chunks(sum_dyz, e, chunks, i, out) / n : (compute_t)0;
            const compute_t p = exact ? g * m : (compute_t)0;
            const compute_t scale = row_scale ? row_scale[at] : (compute_t)1;
            const bool hidden = suspect[at];
            for (index_t r = r0; r < r_end; ++r) {
                const index_t own = at * rank + r;
                const compute_t along =
                    by_rank ? over_chunks(db_sums, e, db_chunks, r * out + i, rank * out)
                            : db_sums[own];
                db[own] = scaling * (exact ? g * along - p * unit[own] : g * along);
                const compute_t row = hidden ? (compute_t)0 : pulled(p, n, b[own]);
                if (pull) pull[own] = scale * row;
                if (rows) rows[(e * (tokens + rank) + tokens + r) * out + i] = scale * row;
                if (over) over[own] = scale != 0 ? b[own] / scale : b[own];
            }
            if (!hidden) held_p[threadIdx.x] = p, held_n[threadIdx.x] = n;
            if (blockIdx.y == 0) {
                dm[at] = m;
                p_result[at] = p;
                if (dbias) dbias[at] = over_chunks(sum_dy, e, chunks, i, out);
            }
        }
        if (!square) continue;
        __syncthreads();
        for (index_t k = threadIdx.x; k < (r_end - r0) * rank; k += THREADS) {
            const index_t r = r0 + k / rank, other = k % rank;
            compute_t total = 0;
            for (int j = 0; j < THREADS && top + j < out; ++j) {
                const compute_t* row = b + (e * out + top + j) * rank;
                total += pulled(held_p[j], held_n[j], row[r]) * row[other];
            }
            compute_t* result =
                square + ((e * gridDim.x + blockIdx.x) * rank + r) * rank + other;
            *result = s == 0 ? total : *result + total;
        }
        __syncthreads();
    }
}

// dA = Σ partial + (Σ square) A, and the suspect rows' part: see suspect_pull.
// grid (in / THREADS, rank / TILE, stack)                  4 chunks + 4 bytes of (rank, in)
// `partial` (stack, chunks, rank, in) are the sums lowᵀ x + pullᵀ W over chunks of their rows.
// `square` (stack, square_chunks, rank, rank) is null for 0, and p too. d and x are arrays of
// storage_t if `stored`, else of compute_t.
extern "C" __global__ void gradient_a(
    const compute_t* partial, index_t chunks, const compute_t* square /* or null */,
    index_t square_chunks, compute_t* result, const int* any, const unsigned char* suspect,
    const storage_t* weight, int turned, const compute_t* a, const compute_t* b,
    const compute_t* row_scale /* or null */, const compute_t* gain, const compute_t* norm,
    const compute_t* p /* or null */, const void* d, const void* x, int stored, index_t tokens,
    index_t out, index_t inner, index_t rank) {
    __shared__ compute_t held[TILE][WARP];
    const index_t k = (index_t)blockIdx.x * THREADS + threadIdx.x, e = blockIdx.z;
    const index_t r0 = (index_t)blockIdx.y * TILE;
    compute_t sums[TILE];
#pragma unroll
    for (int j = 0; j < TILE; ++j)
        sums[j] = k < inner && r0 + j < rank
                      ? over_chunks(partial, e, chunks, (r0 + j) * inner + k, rank * inner)
                      : (compute_t)0;
    for (index_t first = 0; square && first < rank; first += WARP) {
        __syncthreads();
        for (int j = threadIdx.x / WARP; j < TILE; j += WARPS) {
            const index_t r = r0 + j, other = first + threadIdx.x % WARP;
            held[j][threadIdx.x % WARP] =
                r < rank && other < rank
                    ? over_chunks(square, e, square_chunks, r * rank + other, rank * rank)
                    : (compute_t)0;
        }
        __syncthreads();
        for (index_t other = first; k < inner && other < first + WARP && other < rank; ++other) {
            const compute_t value = a[(e * rank + other) * inner + k];
#pragma unroll
            for (int j = 0; j < TILE; ++j) sums[j] += held[j][other - first] * value;
        }
    }
    if (k >= inner) return;
#pragma unroll
    for (int j = 0; j < TILE; ++j) {
        if (r0 + j >= rank) break;
        if (*any)
            sums[j] += suspect_pull(suspect, weight, turned, a, b, row_scale, gain, norm, p, d, x,
                                    stored, e, r0 + j, k, tokens, out, inner, rank);
        result[(e * rank + r0 + j) * inner + k] = sums[j];
    }
}
