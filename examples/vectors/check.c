// Checks an implementation of DoRA against the golden vectors of `doraxp vectors --out DIR`:
//
//     cc -std=c99 -O2 -o check examples/vectors/check.c -lm && ./check DIR
//
// The implementation is in dora.h. The exit status is 0 if every number is within its bound, 1 if not,
// 2 if DIR cannot be read or has a case of a kind that dora.h does not know.

#include "dora.h"

// Prints the first number of an array that is outside its bound; returns whether there is one.
static bool is_wrong(
    const char *dtype, const char *what, const results *found, const char *name,
    const dv_array *expected, const dv_array *bound
) {
    size_t i = 0, first = 0, bad = 0;
    while (i < found->used && strcmp(found->each[i].name, name) != 0) i++;
    size_t count = i < found->used ? found->each[i].count : 0;
    if (i == found->used || count != expected->count || count != bound->count) {
        printf("WRONG %s, %s, %s: must have %zu numbers, has %zu\n", dtype, what, name, expected->count,
               count);
        return true;
    }
    const double *actual = found->each[i].data;
    for (size_t k = count; k-- > 0;) {
        if (fabs(actual[k] - expected->data[k]) <= bound->data[k]) continue;  // NaN is wrong
        first = k;
        bad++;
    }
    if (bad) {
        printf("WRONG %s, %s, %s: number %zu must be %.17g ± %.3g, got %.17g; %zu of %zu are wrong\n",
               dtype, what, name, first, expected->data[first], bound->data[first], actual[first], bad,
               count);
    }
    return bad > 0;
}

// Fails where an array that the entry of a case lists is missing.
static bool has_arrays(
    dv_vectors *vectors, const dv_json *entry, const char *list, const char *group
) {
    const dv_json *names = dv_get(entry, list);
    if (!names) return dv_fail(vectors, "%s: there is no %s", dv_text(entry, "name"), list);
    for (const dv_json *one = names->child; one; one = one->next) {
        const char *name = one->text ? one->text : "";
        if (dv_find(vectors, entry, group, name)) continue;
        return dv_fail(vectors, "%s: there is no %s/%s", dv_text(entry, "name"), group, name);
    }
    return true;
}

static bool check_case(
    dv_vectors *vectors, const char *dtype, const dv_json *entry, size_t *checked, size_t *failures
) {
    const char *name = dv_text(entry, "name");
    given its = {vectors, entry};
    results found = {0};
    if (!has_arrays(vectors, entry, "inputs", "inputs")) return false;
    if (!has_arrays(vectors, entry, "expected", "expected")) return false;
    if (!has_arrays(vectors, entry, "expected", "bound")) return false;
    if (!compute(&its, &found)) {
        char known[256] = "";
        for (int i = 0; i < COUNT; i++) {
            strncat(known, i ? ", " : "", sizeof known - strlen(known) - 1);
            strncat(known, KINDS[i].name, sizeof known - strlen(known) - 1);
        }
        const char *kind = dv_text(entry, "kind");
        return dv_fail(vectors, "%s: kind must be one of %s, got %s", name, known, kind);
    }
    for (const dv_json *one = dv_get(entry, "expected")->child; one; one = one->next) {
        const dv_array *expected = dv_find(vectors, entry, "expected", one->text);
        const dv_array *bound = dv_find(vectors, entry, "bound", one->text);
        *checked += expected->count;
        *failures += is_wrong(dtype, name, &found, one->text, expected, bound);
    }
    return true;
}

int main(int count, char **arguments) {
    if (count != 2) return fputs("error: usage: check DIR\n", stderr), 2;
    dv_vectors vectors;
    size_t checked = 0, failures = 0;
    bool good = dv_open(&vectors, arguments[1]);
    const dv_json *file = dv_first(dv_get(vectors.manifest, "files"));
    for (; good && file; file = file->next) {
        good = dv_load(&vectors, file->key);
        const dv_json *entry = dv_cases(&vectors);
        for (; good && entry; entry = entry->next) {
            good = check_case(&vectors, file->key, entry, &checked, &failures);
            release();
        }
    }
    if (good) {
        size_t cases = dv_length(dv_get(vectors.manifest, "cases"));
        printf("%zu cases, %zu numbers: %zu arrays are wrong\n", cases, checked, failures);
    } else {
        fprintf(stderr, "error: %s\n", vectors.error);
    }
    dv_close(&vectors);
    return good ? failures > 0 : 2;
}
