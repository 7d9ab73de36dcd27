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
        if (j < count) g[j] *= scale_of(row_scale, e * out + column + j);
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

enum {
    SWATH = 64,  // columns of a warp of `mixed_gradients`
    SWATH_COLUMNS = 512,  // of a block
    SWATHS = SWATH_COLUMNS / SWATH, SWATH_STEP = 16, SWATH_RANKS = 8 * PULL_TILES,
    SWATH_THREADS = WARP * SWATHS
};

// All that a backward of 16 bits takes from dy and z, by one pass over both:
//     dz = ρ⊙g⊙dy as in `gradients`      the sums of dy⊙z and of dy over chunks of tokens
//     low = dy gained, as sums over blocks of columns      dyᵀ L, as sums over chunks of tokens
// grid (out / 512 · rank / 16, chunks, stack), 256 threads
// 2 (dy) + 2 (z) + 2 (dz) = 6 bytes; for each further 16 ranks, dy again, from the cache
// gained (stack, out, rank) is g⊙b, with 0 for suspect rows; L (stack, tokens, rank). `low` is
// (stack, out / 512, tokens, rank) and `db` (stack, chunks, rank, out). A chunk has `per_chunk`
// tokens, a multiple of 16. The rows of gained and of L are split into parts, as in `project` and
// `pull`; dy is loaded in the order of both, the second time from the cache.
extern "C" __global__ void __launch_bounds__(SWATH_THREADS, 1)
    mixed_gradients(const storage_t* __restrict__ dy, const storage_t* __restrict__ z,
                    const compute_t* __restrict__ gain,
                    const compute_t* __restrict__ row_scale /* or null */,
                    const unsigned char* __restrict__ suspect,
                    const compute_t* __restrict__ gained, const compute_t* __restrict__ low_rank,
                    storage_t* __restrict__ dz, compute_t* __restrict__ sum_dyz,
                    compute_t* __restrict__ sum_dy /* or null */, compute_t* __restrict__ low,
                    compute_t* __restrict__ db, index_t tokens, index_t out, index_t rank,
                    index_t per_chunk) {
    if (!is_skinny) return;
    __shared__ float held[2][SWATHS][SWATH_STEP][SWATH_RANKS];
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const index_t e = blockIdx.z, rank_chunks = (rank + SWATH_RANKS - 1) / SWATH_RANKS;
    const index_t across = blockIdx.x / rank_chunks, first_rank = blockIdx.x % rank_chunks * SWATH_RANKS;
    const index_t left = (across * SWATHS + warp) * SWATH;
    const index_t begin = blockIdx.y * per_chunk;
    const index_t end = begin + per_chunk < tokens ? begin + per_chunk : tokens;
    const bool packed = out % 8 == 0 && aligned(dy, z, dz, db);
    const auto there = [&](index_t column) {
        return column >= out ? 0 : out - column < 8 ? (int)(out - column) : 8;
    };

    // As the right factor of low = dy gained: the lane's ranks of its columns, in parts.
    unsigned factor[2][2][PULL_TILES][FACTOR_PARTS][2];
#pragma unroll
    for (int group = 0; group < 2; ++group)
#pragma unroll
        for (int s = 0; s < 2; ++s)
#pragma unroll
            for (int q = 0; q < PULL_TILES; ++q)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    const index_t column = left + 32 * group + 8 * t + 4 * s + 2 * h;
                    const index_t r = first_rank + g * PULL_TILES + q;
                    const compute_t* from = gained + (e * out + column) * rank + r;
                    unsigned parts[FACTOR_PARTS];
                    split_pair<FACTOR_PARTS>(
                        column < out && r < rank ? (float)from[0] : 0.0f,
                        column + 1 < out && r < rank ? (float)from[rank] : 0.0f, parts);
#pragma unroll
                    for (int p = 0; p < FACTOR_PARTS; ++p) factor[group][s][q][p][h] = parts[p];
                }

    const index_t column = left + 8 * g;  // of the lane's eight, where lanes share rows by fours
    const int count = there(column);
    // In shared memory, since a thread has no register left.
    __shared__ compute_t scales[SWATHS][SWATH];
    for (int j = lane; j < SWATH; j += WARP) {
        const index_t at = e * out + left + j;
        const bool own = left + j < out && !suspect[at];
        scales[warp][j] = own ? scale_of(row_scale, at) * gain[at] : (compute_t)0;
    }
    __syncthreads();
    const compute_t* scale = scales[warp] + 8 * g;
    compute_t along[8] = {}, total[8] = {};
    float db_sums[4][PULL_TILES][4] = {};
    for (index_t top = begin; top < end; top += SWATH_STEP) {
        PulledRows held_rows;
        Eight other[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const index_t row = top + 4 * t + i, at = (e * tokens + row) * out + column;
            const int own = row < end ? count : 0;
            held_rows.matrix[i] = eight_of(dy + at, own, packed);
            if (first_rank == 0) other[i] = eight_of(z + at, own, packed);
#pragma unroll
            for (int q = 0; q < PULL_TILES; ++q) {
                const index_t r = first_rank + PULL_TILES * g + q;
                held_rows.factor[i][q] =
                    row < end && r < rank ? (float)low_rank[(e * tokens + row) * rank + r] : 0.0f;
            }
        }
        multiply_rows(held_rows, db_sums);
        float low_sums[PULL_TILES][4] = {};
#pragma unroll
        for (int group = 0; group < 2; ++group) {
            Eight band[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const index_t row = top + 8 * h + g, from = left + 32 * group + 8 * t;
                band[h] = eight_of(dy + (e * tokens + row) * out + from,
                                   row < end ? there(from) : 0, packed);
            }
#pragma unroll
            for (int s = 0; s < 2; ++s) {
                unsigned matrix[MATRIX_PARTS][4];
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                    unsigned parts[MATRIX_PARTS];
                    split_stored(band[h % 2].word[2 * s + h / 2], parts);
#pragma unroll
                    for (int p = 0; p < MATRIX_PARTS; ++p) matrix[p][h] = parts[p];
                }
#pragma unroll
                for (int q = 0; q < PULL_TILES; ++q)
                    add_product(low_sums[q], matrix, factor[group][s][q]);
            }
        }
        // Two buffers: a warp that is ahead writes into the one that nobody reads any more.
        float(&of_step)[SWATHS][SWATH_STEP][SWATH_RANKS] = held[(top - begin) / SWATH_STEP % 2];
