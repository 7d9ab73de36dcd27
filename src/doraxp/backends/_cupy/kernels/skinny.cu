// Products of a matrix of 16 bits with a float factor of few rows or columns, on tensor cores.
//
// The matrix is exact in its own type, and 24 bits of the factor are kept: in registers, a float is
// split into three parts of bfloat16, and a number of float16 into two (its 11 bits are 8 and 3).
// Both types then need products of bfloat16 alone, whose exponents are those of float.
// Builds with another storage_t, or with double, have these kernels too, but empty: `is_skinny`.
//
// Tensor cores truncate the sums that they make. So they add up only the products of 16 terms, the
// smallest first; ordinary additions sum over the steps of 16.

enum {
    FACTOR_PARTS = 3,
    RANKS = 16,            // of a tile of F
    ROW_TILES = 4,         // of a warp of `project`, 8 rows each
    BAND = 8 * ROW_TILES,  // rows of a warp of `project`
    BAND_COLUMNS = 32,     // columns that it multiplies at once: two steps of 16
    BAND_WARPS = 8,
    BAND_THREADS = WARP * BAND_WARPS,
    MOST_BANDS = 4,  // warps of `adapted_norm` that share a part of F

    PULL_STEP = 16,                   // rows of M that a warp of `pull` multiplies at once
    PULL_BESIDE = 2, PULL_BELOW = 3,  // warps of a block
    PULL_THREADS = WARP * PULL_BESIDE * PULL_BELOW,
    PULL_COLUMNS = 64 * PULL_BESIDE,  // of a block: 64 of a warp
    PULL_TILES = 2,                   // rank tiles of 8
    PULL_PLACES = 2                   // steps of a warp in flight
};

template <typename M> struct Halves { enum { parts = 1 }; };
template <> struct Halves<half_t> { enum { parts = 2 }; };

enum {
    MATRIX_PARTS = Halves<storage_t>::parts,
    is_skinny = sizeof(storage_t) == 2 && sizeof(compute_t) == 4
};

// Eight neighbours of a row of the matrix, two in a word.
struct alignas(16) Eight { unsigned word[4]; };

#ifdef DORAXP_HOST
__device__ inline unsigned narrow_pair(float low, float high) {
    return host_bf16(low) | (unsigned)host_bf16(high) << 16;
}
__device__ inline unsigned low_halves(unsigned first, unsigned second) {
    return (first & 0xffffu) | second << 16;
}
__device__ inline unsigned high_halves(unsigned first, unsigned second) {
    return first >> 16 | (second & 0xffff0000u);
}
#else
__device__ inline unsigned narrow_pair(float low, float high) {
    unsigned result;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
    return result;
}
__device__ inline unsigned low_halves(unsigned first, unsigned second) {
    return __byte_perm(first, second, 0x5410);
}
__device__ inline unsigned high_halves(unsigned first, unsigned second) {
    return __byte_perm(first, second, 0x7632);
}
#endif

// Split two numbers into `count` parts of bfloat16, the largest first. A part has both numbers.
// Infinity gives NaN in the parts after the first.
template <int count> __device__ inline void split_pair(float low, float high, unsigned* parts) {
#pragma unroll
    for (int p = 0; p < count; ++p) {
        parts[p] = narrow_pair(low, high);
        low -= __uint_as_float(parts[p] << 16);
        high -= __uint_as_float(parts[p] & 0xffff0000u);
    }
}

__device__ inline void split_stored(unsigned word, unsigned* parts) {
    if (MATRIX_PARTS == 1) {
        parts[0] = word;
    } else {
        const half_t low = {(unsigned short)word}, high = {(unsigned short)(word >> 16)};
        split_pair<MATRIX_PARTS>(wide(low), wide(high), parts);
    }
}

// Load eight neighbours, of which `count` are there; the others are 0.
__device__ inline Eight eight_of(const storage_t* from, int count, bool packed) {
    Eight found = {};
    if (packed) {
        if (count > 0) found = *(const Eight*)from;
    } else {
#pragma unroll
        for (int j = 0; j < 8; ++j)
            if (j < count)
                found.word[j / 2] |= (unsigned)*(const unsigned short*)(from + j) << j % 2 * 16;
    }
    return found;
}

