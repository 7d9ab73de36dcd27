// V by patches: its row norms, and merge.

// A lane's part of 16 by 16 numbers, two in a register.
struct alignas(16) Tile { unsigned item[4]; };

enum {
    WIDE_PARTS = 3,
    PARTS = sizeof(product_t) == 2 ? 2 : WIDE_PARTS,  // of a number in float16: see `tiles`
    TERMS = 16,             // terms of the sum over the rank that tensor cores add up at once
    DOWN = 2, ACROSS = 2,   // tiles of a warp: 32 rows by 32 columns
    STRIP = 32,             // rows, and columns, of a warp
    BELOW = 2, BESIDE = 4,  // warps of a block: 64 rows by 128 columns
    PATCH_THREADS = WARP * BELOW * BESIDE,
    PATCH_ROWS = 2 * DOWN, PATCH_COLUMNS = 4 * ACROSS,  // of a lane
    PATCH_PACKS = PATCH_COLUMNS / PER_THREAD
};

// sums (16, 8) += left (16, 16) right (16, 8) of float16, in the order of `tensor_product`.
#ifdef DORAXP_HOST
#define half_product host_half_product
#else
__device__ inline void half_product(float* sums, const unsigned* left, const unsigned* right) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                 : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]),
                   "r"(right[0]), "r"(right[1]));
}
#endif

__device__ inline index_t strips(index_t length) { return (length + STRIP - 1) / STRIP; }

// Split b and A into parts of float16, and store them in the order in which the lanes of a tensor
// core load them: tiles (stack, strips down and across, rank / TERMS, 2, PARTS, WARP).
// grid (strips / WARPS, rank / TERMS, stack)                         4 + 2 PARTS bytes
// The stored W is (rows, columns). Its rows are those of b and its columns those of A. If `turned`,
// W is stored as its transpose, and it is the other way round.
//
// float16 has few exponents. So each row of b is multiplied by the power of two that brings its
// largest number into 2^14..2^15, and so are STRIP columns of A together: `shrink`, which is
// (stack, out + in / STRIP), gets the inverse powers. Let a be a number so multiplied, a₁ its
// nearest float16, and a₂ the nearest float16 of a − a₁. A float16 has 11 bits, so
//     |a − a₁| ≤ 2^−11 |a|        |a − a₁ − a₂| ≤ 2^−23 |a| + 2^−25
// The last term is 2^−39 of the largest number. Where product_t has 16 bits, the three
// products b₁A₁ + b₁A₂ + b₂A₁ lack b₂A₂ and the products with what two parts leave: at most
// (2^−22 + 2·2^−23) |b| |A| = 2^−21 |b| |A|. Elsewhere there are three parts and six products, which
// lack less than a product in float loses.
extern "C" __global__ void tiles(const compute_t* a, const compute_t* b, Tile* result,
                                 compute_t* shrink, index_t rows, index_t columns, index_t rank,
                                 int turned) {
    const index_t e = blockIdx.z, down = strips(rows), across = strips(columns);
    const index_t strip = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (strip >= down + across) return;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bool is_down = strip < down, of_b = is_down == !turned;
    const index_t count = is_down ? rows : columns, first = (strip - (is_down ? 0 : down)) * STRIP;
    const compute_t* from = (of_b ? b : a) + e * rank * count;
    const index_t step = of_b ? rank : 1, step_k = of_b ? 1 : count;

    float most = 0;  // of the row of b, or of the column of A, with the lane's number
    const index_t line = first + lane;
#pragma unroll 4
    for (index_t k = 0; k < rank; ++k)
        if (line < count) most = larger(most, fabs((float)from[line * step + k * step_k]));
    if (!of_b) most = warp_max(most);
    int exponent = 0;
    if (most > 0 && most < __uint_as_float(0x7f800000u)) frexp(most, &exponent);
    exponent = exponent < 15 - 126 ? 126 : 15 - exponent;  // the inverse is a normal number
    const float grow = ldexp(1.0f, exponent);
    const index_t out = turned ? columns : rows, of_a = turned ? down : across;
    if (blockIdx.y == 0 && (of_b ? line < count : lane == 0))
        shrink[e * (out + of_a) + (of_b ? line : out + first / STRIP)] = ldexp(1.0f, -exponent);

    result += ((e * (down + across) + strip) * gridDim.y + blockIdx.y) * 2 * PARTS * WARP + lane;
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
        Tile found[PARTS];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            // A tile may have any columns. These give each lane 8 neighbours in its tiles.
            const int place = is_down ? tile * 16 + h % 2 * 8 + g
                                      : g / 2 * 8 + (2 * tile + h / 2) * 2 + g % 2;
            const index_t own = first + place;
            const index_t k = (index_t)blockIdx.y * TERMS + 2 * t + (is_down ? h / 2 : h % 2) * 8;
            const float scale = __shfl_sync(~0u, grow, place);
            float low = 0, high = 0;
            if (own < count && k < rank) low = scale * (float)from[own * step + k * step_k];
            if (own < count && k + 1 < rank)
                high = scale * (float)from[own * step + (k + 1) * step_k];
#pragma unroll
            for (int p = 0; p < PARTS; ++p) {
                const half_t one = narrow<half_t>(low), other = narrow<half_t>(high);
                found[p].item[h] = one.bits | (unsigned)other.bits << 16;
                low -= wide(one);
                high -= wide(other);
            }
        }
