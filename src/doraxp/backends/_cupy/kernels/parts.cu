// Products in parts: a float32 factor as a sum of 16-bit ones.

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