// values = `count` neighbours, by one load.
template <int count> __device__ inline void neighbours(const float* from, float* values) {
    struct alignas(4 * count) Group { float item[count]; };
    const Group group = *(const Group*)from;
#pragma unroll
    for (int j = 0; j < count; ++j) values[j] = group.item[j];
}

// product (16, 8) = left right, over 16 terms: the first of the products that add up in it.
#ifdef DORAXP_HOST
__device__ inline void first_product(float* product, const unsigned* left, const unsigned* right) {
    for (int h = 0; h < 4; ++h) product[h] = 0;
    loose_product(product, left, right);
}
#else
__device__ inline void first_product(float* product, const unsigned* left, const unsigned* right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%10, %10, %10, %10};"
        : "=f"(product[0]), "=f"(product[1]), "=f"(product[2]), "=f"(product[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]),
          "r"(right[0]), "r"(right[1]),
          "f"(0.0f));
}
#endif

// sums (16, 8) += left right, over 16 terms. Both are in parts; the products of two small parts,
// below 2^-24 of the whole, are left out.
template <int left_parts, int right_parts>
__device__ inline void add_product(float* sums, const unsigned (&left)[left_parts][4],
                                   const unsigned (&right)[right_parts][2]) {
    float fresh[4];
    bool is_first = true;
#pragma unroll
    for (int least = FACTOR_PARTS - 1; least >= 0; --least)
#pragma unroll
        for (int p = 0; p < left_parts; ++p) {
            if (p > least || least - p >= right_parts) continue;
            if (is_first) first_product(fresh, left[p], right[least - p]);
            else loose_product(fresh, left[p], right[least - p]);
            is_first = false;
        }
#pragma unroll
    for (int h = 0; h < 4; ++h) sums[h] += fresh[h];
}

// How F is read in `project`: eight neighbours of a row, neighbours of a column, or one at a time.
enum { BY_ROWS, BY_COLUMNS, ONE_BY_ONE };

