// AdamW.

// One array of the parameters and its moments. LEAF in parameters.py has the same fields. The new
// arrays may be the old ones: a thread reads its number of each before it writes.
struct Leaf {
    const void *p, *g;
    const compute_t *mu, *nu;
    void* new_p;
    compute_t *new_mu, *new_nu;
    index_t size, first_block;
    int p_type, g_type;  // 0 half_t, 1 bf16_t, 2 float, 3 double
    double rate, decay;
};

// Passed by value: a launch needs no copy to the device before it.
enum {
    LEAVES = 36,
    LEAF_BLOCK = 4 * THREADS  // numbers of a leaf that a block updates
};
struct Leaves {
    Leaf leaf[LEAVES];
};

__device__ inline compute_t typed(const void* array, index_t i, int type) {
    if (type == 0) return (compute_t)wide(((const half_t*)array)[i]);
    if (type == 1) return (compute_t)wide(((const bf16_t*)array)[i]);
    return type == 2 ? (compute_t)((const float*)array)[i] : (compute_t)((const double*)array)[i];
}

// One step of AdamW for all leaves.
// grid (Σ size / LEAF_BLOCK)            16 (p, g, mu, nu) + 12 (p, mu, nu) = 28 bytes in float
extern "C" __global__ void adamw(Leaves leaves, int leaf_count, compute_t beta1, compute_t rest1,
                                 compute_t beta2, compute_t rest2, compute_t eps,
                                 compute_t correct1, compute_t correct2) {
    int low = 0, high = leaf_count - 1;
    while (low < high) {  // find the last leaf that begins at this block or before
        const int middle = (low + high + 1) / 2;
        if (leaves.leaf[middle].first_block <= (index_t)blockIdx.x) low = middle;
        else high = middle - 1;
    }
    const Leaf leaf = leaves.leaf[low];
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
