// The kernels of the CuPy backend, for NVRTC, and for any C++ compiler through tests/cuda_host.hpp.
//
//     W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or null for 1   V = ρ⊙W + b A
//     n = ‖V‖ by rows, (out,)      g = m / n             z = x Vᵀ, (tokens, out)
//
// Three types are defined from outside:
//     S  storage: of the weight, x, dy and y         half_t, bf16_t, float or double
//     C  compute: of all else                        float or double
//     Z  of z and dz: C, or S where the caller asked for reduced precision
//
// Stacks: an element of the stack is one more index, `e` or gridDim.z; its arrays lie one after the
// other. Bytes are those of device memory per element of the largest array, in bfloat16 and with
// Z = C = float. No kernel adds with atomics: the order of every sum is fixed by the shapes.

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

// To the nearest, ties to even.
template <typename T> __device__ inline T narrow(C value);
template <> __device__ inline float narrow<float>(C value) { return (float)value; }
template <> __device__ inline double narrow<double>(C value) { return (double)value; }
#ifdef DORAXP_HOST
template <> __device__ inline half_t narrow<half_t>(C value) { return {host_half(value)}; }
template <> __device__ inline bf16_t narrow<bf16_t>(C value) { return {host_bf16(value)}; }
#else
template <> __device__ inline half_t narrow<half_t>(C value) {
    half_t result;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result.bits) : "f"((float)value));
    return result;
}
template <> __device__ inline bf16_t narrow<bf16_t>(C value) {
    bf16_t result;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(result.bits) : "f"((float)value));
    return result;
}
#endif

// A thread takes N neighbours at once: 16 bytes of S, and no fewer of the wider types.
enum { N = 16 / sizeof(S), WARP = 32, WARPS = 4, THREADS = WARP * WARPS };

template <typename T> struct alignas(16) Pack { T item[16 / sizeof(T)]; };

__device__ inline bool aligned(const void* a, const void* b = 0, const void* c = 0,
                               const void* d = 0) {
    return (((size_t)a | (size_t)b | (size_t)c | (size_t)d) & 15) == 0;
}

// Load `count` ≤ N numbers, by 16 bytes where `packed`: then count is N and `from` is aligned.
template <typename T> __device__ inline void load(const T* from, C* to, int count, bool packed) {
    const int each = 16 / sizeof(T);
    if (packed) {
#pragma unroll
        for (int k = 0; k < N / each; ++k) {
            const Pack<T> pack = ((const Pack<T>*)from)[k];
#pragma unroll
            for (int j = 0; j < each; ++j) to[k * each + j] = wide(pack.item[j]);
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j) to[j] = j < count ? (C)wide(from[j]) : (C)0;
    }
}

template <typename T> __device__ inline void store(T* to, const C* from, int count, bool packed) {
    const int each = 16 / sizeof(T);
    if (packed) {
#pragma unroll
        for (int k = 0; k < N / each; ++k) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < each; ++j) pack.item[j] = narrow<T>(from[k * each + j]);
            ((Pack<T>*)to)[k] = pack;
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; ++j)
            if (j < count) to[j] = narrow<T>(from[j]);
    }
}

__device__ inline C warp_sum(C value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value += __shfl_xor_sync(~0u, value, step);
    return value;
}

// NaN wins, as in the array API's max.
__device__ inline C larger(C a, C b) { return a > b || a != a ? a : b; }

__device__ inline C warp_max(C value) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2)
        value = larger(value, __shfl_xor_sync(~0u, value, step));
    return value;
}

// Over a block of THREADS: every thread gets the result.
__device__ inline C block_sum(C value) {
    __shared__ C of_warp[WARPS];
    value = warp_sum(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    C total = 0;
    for (int w = 0; w < WARPS; ++w) total += of_warp[w];
    return total;
}

__device__ inline C block_max(C value) {
    __shared__ C of_warp[WARPS];
    value = warp_max(value);
    __syncthreads();
    if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = value;
    __syncthreads();
    C most = of_warp[0];
    for (int w = 1; w < WARPS; ++w) most = larger(most, of_warp[w]);
    return most;
}

// ---------------------------------------------------------------- the two hot passes

// z = ρ⊙base + update and y = g⊙z + bias.             grid (columns / (N THREADS), any, stack)
// 4 (base) + 4 (update) + 4 (z) + 2 (y) = 14 bytes; where base is z already, 4 + 2 = 6.
// `update` may be null for 0, `z` null where it is not wanted; z may be base.
extern "C" __global__ void outputs(const Z* base, const Z* update, const C* row_scale,
                                   const C* gain, const C* bias, Z* z, S* y, index_t tokens,
                                   index_t out) {
    const index_t column = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (column >= out) return;
    const bool packed = out % N == 0 && aligned(base, update, z, y);
    const int count = out - column < N ? (int)(out - column) : N;
    const index_t e = blockIdx.z, own = e * out + column;

    const bool whole = out % N == 0 && aligned(gain, bias, row_scale);
    C g[N], shift[N], scale[N];
    load(gain + own, g, count, whole);
    if (bias) load(bias + own, shift, count, whole);
    if (row_scale) load(row_scale + own, scale, count, whole);
    for (index_t t = blockIdx.y; t < tokens; t += gridDim.y) {
        const index_t at = (e * tokens + t) * out + column;
        C value[N], other[N];
        load(base + at, value, count, packed);
        if (update) load(update + at, other, count, packed);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            if (row_scale) value[j] *= scale[j];
            if (update) value[j] += other[j];
        }
        if (z) store(z + at, value, count, packed);
#pragma unroll
        for (int j = 0; j < N; ++j) value[j] = bias ? g[j] * value[j] + shift[j] : g[j] * value[j];
        store(y + at, value, count, packed);
    }
}

