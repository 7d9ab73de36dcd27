// The adapter's own arrays, and the norm with all that follows from it by rows.

enum { SIDE = 4 };  // ranks on each side of the part of gram that a block makes

// gram[i, j] = A Aᵀ for SIDE × SIDE pairs of rows i ≤ j, and the same numbers at [j, i].
template <typename T>
__device__ inline void gram_pairs(const T* a, compute_t* gram, int pair, index_t inner,
                                  index_t rank) {
    int right = 0;
    for (; pair > right; ++right) pair -= right + 1;
    const T *of_left[SIDE], *of_right[SIDE];
#pragma unroll
    for (int i = 0; i < SIDE; ++i) {
        const index_t own = pair * SIDE + i, other = right * SIDE + i;
        of_left[i] = a + (own < rank ? own : rank - 1) * inner;
        of_right[i] = a + (other < rank ? other : rank - 1) * inner;
    }
    const bool packed = inner % PER_THREAD == 0 && aligned(a);
    compute_t sums[SIDE][SIDE] = {};
    for (index_t k = threadIdx.x * PER_THREAD; k < inner; k += THREADS * PER_THREAD) {
        const int count = inner - k < PER_THREAD ? (int)(inner - k) : PER_THREAD;
        compute_t left[SIDE][PER_THREAD], other[PER_THREAD];
#pragma unroll
        for (int i = 0; i < SIDE; ++i) load(of_left[i] + k, left[i], count, packed);
#pragma unroll
        for (int j = 0; j < SIDE; ++j) {
            load(of_right[j] + k, other, count, packed);
#pragma unroll
            for (int i = 0; i < SIDE; ++i)
#pragma unroll
                for (int c = 0; c < PER_THREAD; ++c) sums[i][j] += left[i][c] * other[c];
        }
    }
#pragma unroll
    for (int i = 0; i < SIDE; ++i)
#pragma unroll
        for (int j = 0; j < SIDE; ++j) {
            const compute_t total = block_sum(sums[i][j]);
            const index_t row = pair * SIDE + i, column = right * SIDE + j;
            if (threadIdx.x != 0 || row > column || column >= rank) continue;
            gram[row * rank + column] = total;
            gram[column * rank + row] = total;
        }
}

// to = factor from, for the PER_THREAD numbers of this thread in block `block`.
template <typename T>
__device__ inline void scale_numbers(const T* from, compute_t* to, int block, index_t size,
                                     compute_t factor) {
    const index_t at = ((index_t)block * THREADS + threadIdx.x) * PER_THREAD;
    if (at >= size) return;
    const int count = size - at < PER_THREAD ? (int)(size - at) : PER_THREAD;
    const bool packed = count == PER_THREAD && aligned(from + at, to + at);
    compute_t value[PER_THREAD];
    load(from + at, value, count, packed);
#pragma unroll
    for (int j = 0; j < PER_THREAD; ++j) value[j] *= factor;
    store(to + at, value, count, packed);
}

// wide_a = A and scaled_b = s B in compute_t, gram = A Aᵀ, and any = 0.
// grid (pairs + numbers of B / (PER_THREAD THREADS) + of A / (PER_THREAD THREADS), 1, stack), where
// pairs = i (i + 1) / 2 for i = rank / SIDE, or 0 without `gram`; A counts if it is copied
// 2 + 4 = 6 bytes of A and of B; each pair reads 8 rows of A from the cache
// A is an array of storage_t if `a_is_stored`, else of compute_t, and so is B.
extern "C" __global__ void prepare_adapter(const void* a, int a_is_stored, const void* b,
                                           int b_is_stored, compute_t* wide_a /* or null */,
                                           compute_t* scaled_b, compute_t* gram /* or null */,
                                           int* any, index_t out, index_t inner, index_t rank,
                                           compute_t scaling) {
    const index_t e = blockIdx.z, numbers = e * rank * inner, of_b = out * rank;
    const storage_t* a_s = (const storage_t*)a + numbers;
    const compute_t* a_c = (const compute_t*)a + numbers;
    const int sides = (int)((rank + SIDE - 1) / SIDE);
    const int pairs = gram ? sides * (sides + 1) / 2 : 0;
    const int blocks_b = (int)((of_b + PER_THREAD * THREADS - 1) / (PER_THREAD * THREADS));
    int block = blockIdx.x;
    if (block == 0 && e == 0 && threadIdx.x == 0) *any = 0;
    if (block < pairs) {
        compute_t* of_e = gram + e * rank * rank;
        if (a_is_stored) gram_pairs(a_s, of_e, block, inner, rank);
        else gram_pairs(a_c, of_e, block, inner, rank);
        return;
    }
    block -= pairs;
    if (block < blocks_b) {
        compute_t* to = scaled_b + e * of_b;
        if (b_is_stored) scale_numbers((const storage_t*)b + e * of_b, to, block, of_b, scaling);
        else scale_numbers((const compute_t*)b + e * of_b, to, block, of_b, scaling);
        return;
    }
    block -= blocks_b;
    if (a_is_stored) scale_numbers(a_s, wide_a + numbers, block, rank * inner, (compute_t)1);
    else scale_numbers(a_c, wide_a + numbers, block, rank * inner, (compute_t)1);
}

