// The kernels of the CuPy backend. NVRTC compiles this file; a C++ compiler can do so too, with
// tests/cuda_host.hpp.
//
//     W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or null for 1   V = ρ⊙W + b A
//     n = ‖V‖ by rows, (out,)      g = m / n             z = x Vᵀ, (tokens, out)
//
// The compiler's options define three types:
//     storage_t  weight, x, dy and y    half_t, bf16_t, float or double
//     compute_t  all other arrays       float or double
//     product_t  z and dz               compute_t, or storage_t where the caller asked for reduced
//                                       precision
//
// signatures.py declares the parameters of every kernel again, for the launches, and a test
// compares the two. A parameter that may be a null pointer has the comment "or null".
//
// The comment above a kernel gives its formula, its grid and the bytes of device memory that it
// reads and writes for each element of its largest array, for bfloat16 storage and float products.
// `any` blocks means that the kernel is right for every number of blocks.
//
// Stacks: `e` is the index of an element of the stack, and gridDim.z is how many there are. The
// arrays of the elements lie one after the other. The shapes alone fix the order of every sum: no
// kernel adds with atomics.

typedef long long index_t;

struct half_t { unsigned short bits; };
struct bf16_t { unsigned short bits; };

__device__ inline float wide(float value) { return value; }
__device__ inline double wide(double value) { return value; }
__device__ inline float wide(bf16_t value) { return __uint_as_float((unsigned)value.bits << 16); }
#ifdef DORAXP_HOST
__device__ inline float wide(half_t value) { return host_half_to_float(value.bits); }
#else
__device__ inline float wide(half_t value) {
    float result;
    asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(value.bits));
    return result;
}
#endif

// Round to the nearest number, ties to even.
template <typename T> __device__ inline T narrow(compute_t value);
template <> __device__ inline float narrow<float>(compute_t value) { return (float)value; }
template <> __device__ inline double narrow<double>(compute_t value) { return (double)value; }
#ifdef DORAXP_HOST
template <> __device__ inline half_t narrow<half_t>(compute_t value) { return {host_half(value)}; }
template <> __device__ inline bf16_t narrow<bf16_t>(compute_t value) { return {host_bf16(value)}; }
#else
template <> __device__ inline half_t narrow<half_t>(compute_t value) {
    half_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"((float)value));
    return result;
}
template <> __device__ inline bf16_t narrow<bf16_t>(compute_t value) {
    bf16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"((float)value));
    return result;
}
#endif

// A thread loads PER_THREAD neighbours at once: 16 bytes of storage_t, and more of a wider type.
enum { PER_THREAD = 16 / sizeof(storage_t), WARP = 32, WARPS = 4, THREADS = WARP * WARPS };

template <typename T> struct alignas(16) Pack { T item[16 / sizeof(T)]; };

__device__ inline bool aligned(const void* a, const void* b = 0, const void* c = 0,
                               const void* d = 0) {
    return (((size_t)a | (size_t)b | (size_t)c | (size_t)d) & 15) == 0;
}

// Load `count` ≤ PER_THREAD numbers. `packed` allows loads of 16 bytes: count must then be
// PER_THREAD and `from` aligned.
template <typename T> __device__ inline void load(const T* from, compute_t* to, int count,
                                                  bool packed) {
    const int each = 16 / sizeof(T);
    if (packed) {
#pragma unroll
        for (int k = 0; k < PER_THREAD / each; ++k) {
            const Pack<T> pack = ((const Pack<T>*)from)[k];
#pragma unroll
            for (int j = 0; j < each; ++j) to[k * each + j] = wide(pack.item[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j)
            to[j] = j < count ? (compute_t)wide(from[j]) : (compute_t)0;
    }
}

template <typename T> __device__ inline void store(T* to, const compute_t* from, int count,
                                                   bool packed) {
    const int each = 16 / sizeof(T);
    if (packed) {
#pragma unroll
        for (int k = 0; k < PER_THREAD / each; ++k) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < each; ++j) pack.item[j] = narrow<T>(from[k * each + j]);
            ((Pack<T>*)to)[k] = pack;
        }
    } else {
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j)
            if (j < count) to[j] = narrow<T>(from[j]);
    }
}