#pragma unroll
        for (int q = 0; q < PULL_TILES; ++q)
#pragma unroll
            for (int h = 0; h < 4; ++h)
                of_step[warp][h / 2 * 8 + g][(2 * t + h % 2) * PULL_TILES + q] = low_sums[q][h];
        if (first_rank == 0) {
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const index_t row = top + 4 * t + i;
                compute_t value[8];
#pragma unroll
                for (int j = 0; j < 8; ++j) {
                    const unsigned short d_bits = held_rows.matrix[i].word[j / 2] >> j % 2 * 16;
                    const unsigned short z_bits = other[i].word[j / 2] >> j % 2 * 16;
                    const compute_t d = wide(from_bits(d_bits));
                    along[j] += d * wide(from_bits(z_bits));
                    total[j] += d;
                    value[j] = scale[j] * d;
                }
                if (row < end && count > 0)
                    store(dz + (e * tokens + row) * out + column, value, count, packed);
            }
        }
        __syncthreads();
        const int line = threadIdx.x / SWATH_RANKS, of_rank = threadIdx.x % SWATH_RANKS;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < SWATHS; ++w) sum += of_step[w][line][of_rank];
        if (top + line < end && first_rank + of_rank < rank)
            low[((e * (gridDim.x / rank_chunks) + across) * tokens + top + line) * rank +
                first_rank + of_rank] = sum;
    }

    if (count == 0) return;
    const index_t chunk = e * gridDim.y + blockIdx.y;
#pragma unroll
    for (int q = 0; q < PULL_TILES; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const index_t r = first_rank + (2 * t + h) * PULL_TILES + q;
            if (r >= rank) continue;
            compute_t value[PER_THREAD];
#pragma unroll
            for (int c = 0; c < 8; ++c) value[c % PER_THREAD] = db_sums[c / 2][q][c % 2 * 2 + h];
            store(db + (chunk * rank + r) * out + column, value, count, packed);
        }
    if (first_rank != 0) return;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
        for (int step = 1; step < 4; step *= 2) {
            along[j] += __shfl_xor_sync(~0u, along[j], step);
            total[j] += __shfl_xor_sync(~0u, total[j], step);
        }
        if (t != 0 || j >= count) continue;
        sum_dyz[chunk * out + column + j] = along[j];
        if (sum_dy) sum_dy[chunk * out + column + j] = total[j];
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

enum { CHAIN = 64 };  // chunks that are added up in one chain: its error grows with its length

