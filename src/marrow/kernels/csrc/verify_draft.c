/* Which drafts of speculative decoding stand. The reference is kernels/sampling/verify_draft.py. */
#ifdef _OPENMP
#include <omp.h>
#endif

#include "draws.h"

static const uint64_t ACCEPT = 0x5851F42D4C957F2D; /* another stream of random numbers */

/* Where a token stands among the places, which rise; -1 where it does not. */
static long find(const int32_t *places, long count, int64_t token) {
    long low = 0, high = count;
    while (low < high) {
        long middle = (low + high) / 2;
        if (places[middle] < token) low = middle + 1;
        else high = middle;
    }
    return low < count && places[low] == token ? low : -1;
}

typedef struct {
    const void *logits;
    const int64_t *drafts, *begins, *keys, *history, *starts;
    const float *probs, *factors;
    int64_t *accepted, *tokens;
    long columns;
} verification;

INLINE void verify(const verification *given, long sequence, scratch *own, int type) {
    long columns = given->columns, first = given->begins[sequence], last = given->begins[sequence + 1] - 1;
    given->accepted[sequence] = 0, given->tokens[sequence] = -1;
    for (long row = first; row <= last; row++) {
        const void *x = row_of(given->logits, row, columns, type);
        const float *factors = given->factors + row * FACTORS, *probs = given->probs + row * columns;
        const int64_t *keys = given->keys + row * KEYS, *history = given->history + given->starts[row];
        long length = given->starts[row + 1] - given->starts[row], count;
        if (is_penalised(factors, length)) {
            const void *penalised = penalise(x, columns, factors, history, length, keys[DRAWN], own, type);
            count = collect(penalised, columns, factors, keys, own, F32);
        } else {
            count = collect(x, columns, factors, keys, own, type);
        }
        if (!count) return;
        uint64_t seed = (uint64_t)keys[SEED], position = (uint64_t)keys[POSITION];
        if (row < last) {
            double total = 0;
            for (long i = 0; i < count; i++) total += own->masses[i];
            long place = find(own->places, count, given->drafts[row]);
            double target = place < 0 ? 0 : own->masses[place] / total;
            if (target > 0 && uniform(mix(seed) ^ ACCEPT, position) * probs[given->drafts[row]] < target) {
                given->accepted[sequence]++;
                continue;
            }
            double rest = 0; /* what the target has more of than the draft */
            for (long i = 0; i < count; i++) {
                double more = own->masses[i] / total - probs[own->places[i]];
                own->work[i] = more > 0 ? (float)more : 0;
                rest += own->work[i];
            }
            if (rest > 0) memcpy(own->masses, own->work, count * sizeof *own->masses);
        }
        given->tokens[sequence] = own->places[invert(own->masses, count, uniform(seed, position))];
        return;
    }
}

void verify_draft(const void *logits, const int64_t *drafts, const int64_t *begins, const float *probs,
                  const float *factors, const int64_t *keys, const int64_t *history, const int64_t *starts,
                  int64_t *accepted, int64_t *tokens, float *memory, int32_t *counts, long sequences,
                  long columns, long stride, int threads, int type) {
    verification given = {logits, drafts,  begins,   keys,   history, starts,
                          probs,  factors, accepted, tokens, columns};
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1)
    for (long sequence = 0; sequence < sequences; sequence++) {
        int thread = 0;
#ifdef _OPENMP
        thread = omp_get_thread_num();
#endif
        scratch own = scratch_of(memory, counts, thread, columns, stride);
        if (type == BF16) verify(&given, sequence, &own, BF16);
        else verify(&given, sequence, &own, F32);
    }
}
