// DoRA in plain loops, in double. check.c checks it. Put your implementation in its place.
//
// `compute` gets the entry of a case in the manifest and its inputs, and returns numbers by name.

#ifndef DORA_H
#define DORA_H

#include <math.h>

#include "doraxp_vectors.h"

// Memory: `release` frees everything that `numbers` has returned.

typedef struct block {
    struct block *next;
    double data[];
} block;
static block *blocks;

static double *numbers(size_t count) {  // zeros
    block *one = calloc(1, sizeof *one + (count ? count : 1) * sizeof(double));
    if (!one) exit((fputs("error: no memory is left\n", stderr), 2));
    one->next = blocks;
    blocks = one;
    return one->data;
}

static void release(void) {
    while (blocks) {
        block *next = blocks->next;
        free(blocks);
        blocks = next;
    }
}

// Results by name. A stack has many parts of the same size.

enum { RESULTS = 64 };
typedef struct {
    size_t used;
    struct {
        char name[32];
        size_t count;
        double *data;
    } each[RESULTS];
} results;

static double *result(results *found, const char *name, size_t count) {
    size_t i = 0;
    while (i < found->used && strcmp(found->each[i].name, name) != 0) i++;
    if (i == found->used) {
        if (i == RESULTS) exit((fputs("error: too many results\n", stderr), 2));
        found->used++;
        snprintf(found->each[i].name, sizeof found->each[i].name, "%s", name);
        found->each[i].count = count;
        found->each[i].data = numbers(count);
    }
    return found->each[i].data;
}

// A case: the inputs by name, NULL where there is none.

typedef struct {
    const dv_vectors *vectors;
    const dv_json *entry;
} given;

static const dv_array *input(const given *its, const char *name) {
    return dv_find(its->vectors, its->entry, "inputs", name);
}
static const dv_array *needed(const given *its, const char *name) {
    const dv_array *found = input(its, name);
    if (found) return found;
    fprintf(stderr, "error: %s: there is no inputs/%s\n", dv_text(its->entry, "name"), name);
    exit(2);
}
static bool is(const given *its, const char *key, const char *text) {
    return strcmp(dv_text(its->entry, key), text) == 0;
}

// Matrices are row-major.

typedef struct {
    size_t rows, cols;
    double *data;
} matrix;

static matrix new_matrix(size_t rows, size_t cols) {
    matrix m = {rows, cols, numbers(rows * cols)};
    return m;
}
static matrix as_matrix(const dv_array *array) {
    matrix m = {array->shape[0], array->shape[1], array->data};
    return m;
}
static double at(matrix m, size_t i, size_t j) { return m.data[i * m.cols + j]; }

static matrix transposed(matrix m) {
    matrix t = new_matrix(m.cols, m.rows);
    for (size_t i = 0; i < m.rows; i++)
        for (size_t j = 0; j < m.cols; j++) t.data[j * m.rows + i] = at(m, i, j);
    return t;
}
static matrix times(matrix a, matrix b) {
    matrix c = new_matrix(a.rows, b.cols);
    for (size_t i = 0; i < a.rows; i++)
        for (size_t j = 0; j < b.cols; j++)
            for (size_t k = 0; k < a.cols; k++) c.data[i * b.cols + j] += at(a, i, k) * at(b, k, j);
    return c;
}
static matrix plus(matrix a, double factor, matrix b) {  // a + factor b
    matrix c = new_matrix(a.rows, a.cols);
    for (size_t i = 0; i < a.rows * a.cols; i++) c.data[i] = a.data[i] + factor * b.data[i];
    return c;
}
static matrix product(matrix a, matrix b) {  // a⊙b
    matrix c = new_matrix(a.rows, a.cols);
    for (size_t i = 0; i < a.rows * a.cols; i++) c.data[i] = a.data[i] * b.data[i];
    return c;
}
static matrix scaled(double s, matrix m) { return plus(new_matrix(m.rows, m.cols), s, m); }
static matrix rows_times(const double *column, matrix m) {
    matrix c = new_matrix(m.rows, m.cols);
    for (size_t i = 0; i < m.rows; i++)
        for (size_t j = 0; j < m.cols; j++) c.data[i * m.cols + j] = column[i] * at(m, i, j);
    return c;
}
static matrix cols_times(const double *row, matrix m) {
    matrix c = new_matrix(m.rows, m.cols);
    for (size_t i = 0; i < m.rows; i++)
        for (size_t j = 0; j < m.cols; j++) c.data[i * m.cols + j] = row[j] * at(m, i, j);
    return c;
}
static double *row_sums(matrix m) {
    double *sums = numbers(m.rows);
    for (size_t i = 0; i < m.rows; i++)
        for (size_t j = 0; j < m.cols; j++) sums[i] += at(m, i, j);
    return sums;
}
static double *norms(matrix m) {
    double *lengths = row_sums(product(m, m));
    for (size_t i = 0; i < m.rows; i++) lengths[i] = sqrt(lengths[i]);
    return lengths;
}
static double or_zero(double numerator, double denominator) {
    return denominator > 0 ? numerator / denominator : 0;  // a row of zeros
}