// A warp's part of F Mᵀ: BAND rows of M, and 16 `tiles` ranks. Lane 4 g + t loads 8 neighbouring
// columns of row g of each row tile, and of the ranks 2 tiles·g .. 2 tiles·g + 2 tiles − 1. Rows g
// and g + 8 of rank tile q are its ranks 2 q and 2 q + 1.
template <int tiles, int way, int places> struct Band {
    const storage_t* row[ROW_TILES];
    const float* of_rank[2 * tiles];
    index_t step;  // from a column of F to the next
    float sums[tiles][ROW_TILES][4];

    // `left` columns are there from the lane's first on.
    __device__ void fetch(int place, int left, Eight (&held)[ROW_TILES]) const {
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
            held[i] = eight_of(row[i] + place * BAND_COLUMNS, left - place * BAND_COLUMNS,
                               way != ONE_BY_ONE);
    }

    // values[r][j] = F of the lane's rank r and of its column j, or 0.
    __device__ void load_factor(int place, int left, float (&values)[2 * tiles][8]) const {
        const int at = place * BAND_COLUMNS, count = left - at;
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
            for (int r = 0; r < 2 * tiles; ++r) {
                values[r][j] = 0;
                if (way == ONE_BY_ONE && j < count) values[r][j] = of_rank[r][(at + j) * step];
            }
        if (way == ONE_BY_ONE || count <= 0) return;
        if (way == BY_ROWS) {
#pragma unroll
            for (int r = 0; r < 2 * tiles; ++r) {
                neighbours<4>(of_rank[r] + at, values[r]);
                neighbours<4>(of_rank[r] + at + 4, values[r] + 4);
            }
        } else {
#pragma unroll
            for (int j = 0; j < 8; ++j) {
                float found[2 * tiles];
                neighbours<2 * tiles>(of_rank[0] + (at + j) * step, found);
#pragma unroll
                for (int r = 0; r < 2 * tiles; ++r) values[r][j] = found[r];
            }
        }
    }

    // sums += the products of 32 columns. The order of the columns in a step of 16 is the same for
    // both factors: columns 4 s .. 4 s + 3 of each lane's eight are in step s. A lane's two words
    // of M are neighbours, as the right factor needs them.
    __device__ void multiply(const float (&values)[2 * tiles][8], const Eight (&held)[ROW_TILES]) {
#pragma unroll
        for (int s = 0; s < 2; ++s) {
            unsigned right[ROW_TILES][MATRIX_PARTS][2];
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
                for (int h = 0; h < 2; ++h) {
                    unsigned parts[MATRIX_PARTS];
                    split_stored(held[i].word[2 * s + h], parts);
#pragma unroll
                    for (int p = 0; p < MATRIX_PARTS; ++p) right[i][p][h] = parts[p];
                }
#pragma unroll
            for (int q = 0; q < tiles; ++q) {
                unsigned left[FACTOR_PARTS][4];
#pragma unroll
                for (int h = 0; h < 4; ++h) {
                    const float* pair = values[2 * q + h % 2] + 4 * s + h / 2 * 2;
                    unsigned parts[FACTOR_PARTS];
                    split_pair<FACTOR_PARTS>(pair[0], pair[1], parts);
#pragma unroll
                    for (int p = 0; p < FACTOR_PARTS; ++p) left[p][h] = parts[p];
                }
#pragma unroll
                for (int i = 0; i < ROW_TILES; ++i) add_product(sums[q][i], left, right[i]);
            }
        }
    }

    // sums = the sum over the columns 0 .. 32 `places` − 1 of every `stride`, where `there` columns
    // are there from the warp's first on. A ring of loads of M is in flight: each place is filled
    // again as soon as its numbers are multiplied. F is loaded one place ahead if the registers
    // suffice. The branch around a product keeps the compiler from loading all of F at once.
    __device__ void run(int there, int stride) {
        const int ahead = tiles == 1 && way != ONE_BY_ONE;
        int left = there - threadIdx.x % 4 * 8;
        Eight ring[places][ROW_TILES];
        float factor[2][2 * tiles][8];
#pragma unroll
        for (int place = 0; place < places; ++place) fetch(place, left, ring[place]);
        if (ahead) load_factor(0, left, factor[0]);
#pragma unroll 1
        for (; there > 0; there -= stride) {
#pragma unroll
            for (int i = 0; i < ROW_TILES; ++i) row[i] += stride;
#pragma unroll
            for (int place = 0; place < places; ++place) {
                const int later = place + ahead, own = place % 2;
                if (!ahead) load_factor(place, left, factor[own]);
                if (later == places) {
#pragma unroll
                    for (int r = 0; r < 2 * tiles; ++r) of_rank[r] += stride * step;
                }
                if (ahead)
                    load_factor(later % places, left - later / places * stride, factor[1 - own]);
                if (there > place * BAND_COLUMNS) multiply(factor[own], ring[place]);
                fetch(place, left - stride, ring[place]);
            }
            if (!ahead) {
#pragma unroll
                for (int r = 0; r < 2 * tiles; ++r) of_rank[r] += stride * step;
            }
            left -= stride;
        }
    }
};

// The sums of the ranks 2 g and 2 g + 1. A row has room for two more, so that the lanes of a warp
// write to different banks.
struct alignas(8) TwoSums { float of[2]; };
typedef TwoSums BandSums[BAND_WARPS][BAND][RANKS / 2 + 2];

