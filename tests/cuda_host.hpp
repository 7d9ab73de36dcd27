// The parts of CUDA that the kernels use, for a C++ compiler. Each thread of a block is a fiber, which
// runs until it reaches a barrier. Blocks run one after the other.
#pragma once
#ifndef __x86_64__
#include <ucontext.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#define DORAXP_HOST
#define __global__
#define __device__
#define __launch_bounds__(...)
#define __shared__ static  // blocks do not overlap

struct Dim3 { unsigned x, y, z; };
static Dim3 gridDim, blockDim, blockIdx, threadIdx;
struct alignas(16) uint4 { unsigned x, y, z, w; };

inline float __uint_as_float(unsigned bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

// Round to nearest even in a format of `digits` explicit bits, by arithmetic in double.
inline double host_round(double value, int digits, int least) {
    if (!std::isfinite(value) || value == 0) return value;
    int exponent;
    std::frexp(value, &exponent);
    const int unit = (exponent - 1 < least ? least : exponent - 1) - digits;
    return std::ldexp(std::nearbyint(std::ldexp(value, -unit)), unit);
}

// A double is rounded twice, first to float: the device's instruction has no form for double.
inline unsigned short host_bf16(double given) {
    float value = (float)given;
    if (std::isnan(value)) return 0x7fff;
    const double rounded = host_round(value, 7, -126);
    const float result = std::fabs(rounded) > 3.39e38 ? std::copysign(INFINITY, value) : (float)rounded;
    unsigned bits;
    std::memcpy(&bits, &result, sizeof bits);
    return (unsigned short)(bits >> 16);
}

inline unsigned short host_half(double given) {
    float value = (float)given;
    const unsigned short sign = std::signbit(value) ? 0x8000 : 0;
    if (std::isnan(value)) return 0x7fff;
    const double rounded = std::fabs(host_round(value, 10, -14));
    if (rounded > 65504) return sign | 0x7c00;
    if (rounded < std::ldexp(1, -14)) return sign | (unsigned short)std::ldexp(rounded, 24);
    int exponent;
    const double fraction = std::frexp(rounded, &exponent);
    const unsigned digits = (unsigned)std::ldexp(fraction, 11) - 1024;
    return sign | (unsigned short)((exponent + 14) << 10 | digits);
}

inline float host_half_to_float(unsigned short bits) {
    const int exponent = bits >> 10 & 31, digits = bits & 1023;
    float value;
    if (exponent == 31) value = digits ? NAN : INFINITY;
    else if (exponent == 0) value = std::ldexp((float)digits, -24);
    else value = std::ldexp((float)(digits + 1024), exponent - 25);
    return bits & 0x8000 ? -value : value;
}

namespace host {
// A place in a run of code, to which `go` returns. ucontext makes two system calls for each switch,
// which would take most of the time of the tests. On x86-64 a switch is a few instructions: it saves
// the registers that a function must keep (System V ABI) on the stack that it leaves.
#ifdef __x86_64__
extern "C" void host_switch(void** from, void* to) __attribute__((visibility("hidden")));
asm(R"(
    .text
    .globl host_switch
    .hidden host_switch
    .type host_switch, @function
host_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size host_switch, .-host_switch
)");

struct Place {
    void* top = nullptr;

    // The first `go` to this place calls `function`, which must not return, on the given stack.
    void begin(char* stack, std::size_t size, void (*function)()) {
        auto end = ((std::size_t)stack + size) / 16 * 16;
        void** frame = (void**)end - 8;  // six registers, the address to return to, and one to align
        for (int i = 0; i < 6; ++i) frame[i] = nullptr;
        frame[6] = (void*)function;
        frame[7] = nullptr;
        top = frame;
    }
    void go(Place& from) { host_switch(&from.top, top); }
};
#else
struct Place {
    ucontext_t context;

    void begin(char* stack, std::size_t size, void (*function)()) {
        getcontext(&context);
        context.uc_stack.ss_sp = stack;
        context.uc_stack.ss_size = size;
        context.uc_link = nullptr;
        makecontext(&context, function, 0);
    }
    void go(Place& from) { swapcontext(&from.context, &context); }
};
#endif

struct Fiber {
    enum { SIZE = 1 << 16 };
    Place place;
    std::unique_ptr<char[]> stack{new char[SIZE]};
    bool done = false;
    int waits = 0;  // 0: not waiting, 1: for its warp, 2: for its block
};
static std::vector<std::unique_ptr<Fiber>> fibers;
static Place scheduler;
static std::function<void()> body;
static unsigned current;
static double slots[1024];

inline void enter() {
    body();
    fibers[current]->done = true;
    scheduler.go(fibers[current]->place);
}

inline void wait(int kind) {
    Fiber& fiber = *fibers[current];
    fiber.waits = kind;
    scheduler.go(fiber.place);
}

inline void release(unsigned first, unsigned end, int kind) {
    for (unsigned i = first; i < end; ++i)
        if (!fibers[i]->done && fibers[i]->waits != kind) return;
    for (unsigned i = first; i < end; ++i) fibers[i]->waits = 0;
}

inline void run_block(unsigned threads) {
    while (fibers.size() < threads) fibers.emplace_back(new Fiber);
    for (unsigned i = 0; i < threads; ++i) {
        Fiber& fiber = *fibers[i];
        fiber.done = false;
        fiber.waits = 0;
        fiber.place.begin(fiber.stack.get(), Fiber::SIZE, enter);
    }
    for (bool alive = true; alive;) {
        alive = false;
        for (unsigned i = 0; i < threads; ++i) {
            Fiber& fiber = *fibers[i];
            if (fiber.done || fiber.waits) continue;
            current = i;
            threadIdx = {i, 0, 0};
            fiber.place.go(scheduler);
        }
        for (unsigned i = 0; i < threads; ++i) alive = alive || !fibers[i]->done;
        for (unsigned w = 0; w < threads; w += 32) release(w, w + 32, 1);
        release(0, threads, 2);
    }
}

inline void launch(Dim3 grid, unsigned threads, std::function<void()> kernel) {
    body = std::move(kernel);
    gridDim = grid;
    blockDim = {threads, 1, 1};
    for (unsigned z = 0; z < grid.z; ++z)
        for (unsigned y = 0; y < grid.y; ++y)
            for (unsigned x = 0; x < grid.x; ++x) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
}

template <typename... A, std::size_t... I>
void call(void (*kernel)(A...), void** arguments, std::index_sequence<I...>) {
    kernel(*(A*)arguments[I]...);
}
template <typename... A> void call(void (*kernel)(A...), void** arguments) {
    call(kernel, arguments, std::index_sequence_for<A...>());
}

// A letter for the type of each parameter: P pointer, q long long, i int, f float, d double, s struct.
inline char code(const void*) { return 'P'; }
inline char code(long long) { return 'q'; }
inline char code(int) { return 'i'; }
inline char code(float) { return 'f'; }
inline char code(double) { return 'd'; }
template <typename T> std::enable_if_t<std::is_class<T>::value, char> code(const T&) { return 's'; }
template <typename... A> const char* signature(void (*)(A...)) {
    static const char codes[] = {code(A{})..., 0};
    return codes;
}
}  // namespace host

inline void __syncthreads() { host::wait(2); }

template <typename T> inline T __shfl_xor_sync(unsigned, T value, int step) {
    const unsigned own = host::current;
    host::slots[own] = (double)value;
    host::wait(1);
    const T other = (T)host::slots[own ^ step];
    host::wait(1);
    return other;
}

template <typename T> inline T __shfl_sync(unsigned, T value, int lane) {
    const unsigned own = host::current;
    host::slots[own] = (double)value;
    host::wait(1);
    const T other = (T)host::slots[own / 32 * 32 + lane];
    host::wait(1);
    return other;
}

inline float host_truncated(double value) {
    const float near = (float)value;
    return std::fabs(near) > std::fabs(value) ? std::nextafterf(near, 0) : near;
}

inline float host_bf16_to_float(unsigned short bits) {
    return __uint_as_float((unsigned)bits << 16);
}

// sums (16, 8) += left (16, 16) right (16, 8), of 16-bit numbers, with the lanes of mma.m16n8k16.
// As on a device, a sum is truncated and not rounded (Fasi, Higham, Mikaitis and Pranesh 2021,
// doi:10.7717/peerj-cs.330).
template <float (*TO_FLOAT)(unsigned short)>
inline void host_product(float* sums, const unsigned* left, const unsigned* right) {
    static unsigned held[1024][6];
    const unsigned own = host::current, warp = own / 32 * 32, g = own % 32 / 4, t = own % 4;
    std::memcpy(held[own], left, 4 * sizeof *left);
    std::memcpy(held[own] + 4, right, 2 * sizeof *right);
    host::wait(1);
    for (unsigned i = 0; i < 4; ++i) {
        const unsigned row = g + i / 2 * 8, column = 2 * t + i % 2;
        double total = sums[i];
        for (unsigned k = 0; k < 16; ++k) {
            const unsigned* of_left = held[warp + row % 8 * 4 + k % 8 / 2];
            const unsigned* of_right = held[warp + column * 4 + k % 8 / 2];
            const unsigned shift = k % 2 * 16;
            total += (double)TO_FLOAT((unsigned short)(of_left[row / 8 + k / 8 * 2] >> shift)) *
                     TO_FLOAT((unsigned short)(of_right[4 + k / 8] >> shift));
        }
        sums[i] = host_truncated(total);
    }
    host::wait(1);
}
#define host_tensor_product host_product<host_bf16_to_float>
#define host_half_product host_product<host_half_to_float>

// Defines `launch_NAME(x, y, z, threads, arguments)` and `signature_NAME()` for a kernel.
#define DORAXP_LAUNCHER(NAME)                                                             \
    extern "C" const char* signature_##NAME() { return host::signature(NAME); }           \
    extern "C" void launch_##NAME(unsigned x, unsigned y, unsigned z, unsigned threads,   \
                                  void** arguments) {                                     \
        host::launch({x, y, z}, threads, [=] { host::call(NAME, arguments); });           \
    }