// DoRA: V = ρ⊙W + s B A, n = ‖V‖ by rows, g = m / n, W' = g⊙V.

typedef struct {
    const given *its;
    matrix x, w, a, b, dy, mask;  // mask.data is NULL where there is none
    const double *m, *bias;
    results *found;
    size_t part, parts;
} one_layer;

static void put(const one_layer *l, const char *name, size_t count, const double *data) {
    double *whole = result(l->found, name, l->parts * count);
    memcpy(whole + l->part * count, data, count * sizeof(double));
}
static void put_matrix(const one_layer *l, const char *name, matrix m) {
    put(l, name, m.rows * m.cols, m.data);
}

static void layer(const one_layer *l) {
    matrix x = l->x, w = l->w, a = l->a, b = l->b, dy = l->dy, mask = l->mask;
    double s = dv_number(l->its->entry, "scaling");
    bool direction = is(l->its, "form", "direction"), exact = is(l->its, "norm_gradient", "exact");
    bool of_input = is(l->its, "dropout", "input");
    bool low_rank_only = is(l->its, "dropout", "low_rank");
    size_t out = w.rows;

    double *lengths = norms(w), *rho = numbers(out), *g = numbers(out);
    for (size_t i = 0; i < out; i++) rho[i] = direction ? or_zero(1, lengths[i]) : 1;
    matrix base = rows_times(rho, w);
    matrix v = plus(base, s, times(b, a));
    double *n = norms(v);
    for (size_t i = 0; i < out; i++) g[i] = or_zero(l->m[i], n[i]);
    matrix merged = rows_times(g, v);

    // W' multiplies the masked x, and `beside` multiplies the rest of x.
    matrix seen = mask.data ? product(mask, x) : x;
    matrix rest = plus(x, -1, seen);
    matrix beside = low_rank_only ? rows_times(g, base) : w;

    matrix z = times(seen, transposed(v));
    if (low_rank_only) z = plus(z, 1, times(rest, transposed(base)));
    matrix y = cols_times(g, z);
    if (of_input) y = plus(y, 1, times(rest, transposed(w)));
    for (size_t i = 0; l->bias && i < y.rows * out; i++) y.data[i] += l->bias[i % out];

    matrix dz = cols_times(g, dy);
    double *e = row_sums(transposed(product(dy, z))), *dm = numbers(out), *q = numbers(out);
    for (size_t i = 0; i < out; i++) {
        dm[i] = or_zero(e[i], n[i]);
        q[i] = exact ? or_zero(-l->m[i] * e[i], n[i] * n[i] * n[i]) : 0;
    }
    matrix dv = plus(times(transposed(dz), seen), 1, rows_times(q, v));
    matrix dx = times(dy, merged), dw = dv;
    if (low_rank_only) dw = plus(dw, 1, times(transposed(dz), rest));
    if (direction) {
        double *along = row_sums(product(base, dw));
        dw = rows_times(rho, plus(dw, -1, rows_times(along, base)));
    }
    if (of_input) dw = plus(dw, 1, times(transposed(dy), rest));
    if (mask.data) {
        matrix other = times(dy, beside);
        dx = plus(product(mask, dx), 1, plus(other, -1, product(mask, other)));
    }
    put(l, "initial", out, lengths);
    put(l, "norm", out, n);
    put_matrix(l, "merged", merged);
    put_matrix(l, "y", y);
    put_matrix(l, "dx", dx);
    put_matrix(l, "da", scaled(s, times(transposed(b), dv)));
    put_matrix(l, "db", scaled(s, times(dv, transposed(a))));
    put(l, "dm", out, dm);
    put_matrix(l, "dw", dw);
    put(l, "dbias", out, row_sums(transposed(dy)));
    put(l, "row_scale", out, rho);
    put_matrix(l, "v", v);
    put(l, "gain", out, g);
    put_matrix(l, "u", rows_times(rho, times(w, transposed(a))));
    put_matrix(l, "gram", times(a, transposed(a)));
    put_matrix(l, "low_rank", times(seen, transposed(a)));
    put_matrix(l, "z", z);
    put_matrix(l, "dz", dz);
    put(l, "e", out, e);
    put(l, "q", out, q);
}

