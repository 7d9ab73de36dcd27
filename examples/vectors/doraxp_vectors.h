// Reads the golden vectors that `doraxp vectors --out DIR` writes. C99, and no other library.
//
//     dv_vectors vectors;
//     if (dv_open(&vectors, "DIR") && dv_load(&vectors, "float32")) {
//         for (const dv_json *entry = dv_cases(&vectors); entry; entry = entry->next) {
//             const dv_array *weight = dv_find(&vectors, entry, "inputs", "weight");
//         }
//     } else {
//         puts(vectors.error);
//     }
//     dv_close(&vectors);
//
// `entry` is an object of JSON: dv_text(entry, "kind") is its kind. A number of an array is right where
// |actual − expected| ≤ bound. A file with a wrong length or offset is an error. The checksums are not
// read here: `sha256sum --check SHA256SUMS` does that.

#ifndef DORAXP_VECTORS_H
#define DORAXP_VECTORS_H

#include <errno.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DV_FORMAT = 2, DV_AXES = 8, DV_DEPTH = 64 };

typedef enum { DV_NULL, DV_BOOL, DV_NUMBER, DV_TEXT, DV_LIST, DV_OBJECT } dv_type;

// A value of JSON. The members of a list or of an object begin at `child` and go on at `next`.
typedef struct dv_json {
    dv_type type;
    char *key;      // in an object
    char *text;     // of a DV_TEXT
    double number;  // of a DV_NUMBER; 0 or 1 of a DV_BOOL
    struct dv_json *child, *next;
} dv_json;

// Numbers, row-major. Those of float32 and of ids are converted.
typedef struct {
    size_t axes, shape[DV_AXES], count;
    double *data;
} dv_array;

typedef struct {
    char error[512];
    const char *folder;
    dv_json *manifest, *header;
    dv_array *arrays;  // in the order of the header
} dv_vectors;

// Writes the error and returns false.
static inline bool dv_fail(dv_vectors *vectors, const char *format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(vectors->error, sizeof vectors->error, format, values);
    va_end(values);
    return false;
}

static inline void dv_free(dv_json *value) {
    while (value) {
        dv_json *next = value->next;
        dv_free(value->child);
        free(value->key);
        free(value->text);
        free(value);
        value = next;
    }
}

// Returns the member of an object, or NULL.
static inline const dv_json *dv_get(const dv_json *object, const char *key) {
    const dv_json *member = object && object->type == DV_OBJECT ? object->child : NULL;
    while (member && strcmp(member->key, key) != 0) member = member->next;
    return member;
}

// Returns a number or a bool of an object, and 0 where there is none.
static inline double dv_number(const dv_json *object, const char *key) {
    const dv_json *member = dv_get(object, key);
    return member ? member->number : 0;
}

// Returns a text of an object, and "" where there is none.
static inline const char *dv_text(const dv_json *object, const char *key) {
    const dv_json *member = dv_get(object, key);
    return member && member->type == DV_TEXT ? member->text : "";
}

// Returns the first member of a list or of an object; the others follow at `next`.
static inline const dv_json *dv_first(const dv_json *list) { return list ? list->child : NULL; }

static inline size_t dv_length(const dv_json *list) {
    size_t count = 0;
    for (const dv_json *one = dv_first(list); one; one = one->next) count++;
    return count;
}

// JSON. Each function moves `*at` past the value that it read; NULL or false: the text is not JSON.

static inline void dv_spaces(const char **at) { *at += strspn(*at, " \t\r\n"); }

static inline char *dv_put_code(char *to, unsigned long code) {  // as UTF-8
    if (code < 0x80) {
        *to++ = (char)code;
        return to;
    }
    int more = code < 0x800 ? 1 : code < 0x10000 ? 2 : 3;
    static const unsigned char first[] = {0, 0xC0, 0xE0, 0xF0};
    *to++ = (char)(first[more] | code >> 6 * more);
    while (more--) *to++ = (char)(0x80 | (code >> 6 * more & 0x3F));
    return to;
}

static inline bool dv_hexadecimal(const char **at, unsigned long *code) {
    char digits[5] = {0};
    strncpy(digits, *at, 4);
    if (strspn(digits, "0123456789abcdefABCDEF") != 4) return false;
    *code = strtoul(digits, NULL, 16);
    *at += 4;
    return true;
}

static inline char *dv_parse_text(const char **at) {
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    if (**at != '"') return NULL;
    const char *end = *at + 1;
    while (*end && *end != '"') end += *end == '\\' && end[1] ? 2 : 1;
    char *text = malloc((size_t)(end - *at)), *to = text;  // an escape is longer than its bytes
    if (!text) return NULL;
    for (++*at; **at != '"';) {
        const char *escape;
        unsigned long code, low;
        if ((unsigned char)**at < 0x20) break;  // also the end of the file
        if (**at != '\\') {
            *to++ = *(*at)++;
        } else if (*++*at == 'u') {
            ++*at;
            if (!dv_hexadecimal(at, &code)) break;
            if (code >= 0xD800 && code < 0xDC00) {  // the first of a pair
                if (strncmp(*at, "\\u", 2) != 0) break;
                *at += 2;
                if (!dv_hexadecimal(at, &low) || low < 0xDC00 || low > 0xDFFF) break;
                code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
            }
            to = dv_put_code(to, code);
        } else if (**at && (escape = strchr(names, **at))) {
            *to++ = values[escape - names];
            ++*at;
        } else {
            break;
        }
    }
    *to = 0;
    if (**at == '"') {
        ++*at;
        return text;
    }
    free(text);
    return NULL;
}

