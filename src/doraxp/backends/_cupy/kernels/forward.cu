// The passes of the forward, and the low-rank update of both directions.

// z ← ρ⊙z and y = g⊙z + bias.
// grid (out / (PER_THREAD THREADS), any, stack)
// 2 (z) + 2 (y) = 4 bytes, and with ρ + 2 (z), where z is bfloat16
// In the columns of suspect rows z is x Vᵀ + shift bᵀ instead, with `shift` (stack, tokens, rank), or
// null for 0. x and y are arrays of storage_t if `stored`, else of compute_t.
extern "C" __global__ void outputs(
    product_t* z, const compute_t* row_scale /* or null */, const compute_t* gain,
    const compute_t* bias /* or null */, void* y, int stored, const int* any,
    const unsigned char* suspect, const storage_t* weight, int turned,
    const compute_t* a, const compute_t* b, const void* x, const compute_t* shift /* or null */,
    index_t tokens, index_t out, index_t inner, index_t rank) {
    const index_t column = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    const index_t e = blockIdx.z;
    if (column < out) {
        const bool packed = out % PER_THREAD == 0 && aligned(z, y);
        const int count = out - column < PER_THREAD ? (int)(out - column) : PER_THREAD;
        const index_t own = e * out + column;
        const bool whole = out % PER_THREAD == 0 && aligned(gain, bias, row_scale);
        compute_t g[PER_THREAD], offset[PER_THREAD], scale[PER_THREAD];
        load(gain + own, g, count, whole);
        if (bias) load(bias + own, offset, count, whole);
        if (row_scale) load(row_scale + own, scale, count, whole);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j)
            if (row_scale && scale[j] == 0) scale[j] = 1;  // see scale_of
        for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
            const index_t at = (e * tokens + t) * out + column;
            compute_t value[PER_THREAD];
            load(z + at, value, count, packed);
            if (row_scale) {
#pragma unroll
                for (int j = 0; j < PER_THREAD; ++j) value[j] *= scale[j];
                store(z + at, value, count, packed);
            }
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                value[j] = bias ? g[j] * value[j] + offset[j] : g[j] * value[j];
            if (stored) store((storage_t*)y + at, value, count, packed);
            else store((compute_t*)y + at, value, count, packed);
        }
    }
    if (!*any) return;
    __syncthreads();  // the numbers below overwrite those above
    const index_t first = e * out + (index_t)blockIdx.x * blockDim.x * PER_THREAD;
    const index_t last = first + (index_t)blockDim.x * PER_THREAD;
    const index_t end = last < (e + 1) * out ? last : (e + 1) * out;
    for (index_t row = next_suspect(suspect, first, end); row < end;
         row = next_suspect(suspect, row + 1, end))
        for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
            compute_t value = 0;
#pragma unroll 1
            for (index_t k = threadIdx.x; k < inner; k += THREADS)
                value += item(x, (e * tokens + t) * inner + k, stored) *
                         formed(weight, turned, a, b, row_scale, row, k, out, inner, rank);
            value = block_sum(value);
            if (threadIdx.x != 0) continue;
#pragma unroll 1
            for (index_t r = 0; shift && r < rank; ++r)
                value += shift[(e * tokens + t) * rank + r] * b[row * rank + r];
            const index_t at = (e * tokens + t) * out + row % out;
            z[at] = narrow<product_t>(value);
            const compute_t result = bias ? gain[row] * value + bias[row] : gain[row] * value;
            if (stored) ((storage_t*)y)[at] = narrow<storage_t>(result);
            else ((compute_t*)y)[at] = result;
        }
}

enum { TILE = 8 };  // tokens, or ranks, that a thread works on at once

// The arrays with which `update` adds the suspect rows' part of d V.
struct Inputs {
    const int* any;
    const unsigned char* suspect;
    const storage_t* weight;
    int turned;
    const compute_t *a, *b, *row_scale, *gain, *norm, *p;
    const void* d;
    int d_is_stored;
    const void* x;
    int x_is_stored;
    index_t tokens, out, inner, rank;

    // The suspect rows' part of (d V)[row, k]; below the tokens, of dA[row − tokens, k].
    __device__ compute_t part(index_t e, index_t row, index_t k) const {
        if (row >= tokens)
            return suspect_pull(suspect, weight, turned, a, b, row_scale, gain, norm, p, d,
                                d_is_stored, x, x_is_stored, e, row - tokens, k, tokens, out, inner,
                                rank);
        compute_t total = 0;
        const index_t end = (e + 1) * out;
        for (index_t i = next_suspect(suspect, e * out, end); i < end;
             i = next_suspect(suspect, i + 1, end))
            total += gain[i] * item(d, (e * tokens + row) * out + i % out, d_is_stored) *
                     formed(weight, turned, a, b, row_scale, i, k, out, inner, rank);
        return total;
    }
};