// The arrays of the norm. See `expanded_norm`.
struct NormArrays {
    const storage_t* weight;
    int turned;
    const compute_t *a, *b, *bg, *gram, *squares, *row_scale, *magnitude;
    compute_t *norm, *gain, *unit, *gained;
    unsigned char* suspect;
    int* any;
    index_t out, inner, rank;
    compute_t floor, cancellation;
};

enum {
    TEAM = 8,  // lanes that share a row
    ROWS_AT_ONCE = WARP / TEAM,
    FORMED_RANKS = 16  // ranks for which a warp forms V once
};

__device__ inline compute_t team_sum(compute_t value) {
#pragma unroll
    for (int step = TEAM / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// n = ‖V‖ for a suspect row, from V itself and without overflow or underflow, by a warp; also
// g = m / n and unit = V Aᵀ / n, both 0 where n = 0. Returns n.
__device__ inline compute_t measure_row(const NormArrays& of, index_t row) {
    const int lane = threadIdx.x % WARP;
    const compute_t* a = of.a + row / of.out * of.rank * of.inner;
    const auto v = [&](index_t k) {
        return formed(of.weight, of.turned, of.a, of.b, of.row_scale, row, k, of.out, of.inner,
                      of.rank);
    };
    compute_t most = 0;
#pragma unroll 1
    for (index_t k = lane; k < of.inner; k += WARP) most = larger(most, fabs(v(k)));
    most = warp_max(most);
    const compute_t peak = most > 0 ? most : (compute_t)1;
    compute_t total = 0;
#pragma unroll 1
    for (index_t k = lane; k < of.inner; k += WARP) {
        const compute_t part = v(k) / peak;
        total += part * part;
    }
    const compute_t n = peak * sqrt(warp_sum(total));  // NaN where V has a NaN
    for (index_t r0 = 0; r0 < of.rank; r0 += FORMED_RANKS) {
        compute_t sums[FORMED_RANKS];
        for (int j = 0; j < FORMED_RANKS; ++j) sums[j] = 0;
#pragma unroll 1
        for (index_t k = lane; k < of.inner && n != 0; k += WARP) {
            const compute_t value = v(k);
            for (int j = 0; j < FORMED_RANKS; ++j)
                if (r0 + j < of.rank) sums[j] += a[(r0 + j) * of.inner + k] * value;
        }
        for (int j = 0; j < FORMED_RANKS; ++j) {
            const compute_t value = warp_sum(sums[j]);
            if (lane == 0 && r0 + j < of.rank)
                of.unit[row * of.rank + r0 + j] = n != 0 ? value / n : (compute_t)0;
        }
    }
    return n;
}

// The rows first .. first + ROWS_AT_ONCE − 1 of the norm, by a warp. Those before `end` are there.
// `u` is the first of these rows of W Aᵀ, and `stride` leads to the next.
__device__ inline void expand_rows(const NormArrays& of, const compute_t* u, index_t stride,
                                   index_t first, index_t end) {
    const int lane = threadIdx.x % TEAM, team = threadIdx.x % WARP / TEAM;
    const bool there = first + team < end;
    const index_t row = there ? first + team : end - 1;
    u += (row - first) * stride;
    const compute_t scale = of.row_scale ? of.row_scale[row] : (compute_t)1;
    const compute_t base = of.row_scale ? (scale > 0 ? (compute_t)1 : (compute_t)0)
                                        : of.squares[row];
    const compute_t magnitude = of.magnitude[row];
    const compute_t *b = of.b + row * of.rank,
                    *gram = of.gram + row / of.out * of.rank * of.rank;
    compute_t *unit = of.unit + row * of.rank, *gained = of.gained + row * of.rank;
    compute_t along = 0, update = 0, apart = 0;  // `apart`: `update`, if A's rows were orthogonal
    for (index_t r = lane; r < of.rank; r += TEAM) {
        compute_t bg = 0;
        if (of.bg) {
            bg = of.bg[row * of.rank + r];
        } else {
#pragma unroll 8
            for (index_t j = 0; j < of.rank; ++j) bg += b[j] * gram[j * of.rank + r];
        }
        if (there) gained[r] = bg;  // this lane reads it again, and then replaces it
        along += b[r] * (scale * u[r]);
        update += bg * b[r];
        apart += b[r] * (gram[r * of.rank + r] + of.floor) * b[r];
    }
    along = team_sum(along);
    update = team_sum(update);
    apart = team_sum(apart);

    const compute_t infinity = (compute_t)__uint_as_float(0x7f800000u);
    const compute_t n2 = base + 2 * along + update;
    const bool trusted =
        n2 > of.cancellation * (base + larger(update, apart)) + of.floor && n2 < infinity;
    compute_t n = sqrt(n2);
    if (there && trusted)
        for (index_t r = lane; r < of.rank; r += TEAM) unit[r] = (scale * u[r] + gained[r]) / n;
    for (int other = 0; other < ROWS_AT_ONCE; ++other) {
        if (!__shfl_sync(~0u, there && !trusted, other * TEAM)) continue;
        const compute_t measured = measure_row(of, first + other);
        if (other == team) n = measured;
    }
    if (!there) return;
    const compute_t gain = n != 0 ? magnitude / n : (compute_t)0;
    const bool suspect = !trusted && n != 0;
    for (index_t r = lane; r < of.rank; r += TEAM)
        gained[r] = suspect ? (compute_t)0 : gain * b[r];
    if (lane != 0) return;
    of.norm[row] = n;
    of.gain[row] = gain;
    of.suspect[row] = suspect;
    if (suspect) *of.any = 1;
}

// n = √n², g = m / n, unit = V Aᵀ / n and gained = g⊙b, where
//     n² = ρ²‖w‖² + 2 rowsum(b⊙ρ⊙u) + rowsum(bg⊙b)        V Aᵀ = ρ⊙u + bg
//     u = W Aᵀ     gram = A Aᵀ     bg = b gram, which is computed here if it is null
// A warp makes four rows: grid (rows / (4 WARPS))     20 bytes of (out, rank): u, b, unit, gained
//
// A row whose n² may have lost digits is suspect, by the rule of `_expanded_norm` in _generic.py. A
// row is trusted if n² < ∞ and
//     n² > cancellation (base + max(rowsum(bg⊙b), Σ_r b_r² (‖A_r‖² + floor))) + floor
// where base is ‖w‖², or with ρ 1 or 0; ‖A_r‖² is on the diagonal of `gram`; and `floor` is the
// bound below which a sum of squares may have underflowed. NaN is not trusted.
// A suspect row is measured on V itself. All numbers of a row of zeros are 0, so it needs no care
// later. `suspect` marks the other suspect rows: their part of `gained` is 0, and any[0] is set to
// 1 if there are such rows. `prepare_adapter` sets it to 0.
extern "C" __global__ void expanded_norm(
    const compute_t* u, const storage_t* weight, int turned, const compute_t* a,
    const compute_t* b, const compute_t* bg /* or null */, const compute_t* gram,
    const compute_t* squares /* or null */, const compute_t* row_scale /* or null */,
    const compute_t* magnitude, compute_t* norm, compute_t* gain, compute_t* unit,
    compute_t* gained, unsigned char* suspect, int* any, index_t rows, index_t out, index_t inner,
    index_t rank, compute_t floor, compute_t cancellation) {
    const index_t first = ((index_t)blockIdx.x * WARPS + threadIdx.x / WARP) * ROWS_AT_ONCE;
    if (first >= rows) return;
    const NormArrays of = {weight,    turned, a,    b,    bg,     gram,    squares, row_scale,
                           magnitude, norm,   gain, unit, gained, suspect, any,     out,
                           inner,     rank,   floor, cancellation};
    expand_rows(of, u + first * rank, rank, first, rows);
}

// The same for W of 16 bits by rows and a rank of 32 at most: u stays in the block that makes it.
// grid (out / (32 groups), 1, stack), 256 threads; a chunk of `project` holds all ranks
// 2 bytes of W, and A from the cache, once for each block; 16 bytes of (out, rank)
extern "C" __global__ void __launch_bounds__(BAND_THREADS, 1)
    adapted_norm(const storage_t* __restrict__ weight, const compute_t* __restrict__ a,
                 const compute_t* __restrict__ b, const compute_t* __restrict__ gram,
                 const compute_t* __restrict__ squares /* or null */,
                 const compute_t* __restrict__ row_scale /* or null */,
                 const compute_t* __restrict__ magnitude, compute_t* norm, compute_t* gain,
                 compute_t* unit, compute_t* gained, unsigned char* suspect, int* any,
                 index_t out, index_t inner, index_t rank, int tiles, int groups, compute_t floor,
                 compute_t cancellation) {
    if (!is_skinny) return;
    __shared__ BandSums held;
    __shared__ float u[MOST_BANDS * BAND][2 * RANKS];
    const int top = blockIdx.x * groups * BAND;
    project_bands(weight, (const float*)a, top, 0, out, inner, rank, 0, tiles, groups, held,
                  [&](int line, int r, float total) { u[line][r] = total; });
    __syncthreads();
    const NormArrays of = {weight,    0,    a,     b,    0,      gram,    squares, row_scale,
                           magnitude, norm, gain,  unit, gained, suspect, any,     out,
                           inner,     rank, floor, cancellation};
    const index_t first = blockIdx.z * out + top, end = (blockIdx.z + 1) * out;
    for (int line = threadIdx.x / WARP * ROWS_AT_ONCE;
         line < groups * BAND && first + line < end; line += BAND_WARPS * ROWS_AT_ONCE)
        expand_rows(of, (const compute_t*)u[line], 2 * RANKS, first + line, end);
}
