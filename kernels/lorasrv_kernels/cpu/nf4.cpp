// Dequantization of NF4 rows. Bit-identical with the reference (nf4/reference.py): scale and weight are each rounded
// after every step, so no multiply-add may be contracted (-ffp-contract=off).

#include <algorithm>

#include "isa.h"
#include "nf4_slice.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kRun = 64;  // blocks a thread takes at a time
constexpr int64_t kParallelBlocks = 1024;

float convert(float value, float*) { return value; }
uint16_t convert(float value, uint16_t*) { return to_bfloat16(value); }

// Blocks [first, last) of a slice into out, which begins with block `first`.
template <typename T>
void portable_blocks(const Slice& slice, int64_t first, int64_t last, T* out) {
    for (int64_t block = first; block < last; ++block, out += kBlock) {
        const float scale = slice.scale(block);
        T table[16];
        for (int code = 0; code < 16; ++code) table[code] = convert(slice.levels[code] * scale, table);
        const uint8_t* packed = slice.packed + block * (kBlock / 2);
        for (int64_t i = 0; i < kBlock / 2; ++i) {
            out[2 * i] = table[packed[i] >> 4];
            out[2 * i + 1] = table[packed[i] & 15];
        }
    }
}

#if defined(__x86_64__)
#define LORASRV_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq")))

LORASRV_AVX512 void avx512_blocks(const Slice& slice, int64_t first, int64_t last, float* out) {
    const __m512 levels = _mm512_loadu_ps(slice.levels);
    const __m512i low = _mm512_set1_epi64(15);
    for (int64_t block = first; block < last; ++block, out += kBlock) {
        const __m512 table = _mm512_mul_ps(levels, _mm512_set1_ps(slice.scale(block)));
        const uint8_t* packed = slice.packed + block * (kBlock / 2);
        for (int i = 0; i < 4; ++i) {
            // a byte widened to 64 bits becomes the two 32-bit indices of its codes, in row order
            const __m512i bytes =
                _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed + 8 * i)));
            const __m512i codes = _mm512_or_si512(_mm512_srli_epi64(bytes, 4),
                                                  _mm512_slli_epi64(_mm512_and_si512(bytes, low), 32));
            _mm512_storeu_ps(out + 16 * i, _mm512_permutexvar_ps(codes, table));
        }
    }
}

LORASRV_AVX512 inline __m256i avx512_to_bfloat16(__m512 values) {
    const __m512i bits = _mm512_castps_si512(values);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(
        _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}

LORASRV_AVX512 void avx512_blocks(const Slice& slice, int64_t first, int64_t last, uint16_t* out) {
    const __m512 levels = _mm512_loadu_ps(slice.levels);
    const __m512i low = _mm512_set1_epi32(15);
    for (int64_t block = first; block < last; ++block, out += kBlock) {
        const __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(slice.scale(block)));
        const __m512i table = _mm512_broadcast_i64x4(avx512_to_bfloat16(scaled));
        const uint8_t* packed = slice.packed + block * (kBlock / 2);
        for (int i = 0; i < 2; ++i) {
            // a byte widened to 32 bits becomes the two 16-bit indices of its codes, in row order
            const __m512i bytes =
                _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 16 * i)));
            const __m512i codes = _mm512_or_si512(_mm512_srli_epi32(bytes, 4),
                                                  _mm512_slli_epi32(_mm512_and_si512(bytes, low), 16));
            _mm512_storeu_si512(out + 32 * i, _mm512_permutexvar_epi16(codes, table));
        }
    }
}
#endif

template <typename T>
void slice_blocks(const Slice& slice, int64_t first, int64_t last, T* out, int32_t isa) {
    const int64_t runs = (last - first + kRun - 1) / kRun;
#pragma omp parallel for schedule(static) if (last - first >= kParallelBlocks)
    for (int64_t run = 0; run < runs; ++run) {
        const int64_t start = first + run * kRun;
        const int64_t stop = std::min(last, start + kRun);
        T* target = out + (start - first) * kBlock;
#if defined(__x86_64__)
        if (isa >= kAvx512) {
            avx512_blocks(slice, start, stop, target);
            continue;
        }
#endif
        portable_blocks(slice, start, stop, target);
    }
}

// Columns [start, start + width) of a slice's rows, whole blocks, into out, whose rows are `width` wide.
template <typename T>
void slice_columns(const Slice& slice, int64_t rows, int64_t in_features, int64_t start, int64_t width, T* out,
                   int32_t isa) {
    const int64_t row_blocks = in_features / kBlock, blocks = width / kBlock;
#pragma omp parallel for schedule(static) if (rows * blocks >= kParallelBlocks)
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t first = row * row_blocks + start / kBlock;
        T* target = out + row * width;
#if defined(__x86_64__)
        if (isa >= kAvx512) {
            avx512_blocks(slice, first, first + blocks, target);
            continue;
        }
#endif
        portable_blocks(slice, first, first + blocks, target);
    }
}

}  // namespace

// Rows [start_row, start_row + num_rows) of a matrix of slices into out [num_rows, in_features], contiguous.
// in_features is a multiple of 64, so that no block crosses a row; the caller has checked every size.
extern "C" void lorasrv_nf4_dequantize(const uint8_t* packed, const uint8_t* absmax, const float* nested_absmax,
                                       const float* offset, const float* levels, const float* nested_codes,
                                       const int64_t* out_features, int64_t num_slices, int64_t in_features,
                                       int64_t start_row, int64_t num_rows, void* out, int32_t dtype, int32_t isa) {
    const int64_t row_blocks = in_features / kBlock;
    const int64_t stop_row = start_row + num_rows;
    int64_t slice_row = 0;
    Slice slice{packed, absmax, nested_absmax, 0, levels, nested_codes};
    for (int64_t index = 0; index < num_slices; ++index) {
        slice.offset = offset[index];
        const int64_t first_row = std::max(start_row, slice_row);
        const int64_t last_row = std::min(stop_row, slice_row + out_features[index]);
        if (first_row < last_row) {
            const int64_t first = (first_row - slice_row) * row_blocks;
            const int64_t last = (last_row - slice_row) * row_blocks;
            const int64_t position = (first_row - start_row) * in_features;
            if (dtype == kBfloat16)
                slice_blocks(slice, first, last, static_cast<uint16_t*>(out) + position, isa);
            else
                slice_blocks(slice, first, last, static_cast<float*>(out) + position, isa);
        }
        slice_row += out_features[index];
        slice = slice.next(out_features[index] * row_blocks);
    }
}

// Columns [start_column, start_column + num_columns), both multiples of 64, of all rows into out [O, num_columns].
extern "C" void lorasrv_nf4_dequantize_columns(const uint8_t* packed, const uint8_t* absmax, const float* nested_absmax,
                                               const float* offset, const float* levels, const float* nested_codes,
                                               const int64_t* out_features, int64_t num_slices, int64_t in_features,
                                               int64_t start_column, int64_t num_columns, void* out, int32_t dtype,
                                               int32_t isa) {
    int64_t row = 0;
    Slice slice{packed, absmax, nested_absmax, 0, levels, nested_codes};
    for (int64_t index = 0; index < num_slices; ++index) {
        slice.offset = offset[index];
        const int64_t rows = out_features[index], position = row * num_columns;
        if (dtype == kBfloat16)
            slice_columns(slice, rows, in_features, start_column, num_columns, static_cast<uint16_t*>(out) + position,
                          isa);
        else
            slice_columns(slice, rows, in_features, start_column, num_columns, static_cast<float*>(out) + position,
                          isa);
        row += rows;
        slice = slice.next(rows * (in_features / kBlock));
    }
}