// The sum of the chunks of partial (stack, chunks, length), at i.
__device__ inline compute_t over_chunks(const compute_t* partial, index_t e, index_t chunks,
                                        index_t i, index_t length) {
    compute_t total = 0;
    for (index_t first = 0; first < chunks; first += CHAIN) {
        const index_t end = first + CHAIN < chunks ? first + CHAIN : chunks;
        compute_t chain = 0;
#pragma unroll 8
        for (index_t c = first; c < end; ++c) chain += partial[(e * chunks + c) * length + i];
        total += chain;
    }
    return total;
}

// The gradients that belong to rows of W:
//     dm = Σ sum_dyz / n      p = g⊙dm      dbias = Σ sum_dy      dB = s (g⊙(dyᵀ L) − p⊙(V Aᵀ / n))
// grid (row_blocks, rank / TILE, stack) with row_blocks = out / (THREADS per_block); more blocks
// beside these add up `low_sums` (stack, low_chunks, low_size) to `low`, where it is not null
// 4 db_chunks (dyᵀ L) + 4 (b) + 4 (unit) + 4 (dB) + 4 (pull) bytes of (out, rank)
// dyᵀ L comes as `db_chunks` sums of (rank, out) if `by_rank`, else as one of (out, rank).
// The rows ρ⊙q⊙b of the gradient through the norm, q = −p / n, are written as `pull` (out, rank), or
// as the transpose below the first `tokens` rows of `rows`. They are 0 for suspect rows. Without
// `exact`, p is 0. `square` gets bᵀ (q⊙b), without suspect rows, summed over the rows of each block:
// (stack, row_blocks, rank, rank). `over` gets b / ρ.
extern "C" __global__ void row_gradients(
    const compute_t* sum_dyz, const compute_t* sum_dy /* or null */, index_t chunks,
    const compute_t* db_sums, index_t db_chunks, int by_rank, const compute_t* gain,
    const compute_t* norm, const compute_t* b, const compute_t* unit,
    const compute_t* row_scale /* or null */, const unsigned char* suspect, int exact,
    compute_t scaling, compute_t* dm, compute_t* p_result, compute_t* dbias /* or null */,
    compute_t* db, compute_t* pull /* or null */, compute_t* rows /* or null */,
    compute_t* square /* or null */, compute_t* over /* or null */,
    const compute_t* low_sums /* or null */, index_t low_chunks, index_t low_size,
    compute_t* low /* or null */, index_t tokens, index_t out, index_t rank, index_t per_block,
    index_t row_blocks) {
    if ((index_t)blockIdx.x >= row_blocks) {
        const index_t i = ((index_t)blockIdx.x - row_blocks) * THREADS + threadIdx.x;
        if (i < low_size && blockIdx.y == 0)
            low[blockIdx.z * low_size + i] = over_chunks(low_sums, blockIdx.z, low_chunks, i, low_size);
        return;
    }
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
            const compute_t scale = scale_of(row_scale, at);
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
                if (over) over[own] = b[own] / scale;
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
                square + ((e * row_blocks + blockIdx.x) * rank + r) * rank + other;
            *result = s == 0 ? total : *result + total;
        }
        __syncthreads();
    }
}

// dA = Σ partial + (Σ square) A, and the suspect rows' part: see suspect_pull.
// grid (in / THREADS, rank / TILE, stack)                  4 chunks + 4 bytes of (rank, in)
// `partial` (stack, chunks, rank, in) are the sums lowᵀ x + pullᵀ W over chunks of their rows.
// `square` (stack, square_chunks, rank, rank) is null for 0, and p too. d is an array of storage_t
// if `d_is_stored`, else of compute_t, and so is x.
extern "C" __global__ void gradient_a(
    const compute_t* partial, index_t chunks, const compute_t* square /* or null */,
    index_t square_chunks, compute_t* result, const int* any, const unsigned char* suspect,
    const storage_t* weight, int turned, const compute_t* a, const compute_t* b,
    const compute_t* row_scale /* or null */, const compute_t* gain, const compute_t* norm,
    const compute_t* p /* or null */, const void* d, int d_is_stored, const void* x,
    int x_is_stored, index_t tokens, index_t out, index_t inner, index_t rank) {
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
    result += (e * rank + r0) * inner + k;
#pragma unroll
    for (int j = 0; j < TILE; ++j)
        if (r0 + j < rank) result[j * inner] = sums[j];
    if (!*any) return;
    for (int j = 0; j < TILE && r0 + j < rank; ++j)
        result[j * inner] += suspect_pull(suspect, weight, turned, a, b, row_scale, gain, norm, p,
                                          d, d_is_stored, x, x_is_stored, e, r0 + j, k, tokens, out,
                                          inner, rank);
}
