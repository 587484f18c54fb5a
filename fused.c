// The few loops for which PyTorch on a CPU goes over memory many times, each in one pass. Compiled by fused.py.
// `half`: the numbers are bfloat16 (the upper 16 bits of a float32) and not float32; all computing is in float32.

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#define THREAD omp_get_thread_num()
#define THREADS omp_get_num_threads()
#else
#define THREAD 0
#define THREADS 1
#endif

#define INLINE static inline __attribute__((always_inline))
typedef int64_t integer;

INLINE float widen(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}

INLINE uint16_t narrow(float x) {  // to the nearest, of two as near to the even one; a NaN stays one
    uint32_t bits;
    memcpy(&bits, &x, 4);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return x != x ? 0x7fc0 : (uint16_t)rounded;
}

INLINE float get(const void *from, int half, integer i) {
    return half ? widen(((const uint16_t *)from)[i]) : ((const float *)from)[i];
}

INLINE void put(void *to, int half, integer i, float x) {
    if (half) ((uint16_t *)to)[i] = narrow(x);
    else ((float *)to)[i] = x;
}

INLINE const void *row_of(const void *from, int half, integer i) {
    return (const char *)from + i * (half ? 2 : 4);
}

// AdamW on n numbers; see optimizer.py for the formula.
void adamw(integer n, float *restrict p, const float *restrict g, float *restrict m, float *restrict v,
           float one_less_beta1, float beta2, float one_less_beta2, float step_size, float eps, float keep) {
    for (integer i = 0; i < n; i++) {
        m[i] += one_less_beta1 * (g[i] - m[i]);
        v[i] = beta2 * v[i] + one_less_beta2 * g[i] * g[i];
        p[i] = (p[i] - step_size * m[i] / (sqrtf(v[i]) + eps)) * keep;
    }
}

// The same on some rows of a table: row rows[k] has the gradient g[places[k]], or none where places[k] is below 0.
void adamw_rows(integer n, integer dim, const integer *rows, const integer *places, float *p, const float *g, float *m,
                float *v, const float *zeros, float one_less_beta1, float beta2, float one_less_beta2, float step_size,
                float eps, float keep) {
    for (integer k = 0; k < n; k++) {
        integer at = rows[k] * dim;
        adamw(dim, p + at, places[k] < 0 ? zeros : g + places[k] * dim, m + at, v + at, one_less_beta1, beta2,
              one_less_beta2, step_size, eps, keep);
    }
}

// RMSNorm: y = x * root * weight with root = 1 / sqrt(mean(x^2) + eps), which is kept for the way back.
INLINE void norm_row(integer dim, const void *x, int half, const float *weight, float eps, void *y, int y_half,
                     float *root) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (integer i = 0; i < dim; i++) sum += get(x, half, i) * get(x, half, i);
    float r = *root = 1.0f / sqrtf(sum / dim + eps);
#pragma omp simd
    for (integer i = 0; i < dim; i++) put(y, y_half, i, get(x, half, i) * r * weight[i]);
}

void rms_norm(integer rows, integer dim, const void *x, int half, const float *weight, float eps, void *y, int y_half,
              float *roots, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (integer i = 0; i < rows; i++) {
        const void *from = row_of(x, half, i * dim);
        void *to = (void *)row_of(y, y_half, i * dim);
        if (half) norm_row(dim, from, 1, weight, eps, to, 1, roots + i);
        else if (y_half) norm_row(dim, from, 0, weight, eps, to, 1, roots + i);
        else norm_row(dim, from, 0, weight, eps, to, 0, roots + i);
    }
}

// dx = root * (g * weight) - x * root^3 * mean(g * weight * x);  dweight = the rows' sum of g * x * root
INLINE void norm_row_back(integer dim, const float *x, const float *weight, float root, const void *g, int half,
                          float *dx, float *dweight) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (integer i = 0; i < dim; i++) sum += get(g, half, i) * weight[i] * x[i];
    float pull = sum / dim * root * root * root;
