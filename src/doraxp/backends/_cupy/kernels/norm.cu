// The norm.

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
