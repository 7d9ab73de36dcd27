// Suspect rows.
//
// A suspect row i of V is one whose factored products may have lost digits: `suspect` marks it, and
// any[0] says whether there are such rows. Every pass that needs V Vᵢ forms it from its factors
// then. Without suspect rows, a pass reads `any` and nothing else.

__device__ inline compute_t item(const void* array, index_t i, bool stored) {
    return stored ? (compute_t)wide(((const storage_t*)array)[i]) : ((const compute_t*)array)[i];
}

// The first suspect row from `i` on, or `end`. Sixteen marks are read at once.
__device__ inline index_t next_suspect(const unsigned char* suspect, index_t i, index_t end) {
    while (i < end) {
        if (i + 16 <= end && aligned(suspect + i)) {
            const Pack<unsigned> marks = *(const Pack<unsigned>*)(suspect + i);
            if ((marks.item[0] | marks.item[1] | marks.item[2] | marks.item[3]) == 0) {
                i += 16;
                continue;
            }
        }
        if (suspect[i]) return i;
        ++i;
    }
    return end;
}

// q b for one number of b, with q = −p / n. q alone would overflow where n is tiny.
__device__ inline compute_t pulled(compute_t p, compute_t n, compute_t b) {
    return n != 0 ? -p * b / n : (compute_t)0;
}

// The suspect rows' part of dA[r, k]: Σ (q⊙b)ᵢᵣ Vᵢₖ + gᵢ bᵢᵣ Σ_tokens dyᵢ xₖ. `p` is null for q = 0.
__device__ inline compute_t suspect_pull(
    const unsigned char* suspect, const storage_t* weight, int turned, const compute_t* a,
    const compute_t* b, const compute_t* row_scale, const compute_t* gain, const compute_t* norm,
    const compute_t* p, const void* d, int d_is_stored, const void* x, int x_is_stored, index_t e,
    index_t r, index_t k, index_t tokens, index_t out, index_t inner, index_t rank) {
    compute_t total = 0;
    const index_t end = (e + 1) * out;
    for (index_t row = next_suspect(suspect, e * out, end); row < end;
         row = next_suspect(suspect, row + 1, end)) {
        if (p)
            total += pulled(p[row], norm[row], b[row * rank + r]) *
                     formed(weight, turned, a, b, row_scale, row, k, out, inner, rank);
        compute_t along = 0;
        for (index_t t = e * tokens; t < (e + 1) * tokens; ++t)
            along += item(d, t * out + row % out, d_is_stored) * item(x, t * inner + k, x_is_stored);
        total += gain[row] * b[row * rank + r] * along;
    }
    return total;
}