#pragma omp simd
    for (integer i = 0; i < dim; i++) {
        float gradient = get(g, half, i);
        dx[i] = root * gradient * weight[i] - x[i] * pull;
        dweight[i] += gradient * x[i] * root;
    }
}

void rms_norm_back(integer rows, integer dim, const float *x, const float *weight, const float *roots, const void *g,
                   int half, float *dx, float *dweights, int threads) {  // dweights: zeros (threads, dim), to be summed
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        float *dweight = dweights + thread * dim;
        for (integer i = rows * thread / threads; i < rows * (thread + 1) / threads; i++) {
            const void *from = row_of(g, half, i * dim);
            if (half) norm_row_back(dim, x + i * dim, weight, roots[i], from, 1, dx + i * dim, dweight);
            else norm_row_back(dim, x + i * dim, weight, roots[i], from, 0, dx + i * dim, dweight);
        }
    }
}

// Rotary positions: adjacent pairs times cos + i sin (`pairs` of them a head); row i stands at position i % length.
// turn: 1, or -1 for the way back.
INLINE void rotate_row(integer heads, integer pairs, const void *x, int half, const float *table, float turn, void *y) {
    for (integer head = 0; head < heads; head++)
        for (integer j = 0; j < pairs; j++) {
            integer at = 2 * (head * pairs + j);
            float even = get(x, half, at), odd = get(x, half, at + 1);
            float cosine = table[2 * j], sine = turn * table[2 * j + 1];
            put(y, half, at, even * cosine - odd * sine);
            put(y, half, at + 1, even * sine + odd * cosine);
        }
}

void rotate(integer rows, integer length, integer heads, integer pairs, const void *x, int half, const float *table,
            float turn, void *y, int threads) {
#pragma omp parallel for num_threads(threads) if (rows > 16)
    for (integer i = 0; i < rows; i++) {
        const void *from = row_of(x, half, i * heads * pairs * 2);
        void *to = (void *)row_of(y, half, i * heads * pairs * 2);
        const float *angles = table + i % length * pairs * 2;
        if (half) rotate_row(heads, pairs, from, 1, angles, turn, to);
        else rotate_row(heads, pairs, from, 0, angles, turn, to);
    }
}

// exp(x) to 2 units in the last place: 2^n times a polynomial on [-ln(2) / 2, ln(2) / 2]. One that is inlined, so that
// eight or sixteen numbers are computed at once.
INLINE float exponential(float x) {
    x = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = fmaf(x, 1.44269504f, 12582912.0f);  // adding 1.5 * 2^23 rounds to a whole number
    n -= 12582912.0f;
    float r = fmaf(n, 2.12194440e-4f, fmaf(n, -0.693359375f, x));  // n ln(2), in two parts
    float y = fmaf(r, 1.38888889e-3f, 8.33333333e-3f);
    y = fmaf(y, r, 4.16666667e-2f);
    y = fmaf(y, r, 1.66666667e-1f);
    y = fmaf(y, r, 0.5f);
    y = fmaf(y, r, 1.0f);
    y = fmaf(y, r, 1.0f);
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return y * power;
}

// SwiGLU: y = silu(a) * b with silu(a) = a / (1 + exp(-a))
INLINE void swiglu_part(integer from, integer to, const void *a, const void *b, int half, void *y) {
#pragma omp simd
    for (integer i = from; i < to; i++)
        put(y, half, i, get(a, half, i) / (1.0f + exponential(-get(a, half, i))) * get(b, half, i));
}

INLINE void swiglu_part_back(integer from, integer to, const void *a, const void *b, const void *g, int half, void *da,
                             void *db) {
#pragma omp simd
    for (integer i = from; i < to; i++) {
        float wide = get(a, half, i), gradient = get(g, half, i);
        float sigmoid = 1.0f / (1.0f + exponential(-wide)), silu = wide * sigmoid;
        put(da, half, i, gradient * get(b, half, i) * (sigmoid + silu * (1.0f - sigmoid)));
        put(db, half, i, gradient * silu);
    }
}

