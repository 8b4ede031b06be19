// What both AVX-512 versions share: the scales of blocks, the end of a sum, and rounding.

#include <algorithm>

namespace {

LORASRV_OPERATION __m512 add_halves(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
}

LORASRV_OPERATION __m512 add_quarters(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_castps_pd(_mm512_add_ps(
        _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))),
        _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b))))));
}

// four sums, each to one value per 128 bits
LORASRV_OPERATION __m512 add_four(const float* sums) {
    return add_quarters(add_halves(_mm512_loadu_ps(sums), _mm512_loadu_ps(sums + 16)),
                        add_halves(_mm512_loadu_ps(sums + 32), _mm512_loadu_ps(sums + 48)));
}

// adds the lanes of each of 16 sums: the same tree for every one of them
LORASRV_OPERATION void add_lanes(const float* sums, float* results) {
    const __m512 a = add_four(sums), b = add_four(sums + 64), c = add_four(sums + 128), d = add_four(sums + 192);
    const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x44), _mm512_shuffle_f32x4(a, b, 0xee));
    const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x44), _mm512_shuffle_f32x4(c, d, 0xee));
    _mm512_storeu_ps(results,
                     _mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd)));
}

// float32 values rounded to bfloat16, whose bits are the upper half of each lane
LORASRV_OPERATION __m512i rounded_to_bfloat16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}

LORASRV_OPERATION void round_sums(const float* values, uint16_t* results) {
    const __m512i rounded = rounded_to_bfloat16(_mm512_loadu_ps(values));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(results), _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
}

LORASRV_TARGET void fill_scales(const Slice& slice, int64_t first_block, int64_t blocks, float* scales) {
    const __m512 offset = _mm512_set1_ps(slice.offset);
    for (int64_t block = first_block, last = first_block + blocks; block < last;) {
        const __m512 nested = _mm512_set1_ps(slice.nested_absmax[block / kNestedBlock]);
        const int64_t stop = std::min(last, (block / kNestedBlock + 1) * kNestedBlock);
        for (; block + 16 <= stop; block += 16) {
            const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(slice.absmax + block));
            const __m512 values = _mm512_i32gather_ps(_mm512_cvtepu8_epi32(codes), slice.nested_codes, 4);
            // two roundings, as in Slice::scale
            _mm512_storeu_ps(scales + block - first_block, _mm512_add_ps(_mm512_mul_ps(values, nested), offset));
        }
        for (; block < stop; ++block) scales[block - first_block] = slice.scale(block);
    }
}

}  // namespace