// A stack holds one layer after the other: w (parts, out, in), x and mask (parts, tokens, in), and
// dy (parts, tokens, out).
static void stack(
    const given *its, results *found, matrix w, size_t parts, size_t tokens, double *x,
    double *mask, double *dy
) {
    size_t out = w.rows, in = w.cols, rank = needed(its, "lora_b")->count / (parts * out);
    const dv_array *bias = input(its, "bias");
    for (size_t k = 0; k < parts; k++) {
        one_layer l = {
            its,
            {tokens, in, x + k * tokens * in},
            {out, in, w.data + k * out * in},
            {rank, in, needed(its, "lora_a")->data + k * rank * in},
            {out, rank, needed(its, "lora_b")->data + k * out * rank},
            {tokens, out, dy + k * tokens * out},
            {tokens, in, mask ? mask + k * tokens * in : NULL},
            needed(its, "magnitude")->data + k * out,
            bias ? bias->data + k * out : NULL,
            found, k, parts,
        };
        layer(&l);
    }
}

static void linear(const given *its, results *found) {
    const dv_array *x = needed(its, "x"), *w = needed(its, "weight"), *dy = needed(its, "dy");
    const dv_array *mask = input(its, "dropout_mask");
    matrix one = {w->shape[w->axes - 2], w->shape[w->axes - 1], w->data};
    size_t parts = w->count / (one.rows * one.cols), tokens = dy->count / (parts * one.rows);
    stack(its, found, one, parts, tokens, x->data, mask ? mask->data : NULL, dy->data);
}

// A convolution is a linear layer of windows. Both have a part for each group; y has its outputs
// before its positions, the layer after.

typedef struct {
    size_t axes, batch, inner, taps, positions, groups, out;
    size_t size[DV_AXES], kernel[DV_AXES], places[DV_AXES];
    long stride[DV_AXES], padding[DV_AXES], dilation[DV_AXES];
} windows;

static windows windows_of(const given *its) {
    const dv_array *x = needed(its, "x"), *w = needed(its, "weight"), *dy = needed(its, "dy");
    windows of = {0};
    of.axes = x->axes - 2;
    of.batch = x->shape[0];
    of.groups = (size_t)dv_number(its->entry, "groups");
    of.inner = w->shape[1];
    of.out = w->shape[0] / of.groups;
    of.taps = of.positions = 1;
    const char *const names[] = {"stride", "padding", "dilation"};
    long *const lists[] = {of.stride, of.padding, of.dilation};
    for (int i = 0; i < 3; i++) {
        const dv_json *n = dv_first(dv_get(its->entry, names[i]));
        for (size_t d = 0; n && d < of.axes; n = n->next) lists[i][d++] = (long)n->number;
    }
    for (size_t d = 0; d < of.axes; d++) {
        of.size[d] = x->shape[2 + d];
        of.taps *= of.kernel[d] = w->shape[2 + d];
        of.positions *= of.places[d] = dy->shape[2 + d];
    }
    return of;
}

