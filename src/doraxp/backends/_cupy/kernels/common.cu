// The notation, the types and the helpers of the kernels of the CuPy backend. source.py makes one
// source of all files in this folder. NVRTC compiles it; a C++ compiler can do so too, with
// tests/cuda_host.hpp.
//
//     W (out, in)   A (rank, in)   b = s B (out, rank)   ρ (out,) or null for 1   V = ρ⊙W + b A
//     n = ‖V‖ by rows, (out,)      g = m / n             z = x Vᵀ, (tokens, out)
//
// The compiler's options define three types:
//     storage_t  weight, x, dy and y    half_t, bf16_t, float or double
//     compute_t  all other arrays       float or double
//     product_t  z and dz               storage_t in mixed precision, else compute_t
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

// The number of storage_t with these bits. Only types of 16 bits have such a number.
template <typename T> struct OfBits {
    static __device__ T get(unsigned short) { return 0; }
};
template <> struct OfBits<half_t> {
    static __device__ half_t get(unsigned short bits) { return {bits}; }
};
template <> struct OfBits<bf16_t> {
    static __device__ bf16_t get(unsigned short bits) { return {bits}; }
};
__device__ inline storage_t from_bits(unsigned short bits) { return OfBits<storage_t>::get(bits); }

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

// Store 16 bytes at once. It is assembly because the compiler merges a store of C++ with the narrow
// stores of another branch, and writes number by number in both.
template <typename T> __device__ inline void store_pack(Pack<T>* to, const Pack<T>& pack) {
#ifdef DORAXP_HOST
    *to = pack;
#else
    const uint4& bits = (const uint4&)pack;
    asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
                 :
                 : "l"(to), "r"(bits.x), "r"(bits.y), "r"(bits.z), "r"(bits.w)
                 : "memory");
#endif
}

// Store `count` ≤ PER_THREAD numbers, as `load` loads them.
template <typename T> __device__ inline void store(T* to, const compute_t* from, int count,
                                                   bool packed) {
    const int each = 16 / sizeof(T);
    if (packed) {
#pragma unroll
        for (int k = 0; k < PER_THREAD / each; ++k) {
            Pack<T> pack;
#pragma unroll
            for (int j = 0; j < each; ++j) pack.item[j] = narrow<T>(from[k * each + j]);
            store_pack((Pack<T>*)to + k, pack);
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

// ρ of a row, or 1 without ρ. A row with ρ = 0 is a row of zeros of W, which any ρ fits: 1 keeps the
// update, which is divided by ρ before the product with W and multiplied by it afterwards.
__device__ inline compute_t scale_of(const compute_t* row_scale, index_t row) {
    const compute_t scale = row_scale ? row_scale[row] : (compute_t)1;
    return scale != 0 ? scale : (compute_t)1;
}

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
#pragma unroll 1
    for (index_t r = 0; b && r < rank; ++r)
        value += (double)b[row * rank + r] * a[(e * rank + r) * inner + k];
    return (compute_t)value;
}

// sums (16, 8) += left (16, 16) right (16, 8), by a warp on tensor cores. Lane 4 g + t holds
//     of left   rows g, g + 8     columns 2t, 2t + 1, 2t + 8, 2t + 9    (PTX ISA, mma.m16n8k16)
//     of right  column g          rows    2t, 2t + 1, 2t + 8, 2t + 9
//     of sums   rows g, g + 8     columns 2t, 2t + 1
// All lanes of the warp must come here together. `volatile` keeps the compiler from moving the
// product into a branch that some of them take. `loose_product` is for sums that all lanes use:
// there the compiler may choose the order, and needs fewer registers.
#ifdef DORAXP_HOST
#define tensor_product host_tensor_product
#define loose_product host_tensor_product
#else
#define TENSOR_PRODUCT(QUALIFIER)                                                  \
    asm QUALIFIER("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "           \
                  "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                  : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])     \
                  : "r"(left[0]), "r"(left[1]), "r"(left[2]), "r"(left[3]),        \
                    "r"(right[0]), "r"(right[1]))
__device__ inline void tensor_product(float* sums, const unsigned* left, const unsigned* right) {
    TENSOR_PRODUCT(volatile);
}
__device__ inline void loose_product(float* sums, const unsigned* left, const unsigned* right) {
    TENSOR_PRODUCT();
}
#undef TENSOR_PRODUCT
#endif
