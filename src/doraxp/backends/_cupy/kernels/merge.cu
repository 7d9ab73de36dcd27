// V by patches: its row norms, and merge.

// A lane's part of 16 by 16 numbers, two in a register.
struct alignas(16) Tile { unsigned item[4]; };

enum {
    PARTS = 3,              // parts of bfloat16 that hold all digits of a float
    TERMS = 16,             // terms of the sum over the rank that tensor cores add up at once
    DOWN = 2, ACROSS = 2,   // tiles of a warp: 32 rows by 32 columns
    STRIP = 32,             // rows, and columns, of a warp
    BELOW = 2, BESIDE = 4,  // warps of a block: 64 rows by 128 columns
    PATCH_THREADS = WARP * BELOW * BESIDE,
    PATCH_ROWS = 2 * DOWN, PATCH_COLUMNS = 4 * ACROSS,  // of a lane
    PATCH_PACKS = PATCH_COLUMNS / PER_THREAD
};

__device__ inline index_t tiles_down(index_t rows) {
    return (rows + STRIP - 1) / STRIP * DOWN;
}
__device__ inline index_t tiles_across(index_t columns) {
    return (columns + STRIP - 1) / STRIP * ACROSS;
}

// Split b and A into parts of bfloat16, as `split` does, and store them in the order in which the
// lanes of a tensor core load them: tiles (stack, down and across, rank / TERMS, parts, WARP).
// grid (tiles / WARPS, rank / TERMS, stack)                          4 + 2 `parts` bytes
// The stored W is (rows, columns). Its rows are those of b and its columns those of A. If `turned`,
// W is stored as its transpose, and it is the other way round.
extern "C" __global__ void tiles(const compute_t* a, const compute_t* b, Tile* result, index_t rows,
                                 index_t columns, index_t rank, int parts, int turned) {
    const index_t tile = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP, e = blockIdx.z;
    const index_t down = tiles_down(rows), across = tiles_across(columns);
    if (tile >= down + across) return;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bool is_down = tile < down, of_b = is_down == !turned;
    const index_t count = is_down ? rows : columns;
    const compute_t* from = (of_b ? b : a) + e * rank * count;
    const index_t step = of_b ? rank : 1, step_k = of_b ? 1 : count;
    Tile found[PARTS];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
        // A tile may have any columns. These give each lane 8 neighbours in its tiles.
        const index_t eight = 2 * (tile - down) + h / 2;
        const index_t own = is_down ? tile * 16 + h % 2 * 8 + g
                                    : eight / 4 * 32 + g / 2 * 8 + eight % 4 * 2 + g % 2;
        const index_t k = (index_t)blockIdx.y * TERMS + 2 * t + (is_down ? h / 2 : h % 2) * 8;
        float low = 0, high = 0;
        if (own < count && k < rank) low = (float)from[own * step + k * step_k];
        if (own < count && k + 1 < rank) high = (float)from[own * step + (k + 1) * step_k];
#pragma unroll
        for (int p = 0; p < PARTS; ++p) {
            const bf16_t first = narrow<bf16_t>(low), second = narrow<bf16_t>(high);
            found[p].item[h] = first.bits | (unsigned)second.bits << 16;
            low -= wide(first);
            high -= wide(second);
        }
    }
    result += ((e * (down + across) + tile) * gridDim.y + blockIdx.y) * parts * WARP + lane;
#pragma unroll
    for (int p = 0; p < PARTS; ++p)
        if (p < parts) result[p * WARP] = found[p];
}

// A warp's part of V = ρ⊙W + b A. The stored W is (rows, columns). If `turned` that is Wᵀ, and ρ
// goes by columns. Neighbouring blocks are neighbours along the columns, as in memory.
struct Patch {
    int g, t;
    index_t top, first, e, rows, columns;
    int turned;
    float sums[DOWN][2 * ACROSS][4];

    __device__ Patch(index_t rows, index_t columns, int turned)
        : g(threadIdx.x % WARP / 4),
          t(threadIdx.x % 4),
          e(blockIdx.z),
          rows(rows),
          columns(columns),
          turned(turned),
          sums{} {
        const unsigned across = (unsigned)((columns + STRIP * BESIDE - 1) / (STRIP * BESIDE));
        const index_t down = blockIdx.x / across, beside = blockIdx.x % across;
        top = (down * BELOW + threadIdx.x / WARP / BESIDE) * STRIP;
        first = (beside * BESIDE + threadIdx.x / WARP % BESIDE) * STRIP;
    }

    __device__ bool outside() const { return top >= rows || first >= columns; }