// dz = g⊙dy, and for each chunk of tokens the sums over it of dy⊙z and of dy.
// 2 (dy) + 4 (z) + 4 (dz) = 10 bytes, and 4 / (tokens of a chunk) for each sum.
// grid (columns / (N THREADS), chunks, stack); dz has `rows` ≥ tokens rows in each element, the
// sums are (stack, chunks, out). `sum_dy` may be null.
extern "C" __global__ void gradients(const S* __restrict__ dy, const Z* __restrict__ z,
                                     const C* __restrict__ gain, Z* __restrict__ dz, C* sum_dyz,
                                     C* sum_dy, index_t tokens, index_t rows, index_t out,
                                     index_t per_chunk) {
    const index_t column = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (column >= out) return;
    const bool packed = out % N == 0 && aligned(dy, z, dz);
    const int count = out - column < N ? (int)(out - column) : N;
    const index_t e = blockIdx.z;
    const index_t first = blockIdx.y * per_chunk;
    const index_t end = first + per_chunk < tokens ? first + per_chunk : tokens;

    C g[N], along[N], total[N];
    load(gain + e * out + column, g, count, out % N == 0 && aligned(gain));
#pragma unroll
    for (int j = 0; j < N; ++j) along[j] = total[j] = 0;
#pragma unroll 4
    for (index_t t = first; t < end; ++t) {
        C d[N], value[N];
        load(dy + (e * tokens + t) * out + column, d, count, packed);
        load(z + (e * tokens + t) * out + column, value, count, packed);
#pragma unroll
        for (int j = 0; j < N; ++j) {
            along[j] += d[j] * value[j];
            total[j] += d[j];
            d[j] *= g[j];
        }
        store(dz + (e * rows + t) * out + column, d, count, packed);
    }
    const index_t at = (e * gridDim.y + blockIdx.y) * out + column;
#pragma unroll
    for (int j = 0; j < N; ++j) {
        if (j < count) sum_dyz[at + j] = along[j];
        if (j < count && sum_dy) sum_dy[at + j] = total[j];
    }
}

// The second stage: (stack, chunks, out) -> (stack, out).  grid (out / WARP, 1, stack), a warp a block
extern "C" __global__ void sum_chunks(const C* partial, C* result, index_t chunks, index_t out) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (i >= out) return;
    C total = 0;
#pragma unroll 16
    for (index_t c = 0; c < chunks; ++c) total += partial[(e * chunks + c) * out + i];
    result[e * out + i] = total;
}

// What a gradient through the norm needs: dm = e / n, p = g⊙dm, and below the `tokens` rows of dz the
// rows (q⊙b)ᵀ where q = −p / n; all 0 where n = 0.          grid (out / THREADS, rank, stack)
// 4 (b) + 4 (rows) = 8 bytes of (out, rank)
extern "C" __global__ void norm_rows(const C* e_of, const C* gain, const C* norm, const C* b, C* dm,
                                     C* p_of, Z* dz, index_t tokens, index_t out, index_t rank) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (i >= out) return;
    const index_t at = e * out + i;
    const C n = norm[at], m = n != 0 ? e_of[at] / n : (C)0, p = gain[at] * m;
    for (index_t r = blockIdx.y; r < rank; r += gridDim.y) {
        const C row = n != 0 ? -p * b[at * rank + r] / n : (C)0;
        dz[(e * (tokens + rank) + tokens + r) * out + i] = narrow<Z>(row);
    }
    if (blockIdx.y != 0) return;
    dm[at] = m;
    p_of[at] = p;
}

// dB ← s (dB − p⊙u) by rows.                    grid (size / THREADS)     12 bytes of (out, rank)
extern "C" __global__ void turning(C* db, const C* p, const C* u, index_t size, index_t rank, C s) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i < size) db[i] = s * (db[i] - p[i / rank] * u[i]);
}

// ---------------------------------------------------------------- one token

// One number of V = ρ⊙W + b A; A is (stack, rank, in). `b` null for no update; `turned` where W lies
// as (in, out). In double: what is left of a row that cancels shows every rounding on the way, and
// such rows are few.
template <typename M>
__device__ inline C formed(const M* weight, int turned, const C* a, const C* b, const C* row_scale,
                           index_t row, index_t k, index_t out, index_t in, index_t rank) {
    const index_t e = row / out;
    double value = wide(weight[turned ? (e * in + k) * out + row % out : row * in + k]);
    if (row_scale) value *= row_scale[row];
    for (index_t r = 0; b && r < rank; ++r)
        value += (double)b[row * rank + r] * a[(e * rank + r) * in + k];
    return (C)value;
}

