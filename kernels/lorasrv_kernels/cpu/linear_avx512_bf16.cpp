// The linear layer with bfloat16 dot products (AVX-512-BF16): 32 products and 16 sums an instruction.
//
// The instruction takes subnormal bfloat16 values as zero. Over NF4 weights the elements of a block are multiplied in an
// order of their own, tokens and weights alike.

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
    return (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
}

// The order in which a block's weights fall out of their codes with fewest operations: of every two bytes, taken as one
// number, the codes at bits 0 and 4, each of them a half of the first vector, then those at bits 8 and 12.
LORASRV_OPERATION Vector decode(Table table, const uint8_t* codes, int part) {
    const __m512i bytes =
        _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)));
    const __m512i shifts = _mm512_inserti64x4(_mm512_set1_epi16(static_cast<int16_t>(8 * part)),
                                              _mm256_set1_epi16(static_cast<int16_t>(8 * part + 4)), 1);
    return _mm512_permutexvar_epi16(_mm512_srlv_epi16(bytes, shifts), table);
}

// Tokens in the order of decoded weights.
LORASRV_TARGET void arrange(const TokenBlocks& blocks, void* to) {
    alignas(64) uint16_t places[2][32];
    for (int i = 0; i < 16; ++i) {
        places[0][i] = static_cast<uint16_t>(4 * i + 1);
        places[0][16 + i] = static_cast<uint16_t>(4 * i);
        places[1][i] = static_cast<uint16_t>(4 * i + 3);
        places[1][16 + i] = static_cast<uint16_t>(4 * i + 2);
    }
    const Vector first = load(places[0]), second = load(places[1]);
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
        const Vector low = load(blocks.x + block * kBlock), high = load(blocks.x + block * kBlock + kStep);
        Element* out = static_cast<Element*>(to) + block * kBlock;
        store(out, _mm512_permutex2var_epi16(low, first, high));
        store(out + kStep, _mm512_permutex2var_epi16(low, second, high));
    }
}

}  // namespace

#include "avx512_sums.h"
#include "linear_tile.h"

const LinearKernels kAvx512Bf16Linear = kKernels;
#endif