// The rows and ranks of a block of `project`. `groups` warps beside each other take different rows,
// and the others the same rows and other columns. keep(line, r, sum) gets each number of the
// result, for row top + line and rank r.
template <int tiles, int way, typename Keep>
__device__ inline void project_band(const storage_t* matrix, const float* factor, int top,
                                    int first_rank, index_t rows, index_t columns, index_t rank,
                                    int turned, int groups, BandSums& held, Keep keep) {
    const int places = way == ONE_BY_ONE ? 1 : 4 / tiles;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const index_t e = blockIdx.z;
    const int each = places * BAND_COLUMNS, own_column = warp / groups * each + 8 * t;
    Band<tiles, way, places> band = {};
    band.step = turned ? rank : 1;
#pragma unroll
    for (int r = 0; r < 2 * tiles; ++r) {
        index_t own = first_rank + g * 2 * tiles + r;
        if (own >= rank) own = way == BY_COLUMNS ? rank - 2 * tiles : rank - 1;
        band.of_rank[r] =
            factor + e * rank * columns + own * (turned ? 1 : columns) + own_column * band.step;
    }
#pragma unroll
    for (int i = 0; i < ROW_TILES; ++i) {
        const index_t own = top + warp % groups * BAND + 8 * i + g;
        band.row[i] = matrix + (e * rows + (own < rows ? own : rows - 1)) * columns + own_column;
    }
    band.run((int)columns - warp / groups * each, BAND_WARPS / groups * each);
#pragma unroll
    for (int q = 0; q < tiles; ++q) {
        if (q) __syncthreads();
#pragma unroll
        for (int i = 0; i < ROW_TILES; ++i)
#pragma unroll
            for (int h = 0; h < 2; ++h)
                held[warp][8 * i + 2 * t + h][g] = {band.sums[q][i][h], band.sums[q][i][h + 2]};
        __syncthreads();
        for (int at = threadIdx.x; at < groups * BAND * RANKS; at += BAND_THREADS) {
            const int group = at / (BAND * RANKS), line = at / RANKS % BAND, own = at % RANKS;
            float total = 0;
            for (int w = group; w < BAND_WARPS; w += groups)
                total += held[w][line][own / 2].of[own % 2];
            const int r = first_rank + own / 2 * 2 * tiles + 2 * q + own % 2;
            if (top + group * BAND + line < rows && r < rank) keep(group * BAND + line, r, total);
        }
    }
}

// `project_band` for a chunk of 16 `tiles` ranks, by the way that fits the arrays.
template <typename Keep>
__device__ inline void project_bands(const storage_t* matrix, const float* factor, int top,
                                     int first_rank, index_t rows, index_t columns, index_t rank,
                                     int turned, int tiles, int groups, BandSums& held, Keep keep) {
    const bool whole =
        columns % 8 == 0 && aligned(matrix, factor) && (!turned || rank % (2 * tiles) == 0);
#define PROJECT(TILES, WAY, FIRST)                                                            \
    project_band<TILES, WAY>(matrix, factor, top, FIRST, rows, columns, rank, turned, groups, \
                             held, keep)
    if (!whole) {
        for (int each = first_rank; each < first_rank + RANKS * tiles; each += RANKS) {
            PROJECT(1, ONE_BY_ONE, each);
            __syncthreads();
        }
    } else if (tiles == 1) {
        if (turned) PROJECT(1, BY_COLUMNS, first_rank);
        else PROJECT(1, BY_ROWS, first_rank);
    } else {
        if (turned) PROJECT(2, BY_COLUMNS, first_rank);
        else PROJECT(2, BY_ROWS, first_rank);
    }
#undef PROJECT
}

// result (rows, rank) = M Fᵀ, for M = `matrix` (rows, columns) and F = `factor` (rank, columns), or
// stored as its transpose (columns, rank) if `turned`.
// grid (rows / (32 groups) · chunks of the ranks, 1, stack), 256 threads; a chunk has 16 `tiles`
// ranks, for 1 or 2 tiles
// 2 bytes of M for each chunk, once from memory; F comes from the cache, once for each block
extern "C" __global__ void __launch_bounds__(BAND_THREADS, 1)
    project(const storage_t* __restrict__ matrix, const compute_t* __restrict__ factor,
            compute_t* __restrict__ result, index_t rows, index_t columns, index_t rank, int turned,
            int tiles, int groups) {
    if (!is_skinny) return;
    __shared__ BandSums held;
    const int chunks = (int)((rank + RANKS * tiles - 1) / (RANKS * tiles));
    const int top = blockIdx.x / chunks * groups * BAND;
    result += (blockIdx.z * rows + top) * rank;
    project_bands(matrix, (const float*)factor, top, blockIdx.x % chunks * RANKS * tiles, rows,
                  columns, rank, turned, tiles, groups, held,
                  [&](int line, int r, float total) { result[line * rank + r] = total; });
}