// Returns where a number of a window is in its channel, and -1 where it is in the padding.
static long place(const windows *of, size_t position, size_t tap) {
    long found = 0, step = 1;
    for (size_t d = of->axes; d-- > 0;) {
        long p = (long)(position % of->places[d]), k = (long)(tap % of->kernel[d]);
        long n = p * of->stride[d] - of->padding[d] + k * of->dilation[d];
        position /= of->places[d];
        tap /= of->kernel[d];
        if (n < 0 || n >= (long)of->size[d]) return -1;
        found += n * step;
        step *= (long)of->size[d];
    }
    return found;
}

// Copies x to its windows, (groups, batch, positions, inner, taps), or adds the windows up in x.
static void unfold(const windows *of, double *x, double *rows, bool back) {
    size_t channel = 1, row = 0;
    for (size_t d = 0; d < of->axes; d++) channel *= of->size[d];
    for (size_t g = 0; g < of->groups; g++)
        for (size_t b = 0; b < of->batch; b++)
            for (size_t p = 0; p < of->positions; p++)
                for (size_t i = 0; i < of->inner; i++)
                    for (size_t k = 0; k < of->taps; k++, row++) {
                        long from = place(of, p, k);
                        if (from < 0) continue;
                        double *one = x + ((b * of->groups + g) * of->inner + i) * channel + from;
                        if (back) *one += rows[row];
                        else rows[row] = *one;
                    }
}

// Copies dy, (batch, groups, out, positions), to (groups, batch, positions, out), or back.
static void turn(const windows *of, double *y, double *rows, bool back) {
    size_t row = 0;
    for (size_t g = 0; g < of->groups; g++)
        for (size_t b = 0; b < of->batch; b++)
            for (size_t p = 0; p < of->positions; p++)
                for (size_t o = 0; o < of->out; o++, row++) {
                    double *one = y + ((b * of->groups + g) * of->out + o) * of->positions + p;
                    if (back) *one = rows[row];
                    else rows[row] = *one;
                }
}

static void convolution(const given *its, results *found) {
    windows of = windows_of(its);
    const dv_array *x = needed(its, "x"), *dy = needed(its, "dy");
    const dv_array *mask = input(its, "dropout_mask");
    size_t tokens = of.batch * of.positions, width = of.inner * of.taps;
    size_t columns = of.groups * tokens * width;
    double *x_rows = numbers(columns), *mask_rows = mask ? numbers(columns) : NULL;
    double *dy_rows = numbers(dy->count);
    unfold(&of, x->data, x_rows, false);
    if (mask) unfold(&of, mask->data, mask_rows, false);
    turn(&of, dy->data, dy_rows, false);
    matrix w = {of.out, width, needed(its, "weight")->data};
    results as_linear = {0};
    stack(its, &as_linear, w, of.groups, tokens, x_rows, mask_rows, dy_rows);
    turn(&of, result(found, "y", dy->count), result(&as_linear, "y", dy->count), true);
    unfold(&of, result(found, "dx", x->count), result(&as_linear, "dx", columns), true);
    for (size_t i = 0; i < as_linear.used; i++) {
        size_t count = as_linear.each[i].count;
        const char *name = as_linear.each[i].name;
        if (strcmp(name, "y") == 0 || strcmp(name, "dx") == 0) continue;
        memcpy(result(found, name, count), as_linear.each[i].data, count * sizeof(double));
    }
}

// An embedding is a linear layer of rows that have `scale` at the id, and 0 elsewhere.

static void embedding(const given *its, results *found) {
    const dv_array *ids = needed(its, "x"), *dy = needed(its, "dy");
    matrix table = as_matrix(needed(its, "weight"));
    matrix x = new_matrix(ids->count, table.rows);
    double scale = dv_number(its->entry, "scale");
    for (size_t t = 0; t < x.rows; t++)
        for (size_t token = 0; token < x.cols; token++)
            x.data[t * x.cols + token] = ids->data[t] == (double)token ? scale : 0;
    stack(its, found, transposed(table), 1, x.rows, x.data, NULL, dy->data);
    const char *const names[] = {"merged", "dw"};
    for (int i = 0; i < 2; i++) {
        double *data = result(found, names[i], 0);
        matrix wide = {table.cols, table.rows, data};
        memcpy(data, transposed(wide).data, table.rows * table.cols * sizeof(double));
    }
}

