/* Log probabilities of given targets, and entropies. The reference is kernels/losses/linear_log_probs.py.
 *
 * With y = (x - most) scale: log p = y[target] - rest, H = rest - sum(p y). Rows whose target is IGNORE have 0
 * of both; a target outside the row makes both NaN. `entropies` may be NULL.
 */
#include "softmax_rows.h"

typedef struct {
    void *logits;
    const int64_t *targets;
    float *log_probs, *mosts, *rests, *entropies;
    long columns;
    float scale;
} log_probs;

INLINE int is_target(const log_probs *given, long row) {
    return given->targets[row] >= 0 && given->targets[row] < given->columns;
}

INLINE void forward(const log_probs *given, long row, int type) {
    const void *x = row_of(given->logits, row, given->columns, type);
    float log_prob = 0;
    row_sums sums = {0};
    if (is_target(given, row)) {
        if (given->entropies) sums = sum_row(x, given->columns, given->scale, 1, type);
        else sums = sum_row(x, given->columns, given->scale, 0, type);
        log_prob = (element(x, given->targets[row], type) - sums.most) * given->scale - sums.rest;
    } else if (given->targets[row] != IGNORE) {
        log_prob = sums.rest = __builtin_nanf("");
    }
    given->log_probs[row] = log_prob;
    given->mosts[row] = sums.most, given->rests[row] = sums.rest;
    if (given->entropies) given->entropies[row] = sums.rest - sums.expected;
}

/* The logits become their gradient. d log p / dx = scale ([target] - p), dH / dx = -scale p (log p + H). */
INLINE void backward(const log_probs *given, long row, float grad, float entropy_grad, int type) {
    void *x = (void *)row_of(given->logits, row, given->columns, type);
    if (given->targets[row] == IGNORE) {
        memset(x, 0, given->columns * (type == BF16 ? 2 : 4));
        return;
    }
    int is_whole = is_target(given, row);
    long target = is_whole ? given->targets[row] : -1;
    row_sums sums = {given->mosts[row], given->rests[row], 0};
    float scale = given->scale, a = -grad * scale, b = 0;
    if (given->entropies) {
        b = -entropy_grad * scale;
        a += b * given->entropies[row];
    }
    if (!is_whole) a = __builtin_nanf("");
    row_gradient(x, x, given->columns, scale, sums, a, b, 0, target, grad * scale, type);
}

void log_probs_forward(void *logits, const int64_t *targets, float *out, float *mosts, float *rests,
                       float *entropies, long rows, long columns, float scale, int threads, int type) {
    log_probs given = {logits, targets, out, mosts, rests, entropies, columns, scale};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) /* the type is told apart here: see cross_entropy.c */
        if (type == BF16) forward(&given, row, BF16);
        else forward(&given, row, F32);
}

void log_probs_backward(const float *grads, const float *entropy_grads, void *logits, const int64_t *targets,
                        float *mosts, float *rests, float *entropies, long rows, long columns, float scale,
                        int threads, int type) {
    log_probs given = {logits, targets, 0, mosts, rests, entropies, columns, scale};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        float entropy_grad = entropies ? entropy_grads[row] : 0;
        if (type == BF16) backward(&given, row, grads[row], entropy_grad, BF16);
        else backward(&given, row, grads[row], entropy_grad, F32);
    }
}
