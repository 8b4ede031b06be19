// The linear layer with AVX-512 multiply-adds in float32; bfloat16 weights and tokens are widened, which is exact.

#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LORASRV_TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma,avx2")))
#define LORASRV_OPERATION inline __attribute__((always_inline)) LORASRV_TARGET

namespace {

using Element = float;
using Vector = __m512;
using Sum = __m512;
using Table = __m512;
constexpr int kStep = 16;
constexpr int kLanes = 16;
constexpr int kTileRows = 4;
constexpr int kTileTokens = 6;

LORASRV_OPERATION Vector load(const Element* at) { return _mm512_loadu_ps(at); }
LORASRV_OPERATION void store(Element* at, Vector value) { _mm512_storeu_ps(at, value); }
LORASRV_OPERATION Sum zero() { return _mm512_setzero_ps(); }
LORASRV_OPERATION Sum load_sum(const float* at) { return _mm512_loadu_ps(at); }
LORASRV_OPERATION void store_sum(float* at, Sum value) { _mm512_storeu_ps(at, value); }
LORASRV_OPERATION Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm512_fmadd_ps(a, b, sum); }

}  // namespace

#include "avx512_sums.h"

namespace {

LORASRV_OPERATION Table scaled_table(const float* levels, float scale, bool round) {
    const __m512 scaled = _mm512_mul_ps(_mm512_loadu_ps(levels), _mm512_set1_ps(scale));
    if (!round) return scaled;
    const __m512i upper = _mm512_and_si512(rounded_to_bfloat16(scaled), _mm512_set1_epi32(-0x10000));
    return _mm512_castsi512_ps(upper);
}

LORASRV_OPERATION Vector decode(Table table, const uint8_t* codes, int part) {
    // a byte in 64 bits becomes two 32-bit indices in row order, of which the lowest four bits count
    const __m512i bytes = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + 8 * part)));
    const __m512i indices = _mm512_or_si512(_mm512_srli_epi64(bytes, 4), _mm512_slli_epi64(bytes, 32));
    return _mm512_permutexvar_ps(indices, table);
}

constexpr auto arrange = nullptr;

}  // namespace

#include "linear_tile.h"

const LinearKernels kAvx512Linear = kKernels;
#endif
