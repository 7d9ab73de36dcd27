// The passes over (tokens, out) before and after the products.

// z = ρ⊙base + update and y = g⊙z + bias.
// grid (out / (PER_THREAD THREADS), any, stack)
// 4 (base) + 4 (update) + 4 (z) + 2 (y) = 14 bytes; 4 + 2 = 6 if base already holds z.
// `update` is null for 0. `z` is null if it is not wanted, and may be the same array as base.
extern "C" __global__ void outputs(const product_t* base, const product_t* update /* or null */,
                                   const compute_t* row_scale /* or null */, const compute_t* gain,
                                   const compute_t* bias /* or null */, product_t* z /* or null */,
                                   storage_t* y, index_t tokens, index_t out) {
    const index_t column = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (column >= out) return;
    const bool packed = out % PER_THREAD == 0 && aligned(base, update, z, y);
    const int count = out - column < PER_THREAD ? (int)(out - column) : PER_THREAD;
    const index_t e = blockIdx.z, own = e * out + column;

    const bool whole = out % PER_THREAD == 0 && aligned(gain, bias, row_scale);
    compute_t g[PER_THREAD], shift[PER_THREAD], scale[PER_THREAD];
    load(gain + own, g, count, whole);
    if (bias) load(bias + own, shift, count, whole);
    if (row_scale) load(row_scale + own, scale, count, whole);
    for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
        const index_t at = (e * tokens + t) * out + column;
        compute_t value[PER_THREAD], other[PER_THREAD];
        load(base + at, value, count, packed);
        if (update) load(update + at, other, count, packed);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            if (row_scale) value[j] *= scale[j];
            if (update) value[j] += other[j];
        }
        if (z) store(z + at, value, count, packed);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j)
            value[j] = bias ? g[j] * value[j] + shift[j] : g[j] * value[j];
        store(y + at, value, count, packed);
    }
}

// dz = g⊙dy, and the sums of dy⊙z and of dy over each chunk of `per_chunk` tokens.
// grid (out / (PER_THREAD THREADS), chunks, stack)
// 2 (dy) + 4 (z) + 4 (dz) = 10 bytes, and 4 / per_chunk for each of the two sums.
// dz has `rows` ≥ tokens rows in each element of the stack. The sums are (stack, chunks, out).
extern "C" __global__ void gradients(const storage_t* __restrict__ dy,
                                     const product_t* __restrict__ z,
                                     const compute_t* __restrict__ gain, product_t* __restrict__ dz,
                                     compute_t* sum_dyz, compute_t* sum_dy /* or null */,
                                     index_t tokens, index_t rows, index_t out, index_t per_chunk) {
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
    for (int j = 0; j < PER_THREAD; ++j) along[j] = total[j] = 0;
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

// The gradient through the norm: dm = sum_dyz / n, p = g⊙dm, and the rows (q⊙b)ᵀ with q = −p / n,
// written below the first `tokens` rows of dz. All are 0 where n = 0.
// grid (out / THREADS, rank, stack)                       4 (b) + 4 (rows) = 8 bytes of (out, rank)
extern "C" __global__ void norm_rows(const compute_t* sum_dyz, const compute_t* gain,
                                     const compute_t* norm, const compute_t* b, compute_t* dm,
                                     compute_t* p_result, product_t* dz, index_t tokens,
                                     index_t out, index_t rank) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (i >= out) return;
    const index_t at = e * out + i;
    const compute_t n = norm[at], m = n != 0 ? sum_dyz[at] / n : (compute_t)0, p = gain[at] * m;
    for (index_t r = blockIdx.y; r < rank; r += gridDim.y) {
        const compute_t row = n != 0 ? -p * b[at * rank + r] / n : (compute_t)0;
        dz[(e * (tokens + rank) + tokens + r) * out + i] = narrow<product_t>(row);
    }
    if (blockIdx.y != 0) return;
    dm[at] = m;
    p_result[at] = p;
}

// db ← scaling (db − p⊙unit) by rows, with unit = V Aᵀ / n.
// grid (size / THREADS)                                                 12 bytes of (out, rank)
extern "C" __global__ void turning(compute_t* db, const compute_t* p, const compute_t* unit,
                                   index_t size, index_t rank, compute_t scaling) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) db[i] = scaling * (db[i] - p[i / rank] * unit[i]);
}