    // sums = b A. With 3 `parts` it has all digits of a float, by 6 products.
    __device__ void multiply(const Tile* tiles, index_t rank, int parts) {
        const index_t steps = (rank + TERMS - 1) / TERMS, down = tiles_down(rows);
        const Tile* of_e = tiles + e * (down + tiles_across(columns)) * steps * parts * WARP;
        const Tile* left = of_e + top / 16 * steps * parts * WARP + threadIdx.x % WARP;
        const Tile* right = of_e + (down + first / 16) * steps * parts * WARP + threadIdx.x % WARP;
        for (index_t step = 0; step < steps; ++step) {
            Tile of_left[DOWN][PARTS];
#pragma unroll
            for (int i = 0; i < DOWN; ++i)
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    if (p < parts) of_left[i][p] = left[((i * steps + step) * parts + p) * WARP];
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
                Tile of_right[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    if (p < parts) of_right[p] = right[((j * steps + step) * parts + p) * WARP];
                // Tensor cores truncate the sums that they make. So they add up only the products
                // of one step, the smallest first; ordinary additions sum over the steps.
                float fresh[DOWN][2][4] = {};
#pragma unroll
                for (int least = PARTS - 1; least >= 0; --least)
#pragma unroll
                    for (int p = 0; p <= least; ++p)
#pragma unroll
                        for (int i = 0; i < DOWN; ++i)
#pragma unroll
                            for (int half = 0; half < 2; ++half)
                                if (least < parts)
                                    tensor_product(fresh[i][half], of_left[i][p].item,
                                                   of_right[least - p].item + 2 * half);
#pragma unroll
                for (int i = 0; i < DOWN; ++i)
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int h = 0; h < 4; ++h) sums[i][2 * j + half][h] += fresh[i][half][h];
            }
        }
    }

    __device__ index_t row(int i) const { return top + 8 * i + g; }
    __device__ index_t column(int c) const { return first + 8 * t + c; }
    __device__ index_t at(int i, int c) const { return (e * rows + row(i)) * columns + column(c); }
    // How many of the PER_THREAD numbers from `c` on lie inside W.
    __device__ int count(int i, int c) const {
        const index_t left = row(i) < rows ? columns - column(c) : 0;
        return left < 0 ? 0 : left < PER_THREAD ? (int)left : PER_THREAD;
    }
    // The index in (stack, out) of the row of V that the number at (i, c) belongs to.
    __device__ index_t line(int i, int c) const {
        return turned ? e * columns + column(c) : e * rows + row(i);
    }

    // Load the lane's part of W. All loads are issued together: one row after the other would wait
    // for the memory once for each row.
    __device__ void fetch(const storage_t* weight, bool packed,
                          Pack<storage_t> (&held)[PATCH_ROWS][PATCH_PACKS]) {
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
            for (int c = 0; c < PATCH_COLUMNS; c += PER_THREAD) {
                if (packed) {  // outside of W, load numbers at its edge instead
                    const index_t own = row(i) < rows ? row(i) : rows - 1;
                    const index_t from = column(c) < columns ? column(c) : columns - PER_THREAD;
                    held[i][c / PER_THREAD] =
                        *(const Pack<storage_t>*)(weight + (e * rows + own) * columns + from);
                } else {
#pragma unroll
                    for (int j = 0; j < PER_THREAD; ++j)
                        if (j < count(i, c)) held[i][c / PER_THREAD].item[j] = weight[at(i, c) + j];
                }
            }
    }

    // value = the PER_THREAD numbers of V from `c` on in the lane's row `i`.
    __device__ void form(const Pack<storage_t>& held, const compute_t* row_scale, int i, int c,
                         compute_t* value) const {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) {
            const index_t own = line(i, c) + (turned && j < count(i, c) ? j : 0);
            const compute_t scale = row_scale ? row_scale[own] : (compute_t)1;
            value[j] = scale * (compute_t)wide(held.item[j]) +
                       (compute_t)sums[i / 2][(c + j) / 2][i % 2 * 2 + (c + j) % 2];
        }
    }
};

// merged = W' = g⊙(ρ⊙W + b A).
// grid (rows / 64 · columns / 128, 1, stack) with the rows and columns of `Patch`, 256 threads
// 2 (W) + 2 (W') = 4 bytes; each block loads its tiles once, from the cache
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(compute_t) == 8 ? 1 : 2)
    merge(const storage_t* __restrict__ weight, const Tile* __restrict__ tiles /* or null */,
          const compute_t* __restrict__ row_scale /* or null */, const compute_t* __restrict__ gain,
          storage_t* __restrict__ merged, index_t rows, index_t columns, index_t rank, int parts,
          int turned) {
    Patch patch(rows, columns, turned);
    if (patch.outside()) return;
    const bool packed = columns % PER_THREAD == 0 && aligned(weight, merged);
    Pack<storage_t> held[PATCH_ROWS][PATCH_PACKS];
    patch.multiply(tiles, rank, parts);
    patch.fetch(weight, packed, held);
#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; c += PER_THREAD) {
            const int count = patch.count(i, c);
            if (count == 0) continue;
            compute_t value[PER_THREAD];
            patch.form(held[i][c / PER_THREAD], row_scale, i, c, value);
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                value[j] *= gain[patch.line(i, c) + (turned && j < count ? j : 0)];
            store(merged + patch.at(i, c), value, count, packed);
        }
}