void swiglu(integer n, const void *a, const void *b, int half, void *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1) if (n > 16384)
    for (int thread = 0; thread < threads; thread++) {
        integer from = n * thread / threads, to = n * (thread + 1) / threads;
        if (half) swiglu_part(from, to, a, b, 1, y);
        else swiglu_part(from, to, a, b, 0, y);
    }
}

void swiglu_back(integer n, const void *a, const void *b, const void *g, int half, void *da, void *db, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        integer from = n * thread / threads, to = n * (thread + 1) / threads;
        if (half) swiglu_part_back(from, to, a, b, g, 1, da, db);
        else swiglu_part_back(from, to, a, b, g, 0, da, db);
    }
}

// A matrix times one vector, y = weight x, bound by reading the weight. Two bfloat16 are read as one number of 32 bits,
// so x comes with its even places in front of its odd ones (float32 as it is). dim is even.
INLINE float bits_as_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, 4);
    return x;
}

INLINE void matvec_part(integer from, integer to, integer dim, const void *weight, int half, const float *x, void *y,
                        int y_half) {
    for (integer i = from; i < to; i++) {
        const float *row = row_of(weight, half, i * dim);
        const uint32_t *both = (const uint32_t *)row;
        // The processor fetches ahead within a page only; asking for the row after next gave a sixth more.
        const char *next = row_of(weight, half, (i + 2) * dim);
        for (integer j = 0; j < dim * (half ? 2 : 4); j += 64) __builtin_prefetch(next + j);
        float s = 0, t = 0;
        integer n = dim / 2;
        if (half) {
#pragma omp simd reduction(+ : s, t)
            for (integer j = 0; j < n; j++) {
                s = fmaf(bits_as_float(both[j] << 16), x[j], s);
                t = fmaf(bits_as_float(both[j] & 0xffff0000), x[n + j], t);
            }
        } else {
#pragma omp simd reduction(+ : s, t)
            for (integer j = 0; j < n; j++) {
                s = fmaf(row[j], x[j], s);
                t = fmaf(row[n + j], x[n + j], t);
            }
        }
        put(y, y_half, i, s + t);
    }
}

INLINE void arrange(integer dim, const void *x, int half, int for_half, float *y) {
    for (integer j = 0; j < dim; j++) y[for_half ? j / 2 + j % 2 * (dim / 2) : j] = get(x, half, j);
}

void matvec(integer rows, integer dim, const void *weight, const void *x, int half, float *wide, void *y, int threads) {
    arrange(dim, x, half, half, wide);
#pragma omp parallel for num_threads(threads) schedule(static, 1)
    for (int thread = 0; thread < threads; thread++) {
        integer from = rows * thread / threads, to = rows * (thread + 1) / threads;
        if (half) matvec_part(from, to, dim, weight, 1, wide, y, 1);
        else matvec_part(from, to, dim, weight, 0, wide, y, 0);
    }
}

// One layer for one new token, as LlamaLayer in llama.py: x (dim) float32, in place. keys and values are the layer's
// cache (kv_heads, context, head_dim), filled up to `position`. scratch: see fused.py.
typedef struct {
    integer dim, hidden, heads, kv_heads, head_dim, context;
    const float *attention_norm, *ffn_norm;
    const void *wq, *wk, *wv, *wo, *w1, *w2, *w3;
    void *keys, *values;
    float eps;
    int half;
} layer;

