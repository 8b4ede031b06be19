// The linear layer with bfloat16 dot products (AVX-512-BF16): 32 products and 16 sums an instruction.
//
// The instruction takes subnormal bfloat16 values as zero.

#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LORASRV_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma,avx2")))
#define LORASRV_OPERATION inline __attribute__((always_inline)) LORASRV_TARGET

namespace {

using Element = uint16_t;
using Vector = __m512i;
using Sum = __m512;
using Table = __m512i;
constexpr int kStep = 32;
constexpr int kLanes = 16;
constexpr int kTileRows = 4;
constexpr int kTileTokens = 6;

LORASRV_OPERATION Vector load(const Element* at) { return _mm512_loadu_si512(at); }
LORASRV_OPERATION void store(Element* at, Vector value) { _mm512_storeu_si512(at, value); }
LORASRV_OPERATION Sum zero() { return _mm512_setzero_ps(); }
LORASRV_OPERATION Sum load_sum(const float* at) { return _mm512_loadu_ps(at); }
LORASRV_OPERATION void store_sum(float* at, Sum value) { _mm512_storeu_ps(at, value); }

LORASRV_OPERATION Sum multiply_add(Sum sum, Vector a, Vector b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

LORASRV_OPERATION Table scaled_table(const float* levels, float scale, bool) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    // twice, so that the fifth bit of an index does not matter
    return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(scaled));
}

LORASRV_OPERATION Vector decode(Table table, const uint8_t* codes, int part) {
    // a byte in 32 bits becomes two 16-bit indices in row order: shifted right by four, and as it is
    const __m512i bytes =
        _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + 16 * part)));
    const __m512i shifts = _mm512_set1_epi64(0x2820282408000804);
    return _mm512_permutexvar_epi16(_mm512_multishift_epi64_epi8(shifts, bytes), table);
}

}  // namespace

#include "avx512_sums.h"
#include "linear_tile.h"

const LinearKernels kAvx512Bf16Linear = kKernels;
#endif