// Σ m_k x_k over what is this thread's, of `team` threads.
template <typename M, typename X>
__device__ inline C dot(const M* m, const X* x, index_t length, int team) {
    const bool packed = length % N == 0 && aligned(m, x);
    C left[N], right[N], sums[N];
    for (int j = 0; j < N; ++j) sums[j] = 0;
#pragma unroll 4
    for (index_t k = (int)threadIdx.x % team * N; k < length; k += team * N) {
        const int count = length - k < N ? (int)(length - k) : N;
        load(m + k, left, count, packed);
        load(x + k, right, count, packed);
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += left[j] * right[j];
    }
    C total = 0;
    for (int j = 0; j < N; ++j) total += sums[j];
    return total;
}

// Σ V_k x_k of a suspect row, over what is this thread's of a warp.
template <typename M, typename X>
__device__ inline C dot_formed(const M* m, const X* x, const C* a, const C* b, const C* row_scale,
                               index_t row, index_t out, index_t in, index_t rank) {
    C total = 0;
    for (index_t k = threadIdx.x % WARP; k < in; k += WARP)
        total += formed(m, 0, a, b, row_scale, row, k, out, in, rank) * (C)wide(x[k]);
    return total;
}

// z = M x, a block to each row of M: L = A x, of few rows.  grid (rows)
//                                    2 or 4 bytes of M; x comes from the cache
// z = ρ⊙(M x) + b L and y = g⊙z + bias, a warp to each row of M = W.  grid (rows / WARPS)
//                                    2 bytes of W, 5 of (out, rank)
// The first where `by_block`. A suspect row is x V itself, but for a row of zeros: see the guard.
// M is of S where `m_stored`, else of C; x and y of S where `stored`.
extern "C" __global__ void token(const void* m, int m_stored, const void* x, int stored,
                                 const C* a, const C* b, const C* row_scale,
                                 const unsigned char* suspect, const C* low_rank, const C* gain,
                                 const C* bias, Z* z, void* y, index_t rows, index_t out,
                                 index_t in, index_t rank, int by_block) {
    const index_t row = by_block ? (index_t)blockIdx.x
                                 : (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const int team = by_block ? THREADS : WARP;
    const index_t e = row / out, at = row * in, of_x = e * in;
    const S *m_s = (const S*)m, *x_s = (const S*)x + of_x;
    const C *m_c = (const C*)m, *x_c = (const C*)x + of_x;
    C value;
    if (suspect && suspect[row]) {
        value = m_stored ? stored ? dot_formed(m_s, x_s, a, b, row_scale, row, out, in, rank)
                                  : dot_formed(m_s, x_c, a, b, row_scale, row, out, in, rank)
                : stored ? dot_formed(m_c, x_s, a, b, row_scale, row, out, in, rank)
                         : dot_formed(m_c, x_c, a, b, row_scale, row, out, in, rank);
    } else {
        value = m_stored ? stored ? dot(m_s + at, x_s, in, team) : dot(m_s + at, x_c, in, team)
                : stored ? dot(m_c + at, x_s, in, team)
                         : dot(m_c + at, x_c, in, team);
        if (row_scale) value *= row_scale[row];
        for (index_t r = threadIdx.x % WARP; b && r < rank; r += WARP)
            value += b[row * rank + r] * low_rank[e * rank + r];
    }
    value = by_block ? block_sum(value) : warp_sum(value);
    if (threadIdx.x % team != 0) return;
    z[row] = narrow<Z>(value);
    if (!y) return;
    const C result = bias ? gain[row] * value + bias[row] : gain[row] * value;
    if (stored) ((S*)y)[row] = narrow<S>(result);
    else ((C*)y)[row] = result;
}

// ---------------------------------------------------------------- the norm

// n² = ρ²‖w‖² + 2 rowsum(b⊙u) + rowsum(b G⊙b), g = m / n and `unit` = V Aᵀ / n.
// A warp to each row: grid (rows / WARPS).          20 bytes of (out, rank): u, b, b G, unit
//
// u = W Aᵀ, V Aᵀ = ρ⊙u + b G. A row is `suspect` where n² may have lost digits: it is under
// `cancellation` of what it is the sum of, or squares are not within floor..∞, ‖A‖² / rank among
// them: the mean of the diagonal of `gram` = A Aᵀ. `guard_norms` comes after.
extern "C" __global__ void assemble(const C* u, const C* b, const C* bg, const C* squares,
                                    const C* row_scale, const C* gram, const C* magnitude, C* norm,
                                    C* gain, C* unit, unsigned char* suspect, index_t rows,
                                    index_t out, index_t rank, C floor, C cancellation) {
    const index_t row = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP;
    if (row >= rows) return;
    const C scale = row_scale ? row_scale[row] : (C)1;
    C along = 0, update = 0, b_squares = 0, a_squares = 0;
    for (index_t r = threadIdx.x % WARP; r < rank; r += WARP) {
        const C left = b[row * rank + r];
        along += left * (scale * u[row * rank + r]);
        update += bg[row * rank + r] * left;
        b_squares += left * left;
        a_squares += gram[(row / out * rank + r) * rank + r];
    }
    along = warp_sum(along);
    update = warp_sum(update);
    b_squares = warp_sum(b_squares);
    a_squares = warp_sum(a_squares);

    const C infinity = (C)__uint_as_float(0x7f800000u);
    const C base = row_scale ? (scale > 0 ? (C)1 : (C)0) : squares[row];
    const C n2 = base + 2 * along + update;
    const C mean_square = a_squares / (C)rank;
    const C expected = larger(update, b_squares * mean_square);
    const bool trusted = n2 > cancellation * (base + expected) && n2 > floor && n2 < infinity;
    const bool regular = mean_square > floor || b_squares == 0;
    const C n = sqrt(n2);  // what is not above `floor` is suspect, and written again
    for (index_t r = threadIdx.x % WARP; r < rank; r += WARP) {
        const index_t at = row * rank + r;
        unit[at] = (scale * u[at] + bg[at]) / n;
    }
    if (threadIdx.x % WARP != 0) return;
    norm[row] = n;
    gain[row] = magnitude[row] / n;
    suspect[row] = !(trusted && regular);
}

// n = √n² of sums of squares; `suspect` where they are not within floor..∞.
// grid (rows / THREADS)                                             9 bytes of (out,)
extern "C" __global__ void norms(const C* squares, C* norm, unsigned char* suspect, index_t rows,
                                 C floor) {
    const index_t row = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) return;
    const C n2 = squares[row], infinity = (C)__uint_as_float(0x7f800000u);
    norm[row] = sqrt(n2);
    suspect[row] = !(n2 > floor && n2 < infinity);
}