static inline dv_json *dv_parse(const char **at, int depth);

// Reads the members of a list or of an object, up to `end`.
static inline bool dv_parse_members(const char **at, dv_json *value, char end, int depth) {
    dv_json **last = &value->child;
    dv_spaces(at);
    if (**at == end) return ++*at, true;
    for (;;) {
        char *key = NULL;
        dv_spaces(at);
        if (value->type == DV_OBJECT) {
            if (!(key = dv_parse_text(at))) return false;
            dv_spaces(at);
        }
        if (value->type == DV_OBJECT && *(*at)++ != ':') return free(key), false;
        if (!(*last = dv_parse(at, depth + 1))) return free(key), false;
        (*last)->key = key;
        last = &(*last)->next;
        dv_spaces(at);
        if (**at == end) return ++*at, true;
        if (*(*at)++ != ',') return false;
    }
}

static inline dv_json *dv_parse(const char **at, int depth) {
    static const char *const words[] = {"null", "false", "true"};
    dv_json *value = depth < DV_DEPTH ? calloc(1, sizeof *value) : NULL;
    if (!value) return NULL;
    dv_spaces(at);
    if (**at == '{' || **at == '[') {
        value->type = **at == '{' ? DV_OBJECT : DV_LIST;
        ++*at;
        if (dv_parse_members(at, value, value->type == DV_OBJECT ? '}' : ']', depth)) return value;
    } else if (**at == '"') {
        value->type = DV_TEXT;
        if ((value->text = dv_parse_text(at))) return value;
    } else {
        for (int i = 0; i < 3; i++) {
            if (strncmp(*at, words[i], strlen(words[i])) != 0) continue;
            *at += strlen(words[i]);
            value->type = i ? DV_BOOL : DV_NULL;
            value->number = i == 2;
            return value;
        }
        char *end = NULL;
        value->type = DV_NUMBER;
        if (**at == '-' || (**at >= '0' && **at <= '9')) value->number = strtod(*at, &end);
        if (end) return *at = end, value;
    }
    dv_free(value);
    return NULL;
}

// Returns the value of a whole text.
static inline dv_json *dv_document(const char *text) {
    dv_json *value = dv_parse(&text, 0);
    dv_spaces(&text);
    if (!*text) return value;
    dv_free(value);
    return NULL;
}

// The files

// Returns the bytes of a file with a 0 after them, or NULL.
static inline char *dv_read(dv_vectors *vectors, const char *name, size_t *size) {
    errno = 0;
    char path[4096];
    char *bytes = NULL;
    long length = -1;
    int written = snprintf(path, sizeof path, "%s/%s", vectors->folder, name);
    FILE *file = written > 0 && (size_t)written < sizeof path ? fopen(path, "rb") : NULL;
    if (file && fseek(file, 0, SEEK_END) == 0) length = ftell(file);
    if (length >= 0 && fseek(file, 0, SEEK_SET) == 0) bytes = malloc((size_t)length + 1);
    if (bytes && fread(bytes, 1, (size_t)length, file) == (size_t)length) {
        bytes[*size = (size_t)length] = 0;
    } else {
        dv_fail(vectors, "%s: %s", name, errno ? strerror(errno) : "it cannot be read");
        free(bytes);
        bytes = NULL;
    }
    if (file) fclose(file);
    return bytes;
}

static inline uint64_t dv_little_endian(const char *bytes, int size) {
    uint64_t value = 0;
    while (size--) value = value << 8 | (unsigned char)bytes[size];
    return value;
}

// Converts the numbers of one array.
static inline void dv_convert(const char *bytes, const char *dtype, int size, dv_array *array) {
    for (size_t i = 0; i < array->count; i++, bytes += size) {
        uint64_t bits = dv_little_endian(bytes, size);
        uint32_t half = (uint32_t)bits;
        float single;
        memcpy(&single, &half, sizeof single);
        if (size == 8) memcpy(&array->data[i], &bits, sizeof bits);
        else array->data[i] = dtype[0] == 'F' ? single : (double)(int32_t)half;
    }
}