// A lane's part of a step of `pull`: rows 4 t .. 4 t + 3, of 8 neighbouring columns and of the
// ranks PULL_TILES·g .. PULL_TILES·g + PULL_TILES − 1.
struct PulledRows {
    Eight matrix[4];
    float factor[4][PULL_TILES];
};

// Load the lane's rows of a step, of which `left` are there. Beyond the last, M is 0.
template <bool packed>
__device__ inline void fetch_rows(const storage_t* matrix, const float* factor, int columns,
                                  int rank, int left, int left_columns, int left_ranks,
                                  PulledRows& held) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        held.matrix[i] = eight_of(matrix + i * columns, i < left ? left_columns : 0, packed);
#pragma unroll
        for (int q = 0; q < PULL_TILES; ++q) {
            held.factor[i][q] = 0;
            if (!packed && i < left && q < left_ranks) held.factor[i][q] = factor[i * rank + q];
        }
        if (packed && i < left) neighbours<PULL_TILES>(factor + i * rank, held.factor[i]);
    }
}

// sums[u][q] += the products of 16 rows. The left factor is Mᵀ: rows g and g + 8 of its tile u are
// the columns 2 u and 2 u + 1 of each lane's eight. Its neighbours are rows of M.
__device__ inline void multiply_rows(const PulledRows& held, float (&sums)[4][PULL_TILES][4]) {
    unsigned right[PULL_TILES][FACTOR_PARTS][2];
#pragma unroll
    for (int q = 0; q < PULL_TILES; ++q)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            unsigned parts[FACTOR_PARTS];
            split_pair<FACTOR_PARTS>(held.factor[2 * h][q], held.factor[2 * h + 1][q], parts);
#pragma unroll
            for (int p = 0; p < FACTOR_PARTS; ++p) right[q][p][h] = parts[p];
        }
#pragma unroll
    for (int u = 0; u < 4; ++u) {
        unsigned left[MATRIX_PARTS][4];
#pragma unroll
        for (int h = 0; h < 4; ++h) {
            const unsigned first = held.matrix[h / 2 * 2].word[u];
            const unsigned second = held.matrix[h / 2 * 2 + 1].word[u];
            unsigned parts[MATRIX_PARTS];
            split_stored(h % 2 ? high_halves(first, second) : low_halves(first, second), parts);
#pragma unroll
            for (int p = 0; p < MATRIX_PARTS; ++p) left[p][h] = parts[p];
        }
#pragma unroll
        for (int q = 0; q < PULL_TILES; ++q) add_product(sums[u][q], left, right[q]);
    }
}

// sums += the products of each PULL_BELOW-th step, `count` steps in all, by a ring of loads as in
// Band. `left` rows of the matrix are there from the lane's first on.
template <bool packed, int places>
__device__ inline void pull_rows(const storage_t* matrix, const float* factor, int columns,
                                 int rank, int count, int left, int left_columns,
                                 int left_ranks, float (&sums)[4][PULL_TILES][4]) {
    const int down = PULL_BELOW * PULL_STEP;
    PulledRows ring[places];
    const auto fetch = [&](PulledRows& held) {
        fetch_rows<packed>(matrix, factor, columns, rank, left, left_columns, left_ranks, held);
        matrix += down * columns;
        factor += down * rank;
        left -= down;
    };
#pragma unroll
    for (int place = 0; place < places; ++place) fetch(ring[place]);
#pragma unroll 1
    for (; count > 0; count -= places) {
#pragma unroll
        for (int place = 0; place < places; ++place) {
            if (place < count) multiply_rows(ring[place], sums);
            fetch(ring[place]);
        }
    }
}