// values / n by rows, 0 where n = 0, NaN where it is.       grid (size / THREADS)       8 bytes
extern "C" __global__ void over_norm(const C* values, const C* norm, C* result, index_t size,
                                     index_t per_row) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const C n = norm[i / per_row];
    result[i] = n != 0 ? values[i] / n : (C)0;
}

// ---------------------------------------------------------------- products in parts

// a = Σ parts · 2^exponent by rows.            grid (rows, any, or 1 with `shrink`)   4 + 2 `parts` bytes
// Each part is what S keeps of what the parts before it left: three of bfloat16 have all 24 bits
// of a float. Where S has fewer exponents than C (`shrink` not null), a row is first brought to a
// largest number in 2^13..2^14, and `shrink` gets what to multiply the product with afterwards.
// `parts` is (parts, rows, columns).
extern "C" __global__ void split(const C* a, S* parts, C* shrink, index_t rows, index_t columns,
                                 int count) {
    const index_t row = blockIdx.x;
    C grow = 1;
    if (shrink) {
        C most = 0;
        for (index_t k = threadIdx.x; k < columns; k += THREADS)
            most = larger(most, fabs(a[row * columns + k]));
        most = block_max(most);
        int exponent = 0;
        if (most > 0 && most < (C)__uint_as_float(0x7f800000u)) frexp(most, &exponent);
        exponent = 14 - exponent;
        exponent = exponent > 100 ? 100 : exponent < -100 ? -100 : exponent;
        grow = ldexp((C)1, exponent);
        if (threadIdx.x == 0) shrink[row] = ldexp((C)1, -exponent);
    }
    const index_t stride = (index_t)gridDim.y * THREADS;
    for (index_t k = (index_t)blockIdx.y * THREADS + threadIdx.x; k < columns; k += stride) {
        C rest = grow * a[row * columns + k];
        for (int p = 0; p < count; ++p) {
            const S part = narrow<S>(rest);
            parts[(p * rows + row) * columns + k] = part;
            rest = rest - (C)wide(part);
            if (rest != rest) rest = 0;  // infinity and NaN are whole in the first part
        }
    }
}

// Of a compute dtype to the nearest of S.                     grid (size / (N THREADS))       6 bytes
extern "C" __global__ void cast(const C* from, S* to, index_t size) {
    const index_t at = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * N;
    if (at >= size) return;
    const int count = size - at < N ? (int)(size - at) : N;
    const bool packed = count == N && aligned(from, to);
    C value[N];
    load(from + at, value, count, packed);
    store(to + at, value, count, packed);
}

// result = Σ products of the parts + beta result, each row scaled by `shrink` where that is not null.
// `products` is (parts, few, columns), or where not `on_left` (rows, parts, few): then `shrink` goes
// by columns.                                     grid (size / THREADS)      4 `parts` + 4 bytes
extern "C" __global__ void sum_parts(const C* products, const C* shrink, C* result, index_t size,
                                     index_t columns, int parts, int on_left, C beta) {
    const index_t i = (index_t)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= size) return;
    const index_t row = i / columns, column = i % columns;
    const index_t first = on_left ? i : row * parts * columns + column;
    C total = 0;
    for (int p = 0; p < parts; ++p) total += products[first + p * (on_left ? size : columns)];
    if (shrink) total *= shrink[on_left ? row : column];
    result[i] = beta != 0 ? total + beta * result[i] : total;
}

// ---------------------------------------------------------------- the guard

enum { TILE = 8 };  // tokens, or ranks, that a thread works on at once: V is formed once for all