// Updates that are other products than B A. Without a magnitude W' is V.

static matrix adapted(matrix base, double s, matrix update, const dv_array *m, results *found) {
    matrix v = plus(base, s, update), merged = v;
    memcpy(result(found, "v", v.rows * v.cols), v.data, v.rows * v.cols * sizeof(double));
    if (m) {
        double *n = result(found, "norm", v.rows), *g = result(found, "gain", v.rows);
        memcpy(n, norms(v), v.rows * sizeof(double));
        for (size_t i = 0; i < v.rows; i++) g[i] = or_zero(m->data[i], n[i]);
        merged = rows_times(g, v);
    }
    memcpy(result(found, "merged", v.rows * v.cols), merged.data, v.rows * v.cols * sizeof(double));
    return merged;
}

static void adapted_by(const given *its, matrix update, results *found) {
    matrix base = as_matrix(needed(its, "weight"));
    if (is(its, "form", "direction")) {
        double *rho = norms(base);
        for (size_t i = 0; i < base.rows; i++) rho[i] = or_zero(1, rho[i]);
        base = rows_times(rho, base);
    }
    adapted(base, dv_number(its->entry, "scaling"), update, input(its, "magnitude"), found);
}

static matrix product_of(const given *its, const char *left, const char *right) {
    return times(as_matrix(needed(its, left)), as_matrix(needed(its, right)));
}

static void loha(const given *its, results *found) {
    matrix first = product_of(its, "first_b", "first_a");
    adapted_by(its, product(first, product_of(its, "second_b", "second_a")), found);
}

static void lokr(const given *its, results *found) {
    const dv_array *whole = input(its, "right");
    matrix left = as_matrix(needed(its, "left"));
    matrix right = whole ? as_matrix(whole) : product_of(its, "right_b", "right_a");
    matrix update = new_matrix(left.rows * right.rows, left.cols * right.cols);
    for (size_t i = 0; i < update.rows; i++)
        for (size_t j = 0; j < update.cols; j++)
            update.data[i * update.cols + j] = at(left, i / right.rows, j / right.cols) *
                                               at(right, i % right.rows, j % right.cols);
    adapted_by(its, update, found);
}

// W + Σ tᵢ (W'ᵢ − W), of several adapters of one weight.

static void sum_of_adapters(const given *its, results *found) {
    matrix w = as_matrix(needed(its, "weight")), total = w;
    const dv_json *t = dv_first(dv_get(its->entry, "strengths"));
    const dv_json *s = dv_first(dv_get(its->entry, "scalings"));
    for (int k = 1; t && s; t = t->next, s = s->next, k++) {
        char a[32], b[32], m[32];
        snprintf(a, sizeof a, "lora_a %d", k);
        snprintf(b, sizeof b, "lora_b %d", k);
        snprintf(m, sizeof m, "magnitude %d", k);
        results one = {0};
        matrix merged = adapted(w, s->number, product_of(its, b, a), input(its, m), &one);
        total = plus(total, t->number, plus(merged, -1, w));
    }
    size_t count = w.rows * w.cols;
    memcpy(result(found, "merged", count), total.data, count * sizeof(double));
}

// The optimizers. `magnitude` does not decay. A step changes one array of numbers, p.

typedef struct {
    size_t count;
    double *p, *mu, *nu;
} parameter;

static void adamw(
    parameter *of, const double *g, int t, double rate, double decay, const dv_json *its
) {
    double beta1 = dv_number(its, "beta1"), beta2 = dv_number(its, "beta2");
    for (size_t i = 0; i < of->count; i++) {
        of->mu[i] = beta1 * of->mu[i] + (1 - beta1) * g[i];
        of->nu[i] = beta2 * of->nu[i] + (1 - beta2) * g[i] * g[i];
        double mean = of->mu[i] / (1 - pow(beta1, t)), square = of->nu[i] / (1 - pow(beta2, t));
        of->p[i] -= rate * (mean / (sqrt(square) + dv_number(its, "eps")) + decay * of->p[i]);
    }
}