// result (chunks, rank, columns) = the sums over chunks of rows of Fᵀ M + F₂ᵀ M₂, for F = `factor`
// (rows, rank) and M = `matrix` (rows, columns), and so for F₂ and M₂. A chunk has `per_chunk`
// steps of 16 rows, first of M and then of M₂; `sum_chunks` adds the chunks up.
// grid (columns / 128 · rank / 16, chunks, stack), 256 threads
// 2 bytes of M for each 16 ranks, once from memory; F comes from the cache
extern "C" __global__ void __launch_bounds__(PULL_THREADS, 2)
    pull(const storage_t* __restrict__ matrix, const compute_t* __restrict__ factor, index_t rows,
         const storage_t* __restrict__ matrix2 /* or null */,
         const compute_t* __restrict__ factor2 /* or null */, index_t rows2,
         compute_t* __restrict__ result, index_t columns, index_t rank, index_t per_chunk) {
    if (!is_skinny) return;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int beside = warp % PULL_BESIDE, below = warp / PULL_BESIDE;
    const index_t e = blockIdx.z;
    const int chunks = (int)((rank + 8 * PULL_TILES - 1) / (8 * PULL_TILES));
    const int left = blockIdx.x / chunks * PULL_COLUMNS;
    const int first_rank = blockIdx.x % chunks * 8 * PULL_TILES;

    // A lane without columns or ranks loads the last ones: its sums are not stored.
    const bool packed = columns % 8 == 0 && rank % PULL_TILES == 0 &&
                        aligned(matrix, factor, matrix2, factor2);
    index_t column = left + beside * 64 + 8 * g, own_rank = first_rank + PULL_TILES * g;
    if (column >= columns) column = packed ? columns - 8 : columns - 1;
    if (own_rank >= rank) own_rank = packed ? rank - PULL_TILES : rank - 1;

    const int left_columns = columns - column < 8 ? columns - column : 8;
    const int left_ranks = rank - own_rank < PULL_TILES ? rank - own_rank : PULL_TILES;

    float sums[4][PULL_TILES][4] = {};
    int begin = blockIdx.y * per_chunk, end = begin + per_chunk;
#pragma unroll 1
    for (int second = 0; second < (matrix2 ? 2 : 1); ++second) {
        const index_t count = second ? rows2 : rows;
        const int steps = (count + PULL_STEP - 1) / PULL_STEP;
        const int step = begin + below, until = end < steps ? end : steps;
        const index_t row = e * count + step * PULL_STEP + 4 * t;
        const storage_t* m = (second ? matrix2 : matrix) + row * columns + column;
        const float* f = (const float*)(second ? factor2 : factor) + row * rank + own_rank;
        const int own = (until - step + PULL_BELOW - 1) / PULL_BELOW;
        // The rows of later chunks are not there for this block.
        const index_t last = until * PULL_STEP < count ? until * PULL_STEP : count;
        const int there = last - (step * PULL_STEP + 4 * t);
        if (packed)
            pull_rows<true, PULL_PLACES>(m, f, columns, rank, own, there, 8, PULL_TILES, sums);
        else
            pull_rows<false, 1>(m, f, columns, rank, own, there, left_columns, left_ranks, sums);
        begin = begin > steps ? begin - steps : 0;
        end -= steps;
    }

    __shared__ float held[PULL_BELOW][8][PULL_COLUMNS];
    const int at = beside * 64 + 8 * g;
    result += (e * gridDim.y + blockIdx.y) * rank * columns;
#pragma unroll
    for (int q = 0; q < PULL_TILES; ++q) {
        if (q) __syncthreads();
#pragma unroll
        for (int u = 0; u < 4; ++u)
#pragma unroll
            for (int h = 0; h < 4; ++h)
                held[below][2 * t + h % 2][at + 2 * u + h / 2] = sums[u][q][h];
        __syncthreads();
        for (int each = threadIdx.x; each < 8 * PULL_COLUMNS; each += PULL_THREADS) {
            const int of_rank = each / PULL_COLUMNS, across = each % PULL_COLUMNS;
            float total = 0;
            for (int w = 0; w < PULL_BELOW; ++w) total += held[w][of_rank][across];
            const index_t r = first_rank + of_rank * PULL_TILES + q;
            if (r < rank && left + across < columns)
                result[r * columns + left + across] = (compute_t)total;
        }
    }
}
