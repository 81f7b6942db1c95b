/* Cross entropy of rows of logits. The reference is kernels/losses/cross_entropy.py.
 *
 * loss = lse - (1 - smoothing) x[target] - smoothing mean(x) + z lse^2; a target outside the row makes its
 * loss, and its gradient, NaN.
 */
#include "softmax_rows.h"

typedef struct {
    const void *logits;
    const int64_t *targets;
    float *losses, *lses, *mosts, *rests;
    long columns;
    float smoothing, z;
} cross_entropy;

INLINE void loss_of(const cross_entropy *given, long row, int type) {
    const void *x = row_of(given->logits, row, given->columns, type);
    long target = given->targets[row];
    row_sums sums = sum_row(x, given->columns, 1, 0, type);
    float lse = given->lses[row] = sums.most + sums.rest, loss = 0;
    given->mosts[row] = sums.most, given->rests[row] = sums.rest;
    if (target >= 0 && target < given->columns) {
        float keep = 1 - given->smoothing, below = sums.most - element(x, target, type);
        loss = sums.rest + keep * below + given->z * lse * lse;
        if (given->smoothing != 0)
            loss += given->smoothing * (sums.most - row_sum(x, given->columns, type) / given->columns);
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
    row_sums sums = {given->mosts[row], given->rests[row], 0};
    float lse = sums.most + sums.rest;
    row_gradient(x, to, given->columns, 1, sums, grad * (1 + 2 * given->z * lse) + lse_grad, 0,
                 -grad * given->smoothing / given->columns, target, -grad * (1 - given->smoothing), type);
}

/* The type is told apart inside the loops: OpenMP makes a function of each, which no constant reaches. */
#define TYPED(call, ...) ((type) == BF16 ? call(__VA_ARGS__, BF16) : call(__VA_ARGS__, F32))

void cross_entropy_forward(const void *logits, const int64_t *targets, float *losses, float *lses,
                           float *mosts, float *rests, long rows, long columns, float smoothing,
                           float z, int threads, int type) {
    cross_entropy given = {logits, targets, losses, lses, mosts, rests, columns, smoothing, z};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) TYPED(loss_of, &given, row);
}

void cross_entropy_backward(const float *grads, const float *lse_grads, const void *logits,
                            const int64_t *targets, float *mosts, float *rests, void *out, long rows,
                            long columns, float smoothing, float z, int threads, int type) {
    cross_entropy given = {logits, targets, 0, 0, mosts, rests, columns, smoothing, z};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) TYPED(gradient, &given, row, grads[row], lse_grads[row], out);
}

/* Losses, and the logits become the gradient of their sum. */
void cross_entropy_in_place(void *logits, const int64_t *targets, float *losses, float *lses,
                            float *mosts, float *rests, long rows, long columns, float smoothing,
                            float z, int threads, int type) {
    cross_entropy given = {logits, targets, losses, lses, mosts, rests, columns, smoothing, z};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        if (targets[row] == IGNORE) losses[row] = lses[row] = mosts[row] = rests[row] = 0;
        else TYPED(loss_of, &given, row);
        TYPED(gradient, &given, row, 1, 0, logits);
    }
}
