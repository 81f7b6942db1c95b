/* Draws of the next tokens. The reference, and what is meant by all of it, is kernels/sampling/sample.py. */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "draws.h"

/* The likeliest `wanted`, first of equals first, as log probabilities. */
INLINE void list_top(const void *x, long columns, long wanted, float lse_most, float lse_rest, scratch *own,
                     int64_t *tokens, float *log_probs, int type) {
    scanned unused;
    float least = bound_of(x, columns, wanted, own, &unused, type);
    long count = gather(x, columns, least, own->values, own->places, type), kept = 0;
    for (long i = 0; i < count; i++) { /* insertion into a short list */
        float value = own->values[i];
        if (kept == wanted && !(value > own->work[kept - 1])) continue;
        long at = kept < wanted ? kept++ : kept - 1;
        for (; at > 0 && value > own->work[at - 1]; at--)
            own->work[at] = own->work[at - 1], tokens[at] = tokens[at - 1];
        own->work[at] = value, tokens[at] = own->places[i];
    }
    for (long i = 0; i < kept; i++) log_probs[i] = (own->work[i] - lse_most) - lse_rest;
}

typedef struct {
    const void *logits;
    const float *factors;
    const int64_t *keys, *history, *starts;
    int64_t *tokens, *kept, *top_tokens;
    float *log_probs, *top_log_probs;
    long columns, num_top; /* num_top -1: no log probabilities at all */
} sampling;

INLINE void report(const sampling *given, long row, const void *x, row_sums sums, scratch *own, int type) {
    if (given->num_top < 0) return;
    int64_t token = given->tokens[row];
    given->log_probs[row] =
        token < 0 ? __builtin_nanf("") : (element(x, token, type) - sums.most) - sums.rest;
    if (!given->num_top) return;
    int64_t *tokens = given->top_tokens + row * given->num_top;
    float *log_probs = given->top_log_probs + row * given->num_top;
    for (long i = 0; i < given->num_top; i++) tokens[i] = -1, log_probs[i] = __builtin_nanf("");
    if (token >= 0)
        list_top(x, given->columns, given->num_top, sums.most, sums.rest, own, tokens, log_probs, type);
}

INLINE void sample_row(const sampling *given, long row, scratch *own, int type) {
    const void *x = row_of(given->logits, row, given->columns, type);
    const float *factors = given->factors + row * FACTORS;
    const int64_t *keys = given->keys + row * KEYS, *history = given->history + given->starts[row];
    long count = given->starts[row + 1] - given->starts[row], kept;
    if (is_penalised(factors, count)) {
        const void *penalised = penalise(x, given->columns, factors, history, count, keys[DRAWN], own, type);
        given->tokens[row] = draw(penalised, given->columns, factors, keys, own, &kept, F32);
    } else {
        given->tokens[row] = draw(x, given->columns, factors, keys, own, &kept, type);
    }
    given->kept[row] = kept;
    row_sums sums = {0};
    if (given->num_top >= 0 && given->tokens[row] >= 0) sums = sum_row(x, given->columns, 1, 0, type);
    report(given, row, x, sums, own, type);
}

void sample(const void *logits, const float *factors, const int64_t *keys, const int64_t *history,
            const int64_t *starts, int64_t *tokens, float *log_probs, int64_t *kept, int64_t *top_tokens,
            float *top_log_probs, float *memory, int32_t *counts, long rows, long columns, long num_top,
            long stride, int threads, int type) {
    sampling given = {logits, factors,    keys,      history,       starts,  tokens,
                      kept,   top_tokens, log_probs, top_log_probs, columns, num_top};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long row = 0; row < rows; row++) {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        scratch own = scratch_of(memory, counts, thread, columns, stride);
        if (type == BF16) sample_row(&given, row, &own, BF16);
        else sample_row(&given, row, &own, F32);
    }
}