// partial (stack, chunks, out) = each warp's part of ‖Vᵢ‖², or of ‖wᵢ‖² if `rank` is 0;
// `sum_chunks` adds the parts up. One kernel makes both, and they are equal where b = 0.
// grid (rows / 64 · columns / 128, 1, stack) with the rows and columns of `Patch`, 256 threads
// 2 (W) + 4 / 32 bytes
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(compute_t) == 8 ? 1 : 2)
    squares(const storage_t* __restrict__ weight, const Tile* __restrict__ tiles /* or null */,
            const compute_t* __restrict__ row_scale /* or null */, compute_t* __restrict__ partial,
            index_t rows, index_t columns, index_t rank, int parts, int turned) {
    Patch patch(rows, columns, turned);
    if (patch.outside()) return;
    const bool packed = columns % PER_THREAD == 0 && aligned(weight);
    Pack<storage_t> held[PATCH_ROWS][PATCH_PACKS];
    patch.multiply(tiles, rank, parts);
    patch.fetch(weight, packed, held);
    compute_t by_row[PATCH_ROWS] = {}, by_column[PATCH_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; c += PER_THREAD) {
            const int count = patch.count(i, c);
            if (count == 0) continue;
            compute_t value[PER_THREAD];
            patch.form(held[i][c / PER_THREAD], row_scale, i, c, value);
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j) {
                const compute_t square = j < count ? value[j] * value[j] : (compute_t)0;
                by_row[i] += square;
                by_column[c + j] += square;
            }
        }
    const index_t out = turned ? columns : rows;
    const index_t chunks = ((turned ? rows : columns) + STRIP - 1) / STRIP;
    partial += (patch.e * chunks + (turned ? patch.top : patch.first) / STRIP) * out;
    if (turned) {
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; ++c) {
            for (int step = 4; step < WARP; step *= 2)
                by_column[c] += __shfl_xor_sync(~0u, by_column[c], step);
            if (patch.g == 0 && patch.column(c) < columns) partial[patch.column(c)] = by_column[c];
        }
    } else {
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i) {
            for (int step = 1; step < 4; step *= 2)
                by_row[i] += __shfl_xor_sync(~0u, by_row[i], step);
            if (patch.t == 0 && patch.row(i) < rows) partial[patch.row(i)] = by_row[i];
        }
    }
}

enum { ROWS = 4 };  // rows of W that a thread works on at once: it reads A once for all of them

// merged = W' in double, which tensor cores cannot compute.
// grid (in / (PER_THREAD THREADS), out / ROWS, stack)   8 (W) + 8 (W') = 16 bytes, A from the cache
extern "C" __global__ void merge_wide(const storage_t* __restrict__ weight,
                                      const compute_t* __restrict__ a,
                                      const compute_t* __restrict__ b,
                                      const compute_t* __restrict__ row_scale /* or null */,
                                      const compute_t* __restrict__ gain,
                                      storage_t* __restrict__ merged, index_t out, index_t inner,
                                      index_t rank) {
    const index_t k = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD, e = blockIdx.z;
    if (k >= inner) return;
    const bool packed = inner % PER_THREAD == 0 && aligned(weight, a, merged);
    const int count = inner - k < PER_THREAD ? (int)(inner - k) : PER_THREAD;
    for (index_t i0 = (index_t)blockIdx.y * ROWS; i0 < out; i0 += (index_t)gridDim.y * ROWS) {
        compute_t update[ROWS][PER_THREAD];
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j) update[i][j] = 0;
        for (index_t r = 0; r < rank; ++r) {
            compute_t right[PER_THREAD];
            load(a + (e * rank + r) * inner + k, right, count, packed);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const index_t row = i0 + i < out ? i0 + i : out - 1;
                const compute_t left = b[(e * out + row) * rank + r];
#pragma unroll
                for (int j = 0; j < PER_THREAD; ++j) update[i][j] += left * right[j];
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (i0 + i >= out) break;
            const index_t row = e * out + i0 + i;
            compute_t value[PER_THREAD];
            load(weight + row * inner + k, value, count, packed);
            const compute_t scale = row_scale ? row_scale[row] : (compute_t)1;
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                value[j] = gain[row] * (scale * value[j] + update[i][j]);
            store(merged + row * inner + k, value, count, packed);
        }
    }
}