// n of the suspect rows, from V itself, without overflow or underflow; and where `gain` is not null
// g = m / n and `unit` = V Aᵀ / n, 0 where n = 0.                      grid (any), a row a block
extern "C" __global__ void guard_norms(const unsigned char* suspect, index_t rows, const S* weight,
                                       int turned, const C* a, const C* b, const C* row_scale,
                                       C* norm, const C* magnitude, C* gain, C* unit, index_t out,
                                       index_t in, index_t rank) {
    for (index_t row = blockIdx.x; row < rows; row += gridDim.x) {
        if (!suspect[row]) continue;
        C most = 0;
        for (index_t k = threadIdx.x; k < in; k += THREADS)
            most = larger(most, fabs(formed(weight, turned, a, b, row_scale, row, k, out, in, rank)));
        most = block_max(most);
        const C peak = most > 0 ? most : (C)1;
        C total = 0;
        for (index_t k = threadIdx.x; k < in; k += THREADS) {
            const C v = formed(weight, turned, a, b, row_scale, row, k, out, in, rank) / peak;
            total += v * v;
        }
        total = block_sum(total);
        const C n = peak * sqrt(total);  // NaN where a number is
        if (threadIdx.x == 0) norm[row] = n;
        if (!gain) continue;
        if (threadIdx.x == 0) gain[row] = n != 0 ? magnitude[row] / n : (C)0;
        for (index_t r0 = 0; r0 < rank; r0 += TILE) {
            C sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t k = threadIdx.x; k < in && n != 0; k += THREADS) {
                const C v = formed(weight, turned, a, b, row_scale, row, k, out, in, rank);
                for (int j = 0; j < TILE; ++j)
                    if (r0 + j < rank) sums[j] += a[(row / out * rank + r0 + j) * in + k] * v;
            }
            for (int j = 0; j < TILE; ++j) {
                const C value = block_sum(sums[j]);
                if (threadIdx.x == 0 && r0 + j < rank)
                    unit[row * rank + r0 + j] = n != 0 ? value / n : (C)0;
            }
        }
    }
}

enum { LISTERS = 1024 };  // threads

// The suspect rows that are not of zeros, in order, and how many. What is computed for a row of
// zeros has no effect, as its gain is 0: it is no suspect any more. One block: grid (1), 1024 threads.
// 2 bytes of (out,). `switches` gets {1, 1 if there are any else 0}, for products that add to what the guard wrote.
extern "C" __global__ void list_suspects(unsigned char* suspect, const C* norm, int* list,
                                         int* count, C* switches, index_t rows) {
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
        if (!any) *count = 0;
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
    if (threadIdx.x == LISTERS - 1) *count = at + own;
    for (index_t row = first; row < end; ++row)
        if (suspect[row]) list[at++] = (int)row;
}

__device__ inline C item(const void* array, index_t i, bool stored) {
    return stored ? (C)wide(((const S*)array)[i]) : ((const C*)array)[i];
}

// z[:, i] = x Vᵢᵀ for the listed rows i, and y[:, i] = gᵢ z[:, i] + biasᵢ.    grid (any, tiles)
// z is at z[e·z_element + t·z_token + i·z_row]; x and y are of S where `stored`, else of C. `y`
// may be null.
extern "C" __global__ void guard_outputs(const int* list, const int* count, const S* weight,
                                         int turned, const C* a, const C* b, const C* row_scale,
                                         const void* x, int stored, Z* z, index_t z_element, index_t z_token,
                                         index_t z_row, void* y, const C* gain, const C* bias,
                                         index_t tokens, index_t out, index_t in, index_t rank) {
    for (int s = blockIdx.x; s < *count; s += gridDim.x) {
        const index_t row = list[s], e = row / out, i = row % out;
        for (index_t t0 = (index_t)blockIdx.y * TILE; t0 < tokens; t0 += (index_t)gridDim.y * TILE) {
            C sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t k = threadIdx.x; k < in; k += THREADS) {
                const C v = formed(weight, turned, a, b, row_scale, row, k, out, in, rank);
                for (int j = 0; j < TILE; ++j)
                    if (t0 + j < tokens) sums[j] += item(x, (e * tokens + t0 + j) * in + k, stored) * v;
            }
            for (int j = 0; j < TILE; ++j) {
                const C value = block_sum(sums[j]);
                const index_t t = t0 + j;
                if (threadIdx.x != 0 || t >= tokens) continue;
                z[e * z_element + t * z_token + i * z_row] = narrow<Z>(value);
                if (!y) continue;
                const C result = bias ? gain[row] * value + bias[row] : gain[row] * value;
                const index_t at = (e * tokens + t) * out + i;
                if (stored) ((S*)y)[at] = narrow<S>(result);
                else ((C*)y)[at] = result;
            }
        }
    }
}