#pragma unroll
        for (int p = 0; p < PARTS; ++p) result[(tile * PARTS + p) * WARP] = found[p];
    }
}

// A warp's part of V = ρ⊙W + b A. The stored W is (rows, columns). If `turned` that is Wᵀ, and ρ
// goes by columns. Neighbouring blocks are neighbours along the columns, as in memory; `reversed`
// counts the blocks from the end.
struct Patch {
    int g, t;
    int rows_left, columns_left;  // from the patch's first number on, at most STRIP
    index_t top, first, e, rows, columns;

    __device__ Patch(index_t rows, index_t columns, bool reversed)
        : g(threadIdx.x % WARP / 4), t(threadIdx.x % 4), e(blockIdx.z), rows(rows),
          columns(columns) {
        const unsigned across = (unsigned)((columns + STRIP * BESIDE - 1) / (STRIP * BESIDE));
        const unsigned block = reversed ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
        top = ((index_t)(block / across) * BELOW + threadIdx.x / WARP / BESIDE) * STRIP;
        first = ((index_t)(block % across) * BESIDE + threadIdx.x / WARP % BESIDE) * STRIP;
        rows_left = rows - top < STRIP ? (int)(rows - top) : STRIP;
        columns_left = columns - first < STRIP ? (int)(columns - first) : STRIP;
    }

    __device__ bool outside() const { return rows_left <= 0 || columns_left <= 0; }
    // How many of the PER_THREAD numbers from `c` on, in row i, lie inside W.
    __device__ int count(int i, int c) const {
        const int left = 8 * i + g < rows_left ? columns_left - 8 * t - c : 0;
        return left < 0 ? 0 : left < PER_THREAD ? left : PER_THREAD;
    }
    // The place of the lane's first number. The next row of the lane is 8 `columns` further on.
    __device__ index_t corner() const {
        return (e * rows + top + g) * columns + first + 8 * t;
    }

    // Load the lane's part of W, 0 outside of W. All loads of packs are issued together, before the
    // products: they wait for the memory once. The numbers stay in words, as an array of 16-bit
    // numbers takes a register for each.
    __device__ void fetch(const storage_t* weight, bool packed,
                          uint4 (&held)[PATCH_ROWS][PATCH_PACKS]) const {
        const storage_t* own = weight + corner();
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i, own += 8 * columns)
#pragma unroll
            for (int c = 0; c < PATCH_COLUMNS; c += PER_THREAD) {
                const int inside = count(i, c);
                const storage_t* from = own + c;
                uint4& words = held[i][c / PER_THREAD];
                words = uint4{0, 0, 0, 0};
                if (packed) {
                    if (inside > 0) words = *(const uint4*)from;
                } else {
                    Pack<storage_t> pack = (const Pack<storage_t>&)words;
#pragma unroll
                    for (int j = 0; j < PER_THREAD; ++j)
                        if (j < inside) pack.item[j] = from[j];
                    words = (const uint4&)pack;
                }
            }
    }

    // sums = b A by three or six products of the parts, divided by `shrink`.
    __device__ void multiply(const Tile* tiles, index_t rank,
                             float (&sums)[DOWN][2 * ACROSS][4]) const {
        const int steps = (int)((rank + TERMS - 1) / TERMS);
        const index_t down = strips(rows);
        enum { EACH = 2 * PARTS * WARP };  // tiles of a strip and step
        const Tile* of_e = tiles + e * (down + strips(columns)) * steps * EACH + threadIdx.x % WARP;
        const Tile* left = of_e + top / STRIP * steps * EACH;
        const Tile* right = of_e + (down + first / STRIP) * steps * EACH;
        for (int step = 0; step < steps; ++step, left += EACH, right += EACH) {
            Tile of_left[DOWN][PARTS];
#pragma unroll
            for (int i = 0; i < DOWN; ++i)
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    of_left[i][p] = left[(i * PARTS + p) * WARP];
#pragma unroll
            for (int j = 0; j < ACROSS; ++j) {
                Tile of_right[PARTS];
#pragma unroll
                for (int p = 0; p < PARTS; ++p)
                    of_right[p] = right[(j * PARTS + p) * WARP];
#pragma unroll
                for (int i = 0; i < DOWN; ++i) {
                    // Tensor cores truncate the sums that they make. So they add up only the
                    // products of one step, the smallest first; ordinary additions sum over the
                    // steps.
                    float fresh[2][4] = {};
#pragma unroll
                    for (int least = PARTS - 1; least >= 0; --least)
#pragma unroll
                        for (int p = 0; p <= least; ++p)
#pragma unroll
                            for (int half = 0; half < 2; ++half)
                                half_product(fresh[half], of_left[i][p].item,
                                             of_right[least - p].item + 2 * half);
#pragma unroll
                    for (int half = 0; half < 2; ++half)
#pragma unroll
                        for (int h = 0; h < 4; ++h) sums[i][2 * j + half][h] += fresh[half][h];
                }
            }
        }
    }
};

