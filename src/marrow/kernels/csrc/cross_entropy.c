/* Cross entropy of rows of logits. The reference is kernels/losses/cross_entropy.py.
 *
 * loss = lse - (1 - smoothing) x[target] - smoothing mean(x) + z lse^2; a target outside the row makes its
 * loss, and its gradient, NaN.
 */
#include "softmax_rows.h"

typedef struct {
    const void *logits;
    const int64_t *targets;
    float *losses, *lses;
    long columns;
    float smoothing, z;
} cross_entropy;

INLINE void loss_of(const cross_entropy *given, long row, int type) {
    const void *x = row_of(given->logits, row, given->columns, type);
    long target = given->targets[row];
    float lse = given->lses[row] = row_lse(x, given->columns, 1, 0, type);
    float loss = 0;
    if (target >= 0 && target < given->columns) {
        loss = lse - (1 - given->smoothing) * element(x, target, type) + given->z * lse * lse;
        if (given->smoothing != 0) loss -= given->smoothing / given->columns * row_sum(x, given->columns, type);
    } else if (target != IGNORE) {
        loss = __builtin_nanf("");
    }
    given->losses[row] = loss;
}

/* grad: of the row's loss. lse_grad: of its lse. */
INLINE void gradient(const cross_entropy *given, long row, float grad, float lse_grad, void *out, int type) {
    const void *x = row_of(given->logits, row, given->columns, type);
    void *to = (void *)row_of(out, row, given->columns, type);
    long target = given->targets[row];
    if (target == IGNORE) {
        target = -1, grad = 0;
        if (lse_grad == 0) {
            memset(to, 0, given->columns * (type == BF16 ? 2 : 4));
            return;
        }
    } else if (target < 0 || target >= given->columns) {
        target = -1, grad = __builtin_nanf("");
    }
    float lse = given->lses[row];
    row_gradient(x, to, given->columns, 1, lse, grad * (1 + 2 * given->z * lse) + lse_grad, 0,
                 -grad * given->smoothing / given->columns, target, -grad * (1 - given->smoothing), type);
}

INLINE void forward(cross_entropy given, long rows, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) loss_of(&given, row, type);
}

INLINE void backward(cross_entropy given, const float *grads, const float *lse_grads, void *out, long rows,
                     int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) gradient(&given, row, grads[row], lse_grads[row], out, type);
}

/* Losses, and the logits become the gradient of their sum. */
INLINE void in_place(cross_entropy given, long rows, int threads, int type) {
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        if (given.targets[row] == IGNORE) given.losses[row] = given.lses[row] = 0;
        else loss_of(&given, row, type);
        gradient(&given, row, 1, 0, (void *)given.logits, type);
    }
}

void cross_entropy_forward(const void *logits, const int64_t *targets, float *losses, float *lses, long rows,
                           long columns, float smoothing, float z, int threads, int type) {
    cross_entropy given = {logits, targets, losses, lses, columns, smoothing, z};
    if (type == BF16) forward(given, rows, threads, BF16);
    else forward(given, rows, threads, F32);
}

void cross_entropy_backward(const float *grads, const float *lse_grads, const void *logits,
                            const int64_t *targets, float *lses, void *out, long rows, long columns,
                            float smoothing, float z, int threads, int type) {
    cross_entropy given = {logits, targets, 0, lses, columns, smoothing, z};
    if (type == BF16) backward(given, grads, lse_grads, out, rows, threads, BF16);
    else backward(given, grads, lse_grads, out, rows, threads, F32);
}

void cross_entropy_in_place(void *logits, const int64_t *targets, float *losses, float *lses, long rows,
                            long columns, float smoothing, float z, int threads, int type) {
    cross_entropy given = {logits, targets, losses, lses, columns, smoothing, z};
    if (type == BF16) in_place(given, rows, threads, BF16);
    else in_place(given, rows, threads, F32);
}