// factor[column, k] / ρ for a factor (columns, rank) if `by_rows`, else (rank, columns).
__device__ inline compute_t of_factor(const compute_t* factor, const compute_t* over, int by_rows,
                                      index_t e, index_t column, index_t k, index_t columns,
                                      index_t rank) {
    if (column >= columns || k >= rank) return 0;
    const compute_t value = factor[by_rows ? (e * columns + column) * rank + k
                                           : (e * rank + k) * columns + column];
    return value / scale_of(over, e * columns + column);
}

// Two numbers as `PARTS_OF_UPDATE` pairs of bfloat16, whose sums they are to 16 bits.
enum { PARTS_OF_UPDATE = 2, STRIP_OF_UPDATE = 32, ROWS_OF_UPDATE = 32 };
__device__ inline void two_parts(float low, float high, unsigned* parts) {
#pragma unroll
    for (int p = 0; p < PARTS_OF_UPDATE; ++p) {
        const bf16_t first = narrow<bf16_t>(low), second = narrow<bf16_t>(high);
        parts[p] = first.bits | (unsigned)second.bits << 16;
        low -= wide(first);
        high -= wide(second);
    }
}

// The tensor cores' `update`. A warp makes STRIP_OF_UPDATE columns of ROWS_OF_UPDATE rows at once,
// and goes down the rows.
// With STEPS > 0 it keeps the factor of its columns, STEPS · 16 ranks, in registers.
template <int STEPS>
__device__ inline void update_on_tensor_cores(const compute_t* low, const compute_t* factor,
                                              const compute_t* over, product_t* result,
                                              index_t rows, index_t columns, index_t rank,
                                              int by_rows) {
    const int g = threadIdx.x % WARP / 4, t = threadIdx.x % 4;
    const index_t e = blockIdx.z;
    const index_t first =
        ((index_t)blockIdx.x * WARPS + threadIdx.x / WARP) * STRIP_OF_UPDATE;
    if (first >= columns) return;
    const index_t steps = (rank + 15) / 16;
    unsigned right[STEPS > 0 ? STEPS : 1][4][PARTS_OF_UPDATE][2];
    // Any column may stand in any place of a tile. These give each lane 8 neighbours.
    const auto fetch = [&](index_t step, unsigned(&into)[4][PARTS_OF_UPDATE][2]) {
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const index_t column = first + 8 * (g / 2) + 2 * j + g % 2;
                const index_t k = step * 16 + 8 * half + 2 * t;
                unsigned parts[PARTS_OF_UPDATE];
                two_parts((float)of_factor(factor, over, by_rows, e, column, k, columns, rank),
                          (float)of_factor(factor, over, by_rows, e, column, k + 1, columns, rank),
                          parts);
#pragma unroll
                for (int p = 0; p < PARTS_OF_UPDATE; ++p) into[j][p][half] = parts[p];
            }
    };
#pragma unroll
    for (int s = 0; s < STEPS; ++s) fetch(s, right[s]);
    const bool packed = columns % PER_THREAD == 0 && aligned(result);
    const index_t column = first + 8 * t;
    const int count = columns - column < 0 ? 0 : columns - column < 8 ? (int)(columns - column) : 8;
    const index_t apart = (index_t)gridDim.y * ROWS_OF_UPDATE;
    for (index_t top = (index_t)blockIdx.y * ROWS_OF_UPDATE; top < rows; top += apart) {
        float sums[2][4][4] = {};
#pragma unroll
        for (index_t step = 0; step < (STEPS > 0 ? STEPS : steps); ++step) {
            unsigned left[2][PARTS_OF_UPDATE][4];
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                    const index_t row = top + 16 * i + h % 2 * 8 + g;
                    const index_t k = step * 16 + h / 2 * 8 + 2 * t;
                    const compute_t* from = low + (e * rows + row) * rank + k;
                    unsigned parts[PARTS_OF_UPDATE];
                    two_parts(row < rows && k < rank ? (float)from[0] : 0.0f,
                              row < rows && k + 1 < rank ? (float)from[1] : 0.0f, parts);
#pragma unroll
                    for (int p = 0; p < PARTS_OF_UPDATE; ++p) left[i][p][h] = parts[p];
                }
            if (STEPS == 0) fetch(step, right[0]);
            float fresh[2][4][4] = {};
#pragma unroll
            for (int least = PARTS_OF_UPDATE - 1; least >= 0; --least)
#pragma unroll
                for (int p = 0; p <= least; ++p)
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int j = 0; j < 4; ++j)
                            tensor_product(fresh[i][j], left[i][p],
                                           right[STEPS > 0 ? step : 0][j][least - p]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int h = 0; h < 4; ++h) sums[i][j][h] += fresh[i][j][h];
        }
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const index_t row = top + 8 * i + g;
            if (row >= rows || count == 0) continue;
            compute_t value[PER_THREAD];
#pragma unroll
            for (int c = 0; c < PER_THREAD; ++c)
                value[c] = sums[i / 2][c / 2 % 4][i % 2 * 2 + c % 2];
            store(result + (e * rows + row) * columns + column, value, count,
                  packed && count == PER_THREAD);
        }
    }
}

