// Sixteen float32 lanes with one arithmetic in three instruction sets. AVX2 and AVX-512 give the same bits; portable
// code rounds products before it adds them. A kernel's body is a header that is included once per instruction set, in that
// set's namespace, with LORASRV_TARGET before every function.

#pragma once

#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LORASRV_INLINE __attribute__((always_inline)) inline
#define LORASRV_AVX2 __attribute__((target("avx2,fma")))
#define LORASRV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

namespace {

constexpr int64_t kLanes = 16;

struct Bfloat16 {
    uint16_t bits;
};

namespace portable {

// rows taken together, columns (or dot products) of each of them, and columns of a row that is alone; rows and columns
// of attention
constexpr int kRows = 2, kColumns = 1, kColumnsAlone = 2, kScoreRows = 1, kValueColumns = 2;

struct Lanes {
    float at[kLanes];
};

LORASRV_INLINE Lanes load(const float* from) {
    Lanes value;
    std::memcpy(value.at, from, sizeof value.at);
    return value;
}

LORASRV_INLINE Lanes load(const Bfloat16* from) {
    uint32_t bits[kLanes];
    for (int i = 0; i < kLanes; ++i) bits[i] = static_cast<uint32_t>(from[i].bits) << 16;
    Lanes value;
    std::memcpy(value.at, bits, sizeof value.at);
    return value;
}

LORASRV_INLINE void store(float* to, Lanes value) { std::memcpy(to, value.at, sizeof value.at); }

LORASRV_INLINE void store(Bfloat16* to, Lanes value) {
    uint32_t bits[kLanes];
    std::memcpy(bits, value.at, sizeof bits);
    for (int i = 0; i < kLanes; ++i) {
        const uint32_t rounded = (bits[i] + 0x7fff + ((bits[i] >> 16) & 1)) >> 16;
        to[i].bits = static_cast<uint16_t>(value.at[i] != value.at[i] ? 0x7fc0 : rounded);
    }
}

// The value as it would be stored.
LORASRV_INLINE Lanes rounded(Lanes value, const float*) { return value; }

LORASRV_INLINE Lanes rounded(Lanes value, const Bfloat16*) {
    Bfloat16 stored[kLanes];
    store(stored, value);
    return load(stored);
}

LORASRV_INLINE Lanes broadcast(float value) {
    Lanes result;
    for (int i = 0; i < kLanes; ++i) result.at[i] = value;
    return result;
}

LORASRV_INLINE Lanes add(Lanes a, Lanes b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] += b.at[i];
    return a;
}

LORASRV_INLINE Lanes subtract(Lanes a, Lanes b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] -= b.at[i];
    return a;
}

LORASRV_INLINE Lanes multiply(Lanes a, Lanes b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] *= b.at[i];
    return a;
}

LORASRV_INLINE Lanes divide(Lanes a, Lanes b) {
    for (int i = 0; i < kLanes; ++i) a.at[i] /= b.at[i];
    return a;
}

// a * b + c
LORASRV_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) { return add(multiply(a, b), c); }

// b where either is NaN
LORASRV_INLINE Lanes largest(Lanes a, Lanes b) {
    for (int i = 0; i < kLanes; ++i) b.at[i] = a.at[i] > b.at[i] ? a.at[i] : b.at[i];
    return b;
}

// value, but 0 where x < bound
LORASRV_INLINE Lanes zero_below(Lanes x, Lanes bound, Lanes value) {
    for (int i = 0; i < kLanes; ++i) value.at[i] = x.at[i] < bound.at[i] ? 0.0f : value.at[i];
    return value;
}

// 2^n of numbers that were rounded to n by adding 1.5 * 2^23
LORASRV_INLINE Lanes power_of_rounded(Lanes shifted) {
    uint32_t bits[kLanes];
    std::memcpy(bits, shifted.at, sizeof bits);
    for (int i = 0; i < kLanes; ++i) bits[i] = (bits[i] + 127) << 23;
    std::memcpy(shifted.at, bits, sizeof bits);
    return shifted;
}

LORASRV_INLINE float sum(Lanes value) {
    float* at = value.at;
    for (int i = 0; i < 8; ++i) at[i] += at[i + 8];
    for (int i = 0; i < 4; ++i) at[i] += at[i + 4];
    return (at[0] + at[2]) + (at[1] + at[3]);
}

LORASRV_INLINE float largest_lane(Lanes value) {
    float top = value.at[0];
    for (int i = 1; i < kLanes; ++i) top = value.at[i] > top ? value.at[i] : top;
    return top;
}