INLINE void attend(const layer *l, integer head, integer position, const float *query, float *scores, float *out) {
    integer n = l->head_dim, kv = head / (l->heads / l->kv_heads), start = kv * l->context * n;
    float most = -INFINITY, sum = 0;
    for (integer p = 0; p <= position; p++) {
        const void *key = row_of(l->keys, l->half, start + p * n);
        float dot = 0;
#pragma omp simd reduction(+ : dot)
        for (integer i = 0; i < n; i++) dot = fmaf(query[i], get(key, l->half, i), dot);
        scores[p] = dot / sqrtf(n);
        most = fmaxf(most, scores[p]);
    }
    for (integer p = 0; p <= position; p++) sum += scores[p] = expf(scores[p] - most);
    for (integer i = 0; i < n; i++) out[i] = 0;
    for (integer p = 0; p <= position; p++) {
        const void *value = row_of(l->values, l->half, start + p * n);
        float part = scores[p] / sum;
#pragma omp simd
        for (integer i = 0; i < n; i++) out[i] = fmaf(part, get(value, l->half, i), out[i]);
    }
}

INLINE void decode_part(const layer *l, integer position, const float *angles, float *x, float *scratch, int half,
                        int thread, int threads) {
#define MINE(rows) (rows) * thread / threads, (rows) * (thread + 1) / threads
#define TOGETHER _Pragma("omp barrier")
    integer dim = l->dim, n = l->head_dim, q_dim = n * l->heads, kv_dim = n * l->kv_heads, hidden = l->hidden;
    integer wide = dim > q_dim ? dim : q_dim;
    float *in = scratch, *q = in + (wide > hidden ? wide : hidden), *k = q + wide, *v = k + kv_dim, *out = v + kv_dim;
    float *up = out + wide, *scores = up + hidden, *gate = in, root;
    if (!thread) {
        norm_row(dim, x, 0, l->attention_norm, l->eps, out, 0, &root);
        arrange(dim, out, 0, half, in);
    }
    TOGETHER
    matvec_part(MINE(q_dim), dim, l->wq, half, in, q, 0);
    matvec_part(MINE(kv_dim), dim, l->wk, half, in, k, 0);
    matvec_part(MINE(kv_dim), dim, l->wv, half, in, v, 0);
    TOGETHER
    if (!thread) {
        rotate_row(l->heads, n / 2, q, 0, angles, 1.0f, q);
        rotate_row(l->kv_heads, n / 2, k, 0, angles, 1.0f, k);
        for (integer i = 0; i < kv_dim; i++) {
            integer at = i / n * l->context * n + position * n + i % n;
            put(l->keys, half, at, k[i]);
            put(l->values, half, at, v[i]);
        }
    }
    TOGETHER
    for (integer head = thread; head < l->heads; head += threads)
        attend(l, head, position, q + head * n, scores + head * l->context, out + head * n);
    TOGETHER
    if (!thread) arrange(q_dim, out, 0, half, in);
    TOGETHER
    matvec_part(MINE(dim), q_dim, l->wo, half, in, q, 0);
    TOGETHER
    if (!thread) {
        for (integer i = 0; i < dim; i++) x[i] += q[i];
        norm_row(dim, x, 0, l->ffn_norm, l->eps, out, 0, &root);
        arrange(dim, out, 0, half, in);
    }
    TOGETHER
    matvec_part(MINE(hidden), dim, l->w3, half, in, up, 0);
    float *own = scores;  // the scores are not needed any more
    matvec_part(MINE(hidden), dim, l->w1, half, in, own, 0);
    swiglu_part(MINE(hidden), own, up, 0, up);
    TOGETHER
    if (!thread) arrange(hidden, up, 0, half, gate);
    TOGETHER
    matvec_part(MINE(dim), hidden, l->w2, half, gate, q, 0);
    for (integer i = dim * thread / threads; i < dim * (thread + 1) / threads; i++) x[i] += q[i];
    TOGETHER
}

void decode(integer layers, const layer *all, integer position, const float *angles, float *x, float *scratch,
            int threads) {
#pragma omp parallel num_threads(threads)
    for (integer i = 0; i < layers; i++) {
        if (all[i].half) decode_part(all + i, position, angles, x, scratch, 1, THREAD, THREADS);
        else decode_part(all + i, position, angles, x, scratch, 0, THREAD, THREADS);
    }
}