// The same by ordinary arithmetic, with all digits. A thread makes PER_THREAD columns of TILE rows.
__device__ inline void update_by_threads(const compute_t* low, const compute_t* factor,
                                         const compute_t* over, product_t* result, index_t rows,
                                         index_t columns, index_t rank, int by_rows) {
    const index_t column = ((index_t)blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    const index_t e = blockIdx.z;
    if (column >= columns) return;
    const bool packed = columns % PER_THREAD == 0 && aligned(result);
    const int count = columns - column < PER_THREAD ? (int)(columns - column) : PER_THREAD;
    for (index_t top = (index_t)blockIdx.y * TILE; top < rows; top += (index_t)gridDim.y * TILE) {
        compute_t sums[TILE][PER_THREAD];
#pragma unroll
        for (int i = 0; i < TILE; ++i)
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j) sums[i][j] = 0;
        for (index_t k = 0; k < rank; ++k) {
            compute_t right[PER_THREAD];
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                right[j] = of_factor(factor, over, by_rows, e, column + j, k, columns, rank);
#pragma unroll
            for (int i = 0; i < TILE; ++i) {
                const index_t row = top + i < rows ? top + i : rows - 1;
                const compute_t left = low[(e * rows + row) * rank + k];
#pragma unroll
                for (int j = 0; j < PER_THREAD; ++j) sums[i][j] += left * right[j];
            }
        }
#pragma unroll
        for (int i = 0; i < TILE; ++i) {
            if (top + i >= rows) break;
            store(result + (e * rows + top + i) * columns + column, sums[i], count, packed);
        }
    }
}

// result = low factorᵀ / ρ, to which the product with W is then added: z = x Wᵀ + result, or
// dx = d W + result.
// grid (columns / (WARPS · 32), any, stack) where product_t has 16 bits: 2 bytes; tensor cores add
// up 16 bits of each factor, which is 2^-8 of what the rounding to bfloat16 loses
// grid (columns / (PER_THREAD THREADS), any, stack) elsewhere: 4 bytes
// `low` is (stack, rows, rank). The factor is (stack, columns, rank) if `by_rows`, else (stack, rank,
// columns). `over` is ρ, or null for 1. If `any` is not null, any[0] says whether to add the suspect
// rows' part of d V, and in the rows below `tokens` that of dA: see suspect_pull. d is an array of
// storage_t if `d_is_stored`, else of compute_t, and so is x.
extern "C" __global__ void update(
    const compute_t* low, const compute_t* factor, const compute_t* over /* or null */,
    product_t* result, index_t rows, index_t columns, index_t rank, int by_rows,
    const int* any /* or null */, const unsigned char* suspect /* or null */,
    const storage_t* weight /* or null */, int turned, const compute_t* a /* or null */,
    const compute_t* b /* or null */, const compute_t* row_scale /* or null */,
    const compute_t* gain /* or null */, const compute_t* norm /* or null */,
    const compute_t* p /* or null */, const void* d /* or null */, int d_is_stored,
    const void* x /* or null */, int x_is_stored, index_t tokens, index_t out) {
    const index_t e = blockIdx.z;
    const bool on_tensor_cores = sizeof(product_t) == 2;
    if (on_tensor_cores) {
        if (rank <= 16)
            update_on_tensor_cores<1>(low, factor, over, result, rows, columns, rank, by_rows);
        else if (rank <= 32)
            update_on_tensor_cores<2>(low, factor, over, result, rows, columns, rank, by_rows);
        else
            update_on_tensor_cores<0>(low, factor, over, result, rows, columns, rank, by_rows);
    } else {
        update_by_threads(low, factor, over, result, rows, columns, rank, by_rows);
    }
    if (!any || !*any) return;
    const Inputs inputs = {any,  suspect, weight,      turned, a,           b,      row_scale, gain,
                           norm, p,       d,           d_is_stored, x, x_is_stored, tokens, out,
                           columns, rank};
    // The numbers that this thread has written: `tall` of every `step` rows, `beside` columns.
    const int lane = threadIdx.x % WARP, tall = on_tensor_cores ? 4 : TILE;
    const int apart = on_tensor_cores ? 8 : 1, beside = on_tensor_cores ? 8 : PER_THREAD;
    const index_t first =
        on_tensor_cores
            ? ((index_t)blockIdx.x * WARPS + threadIdx.x / WARP) * STRIP_OF_UPDATE + 8 * (lane % 4)
            : ((index_t)blockIdx.x * THREADS + threadIdx.x) * PER_THREAD;
    const index_t step = tall * apart;
    for (index_t top = blockIdx.y * step + (on_tensor_cores ? lane / 4 : 0); top < rows;
         top += gridDim.y * step)
        for (int i = 0; i < tall * beside; ++i) {
            const index_t row = top + i / beside * apart, k = first + i % beside;
            if (row < rows && k < columns) {
                product_t* at = result + (e * rows + row) * columns + k;
                // It is rare: the number may be rounded once more.
                *at = narrow<product_t>((compute_t)wide(*at) + inputs.part(e, row, k));
            }
        }
}