// result = Σ over the listed rows i of d[:, i] Vᵢ, and nothing where none is.
// grid (in / THREADS, tiles, stack)
extern "C" __global__ void guard_inputs(const int* list, const int* count, const S* weight,
                                        int turned, const C* a, const C* b, const C* row_scale,
                                        const Z* d, Z* result, index_t tokens, index_t out, index_t in,
                                        index_t rank) {
    const index_t k = (index_t)blockIdx.x * blockDim.x + threadIdx.x, e = blockIdx.z;
    if (*count == 0 || k >= in) return;
    for (index_t t0 = (index_t)blockIdx.y * TILE; t0 < tokens; t0 += (index_t)gridDim.y * TILE) {
        C sums[TILE];
        for (int j = 0; j < TILE; ++j) sums[j] = 0;
        for (int s = 0; s < *count; ++s) {
            const index_t row = list[s];
            if (row / out != e) continue;
            const C v = formed(weight, turned, a, b, row_scale, row, k, out, in, rank);
            for (int j = 0; j < TILE; ++j)
                if (t0 + j < tokens) sums[j] += (C)wide(d[(e * tokens + t0 + j) * out + row % out]) * v;
        }
        for (int j = 0; j < TILE; ++j)
            if (t0 + j < tokens) result[(e * tokens + t0 + j) * in + k] = narrow<Z>(sums[j]);
    }
}

// d[:, i] = 0 for the listed rows i, so that no product with W meets them.      grid (any, any)
extern "C" __global__ void guard_hide(const int* list, const int* count, Z* d, index_t tokens,
                                      index_t out) {
    for (int s = blockIdx.y; s < *count; s += gridDim.y) {
        const index_t e = list[s] / out, i = list[s] % out;
        for (index_t t = (index_t)blockIdx.x * blockDim.x + threadIdx.x; t < tokens;
             t += (index_t)gridDim.x * blockDim.x)
            d[(e * tokens + t) * out + i] = narrow<Z>(0);
    }
}

// low = d b once more, where any rows were hidden: a warp to each token.       grid (any, stack)
extern "C" __global__ void guard_low(const int* count, const Z* d, const C* b, C* low,
                                     index_t tokens, index_t out, index_t rank) {
    if (*count == 0) return;
    const index_t e = blockIdx.y;
    for (index_t t = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP; t < tokens;
         t += (index_t)gridDim.x * WARPS)
        for (index_t r0 = 0; r0 < rank; r0 += TILE) {
            C sums[TILE];
            for (int j = 0; j < TILE; ++j) sums[j] = 0;
            for (index_t i = threadIdx.x % WARP; i < out; i += WARP) {
                const C value = (C)wide(d[(e * tokens + t) * out + i]);
                for (int j = 0; j < TILE; ++j)
                    if (r0 + j < rank) sums[j] += value * b[(e * out + i) * rank + r0 + j];
            }
            for (int j = 0; j < TILE; ++j) {
                const C total = warp_sum(sums[j]);
                if (threadIdx.x % WARP == 0 && r0 + j < rank)
                    low[(e * tokens + t) * rank + r0 + j] = total;
            }
        }
}

// ---------------------------------------------------------------- merge and AdamW

// A warp multiplies on tensor cores: sums (16, 8) += left (16, 16) right (16, 8). Lane 4 g + t has
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

// What a lane has of 16 by 16 numbers, two in a register.
struct alignas(16) Tile { unsigned item[4]; };

enum {
    PARTS = 3,               // of bfloat16, that have the digits of a float
    TERMS = 16,              // of a rank, that tensor cores add up at once
    DOWN = 2, ACROSS = 2,    // tiles that a warp has: 32 rows by 32 columns
    STRIP = 32,
    PATCH_ROWS = 2 * DOWN, PATCH_COLUMNS = 4 * ACROSS, PATCH_PACKS = PATCH_COLUMNS / N,  // of a lane
    BELOW = 2, BESIDE = 4,   // warps of a block: it has 64 rows by 128 columns
    PATCH_THREADS = WARP * BELOW * BESIDE
};

__device__ inline index_t tiles_down(index_t rows) {
    return (rows + STRIP - 1) / STRIP * DOWN;
}
__device__ inline index_t tiles_across(index_t columns) {
    return (columns + STRIP - 1) / STRIP * ACROSS;
}