// V of a patch, or g⊙V, is of_weight⊙W + of_update⊙sums. The factors go by rows of V: those are the
// lane's COUNT rows of the stored W, or its COUNT columns.
template <int COUNT> struct Scales {
    compute_t of_weight[COUNT], of_update[COUNT] = {};

    __device__ void load(const Patch& patch, const compute_t* gain, const compute_t* row_scale,
                         const compute_t* shrink) {
        const bool turned = COUNT == PATCH_COLUMNS;
        const index_t out = turned ? patch.columns : patch.rows;
        const index_t of_a = strips(turned ? patch.rows : patch.columns);
        const int step = turned ? 1 : 8, begin = turned ? 8 * patch.t : patch.g;
        const int left = (turned ? patch.columns_left : patch.rows_left) - begin;
        const index_t own = (turned ? patch.first : patch.top) + begin;
#pragma unroll
        for (int k = 0; k < COUNT; ++k)
            of_weight[k] = !gain            ? (compute_t)1
                           : step * k < left ? gain[patch.e * out + own + step * k]
                                             : (compute_t)0;
        if (shrink) {
            shrink += patch.e * (out + of_a);
            const compute_t strip = shrink[out + (turned ? patch.top : patch.first) / STRIP];
#pragma unroll
            for (int k = 0; k < COUNT; ++k)
                of_update[k] = step * k < left ? of_weight[k] * shrink[own + step * k] * strip
                                               : (compute_t)0;
        }
        if (row_scale) {
#pragma unroll
            for (int k = 0; k < COUNT; ++k)
                if (step * k < left) of_weight[k] *= row_scale[patch.e * out + own + step * k];
        }
    }

    // The number (i, c) of the patch. The product with W is not rounded by itself: W and the update
    // may cancel.
    __device__ compute_t form(const uint4 (&held)[PATCH_ROWS][PATCH_PACKS],
                              const float (&sums)[DOWN][2 * ACROSS][4], int i, int c) const {
        const int k = COUNT == PATCH_COLUMNS ? c : i;
        const Pack<storage_t>& pack = (const Pack<storage_t>&)held[i][c / PER_THREAD];
        return fma(of_weight[k], (compute_t)wide(pack.item[c % PER_THREAD]),
                   of_update[k] * (compute_t)sums[i / 2][c / 2][i % 2 * 2 + c % 2]);
    }
};

template <int COUNT>
__device__ inline void put(const Patch& patch, const Scales<COUNT>& scales,
                           const uint4 (&held)[PATCH_ROWS][PATCH_PACKS],
                           const float (&sums)[DOWN][2 * ACROSS][4], storage_t* merged,
                           bool packed) {
    merged += patch.corner();
#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i, merged += 8 * patch.columns)
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; c += PER_THREAD) {
            const int count = patch.count(i, c);
            compute_t value[PER_THREAD];
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j)
                value[j] = scales.form(held, sums, i, c + j);
            if (count > 0) store(merged + c, value, count, packed);
        }
}

// merged = W' = g⊙(ρ⊙W + b A).
// grid (rows / 64 · columns / 128, 1, stack) with the rows and columns of `Patch`, 256 threads
// 2 (W) + 2 (W') = 4 bytes; each block loads its tiles once, from the cache
// Where product_t has 16 bits, the update has an error of at most 2^−20 g Σ|b| |A|: 2^−21 from its
// parts, and as much from the sums that tensor cores truncate. W' is rounded by up to 2^−12 |W'| or
// more in float16, and 2^−9 or more in bfloat16.
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(compute_t) == 8 ? 1 : 2)
    merge(const storage_t* __restrict__ weight, const Tile* __restrict__ tiles /* or null */,
          const compute_t* __restrict__ shrink /* or null */,
          const compute_t* __restrict__ row_scale /* or null */, const compute_t* __restrict__ gain,
          storage_t* __restrict__ merged, index_t rows, index_t columns, index_t rank, int turned,
          int reversed) {
    const Patch patch(rows, columns, reversed);
    if (patch.outside()) return;
    const bool packed = columns % PER_THREAD == 0 && aligned(weight, merged);
    uint4 held[PATCH_ROWS][PATCH_PACKS];
    if (PARTS == 2) patch.fetch(weight, packed, held);  // three parts leave no registers for W
    float sums[DOWN][2 * ACROSS][4] = {};
    patch.multiply(tiles, rank, sums);
    if (PARTS != 2) patch.fetch(weight, packed, held);
    if (turned) {
        Scales<PATCH_COLUMNS> by_column;
        by_column.load(patch, gain, row_scale, shrink);
        put(patch, by_column, held, sums, merged, packed);
    } else {
        Scales<PATCH_ROWS> by_row;
        by_row.load(patch, gain, row_scale, shrink);
        put(patch, by_row, held, sums, merged, packed);
    }
}