// in lane 4 i + j of what `sums` makes of four of them: the sum of the lanes of vector j
LORASRV_INLINE Lanes fold(const Lanes (&vector)[4]) {
    Lanes result;
    for (int part = 0; part < 4; ++part)
        for (int j = 0; j < 4; ++j) {
            const float* at = vector[j].at + 4 * part;
            result.at[4 * part + j] = (at[0] + at[2]) + (at[1] + at[3]);
        }
    return result;
}

LORASRV_INLINE Lanes sums(const Lanes (&folded)[4]) {
    Lanes result;
    for (int i = 0; i < 4; ++i)
        for (int j = 0; j < 4; ++j) {
            const float* at = folded[i].at + j;
            result.at[4 * i + j] = (at[0] + at[4]) + (at[8] + at[12]);
        }
    return result;
}

}  // namespace portable

#if defined(__x86_64__)

namespace avx2 {

constexpr int kRows = 2, kColumns = 2, kColumnsAlone = 4, kScoreRows = 1, kValueColumns = 4;

struct Lanes {
    __m256 low, high;
};

LORASRV_AVX2 LORASRV_INLINE Lanes load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }

LORASRV_AVX2 LORASRV_INLINE __m256 widen(const Bfloat16* from) {
    const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}

LORASRV_AVX2 LORASRV_INLINE Lanes load(const Bfloat16* from) { return {widen(from), widen(from + 8)}; }

LORASRV_AVX2 LORASRV_INLINE void store(float* to, Lanes value) {
    _mm256_storeu_ps(to, value.low);
    _mm256_storeu_ps(to + 8, value.high);
}

LORASRV_AVX2 LORASRV_INLINE __m256i rounded_bits(__m256 value) {
    const __m256i bits = _mm256_castps_si256(value);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    return _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
}

LORASRV_AVX2 LORASRV_INLINE void store(Bfloat16* to, Lanes value) {
    const __m256i packed = _mm256_packus_epi32(rounded_bits(value.low), rounded_bits(value.high));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
}

LORASRV_AVX2 LORASRV_INLINE Lanes rounded(Lanes value, const float*) { return value; }

LORASRV_AVX2 LORASRV_INLINE Lanes rounded(Lanes value, const Bfloat16*) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(value.low), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(rounded_bits(value.high), 16))};
}

LORASRV_AVX2 LORASRV_INLINE Lanes broadcast(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }

LORASRV_AVX2 LORASRV_INLINE Lanes add(Lanes a, Lanes b) {
    return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes subtract(Lanes a, Lanes b) {
    return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes multiply(Lanes a, Lanes b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes divide(Lanes a, Lanes b) {
    return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes largest(Lanes a, Lanes b) {
    return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)};
}

LORASRV_AVX2 LORASRV_INLINE Lanes zero_below(Lanes x, Lanes bound, Lanes value) {
    return {_mm256_andnot_ps(_mm256_cmp_ps(x.low, bound.low, _CMP_LT_OQ), value.low),
            _mm256_andnot_ps(_mm256_cmp_ps(x.high, bound.high, _CMP_LT_OQ), value.high)};
}

LORASRV_AVX2 LORASRV_INLINE __m256 power_of_rounded(__m256 shifted) {
    const __m256i biased = _mm256_add_epi32(_mm256_castps_si256(shifted), _mm256_set1_epi32(127));
    return _mm256_castsi256_ps(_mm256_slli_epi32(biased, 23));
}

LORASRV_AVX2 LORASRV_INLINE Lanes power_of_rounded(Lanes shifted) {
    return {power_of_rounded(shifted.low), power_of_rounded(shifted.high)};
}

LORASRV_AVX2 LORASRV_INLINE float sum(__m256 value) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(value), _mm256_extractf128_ps(value, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LORASRV_AVX2 LORASRV_INLINE float sum(Lanes value) { return sum(_mm256_add_ps(value.low, value.high)); }

LORASRV_AVX2 LORASRV_INLINE float largest_lane(Lanes value) {
    const __m256 eight = _mm256_max_ps(value.low, value.high);
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LORASRV_AVX2 LORASRV_INLINE __m256 fold(__m256 a, __m256 b, __m256 c, __m256 d) {
    const __m256d ab = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)));
    const __m256d cd = _mm256_castps_pd(_mm256_add_ps(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)));
    return _mm256_add_ps(_mm256_castpd_ps(_mm256_unpacklo_pd(ab, cd)), _mm256_castpd_ps(_mm256_unpackhi_pd(ab, cd)));
}