static void sgd(parameter *of, const double *g, double rate, double decay, double momentum) {
    for (size_t i = 0; i < of->count; i++) {
        of->mu[i] = momentum * of->mu[i] + g[i] + decay * of->p[i];
        of->p[i] -= rate * of->mu[i];
    }
}

// Returns M⁻¹ X for a matrix M that is symmetric and positive definite. Writes to M.
static matrix solved(matrix m, matrix right) {
    matrix x = scaled(1, right);
    for (size_t k = 0; k < m.rows; k++)
        for (size_t i = 0; i < m.rows; i++) {
            if (i == k) continue;
            double factor = at(m, i, k) / at(m, k, k);
            for (size_t j = 0; j < m.cols; j++) m.data[i * m.cols + j] -= factor * at(m, k, j);
            for (size_t j = 0; j < x.cols; j++) x.data[i * x.cols + j] -= factor * at(x, k, j);
        }
    for (size_t i = 0; i < x.rows * x.cols; i++) x.data[i] /= at(m, i / x.cols, i / x.cols);
    return x;
}

static matrix damped(matrix m, double damping) {
    for (size_t i = 0; i < m.rows; i++) m.data[i * m.cols + i] += damping;
    return m;
}

// dA ← (Bᵀ B + δ I)⁻¹ dA and dB ← dB (A Aᵀ + δ I)⁻¹, at the present A and B.
static void precondition(const given *its, const parameter *of, matrix *da, matrix *db) {
    double damping = dv_number(dv_get(its->entry, "numbers"), "damping");
    matrix a = {da->rows, da->cols, of[0].p}, b = {db->rows, db->cols, of[1].p};
    *da = solved(damped(times(transposed(b), b), damping), *da);
    *db = transposed(solved(damped(times(a, transposed(a)), damping), transposed(*db)));
}

static void optimizer(const given *its, results *found) {
    const char *const names[] = {"lora_a", "lora_b", "magnitude"};
    const dv_json *told = dv_get(its->entry, "numbers");
    parameter of[3];
    for (int i = 0; i < 3; i++) {
        const dv_array *p = needed(its, names[i]);
        of[i] = (parameter){p->count, numbers(p->count), numbers(p->count), numbers(p->count)};
        memcpy(of[i].p, p->data, p->count * sizeof(double));
    }
    for (int t = 1; t <= 3; t++) {
        char name[64];
        matrix g[3];
        for (int i = 0; i < 3; i++) {
            snprintf(name, sizeof name, "grad %s %d", names[i], t);
            g[i] = as_matrix(needed(its, name));
        }
        if (is(its, "kind", "scaled_adamw")) precondition(its, of, &g[0], &g[1]);
        for (int i = 0; i < 3; i++) {
            double rate = dv_number(told, "learning_rate");
            double decay = i == 2 ? 0 : dv_number(told, "weight_decay");
            if (i == 1 && is(its, "kind", "loraplus")) rate *= dv_number(told, "ratio");
            double momentum = dv_number(told, "momentum");
            if (is(its, "kind", "sgd")) sgd(&of[i], g[i].data, rate, decay, momentum);
            else adamw(&of[i], g[i].data, t, rate, decay, told);
            snprintf(name, sizeof name, "%s %d", names[i], t);
            memcpy(result(found, name, of[i].count), of[i].p, of[i].count * sizeof(double));
        }
    }
}

static const struct {
    const char *name;
    void (*compute)(const given *, results *);
} KINDS[] = {
    {"layer", linear},       {"convolution", convolution}, {"embedding", embedding},
    {"loha", loha},          {"lokr", lokr},               {"sum", sum_of_adapters},
    {"adamw", optimizer},    {"sgd", optimizer},           {"loraplus", optimizer},
    {"scaled_adamw", optimizer},
};
enum { COUNT = sizeof KINDS / sizeof *KINDS };

// Computes a case. Returns false where its kind is not known.
static bool compute(const given *its, results *found) {
    for (int i = 0; i < COUNT; i++) {
        if (!is(its, "kind", KINDS[i].name)) continue;
        KINDS[i].compute(its, found);
        return true;
    }
    return false;
}

#endif