// partial (stack, chunks, out) = each warp's part of ‖Vᵢ‖², or of ‖wᵢ‖² if `rank` is 0. One kernel
// makes both, and they are equal where b = 0.
// grid (rows / 64 · columns / 128, 1, stack) with the rows and columns of `Patch`, 256 threads
// 2 (W) + 4 / 32 bytes
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(compute_t) == 8 ? 1 : 2)
    squares(const storage_t* __restrict__ weight, const Tile* __restrict__ tiles /* or null */,
            const compute_t* __restrict__ shrink /* or null */,
            const compute_t* __restrict__ row_scale /* or null */, compute_t* __restrict__ partial,
            index_t rows, index_t columns, index_t rank, int turned) {
    const Patch patch(rows, columns, false);
    if (patch.outside()) return;
    const bool packed = columns % PER_THREAD == 0 && aligned(weight);
    uint4 held[PATCH_ROWS][PATCH_PACKS];
    if (PARTS == 2) patch.fetch(weight, packed, held);  // three parts leave no registers for W
    float sums[DOWN][2 * ACROSS][4] = {};
    patch.multiply(tiles, rank, sums);
    if (PARTS != 2) patch.fetch(weight, packed, held);
    const index_t out = turned ? columns : rows;
    partial += (patch.e * strips(turned ? rows : columns) +
                (turned ? patch.top : patch.first) / STRIP) * out;
    if (turned) {
        Scales<PATCH_COLUMNS> by_column;
        by_column.load(patch, 0, row_scale, shrink);
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; ++c) {
            compute_t total = 0;
#pragma unroll
            for (int i = 0; i < PATCH_ROWS; ++i) {
                const compute_t value = by_column.form(held, sums, i, c);
                total += value * value;
            }
            for (int step = 4; step < WARP; step *= 2) total += __shfl_xor_sync(~0u, total, step);
            if (patch.g == 0 && 8 * patch.t + c < patch.columns_left)
                partial[patch.first + 8 * patch.t + c] = total;
        }
    } else {
        Scales<PATCH_ROWS> by_row;
        by_row.load(patch, 0, row_scale, shrink);
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i) {
            compute_t total = 0;
#pragma unroll
            for (int c = 0; c < PATCH_COLUMNS; ++c) {
                const compute_t value = by_row.form(held, sums, i, c);
                total += value * value;
            }
            for (int step = 1; step < 4; step *= 2) total += __shfl_xor_sync(~0u, total, step);
            if (patch.t == 0 && 8 * i + patch.g < patch.rows_left) partial[patch.top + 8 * i + patch.g] = total;
        }
    }
}

enum { WIDE_ROWS = 4 };  // rows of W that a thread works on at once: it reads A once for them

// merged = W' in double, which tensor cores cannot compute.
// grid (in / (PER_THREAD THREADS), out / WIDE_ROWS, stack)
// 8 (W) + 8 (W') = 16 bytes, A from the cache
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
    const index_t apart = (index_t)gridDim.y * WIDE_ROWS;
    for (index_t i0 = (index_t)blockIdx.y * WIDE_ROWS; i0 < out; i0 += apart) {
        compute_t update[WIDE_ROWS][PER_THREAD];
#pragma unroll
        for (int i = 0; i < WIDE_ROWS; ++i)
#pragma unroll
            for (int j = 0; j < PER_THREAD; ++j) update[i][j] = 0;
        for (index_t r = 0; r < rank; ++r) {
            compute_t right[PER_THREAD];
            load(a + (e * rank + r) * inner + k, right, count, packed);
#pragma unroll
            for (int i = 0; i < WIDE_ROWS; ++i) {
                const index_t row = i0 + i < out ? i0 + i : out - 1;
                const compute_t left = b[(e * out + row) * rank + r];
#pragma unroll
                for (int j = 0; j < PER_THREAD; ++j) update[i][j] += left * right[j];
            }
        }
#pragma unroll
        for (int i = 0; i < WIDE_ROWS; ++i) {
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