__device__ inline compute_t warp_sum(compute_t value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// The larger number, or NaN if one is NaN, as in the array API's max.
__device__ inline compute_t larger(compute_t a, compute_t b) { return a > b || a != a ? a : b; }

__device__ inline compute_t warp_max(compute_t value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        value = larger(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

// The sum over a block of THREADS. Every thread gets it, and so for block_max.
__device__ inline compute_t block_sum(compute_t value) {
    __shared__ compute_t of_warp[WARPS];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    compute_t total = 0;
    for (int w = 0; w < WARPS; ++w) total += of_warp[w];
    return total;
}

__device__ inline compute_t block_max(compute_t value) {
    __shared__ compute_t of_warp[WARPS];
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    compute_t most = of_warp[0];
    for (int w = 1; w < WARPS; ++w) most = larger(most, of_warp[w]);
    return most;
}

// ---------------------------------------------------------------- the two hot passes

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

// ---------------------------------------------------------------- one token

// V[row, k], with V = ρ⊙W + b A and A (stack, rank, in). `b` is null if there is no update.
// `turned` says that W is stored as (in, out). The sum is made in double: where ρ⊙W and b A cancel,
// the small rest would show every rounding of a float sum. Few rows need this function.
template <typename M>
__device__ inline compute_t formed(const M* weight, int turned, const compute_t* a,
                                   const compute_t* b, const compute_t* row_scale, index_t row,
                                   index_t k, index_t out, index_t inner, index_t rank) {
    const index_t e = row / out;
    double value = wide(weight[turned ? (e * inner + k) * out + row % out : row * inner + k]);
    if (row_scale) value *= row_scale[row];
    for (index_t r = 0; b && r < rank; ++r)
        value += (double)b[row * rank + r] * a[(e * rank + r) * inner + k];
    return (compute_t)value;
}

// This thread's part of Σ m_k x_k, where `team` threads share the sum.
template <typename M, typename X>
__device__ inline compute_t dot(const M* m, const X* x, index_t length, int team) {
    const bool packed = length % PER_THREAD == 0 && aligned(m, x);
    compute_t left[PER_THREAD], right[PER_THREAD], sums[PER_THREAD];
    for (int j = 0; j < PER_THREAD; ++j) sums[j] = 0;
#pragma unroll 4
    for (index_t k = (int)threadIdx.x % team * PER_THREAD; k < length; k += team * PER_THREAD) {
        const int count = length - k < PER_THREAD ? (int)(length - k) : PER_THREAD;
        load(m + k, left, count, packed);
        load(x + k, right, count, packed);
#pragma unroll
        for (int j = 0; j < PER_THREAD; ++j) sums[j] += left[j] * right[j];
    }
    compute_t total = 0;
    for (int j = 0; j < PER_THREAD; ++j) total += sums[j];
    return total;
}

// This thread's part of Σ V_k x_k for a suspect row, where a warp shares the sum.
template <typename M, typename X>
__device__ inline compute_t dot_formed(const M* m, const X* x, const compute_t* a,
                                       const compute_t* b, const compute_t* row_scale, index_t row,
                                       index_t out, index_t inner, index_t rank) {
    compute_t total = 0;
    for (index_t k = threadIdx.x % WARP; k < inner; k += WARP)
        total += formed(m, 0, a, b, row_scale, row, k, out, inner, rank) * (compute_t)wide(x[k]);
    return total;
}

// One token x. If `by_block`, each block makes one number of z = matrix x. This is for L = A x,
// where the matrix has few rows.
// grid (rows)                        2 or 4 bytes of the matrix; x comes from the cache
// Else each warp makes one number of z = ρ⊙(W x) + b L and of y = g⊙z + bias, with W = `matrix`.
// grid (rows / WARPS)                2 bytes of W, 5 of (out, rank)
// A suspect row is formed and multiplied by x instead: see the guard. `matrix` is an array of
// storage_t if `matrix_is_stored`, else of compute_t; x and y are of storage_t if `x_is_stored`,
// else of compute_t.
extern "C" __global__ void token(
    const void* matrix, int matrix_is_stored, const void* x, int x_is_stored,
    const compute_t* a /* or null */, const compute_t* b /* or null */,
    const compute_t* row_scale /* or null */, const unsigned char* suspect /* or null */,
    const compute_t* low_rank /* or null */, const compute_t* gain /* or null */,
    const compute_t* bias /* or null */, product_t* z, void* y /* or null */, index_t rows,
    index_t out, index_t inner, index_t rank, int by_block) {
    const index_t row = by_block ? (index_t)blockIdx.x
                                 : (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const int team = by_block ? THREADS : WARP;
    const index_t e = row / out, at = row * inner, of_x = e * inner;
    const storage_t *m_s = (const storage_t*)matrix, *x_s = (const storage_t*)x + of_x;
    const compute_t *m_c = (const compute_t*)matrix, *x_c = (const compute_t*)x + of_x;
    compute_t value;
    if (suspect && suspect[row]) {
        value = matrix_is_stored
                    ? x_is_stored ? dot_formed(m_s, x_s, a, b, row_scale, row, out, inner, rank)
                                  : dot_formed(m_s, x_c, a, b, row_scale, row, out, inner, rank)
                : x_is_stored ? dot_formed(m_c, x_s, a, b, row_scale, row, out, inner, rank)
                              : dot_formed(m_c, x_c, a, b, row_scale, row, out, inner, rank);
    } else {
        value = matrix_is_stored ? x_is_stored ? dot(m_s + at, x_s, inner, team)
                                               : dot(m_s + at, x_c, inner, team)
                : x_is_stored    ? dot(m_c + at, x_s, inner, team)
                                 : dot(m_c + at, x_c, inner, team);
        if (row_scale) value *= row_scale[row];
        for (index_t r = threadIdx.x % WARP; b && r < rank; r += WARP)
            value += b[row * rank + r] * low_rank[e * rank + r];
    }
    value = by_block ? block_sum(value) : warp_sum(value);
    if (threadIdx.x % team != 0) return;
    z[row] = narrow<product_t>(value);
    if (!y) return;
    const compute_t result = bias ? gain[row] * value + bias[row] : gain[row] * value;
    if (x_is_stored) ((storage_t*)y)[row] = narrow<storage_t>(result);
    else ((compute_t*)y)[row] = result;
}

// ---------------------------------------------------------------- the norm

// n = √n², g = m / n and unit = V Aᵀ / n, where
//     n² = ρ²‖w‖² + 2 rowsum(b⊙ρ⊙u) + rowsum(bg⊙b)        V Aᵀ = ρ⊙u + bg
//     u = W Aᵀ     gram = A Aᵀ     bg = b gram
// A warp makes each row: grid (rows / WARPS)        20 bytes of (out, rank): u, b, bg, unit
//
// `suspect` marks the rows whose n² may have lost digits, by the rule of `expanded_norm` in
// _generic.py. A row is trusted if n² < ∞ and
//     n² > cancellation (base + max(rowsum(bg⊙b), ‖b‖² (‖A‖² / rank + floor))) + floor
// where base is ‖w‖², or with ρ 1 or 0; ‖A‖² / rank is the mean of the diagonal of `gram`; and
// `floor` is the bound below which a sum of squares may have underflowed. NaN is not trusted.
// `guard_norms` then replaces the numbers of the suspect rows.
extern "C" __global__ void assemble(const compute_t* u, const compute_t* b, const compute_t* bg,
                                    const compute_t* squares,
                                    const compute_t* row_scale /* or null */, const compute_t* gram,
                                    const compute_t* magnitude, compute_t* norm, compute_t* gain,
                                    compute_t* unit, unsigned char* suspect, index_t rows,
                                    index_t out, index_t rank, compute_t floor,
                                    compute_t cancellation) {
    const index_t row = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const compute_t scale = row_scale ? row_scale[row] : (compute_t)1;
    compute_t along = 0, update = 0, b_squares = 0, a_squares = 0;
    for (index_t r = threadIdx.x % WARP; r < rank; r += WARP) {
        const compute_t left = b[row * rank + r];
        along += left * (scale * u[row * rank + r]);
        update += bg[row * rank + r] * left;
        b_squares += left * left;
        a_squares += gram[(row / out * rank + r) * rank + r];
    }
    along = warp_sum(along);
    update = warp_sum(update);
    b_squares = warp_sum(b_squares);
    a_squares = warp_sum(a_squares);

    const compute_t infinity = (compute_t)__uint_as_float(0x7f800000u);
    const compute_t base = row_scale ? (scale > 0 ? (compute_t)1 : (compute_t)0) : squares[row];
    const compute_t n2 = base + 2 * along + update;
    const compute_t mean_square = a_squares / (compute_t)rank + floor;
    const compute_t expected = larger(update, b_squares * mean_square);
    const bool trusted = n2 > cancellation * (base + expected) + floor && n2 < infinity;
    const compute_t n = sqrt(n2);  // a row with n² ≤ floor is suspect, and guard_norms overwrites n
    for (index_t r = threadIdx.x % WARP; r < rank; r += WARP) {
        const index_t at = row * rank + r;
        unit[at] = (scale * u[at] + bg[at]) / n;
    }
    if (threadIdx.x % WARP != 0) return;
    norm[row] = n;
    gain[row] = magnitude[row] / n;
    suspect[row] = !trusted;
}

// norm = √squares. `suspect` marks the rows whose square is outside floor..∞.
// grid (rows / THREADS)                                             9 bytes of (out,)
extern "C" __global__ void norms(const compute_t* squares, compute_t* norm, unsigned char* suspect,
                                 index_t rows, compute_t floor) {
    const index_t row = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const compute_t n2 = squares[row], infinity = (compute_t)__uint_as_float(0x7f800000u);
    norm[row] = sqrt(n2);
    suspect[row] = !(n2 > floor && n2 < infinity);
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

// ---------------------------------------------------------------- products in parts

// Split a (rows, columns) into `part_count` parts of storage_t: a = Σ parts, or
// shrink⊙Σ parts by rows.
// grid (rows, any), or (rows, 1) with `shrink`                       4 + 2 `part_count` bytes
// Each part is the remainder after the parts before it, rounded to storage_t. Three parts of
// bfloat16 hold all 24 bits of a float. float16 has fewer exponents than float, so it needs
// `shrink`: each row is first multiplied by the power of two that brings its largest number into
// 2^13..2^14, and `shrink` gets the inverse of that power. `parts` is
// (part_count, rows, columns).
extern "C" __global__ void split(const compute_t* a, storage_t* parts,
                                 compute_t* shrink /* or null */, index_t rows, index_t columns,
                                 int part_count) {
    const index_t row = blockIdx.x;
    compute_t grow = 1;
    if (shrink) {
        compute_t most = 0;
        for (index_t k = threadIdx.x; k < columns; k += THREADS)
            most = larger(most, fabs(a[row * columns + k]));
        most = block_max(most);
        int exponent = 0;
        if (most > 0 && most < (compute_t)__uint_as_float(0x7f800000u)) frexp(most, &exponent);
        exponent = 14 - exponent;
        exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
        grow = ldexp((compute_t)1, exponent);
        if (threadIdx.x == 0) shrink[row] = ldexp((compute_t)1, -exponent);
    }
    const index_t stride = (index_t)gridDim.y * THREADS;
    for (index_t k = (index_t)blockIdx.y * THREADS + threadIdx.x; k < columns; k += stride) {
        compute_t rest = grow * a[row * columns + k];
        for (int p = 0; p < part_count; ++p) {
            const storage_t part = narrow<storage_t>(rest);
            parts[(p * rows + row) * columns + k] = part;
            rest = rest - (compute_t)wide(part);
            if (rest != rest) rest = 0;  // the first part holds infinity and NaN already
        }
    }
}

// result = array, rounded to storage_t.   grid (size / (PER_THREAD THREADS))       6 bytes
extern "C" __global__ void cast(const compute_t* array, storage_t* result, index_t size) {
    const index_t at = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * PER_THREAD;
    if (at >= size) return;
    const int count = size - at < PER_THREAD ? (int)(size - at) : PER_THREAD;
    const bool packed = count == PER_THREAD && aligned(array, result);
    compute_t value[PER_THREAD];
    load(array + at, value, count, packed);
    store(result + at, value, count, packed);
}

// result = shrink⊙Σ products + beta result: the sum over the products of the parts.
// grid (size / THREADS)                                              4 `parts` + 4 bytes
// If `on_left`, the parts were the left factor: `products` is (parts, few, columns) and `shrink`
// goes by rows. Else `products` is (rows, parts, few) and `shrink` goes by columns.
extern "C" __global__ void sum_parts(const compute_t* products,
                                     const compute_t* shrink /* or null */, compute_t* result,
                                     index_t size, index_t columns, int parts, int on_left,
                                     compute_t beta) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const index_t row = i / columns, column = i % columns;
    const index_t first = on_left ? i : row * parts * columns + column;
    compute_t total = 0;
    for (int p = 0; p < parts; ++p) total += products[first + p * (on_left ? size : columns)];
    if (shrink) total *= shrink[on_left ? row : column];
    result[i] = beta != 0 ? total + beta * result[i] : total;
}

// ---------------------------------------------------------------- the guard

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

// ---------------------------------------------------------------- merge and AdamW

// sums (16, 8) += left (16, 16) right (16, 8), by a warp on tensor cores. Lane 4 g + t holds
//     of left   rows g, g + 8     columns 2t, 2t + 1, 2t + 8, 2t + 9    (PTX ISA, mma.m16n8k16)
//     of right  column g          rows    2t, 2t + 1, 2t + 8, 2t + 9
//     of sums   rows g, g + 8     columns 2t, 2t + 1
#ifdef DORAXP_HOST
#define tensor_product host_tensor_product
#else
__device__ inline void tensor_product(float* sums, const unsigned* left, const unsigned* right) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]), "r"(right[0]), "r"(right[1]));
}
#endif

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

