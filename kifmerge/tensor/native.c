/* Loops over elements, each in one pass where torch makes one for every operation.

   Every element is rounded as torch's arithmetic rounds it, operation by operation: build with
   -ffp-contract=off. kifmerge/tensor/native.py declares what is called here. */

#include <stdint.h>
#include <string.h>

/* What is at hand between operations stays in the first level of cache. */
#define BLOCK 2048
#define LANES 64
#define TIES_BLOCK 512 /* of which there is one for each model */
#define MOST_MODELS 8
#define NUM_BUCKETS 65536

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define FOR_EACH_PROCESSOR __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define FOR_EACH_PROCESSOR
#endif

#if defined(__GNUC__)
#define INLINE static inline __attribute__((always_inline))
#else
#define INLINE static inline
#endif

enum { FLOAT32 = 0, BFLOAT16 = 1 };

INLINE uint32_t bits_of(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float at(const void *stored, int kind, int64_t k)
{
    if (kind == FLOAT32)
        return ((const float *)stored)[k];
    uint32_t bits = (uint32_t)((const uint16_t *)stored)[k] << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE const void *from(const void *stored, int kind, int64_t start)
{
    return (const char *)stored + start * (kind == FLOAT32 ? 4 : 2);
}

INLINE void load(const void *stored, int kind, int64_t start, int64_t n, float *restrict values)
{
    const void *block = from(stored, kind, start);
    for (int64_t k = 0; k < n; k++)
        values[k] = at(block, kind, k);
}

/* Whether a number is infinite or NaN: its exponent is all ones. */
INLINE uint32_t is_unbounded(float value)
{
    return ((bits_of(value) & 0x7f800000u) + 0x00800000u) >> 31;
}

/* To the nearest, and of two as near to the even one. Returns whether any number is unbounded;
   what is stored of those has no meaning. */
INLINE uint32_t store(const float *restrict values, int64_t n, void *stored, int kind, int64_t start)
{
    uint32_t unbounded = 0;
    if (kind == FLOAT32) {
        float *restrict floats = (float *)stored + start;
        for (int64_t k = 0; k < n; k++) {
            unbounded |= is_unbounded(values[k]);
            floats[k] = values[k];
        }
    } else {
        uint16_t *restrict halves = (uint16_t *)stored + start;
        for (int64_t k = 0; k < n; k++) {
            uint32_t bits = bits_of(values[k]);
            unbounded |= is_unbounded(values[k]);
            halves[k] = (uint16_t)((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
        }
    }
    return unbounded;
}

/* Two blocks of numbers of one kind: as they are stored, or both as float32. */
struct pair {
    const void *x, *y;
    int kind;
    float x_room[BLOCK], y_room[BLOCK];
};

INLINE void pair_up(struct pair *pair, const void *const *sources, const uint8_t *kinds, int x, int y,
                    int64_t start, int64_t n)
{
    pair->kind = kinds[x];
    pair->x = from(sources[x], kinds[x], start);
    pair->y = from(sources[y], kinds[y], start);
    if (kinds[x] == kinds[y])
        return;
    load(sources[x], kinds[x], start, n, pair->x_room);
    load(sources[y], kinds[y], start, n, pair->y_room);
    pair->x = pair->x_room, pair->y = pair->y_room, pair->kind = FLOAT32;
}

/* x - y. Returns whether any of them is unbounded. */
INLINE uint32_t subtract_as(const void *restrict x, const void *restrict y, int kind, int64_t n,
                            float *restrict vector)
{
    uint32_t unbounded = 0;
    for (int64_t k = 0; k < n; k++) {
        vector[k] = at(x, kind, k) - at(y, kind, k);
        unbounded |= is_unbounded(vector[k]);
    }
    return unbounded;
}

INLINE uint32_t subtract(const struct pair *pair, int64_t n, float *restrict vector)
{
    return pair->kind == BFLOAT16 ? subtract_as(pair->x, pair->y, BFLOAT16, n, vector)
                                  : subtract_as(pair->x, pair->y, FLOAT32, n, vector);
}

/* Which of the masks hold an element: the first in the least significant bit. */
INLINE void encode(const uint8_t *const *masks, int num_masks, int64_t start, int64_t n,
                   uint8_t *restrict codes)
{
    memcpy(codes, masks[0] + start, (size_t)n);
    for (int i = 1; i < num_masks; i++) {
        const uint8_t *restrict mask = masks[i] + start;
        for (int64_t k = 0; k < n; k++)
            codes[k] |= (uint8_t)(mask[k] << i);
    }
}

INLINE int64_t count(const uint8_t *restrict codes, int64_t n, int code)
{
    uint8_t wanted = (uint8_t)code, found[LANES] = {0}; /* of BLOCK / LANES elements each */
    int64_t total = 0, k = 0;
    for (; k + LANES <= n; k += LANES)
        for (int lane = 0; lane < LANES; lane++)
            found[lane] += codes[k + lane] == wanted;
    for (; k < n; k++)
        total += codes[k] == wanted;
    for (int lane = 0; lane < LANES; lane++)
        total += found[lane];
    return total;
}

/* (x - y) * w, into the sum or added to it; weights: one, or those of all codes. */
INLINE void add_term_as(float *restrict sum, int is_first, const void *restrict x,
                        const void *restrict y, int kind, int64_t n, const float *restrict weights,
                        int num_weights, const uint32_t *restrict codes)
{
    float none = weights[0], first = 0, second = 0, both = 0;
    if (num_weights == 4)
        first = weights[1], second = weights[2], both = weights[3];
    for (int64_t k = 0; k < n; k++) {
        float weight = none;
        if (num_weights == 4) { /* choosing takes half as long as looking up */
            float without = codes[k] & 1 ? first : none, with = codes[k] & 1 ? both : second;
            weight = codes[k] & 2 ? with : without;
        } else if (num_weights != 1) {
            weight = weights[codes[k]];
        }
        float term = (at(x, kind, k) - at(y, kind, k)) * weight;
        sum[k] = is_first ? term : sum[k] + term;
    }
}

INLINE void add_term(float *restrict sum, int is_first, const struct pair *pair, int64_t n,
                     const float *restrict weights, int num_weights, const uint32_t *restrict codes)
{
    const void *x = pair->x, *y = pair->y;
    int is_half = pair->kind == BFLOAT16;
    /* Loops of their own: what is spelled out here is known when they are compiled. */
    if (num_weights == 1 && is_half)
        add_term_as(sum, is_first, x, y, BFLOAT16, n, weights, 1, codes);
    else if (num_weights == 1)
        add_term_as(sum, is_first, x, y, FLOAT32, n, weights, 1, codes);
    else if (num_weights == 4 && is_half)
        add_term_as(sum, is_first, x, y, BFLOAT16, n, weights, 4, codes);
    else if (num_weights == 4)
        add_term_as(sum, is_first, x, y, FLOAT32, n, weights, 4, codes);
    else
        add_term_as(sum, is_first, x, y, pair->kind, n, weights, num_weights, codes);
}

INLINE void add(float *restrict sum, const void *stored, int kind, int64_t start, int64_t n)
{
    const void *restrict block = from(stored, kind, start);
    for (int64_t k = 0; k < n; k++)
        sum[k] += at(block, kind, k);
}

/* Raised whenever what is declared elsewhere changes: a library built before is not used. */
int64_t kifmerge_native_version(void)
{
    return 3;
}

/* origin + w_1 * (x_1 - y_1) + w_2 * (x_2 - y_2) + ..., in this order, or with the origin last.

   sources, kinds: the tensors, of numel elements each, and their types
   xs, ys, origin: which of them
   weights: num_terms rows of 2 ** num_masks, by code
   counts: where there are masks, elements of all, of none, and of each alone are added there
   Returns whether all sums are finite; where they are not, what is stored has no meaning. */
FOR_EACH_PROCESSOR
int64_t kifmerge_weighted_sum(int64_t numel, const void *const *sources, const uint8_t *kinds,
                          int num_terms, const int32_t *xs, const int32_t *ys,
                          const float *weights, int origin, int origin_last, int num_masks,
                          const uint8_t *const *masks, int64_t *counts, void *out, int out_kind)
{
    float sum[BLOCK];
    struct pair pair;
    uint8_t codes[BLOCK];
    uint32_t wide_codes[BLOCK]; /* beside floats of the same size: measured twice as fast */
    int num_weights = 1 << num_masks;
    uint32_t unbounded = 0;
    for (int64_t start = 0; start < numel; start += BLOCK) {
        int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
        if (num_masks) {
            encode(masks, num_masks, start, n, codes);
            counts[0] += count(codes, n, num_weights - 1);
            counts[1] += count(codes, n, 0);
            for (int i = 0; i < num_masks; i++)
                counts[2 + i] += count(codes, n, 1 << i);
            for (int64_t k = 0; k < n; k++)
                wide_codes[k] = codes[k];
        }
        if (!origin_last || num_terms == 0)
            load(sources[origin], kinds[origin], start, n, sum);
        for (int t = 0; t < num_terms; t++) {
            pair_up(&pair, sources, kinds, xs[t], ys[t], start, n);
            add_term(sum, t == 0 && origin_last, &pair, n, weights + (int64_t)t * num_weights,
                     num_weights, wide_codes);
        }
        if (origin_last && num_terms)
            add(sum, sources[origin], kinds[origin], start, n);
        unbounded |= store(sum, n, out, out_kind, start);
    }
    return unbounded == 0;
}

/* TIES: of each vector x_i - y_i what is at least as large as smallest_kept[i], times its weight;
   per element the mean of those with the sign of their sum, times the scale, added to the base.

   sources, kinds: the base, and num_models models, of numel elements each, and their types
   ys: where the vectors start
   least_divisor: the smallest size of a weight that is not 0
   Returns whether all vectors and results are finite; where they are not, what is stored has no
   meaning. */
FOR_EACH_PROCESSOR
int64_t kifmerge_ties(int64_t numel, const void *const *sources, const uint8_t *kinds, int num_models,
                  const int32_t *ys, const float *smallest_kept, const float *weights, float scale,
                  float least_divisor, void *out, int out_kind)
{
    float terms[MOST_MODELS][TIES_BLOCK], y[TIES_BLOCK], sum[TIES_BLOCK], divisor[TIES_BLOCK];
    struct pair pair;
    uint32_t unbounded = 0;
    for (int64_t start = 0; start < numel; start += TIES_BLOCK) {
        int64_t n = numel - start < TIES_BLOCK ? numel - start : TIES_BLOCK;
        for (int i = 0; i < num_models; i++) {
            float *restrict term = terms[i];
            float smallest = smallest_kept[i], weight = weights[i];
            pair_up(&pair, sources, kinds, i + 1, ys[i], start, n);
            unbounded |= subtract(&pair, n, term);
            for (int64_t k = 0; k < n; k++) {
                float kept = __builtin_fabsf(term[k]) >= smallest ? 1.0f : 0.0f;
                term[k] = kept * term[k] * weight;
            }
            if (i == 0)
                memcpy(sum, term, (size_t)n * sizeof(float));
            else
                add(sum, term, FLOAT32, 0, n);
        }
        for (int64_t k = 0; k < n; k++)
            y[k] = sum[k] < 0.0f ? -1.0f : 1.0f; /* the elected sign */
        for (int64_t k = 0; k < n; k++)
            sum[k] = divisor[k] = 0.0f;
        for (int i = 0; i < num_models; i++) {
            const float *restrict term = terms[i];
            float size = __builtin_fabsf(weights[i]);
            for (int64_t k = 0; k < n; k++) {
                float agreeing = term[k] * y[k];
                sum[k] += agreeing > 0.0f ? agreeing : 0.0f;
                divisor[k] += agreeing > 0.0f ? size : 0.0f;
            }
        }
        for (int64_t k = 0; k < n; k++) {
            float bounded = divisor[k] < least_divisor ? least_divisor : divisor[k];
            sum[k] = sum[k] / bounded * y[k] * scale;
        }
        add(sum, sources[0], kinds[0], start, n);
        unbounded |= store(sum, n, out, out_kind, start);
    }
    return unbounded == 0;
}

/* |x - y|, into sizes. Returns whether all of them are finite. */
FOR_EACH_PROCESSOR
int64_t kifmerge_sizes(int64_t numel, const void *const *sources, const uint8_t *kinds, float *sizes)
{
    struct pair pair;
    uint32_t unbounded = 0;
    for (int64_t start = 0; start < numel; start += BLOCK) {
        int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
        float *restrict vector = sizes + start;
        pair_up(&pair, sources, kinds, 0, 1, start, n);
        unbounded |= subtract(&pair, n, vector);
        for (int64_t k = 0; k < n; k++)
            vector[k] = __builtin_fabsf(vector[k]);
    }
    return unbounded == 0;
}

/* Of numbers, as their bits, those from first on, below first + width.

   places: how far from first each of them lies, in their order; room for numel
   num_above: how many lie at first + width or above
   largest: of all bits
   Returns how many places there are. */
FOR_EACH_PROCESSOR
int64_t kifmerge_within(int64_t numel, const uint32_t *numbers, uint32_t first, uint32_t width,
                        uint32_t *places, int64_t *num_above, uint32_t *largest)
{
    int64_t num_within = 0, above = 0;
    uint32_t most = 0, end = first + width;
    for (int64_t start = 0; start < numel; start += BLOCK) {
        int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
        const uint32_t *restrict bits = numbers + start;
        uint64_t flags[BLOCK / 8] = {0};
        uint8_t *flag = (uint8_t *)flags;
        uint32_t found = 0;
        for (int64_t k = 0; k < n; k++) {
            found += bits[k] >= end;
            most = bits[k] > most ? bits[k] : most;
        }
        for (int64_t k = 0; k < n; k++)
            flag[k] = bits[k] - first < width; /* below first they wrap around */
        above += found;
        for (int64_t k = 0; k < n; k += 8)
            if (flags[k / 8]) /* mostly none of eight */
                for (int64_t i = k; i < k + 8 && i < n; i++)
                    if (flag[i])
                        places[num_within++] = bits[i] - first;
    }
    *num_above = above;
    *largest = most;
    return num_within;
}

/* Count places: of each there is one counter. */
int64_t kifmerge_tally(int64_t num_places, const uint32_t *places, int64_t *counts)
{
    for (int64_t k = 0; k < num_places; k++)
        counts[places[k]]++;
    return num_places;
}

/* Count how many numbers have which upper 16 bits, in the order of values; -0.0 counts as 0.0.

   room: of two tables, so that equal numbers next to each other do not wait for one counter
   counts: NUM_BUCKETS of them, which are added to
   Returns how many are NaN. */
FOR_EACH_PROCESSOR
int64_t kifmerge_upper_counts(int64_t numel, const void *numbers, int kind, uint32_t *room,
                           int64_t *counts)
{
    float values[BLOCK];
    uint16_t buckets[BLOCK];
    uint32_t *even = room, *odd = room + NUM_BUCKETS;
    int64_t num_nan = 0;
    memset(room, 0, 2 * NUM_BUCKETS * sizeof *room);
    for (int64_t start = 0; start < numel; start += BLOCK) {
        int64_t n = numel - start < BLOCK ? numel - start : BLOCK;
        uint32_t found = 0;
        load(numbers, kind, start, n, values);
        for (int64_t k = 0; k < n; k++)
            found += values[k] != values[k];
        num_nan += found;
        for (int64_t k = 0; k < n; k++) {
            uint32_t bits = bits_of(values[k] + 0.0f);
            uint32_t ordered = bits >> 31 ? ~bits : bits ^ 0x80000000u;
            buckets[k] = (uint16_t)(ordered >> 16);
        }
        for (int64_t k = 0; k + 1 < n; k += 2) {
            even[buckets[k]]++;
            odd[buckets[k + 1]]++;
        }
        if (n % 2)
            even[buckets[n - 1]]++;
    }
    for (int64_t bucket = 0; bucket < NUM_BUCKETS; bucket++)
        counts[bucket] += (int64_t)even[bucket] + odd[bucket];
    return num_nan;
}
