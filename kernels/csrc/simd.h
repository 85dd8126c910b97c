/* Vectors of LANES floats, by GCC and Clang's vector extensions: one text for every instruction
 * set. The including file defines LANES (4, 8 or 16), TARGET (the attribute that lets the compiler
 * use the instruction set) and includes this once. */
#include <math.h>
#include <stdint.h>
#include <string.h>
#if LANES > 4
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline)) TARGET
#define KERNEL static TARGET

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef int32_t ivec __attribute__((vector_size(4 * LANES)));
typedef float vec4 __attribute__((vector_size(16)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ivec){__VA_ARGS__})
#endif

/* Within every four lanes: interleave the low two, the high two; join the low, the high halves. */
#if LANES == 4
#define UNPACK_LOW 0, 4, 1, 5
#define UNPACK_HIGH 2, 6, 3, 7
#define JOIN_LOW 0, 1, 4, 5
#define JOIN_HIGH 2, 3, 6, 7
#elif LANES == 8
#define UNPACK_LOW 0, 8, 1, 9, 4, 12, 5, 13
#define UNPACK_HIGH 2, 10, 3, 11, 6, 14, 7, 15
#define JOIN_LOW 0, 1, 8, 9, 4, 5, 12, 13
#define JOIN_HIGH 2, 3, 10, 11, 6, 7, 14, 15
#elif LANES == 16
#define UNPACK_LOW 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29
#define UNPACK_HIGH 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31
#define JOIN_LOW 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29
#define JOIN_HIGH 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31
#endif

INLINE vec load(const float *p)
{
    vec v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* The first `count` lanes from memory, zeros after. */
INLINE vec load_part(const float *p, long count)
{
    vec v = {0};
    memcpy(&v, p, (size_t)count * sizeof(float));
    return v;
}

/* LANES bytes, each a signed integer. (Of a plain conversion GCC 12 makes one scalar at a time.) */
INLINE ivec load_bytes(const uint8_t *p)
{
#if LANES == 16
    return (ivec)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p));
#elif LANES == 8
    return (ivec)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)p));
#else
    return (ivec){(int8_t)p[0], (int8_t)p[1], (int8_t)p[2], (int8_t)p[3]};
#endif
}

INLINE vec to_floats(ivec v)
{
    return __builtin_convertvector(v, vec);
}

INLINE void store(float *p, vec v)
{
    memcpy(p, &v, sizeof v);
}

INLINE void store_part(float *p, vec v, long count)
{
    memcpy(p, &v, (size_t)count * sizeof(float));
}

INLINE vec splat(float value)
{
    return (vec){0} + value;
}

INLINE vec choose(ivec mask, vec yes, vec no)
{
    return (vec)(((ivec)yes & mask) | ((ivec)no & ~mask));
}

/* The sums of four vectors' lanes. The order of additions is the same whatever the position. */
INLINE vec4 sum_each(vec a, vec b, vec c, vec d)
{
    vec ab = SHUFFLE(a, b, UNPACK_LOW) + SHUFFLE(a, b, UNPACK_HIGH);
    vec cd = SHUFFLE(c, d, UNPACK_LOW) + SHUFFLE(c, d, UNPACK_HIGH);
    vec abcd = SHUFFLE(ab, cd, JOIN_LOW) + SHUFFLE(ab, cd, JOIN_HIGH);
    vec4 quarter[LANES / 4];
    memcpy(quarter, &abcd, sizeof abcd);
#if LANES == 4
    return quarter[0];
#elif LANES == 8
    return quarter[0] + quarter[1];
#else
    return (quarter[0] + quarter[1]) + (quarter[2] + quarter[3]);
#endif
}

INLINE float sum(vec v)
{
    return sum_each(v, v, v, v)[0];
}

INLINE float highest(vec v)
{
    float lane[LANES], best;
    memcpy(lane, &v, sizeof v);
    best = lane[0];
    for (int i = 1; i < LANES; i++)
        best = lane[i] > best ? lane[i] : best;
    return best;
}

/* e^x to about 1e-7 relative: 0 below -87.3, infinite above 88.3, NaN for NaN, exactly 1 at 0.
 * x = n ln 2 + r with |r| <= ln 2 / 2, and the Taylor polynomial of e^r (Cephes's cut). */
INLINE vec exponential(vec x)
{
    const vec lowest = splat(-87.3f), highest_x = splat(88.3f);
    const vec to_integer = splat(12582912.0f); /* 1.5 * 2^23: adding it rounds to an integer */
    ivec underflow = x < lowest, overflow = x > highest_x;
    x = choose(overflow, highest_x, x);
    x = choose(underflow, lowest, x);
    vec shifted = x * 1.44269504f + to_integer;
    vec n = shifted - to_integer;
    vec r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    vec p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = (p * r) * r + r + 1.0f;
    /* The low bits of `shifted` hold n; as an exponent, 2^n. */
    ivec exponent = (((ivec)shifted << 23) + (127 << 23));
    vec result = choose(overflow, splat(INFINITY), p * (vec)exponent);
    return choose(underflow, (vec){0}, result);
}