// One array of the parameters and its moments. LEAF in adamw.py has the same fields, 8 bytes each.
struct Leaf {
    const void *p, *g;
    const compute_t *mu, *nu;
    void* new_p;
    compute_t *new_mu, *new_nu;
    index_t size, first_block, p_type, g_type;  // 0 half_t, 1 bf16_t, 2 float, 3 double
    double rate, decay;
};

enum { LEAF_BLOCK = 4 * THREADS };  // numbers of a leaf that a block updates

__device__ inline compute_t typed(const void* array, index_t i, index_t type) {
    if (type == 0) return (compute_t)wide(((const half_t*)array)[i]);
    if (type == 1) return (compute_t)wide(((const bf16_t*)array)[i]);
    return type == 2 ? (compute_t)((const float*)array)[i] : (compute_t)((const double*)array)[i];
}

// One step of AdamW for all leaves.
// grid (Σ size / LEAF_BLOCK)            16 (p, g, mu, nu) + 12 (p, mu, nu) = 28 bytes in float
extern "C" __global__ void adamw(const Leaf* leaves, int leaf_count, compute_t beta1,
                                 compute_t rest1, compute_t beta2, compute_t rest2, compute_t eps,
                                 compute_t correct1, compute_t correct2) {
    int low = 0, high = leaf_count - 1;
    while (low < high) {  // find the last leaf that begins at this block or before
        const int middle = (low + high + 1) / 2;
        if (leaves[middle].first_block <= (index_t)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Leaf leaf = leaves[low];
    const index_t first = ((index_t)blockIdx.x - leaf.first_block) * LEAF_BLOCK;
    for (index_t i = first + threadIdx.x; i < first + LEAF_BLOCK && i < leaf.size; i += THREADS) {
        const compute_t p = typed(leaf.p, i, leaf.p_type), g = typed(leaf.g, i, leaf.g_type);
        const compute_t mu = beta1 * leaf.mu[i] + rest1 * g;
        const compute_t nu = beta2 * leaf.nu[i] + rest2 * (g * g);
        const compute_t turn =
            (mu / correct1) / (sqrt(nu / correct2) + eps) + (compute_t)leaf.decay * p;
        const compute_t stepped = p - (compute_t)leaf.rate * turn;
        leaf.new_mu[i] = mu;
        leaf.new_nu[i] = nu;
        if (leaf.p_type == 0) ((half_t*)leaf.new_p)[i] = narrow<half_t>(stepped);
        else if (leaf.p_type == 1) ((bf16_t*)leaf.new_p)[i] = narrow<bf16_t>(stepped);
        else if (leaf.p_type == 2) ((float*)leaf.new_p)[i] = (float)stepped;
        else ((double*)leaf.new_p)[i] = (double)stepped;
    }
}