// b and A in parts of bfloat16, each what it keeps of what the parts before it left, and in the order
// in which the lanes of a tensor core take them: tiles (stack, down and across, rank / TERMS, parts,
// WARP). W is (rows, columns): its rows are those of b and its columns those of A, or where `turned`
// the other way round.       grid (tiles / WARPS, rank / TERMS, stack)       4 + 2 `parts` bytes
extern "C" __global__ void tiles(const C* a, const C* b, Tile* result, index_t rows,
                                 index_t columns, index_t rank, int parts, int turned) {
    const index_t tile = (index_t)blockIdx.x * WARPS + threadIdx.x / WARP, e = blockIdx.z;
    const index_t down = tiles_down(rows), across = tiles_across(columns);
    if (tile >= down + across) return;
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const bool is_down = tile < down, of_b = is_down == !turned;
    const index_t count = is_down ? rows : columns;
    const C* from = (of_b ? b : a) + e * rank * count;
    const index_t step = of_b ? rank : 1, step_k = of_b ? 1 : count;
    Tile found[PARTS];
#pragma unroll
    for (int h = 0; h < 4; ++h) {
        // Which columns a tile has is free: so a lane has 8 neighbours in its tiles.
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

// What a warp has of V = ρ⊙W + b A. W is (rows, columns), or where `turned` (columns, rows) turned
// over: then ρ goes by columns. Blocks go along the columns first, as memory does.
struct Patch {
    int g, t;
    index_t top, first, e, rows, columns;
    int turned;
    float sums[DOWN][2 * ACROSS][4];

    __device__ Patch(index_t rows, index_t columns, int turned)
        : g(threadIdx.x % WARP / 4), t(threadIdx.x % 4), e(blockIdx.z), rows(rows), columns(columns), turned(turned), sums{} {
        const unsigned across = (unsigned)((columns + STRIP * BESIDE - 1) / (STRIP * BESIDE));
        const index_t down = blockIdx.x / across, beside = blockIdx.x % across;
        top = (down * BELOW + threadIdx.x / WARP / BESIDE) * STRIP;
        first = (beside * BESIDE + threadIdx.x / WARP % BESIDE) * STRIP;
    }

    __device__ bool outside() const { return top >= rows || first >= columns; }

    // b A. With 3 `parts` it has float's digits, from 6 products.
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
                // Tensor cores cut off what they add, and do not round it. So they add up no more than
                // these products, the least first; the sum over steps is made outside.
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
    // How many of the numbers from `c` on there are, and which of `out` the first belongs to.
    __device__ int count(int i, int c) const {
        const index_t left = row(i) < rows ? columns - column(c) : 0;
        return left < 0 ? 0 : left < N ? (int)left : N;
    }
    __device__ index_t line(int i, int c) const {
        return turned ? e * columns + column(c) : e * rows + row(i);
    }

    // What the lane has of W, all of it on its way at once: a row after the other would wait for the
    // memory as often.
    __device__ void fetch(const S* weight, bool packed, Pack<S> (&held)[PATCH_ROWS][PATCH_PACKS]) {
#pragma unroll
        for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
            for (int c = 0; c < PATCH_COLUMNS; c += N) {
                if (packed) {  // what lies outside is what lies at the edge
                    const index_t own = row(i) < rows ? row(i) : rows - 1;
                    const index_t from = column(c) < columns ? column(c) : columns - N;
                    held[i][c / N] = *(const Pack<S>*)(weight + (e * rows + own) * columns + from);
                } else {
#pragma unroll
                    for (int j = 0; j < N; ++j)
                        if (j < count(i, c)) held[i][c / N].item[j] = weight[at(i, c) + j];
                }
            }
    }

    // V from `c` on in row `i` of the lane's.
    __device__ void form(const Pack<S>& held, const C* row_scale, int i, int c, C* value) const {
#pragma unroll
        for (int j = 0; j < N; ++j) {
            const index_t own = line(i, c) + (turned && j < count(i, c) ? j : 0);
            const C scale = row_scale ? row_scale[own] : (C)1;
            value[j] = scale * (C)wide(held.item[j]) +
                       (C)sums[i / 2][(c + j) / 2][i % 2 * 2 + (c + j) % 2];
        }
    }
};

// W' = g⊙(ρ⊙W + b A).     2 (W) + 2 (W') = 4 bytes; tiles come from the cache, for each block once.
// grid (rows / 64 · columns / 128, 1, stack), of W as in `Patch`; 256 threads
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(C) == 8 ? 1 : 2)
    merge(const S* __restrict__ weight, const Tile* __restrict__ tiles,
          const C* __restrict__ row_scale, const C* __restrict__ gain, S* __restrict__ merged,
          index_t rows, index_t columns, index_t rank, int parts, int turned) {
    Patch patch(rows, columns, turned);
    if (patch.outside()) return;
    const bool packed = columns % N == 0 && aligned(weight, merged);
    Pack<S> held[PATCH_ROWS][PATCH_PACKS];
    patch.multiply(tiles, rank, parts);
    patch.fetch(weight, packed, held);
#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; c += N) {
            const int count = patch.count(i, c);
            if (count == 0) continue;
            C value[N];
            patch.form(held[i][c / N], row_scale, i, c, value);
#pragma unroll
            for (int j = 0; j < N; ++j)
                value[j] *= gain[patch.line(i, c) + (turned && j < count ? j : 0)];
            store(merged + patch.at(i, c), value, count, packed);
        }
}