LORASRV_AVX2 LORASRV_INLINE Lanes fold(const Lanes (&vector)[4]) {
    return {fold(vector[0].low, vector[1].low, vector[2].low, vector[3].low),
            fold(vector[0].high, vector[1].high, vector[2].high, vector[3].high)};
}

LORASRV_AVX2 LORASRV_INLINE __m256 pair_sums(__m256 a, __m256 b) {
    return _mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
}

LORASRV_AVX2 LORASRV_INLINE Lanes sums(const Lanes (&folded)[4]) {
    return {_mm256_add_ps(pair_sums(folded[0].low, folded[1].low), pair_sums(folded[0].high, folded[1].high)),
            _mm256_add_ps(pair_sums(folded[2].low, folded[3].low), pair_sums(folded[2].high, folded[3].high))};
}

}  // namespace avx2

namespace avx512 {

constexpr int kRows = 4, kColumns = 4, kColumnsAlone = 8, kScoreRows = 4, kValueColumns = 4;

using Lanes = __m512;

LORASRV_AVX512 LORASRV_INLINE Lanes load(const float* from) { return _mm512_loadu_ps(from); }

LORASRV_AVX512 LORASRV_INLINE Lanes load(const Bfloat16* from) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

LORASRV_AVX512 LORASRV_INLINE void store(float* to, Lanes value) { _mm512_storeu_ps(to, value); }

LORASRV_AVX512 LORASRV_INLINE __m512i rounded_bits(Lanes value) {
    const __m512i bits = _mm512_castps_si512(value);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0));
}

LORASRV_AVX512 LORASRV_INLINE void store(Bfloat16* to, Lanes value) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(rounded_bits(value)));
}

LORASRV_AVX512 LORASRV_INLINE Lanes rounded(Lanes value, const float*) { return value; }

LORASRV_AVX512 LORASRV_INLINE Lanes rounded(Lanes value, const Bfloat16*) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(rounded_bits(value), 16));
}

LORASRV_AVX512 LORASRV_INLINE Lanes broadcast(float value) { return _mm512_set1_ps(value); }
LORASRV_AVX512 LORASRV_INLINE Lanes add(Lanes a, Lanes b) { return _mm512_add_ps(a, b); }
LORASRV_AVX512 LORASRV_INLINE Lanes subtract(Lanes a, Lanes b) { return _mm512_sub_ps(a, b); }
LORASRV_AVX512 LORASRV_INLINE Lanes multiply(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
LORASRV_AVX512 LORASRV_INLINE Lanes divide(Lanes a, Lanes b) { return _mm512_div_ps(a, b); }
LORASRV_AVX512 LORASRV_INLINE Lanes fused(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
LORASRV_AVX512 LORASRV_INLINE Lanes largest(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }

LORASRV_AVX512 LORASRV_INLINE Lanes zero_below(Lanes x, Lanes bound, Lanes value) {
    return _mm512_mask_mov_ps(value, _mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), _mm512_setzero_ps());
}

LORASRV_AVX512 LORASRV_INLINE Lanes power_of_rounded(Lanes shifted) {
    const __m512i biased = _mm512_add_epi32(_mm512_castps_si512(shifted), _mm512_set1_epi32(127));
    return _mm512_castsi512_ps(_mm512_slli_epi32(biased, 23));
}

LORASRV_AVX512 LORASRV_INLINE float sum(Lanes value) {
    const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LORASRV_AVX512 LORASRV_INLINE float largest_lane(Lanes value) {
    const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(value), _mm512_extractf32x8_ps(value, 1));
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

LORASRV_AVX512 LORASRV_INLINE Lanes fold(const Lanes (&vector)[4]) {
    const __m512 ab =
        _mm512_add_ps(_mm512_unpacklo_ps(vector[0], vector[1]), _mm512_unpackhi_ps(vector[0], vector[1]));
    const __m512 cd =
        _mm512_add_ps(_mm512_unpacklo_ps(vector[2], vector[3]), _mm512_unpackhi_ps(vector[2], vector[3]));
    const __m512d even = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    const __m512d odd = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
    return _mm512_add_ps(_mm512_castpd_ps(even), _mm512_castpd_ps(odd));
}

LORASRV_AVX512 LORASRV_INLINE Lanes pair_sums(Lanes a, Lanes b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
}

LORASRV_AVX512 LORASRV_INLINE Lanes sums(const Lanes (&folded)[4]) {
    return pair_sums(pair_sums(folded[0], folded[1]), pair_sums(folded[2], folded[3]));
}

}  // namespace avx512

#endif

}  // namespace