// Reads one array from the bytes after the header.
static inline bool dv_read_array(
    dv_vectors *vectors, const dv_json *entry, const char *bytes, size_t size, dv_array *array
) {
    const char *name = entry->key, *dtype = dv_text(entry, "dtype");
    const dv_json *shape = dv_get(entry, "shape"), *offsets = dv_get(entry, "data_offsets");
    int item = !strcmp(dtype, "F64") ? 8 : !strcmp(dtype, "F32") || !strcmp(dtype, "I32") ? 4 : 0;
    if (!item) return dv_fail(vectors, "%s: dtype must be F64, F32 or I32, got %s", name, dtype);
    if (!shape || dv_length(shape) > DV_AXES || dv_length(offsets) != 2) {
        const char *rule = "it must have a shape of at most";
        return dv_fail(vectors, "%s: %s %d axes and two offsets", name, rule, DV_AXES);
    }
    double start = offsets->child->number, stop = offsets->child->next->number, count = 1;
    bool good = start >= 0 && stop <= (double)size;
    for (const dv_json *one = shape->child; one; one = one->next) {
        bool fits = one->number >= 0 && one->number <= (double)size;
        array->shape[array->axes++] = fits ? (size_t)one->number : 0;
        count *= one->number;
        good = good && fits;
    }
    if (!good || start + count * item != stop) {
        const char *rule = "numbers must be within the file, got the bytes";
        return dv_fail(vectors, "%s: its %g %s %g to %g of %g", name, count, rule, start, stop,
                       (double)size);
    }
    array->count = (size_t)count;
    array->data = malloc((array->count ? array->count : 1) * sizeof(double));
    if (!array->data) return dv_fail(vectors, "%s: no memory is left", name);
    dv_convert(bytes + (size_t)start, dtype, item, array);
    return true;
}

static inline void dv_unload(dv_vectors *vectors) {
    size_t count = dv_length(vectors->header);
    for (size_t i = 0; vectors->arrays && i < count; i++) free(vectors->arrays[i].data);
    free(vectors->arrays);
    dv_free(vectors->header);
    vectors->arrays = NULL;
    vectors->header = NULL;
}

// Reads the manifest. `folder` must outlive `vectors`.
static inline bool dv_open(dv_vectors *vectors, const char *folder) {
    memset(vectors, 0, sizeof *vectors);
    vectors->folder = folder;
    size_t size;
    char *text = dv_read(vectors, "manifest.json", &size);
    if (!text) return false;
    vectors->manifest = dv_document(text);
    free(text);
    double format = dv_number(vectors->manifest, "format");
    if (!vectors->manifest) return dv_fail(vectors, "manifest.json: it must be JSON");
    if (format != DV_FORMAT) {
        return dv_fail(vectors, "manifest.json: format must be %d, got %g", DV_FORMAT, format);
    }
    return true;
}

// Reads the arrays of all cases, with inputs of a dtype, in the place of those read before.
static inline bool dv_load(dv_vectors *vectors, const char *dtype) {
    dv_unload(vectors);
    const char *name = dv_text(dv_get(vectors->manifest, "files"), dtype);
    if (!*name) return dv_fail(vectors, "manifest.json: files must have the dtype %s", dtype);
    size_t size, length = 0;
    char *bytes = dv_read(vectors, name, &size);
    if (!bytes) return false;
    uint64_t told = size < 8 ? UINT64_MAX : dv_little_endian(bytes, 8);
    if (told <= size - 8) {
        length = (size_t)told;
        char first = bytes[8 + length];
        bytes[8 + length] = 0;  // the header ends here
        vectors->header = dv_document(bytes + 8);
        bytes[8 + length] = first;
    }
    bool good = vectors->header != NULL;
    if (good) vectors->arrays = calloc(dv_length(vectors->header) + 1, sizeof(dv_array));
    if (!vectors->arrays) good = dv_fail(vectors, "%s: it must be a file of safetensors", name);
    const dv_json *entry = good ? vectors->header->child : NULL;
    for (size_t i = 0; good && entry; entry = entry->next, i++) {
        if (!entry->key || strcmp(entry->key, "__metadata__") == 0) continue;
        const char *data = bytes + 8 + length;
        good = dv_read_array(vectors, entry, data, size - 8 - length, &vectors->arrays[i]);
    }
    free(bytes);
    return good;
}

static inline void dv_close(dv_vectors *vectors) {
    dv_unload(vectors);
    dv_free(vectors->manifest);
    vectors->manifest = NULL;
}

// Returns the entry of the first case; the others follow at `next`.
static inline const dv_json *dv_cases(const dv_vectors *vectors) {
    return dv_first(dv_get(vectors->manifest, "cases"));
}

// Returns an array of a case, or NULL. `group` is inputs, expected or bound.
static inline const dv_array *dv_find(
    const dv_vectors *vectors, const dv_json *entry, const char *group, const char *name
) {
    char wanted[1024];
    snprintf(wanted, sizeof wanted, "%s/%s/%s", dv_text(entry, "name"), group, name);
    const dv_json *one = dv_first(vectors->header);
    for (size_t i = 0; one; one = one->next, i++) {
        if (one->key && strcmp(one->key, wanted) == 0) return &vectors->arrays[i];
    }
    return NULL;
}

#endif