// ‖Vᵢ‖², or ‖wᵢ‖² where `rank` is 0: sums over what a warp has of each row, (stack, chunks, out), for
// `sum_chunks`. One kernel for both, so that the two are equal where b = 0.  2 (W) + 4 / 32 bytes
// grid (rows / 64 · columns / 128, 1, stack), of W as in `Patch`; 256 threads
extern "C" __global__ void __launch_bounds__(PATCH_THREADS, sizeof(C) == 8 ? 1 : 2)
    squares(const S* __restrict__ weight, const Tile* __restrict__ tiles,
            const C* __restrict__ row_scale, C* __restrict__ partial, index_t rows,
            index_t columns, index_t rank, int parts, int turned) {
    Patch patch(rows, columns, turned);
    if (patch.outside()) return;
    const bool packed = columns % N == 0 && aligned(weight);
    Pack<S> held[PATCH_ROWS][PATCH_PACKS];
    patch.multiply(tiles, rank, parts);
    patch.fetch(weight, packed, held);
    C by_row[PATCH_ROWS] = {}, by_column[PATCH_COLUMNS] = {};
#pragma unroll
    for (int i = 0; i < PATCH_ROWS; ++i)
#pragma unroll
        for (int c = 0; c < PATCH_COLUMNS; c += N) {
            const int count = patch.count(i, c);
            if (count == 0) continue;
            C value[N];
            patch.form(held[i][c / N], row_scale, i, c, value);
#pragma unroll
            for (int j = 0; j < N; ++j) {
                const C square = j < count ? value[j] * value[j] : (C)0;
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

enum { ROWS = 4 };  // of W, that a thread works on at once: A is read once for all of them

// The same in double, where `merge` would round.     8 (W) + 8 (W') = 16 bytes, A from the cache
// grid (in / (N THREADS), out / ROWS, stack)
extern "C" __global__ void merge_wide(const S* __restrict__ weight, const C* __restrict__ a,
                                      const C* __restrict__ b, const C* __restrict__ row_scale,
                                      const C* __restrict__ gain, S* __restrict__ merged,
                                      index_t out, index_t in, index_t rank) {
    const index_t k = ((index_t)blockIdx.x * blockDim.x + threadIdx.x) * N, e = blockIdx.z;
    if (k >= in) return;
    const bool packed = in % N == 0 && aligned(weight, a, merged);
    const int count = in - k < N ? (int)(in - k) : N;
    for (index_t i0 = (index_t)blockIdx.y * ROWS; i0 < out; i0 += (index_t)gridDim.y * ROWS) {
        C update[ROWS][N];
#pragma unroll
        for (int i = 0; i < ROWS; ++i)
#pragma unroll
            for (int j = 0; j < N; ++j) update[i][j] = 0;
        for (index_t r = 0; r < rank; ++r) {
            C right[N];
            load(a + (e * rank + r) * in + k, right, count, packed);
#pragma unroll
            for (int i = 0; i < ROWS; ++i) {
                const index_t row = i0 + i < out ? i0 + i : out - 1;
                const C left = b[(e * out + row) * rank + r];
#pragma unroll
                for (int j = 0; j < N; ++j) update[i][j] += left * right[j];
            }
        }
#pragma unroll
        for (int i = 0; i < ROWS; ++i) {
            if (i0 + i >= out) break;
            const index_t row = e * out + i0 + i;
            C value[N];
            load(weight + row * in + k, value, count, packed);
            const C scale = row_scale ? row_scale[row] : (C)1;
#pragma unroll
            for (int j = 0; j < N; ++j) value[j] = gain[row] * (scale * value[j] + update[i][j]);
            store(merged + row * in + k, value, count, packed);
        }
    }
}

// What AdamW needs of a leaf; mirrored by the backend's table of 8-byte numbers.
struct Leaf {
    const void *p, *g;
    const C *mu, *nu;
    void* new_p;
    C *new_mu, *new_nu;
    index_t size, first_block, p_type, g_type;  // 0 half_t, 1 bf16_t, 2 float, 3 double
    double rate, decay;
};

enum { LEAF_BLOCK = 4 * THREADS };  // numbers of a leaf that a block steps

__device__ inline C typed(const void* array, index_t i, index_t type) {
    if (type == 0) return (C)wide(((const half_t*)array)[i]);
    if (type == 1) return (C)wide(((const bf16_t*)array)[i]);
    return type == 2 ? (C)((const float*)array)[i] : (C)((const double*)array)[i];
}

// One step of AdamW for all leaves.        grid (Σ size / LEAF_BLOCK)
// 16 (p, g, mu, nu) + 12 (p, mu, nu) = 28 bytes in float
extern "C" __global__ void adamw(const Leaf* leaves, int count, C beta1, C rest1, C beta2, C rest2,
                                 C eps, C correct1, C correct2) {
    int low = 0, high = count - 1;
    while (low < high) {  // the last leaf that begins at this block or before
        const int middle = (low + high + 1) / 2;
        if (leaves[middle].first_block <= (index_t)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Leaf leaf = leaves[low];
    const index_t first = ((index_t)blockIdx.x - leaf.first_block) * LEAF_BLOCK;
    for (index_t i = first + threadIdx.x; i < first + LEAF_BLOCK && i < leaf.size; i += THREADS) {
        const C p = typed(leaf.p, i, leaf.p_type), g = typed(leaf.g, i, leaf.g_type);
        const C mu = beta1 * leaf.mu[i] + rest1 * g;
        const C nu = beta2 * leaf.nu[i] + rest2 * (g * g);
        const C turn = (mu / correct1) / (sqrt(nu / correct2) + eps) + (C)leaf.decay * p;
        const C stepped = p - (C)leaf.rate * turn;
        leaf.new_mu[i] = mu;
        leaf.new_nu[i] = nu;
        if (leaf.p_type == 0) ((half_t*)leaf.new_p)[i] = narrow<half_t>(stepped);
        else if (leaf.p_type == 1) ((bf16_t*)leaf.new_p)[i] = narrow<bf16_t>(stepped);
        else if (leaf.p_type == 2) ((float*)leaf.new_p)[i] = (float)stepped;
        else ((double*)leaf.new_p)[i] = (double)stepped;
    }
}
