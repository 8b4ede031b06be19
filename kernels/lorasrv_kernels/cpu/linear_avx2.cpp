// The linear layer with AVX2 and FMA in float32; bfloat16 weights and tokens are widened, which is exact.

#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define LORASRV_TARGET __attribute__((target("avx2,fma")))
#define LORASRV_OPERATION inline __attribute__((always_inline)) LORASRV_TARGET

namespace {

using Element = float;
using Vector = __m256;
using Sum = __m256;
struct Table {
    __m256 low, high;  // codes 0 ... 7 and 8 ... 15
};
constexpr int kStep = 8;
constexpr int kLanes = 8;
constexpr int kTileRows = 4;
constexpr int kTileTokens = 3;

LORASRV_OPERATION Vector load(const Element* at) { return _mm256_loadu_ps(at); }
LORASRV_OPERATION void store(Element* at, Vector value) { _mm256_storeu_ps(at, value); }
LORASRV_OPERATION Sum zero() { return _mm256_setzero_ps(); }
LORASRV_OPERATION Sum load_sum(const float* at) { return _mm256_loadu_ps(at); }
LORASRV_OPERATION void store_sum(float* at, Sum value) { _mm256_storeu_ps(at, value); }
LORASRV_OPERATION Sum multiply_add(Sum sum, Vector a, Vector b) { return _mm256_fmadd_ps(a, b, sum); }

LORASRV_OPERATION __m256 rounded_to_bfloat16(__m256 values) {
    const __m256i bits = _mm256_castps_si256(values);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256 rounded = _mm256_castsi256_ps(_mm256_and_si256(sum, _mm256_set1_epi32(-0x10000)));
    return _mm256_blendv_ps(rounded, values, _mm256_cmp_ps(values, values, _CMP_UNORD_Q));
}

LORASRV_OPERATION __m256 scaled(const float* levels, float scale, bool round) {
    const __m256 values = _mm256_mul_ps(_mm256_loadu_ps(levels), _mm256_set1_ps(scale));
    return round ? rounded_to_bfloat16(values) : values;
}

LORASRV_OPERATION Table scaled_table(const float* levels, float scale, bool round) {
    return {scaled(levels, scale, round), scaled(levels + 8, scale, round)};
}

LORASRV_OPERATION Vector decode(const Table& table, const uint8_t* codes, int part) {
    int32_t four;
    std::memcpy(&four, codes + 4 * part, sizeof four);
    // a byte in 64 bits becomes two 32-bit indices in row order: bits 0 ... 2 choose, bit 3 chooses the half
    const __m256i bytes = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(four));
    const __m256i indices = _mm256_or_si256(_mm256_srli_epi64(bytes, 4), _mm256_slli_epi64(bytes, 32));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, indices),
                            _mm256_permutevar8x32_ps(table.high, indices),
                            _mm256_castsi256_ps(_mm256_slli_epi32(indices, 28)));
}

// adds the 8 lanes of each of 8 sums, the same tree for every one of them
LORASRV_OPERATION void add_lanes(const float* sums, float* results) {
    const __m256 ab = _mm256_hadd_ps(load_sum(sums), load_sum(sums + 8));
    const __m256 cd = _mm256_hadd_ps(load_sum(sums + 16), load_sum(sums + 24));
    const __m256 ef = _mm256_hadd_ps(load_sum(sums + 32), load_sum(sums + 40));
    const __m256 gh = _mm256_hadd_ps(load_sum(sums + 48), load_sum(sums + 56));
    const __m256 abcd = _mm256_hadd_ps(ab, cd), efgh = _mm256_hadd_ps(ef, gh);
    _mm256_storeu_ps(results, _mm256_add_ps(_mm256_permute2f128_ps(abcd, efgh, 0x20),
                                            _mm256_permute2f128_ps(abcd, efgh, 0x31)));
}

LORASRV_OPERATION void round_sums(const float* values, uint16_t* results) {
    for (int i = 0; i < kLanes; ++i) results[i] = to_bfloat16(values[i]);
}

void fill_scales(const Slice& slice, int64_t first_block, int64_t blocks, float* scales) {
    slice.fill_scales(first_block, blocks, scales);
}

constexpr auto arrange = nullptr;

}  // namespace

#include "linear_tile.h"

const LinearKernels kAvx2Linear = kKernels;
#endif
