// The linear layer over AMX tiles, for every number of tokens: 32 rows of weights times 32 tokens at a time, in 2 x 2 tiles
// of sums.
//
// Weights are the left operand, as they lie in memory; tokens the right one, whose rows are pairs of neighbours in I. A sum
// depends on its own row and token alone, so how many there are beside it changes no bit.

#include "linear.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include <algorithm>
#include <vector>

#define LORASRV_TARGET \
    __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma,avx2")))
#define LORASRV_OPERATION inline __attribute__((always_inline)) LORASRV_TARGET

#include "amx_tiles.h"
#include "avx512_sums.h"

namespace {

// 16 x 16 numbers: halves, quarters, ... change places across the diagonal
LORASRV_OPERATION void transpose(__m512i (&rows)[kTileSide]) {
    const __m512i lanes = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
#pragma GCC unroll 4
    for (int step = 1; step < kTileSide; step *= 2) {
        const __m512i other = _mm512_xor_si512(lanes, _mm512_set1_epi32(step));
        const __mmask16 upper = _mm512_test_epi32_mask(lanes, _mm512_set1_epi32(step));
#pragma GCC unroll 16
        for (int row = 0; row < kTileSide; ++row) {
            if (row & step) continue;
            const __m512i a = rows[row], b = rows[row + step];
            rows[row] = _mm512_mask_permutexvar_epi32(a, upper, other, b);
            rows[row + step] = _mm512_mask_permutexvar_epi32(b, _knot_mask16(upper), other, a);
        }
    }
}

__mmask16 first_lanes(int64_t count) { return static_cast<__mmask16>((1u << count) - 1); }

// Tokens as right operands: of every 16 tokens (the last ones may be fewer) the pairs in the order [I / 2, tokens].
LORASRV_TARGET void arrange(const TokenBlocks& blocks, void* to) {
    const int64_t row_blocks = blocks.in_features / kBlock;
    for (int64_t block = blocks.first; block < blocks.last; ++block) {
        const int64_t token = block / row_blocks * kTileSide, start = block % row_blocks * kBlock;
        const int64_t count = std::min(kTileSide, blocks.tokens - token);
        for (int64_t k = start; k < start + kBlock; k += kTileDepth) {
            __m512i rows[kTileSide];
            for (int64_t n = 0; n < kTileSide; ++n)
                rows[n] = n < count ? _mm512_loadu_si512(blocks.x + (token + n) * blocks.in_features + k)
                                    : _mm512_setzero_si512();
            transpose(rows);
            uint16_t* out = static_cast<uint16_t*>(to) + token * blocks.in_features + k * count;
            for (int64_t pair = 0; pair < kTileSide; ++pair)
                _mm512_mask_storeu_epi32(out + 2 * pair * count, first_lanes(count), rows[pair]);
        }
    }
}

// Weights in the order of memory, so that they give the bits that they give once dequantized.
LORASRV_TARGET void dequantize_rows(const CodeRows& codes, int64_t in_features, void* panel, int64_t stride) {
    const int64_t blocks = in_features / kBlock;
    const __m512 levels = _mm512_loadu_ps(codes.levels);
    for (int64_t row = 0; row < codes.rows; ++row) {
        uint16_t* out = static_cast<uint16_t*>(panel) + row * stride;
        for (int64_t block = 0; block < blocks; ++block) {
            const __m512 scaled = _mm512_mul_ps(levels, _mm512_set1_ps(codes.scales[row * blocks + block]));
            // twice, so that the fifth bit of an index does not matter
            const __m512i table = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
            const uint8_t* packed = codes.packed + (row * blocks + block) * (kBlock / 2);
            for (int part = 0; part < 2; ++part) {
                // a byte widened to 32 bits becomes the two 16-bit indices of its codes, in row order
                const __m512i bytes =
                    _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + 16 * part)));
                const __m512i indices = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
                _mm512_storeu_si512(out + block * kBlock + part * kTileDepth, _mm512_permutexvar_epi16(indices, table));
            }
        }
    }
}

// Up to 2 tiles of weights and 2 of tokens. Their products are summed in tile 2 w + n, weights are in tile 4 + w, tokens in
// tile 6 + n.
struct Block {
    const uint16_t* weights;
    int64_t stride;
    int64_t rows[2];
    Tokens tokens;  // from the block's first token on, out at its first row
    int64_t counts[2];

    TileConfig config() const {
        TileConfig config;
        for (int w = 0; w < 2 && rows[w]; ++w) {
            config.set(4 + w, rows[w], kTileRowBytes);
            for (int n = 0; n < 2 && counts[n]; ++n) config.set(2 * w + n, rows[w], 4 * counts[n]);
        }
        for (int n = 0; n < 2 && counts[n]; ++n) config.set(6 + n, kTileSide, 4 * counts[n]);
        return config;
    }
};

template <int W, int N, typename Tiles>
LORASRV_TARGET void write_tile(const Tiles& tiles, const Block& block) {
    alignas(64) float sums[kTileSide * kTileSide] = {};
    tiles.template store<2 * W + N>(sums, kTileRowBytes);
    __m512i lines[kTileSide];
    for (int64_t row = 0; row < kTileSide; ++row) lines[row] = _mm512_load_si512(sums + row * kTileSide);
    transpose(lines);
    const __mmask16 rows = first_lanes(block.rows[W]);
    for (int64_t n = 0; n < block.counts[N]; ++n) {
        const int64_t position = (N * kTileSide + n) * block.tokens.out_stride + W * kTileSide;
        if (block.tokens.bfloat16_out) {
            const __m512i rounded = _mm512_srli_epi32(rounded_to_bfloat16(_mm512_castsi512_ps(lines[n])), 16);
            _mm512_mask_cvtepi32_storeu_epi16(static_cast<uint16_t*>(block.tokens.out) + position, rows, rounded);
        } else {
            _mm512_mask_storeu_epi32(static_cast<float*>(block.tokens.out) + position, rows, lines[n]);
        }
    }
}

template <int W, int N, typename Tiles>
LORASRV_TARGET void multiply_block(Tiles& tiles, const Block& block) {
    const int64_t in_features = block.tokens.in_features, stride = block.stride;
    const uint16_t* x = static_cast<const uint16_t*>(block.tokens.x);
    tiles.template zero<0>();
    if constexpr (N > 1) tiles.template zero<1>();
    if constexpr (W > 1) tiles.template zero<2>();
    if constexpr (W > 1 && N > 1) tiles.template zero<3>();
    for (int64_t k = 0; k < in_features; k += kTileDepth) {
        tiles.template load<6>(x + k * block.counts[0], 4 * block.counts[0]);
        tiles.template load<4>(block.weights + k, 2 * stride);
        tiles.template add<0, 4, 6>();
        if constexpr (N > 1) {
            tiles.template load<7>(x + kTileSide * in_features + k * block.counts[1], 4 * block.counts[1]);
            tiles.template add<1, 4, 7>();
        }
        if constexpr (W > 1) {
            tiles.template load<5>(block.weights + kTileSide * stride + k, 2 * stride);
            tiles.template add<2, 5, 6>();
        }
        if constexpr (W > 1 && N > 1) tiles.template add<3, 5, 7>();
    }
    write_tile<0, 0>(tiles, block);
    if constexpr (N > 1) write_tile<0, 1>(tiles, block);
    if constexpr (W > 1) write_tile<1, 0>(tiles, block);
    if constexpr (W > 1 && N > 1) write_tile<1, 1>(tiles, block);
}

int64_t part_of(int64_t count, int64_t start) { return std::clamp<int64_t>(count - start, 0, kTileSide); }

template <typename Tiles>
void multiply_rows(const void* weights, int64_t stride, int64_t rows, const Tokens& tokens, const Next&) {
    Tiles tiles;
    TileConfig present;
    present.palette = 0;
    for (int64_t token = 0; token < tokens.count; token += 2 * kTileSide) {
        Tokens from = tokens;
        from.x = static_cast<const uint16_t*>(tokens.x) + token * tokens.in_features;
        for (int64_t row = 0; row < rows; row += 2 * kTileSide) {
            const int64_t position = token * tokens.out_stride + row;
            from.out = static_cast<char*>(tokens.out) + position * (tokens.bfloat16_out ? 2 : 4);
            const Block block{static_cast<const uint16_t*>(weights) + row * stride,
                              stride,
                              {part_of(rows, row), part_of(rows, row + kTileSide)},
                              from,
                              {part_of(tokens.count, token), part_of(tokens.count, token + kTileSide)}};
            const TileConfig config = block.config();
            if (std::memcmp(&config, &present, sizeof config)) {
                present = config;
                tiles.configure(present);
            }
            if (block.rows[1])
                block.counts[1] ? multiply_block<2, 2>(tiles, block) : multiply_block<2, 1>(tiles, block);
            else
                block.counts[1] ? multiply_block<1, 2>(tiles, block) : multiply_block<1, 1>(tiles, block);
        }
    }
}

template <typename Tiles>
constexpr LinearKernels kTileKernels{sizeof(uint16_t), -1,          kTileSide,           arrange,
                                     fill_scales,      dequantize_rows, multiply_rows<Tiles>, nullptr};

}  // namespace

const LinearKernels kAmxLinear = kTileKernels<ProcessorTiles>;
const LinearKernels kAmxEmulatedLinear = kTileKernels<EmulatedTiles>;

bool check_amx_linear() {
    if (!LORASRV_AMX) return false;
    // full and partial tiles of both; sums of small whole numbers are exact, so any difference is a fault
    constexpr int64_t kTokens = 35, kRows = 37, kWidth = 3 * kBlock;
    std::vector<uint16_t> x(kTokens * kWidth), arranged(x.size()), weights(kRows * kWidth);
    for (size_t i = 0; i < x.size(); ++i) x[i] = to_bfloat16(static_cast<float>(i * 7 % 17) - 8);
    for (size_t i = 0; i < weights.size(); ++i) weights[i] = to_bfloat16(static_cast<float>(i * 5 % 13) - 6);
    arrange({x.data(), kTokens, kWidth, 0, (kTokens + kTileSide - 1) / kTileSide * (kWidth / kBlock)}, arranged.data());
    std::vector<float> sums(kTokens * kRows), expected(sums.size());
    const Tokens tokens{arranged.data(), kTokens, kWidth, sums.data(), kRows, false};
    Tokens again = tokens;
    again.out = expected.data();
    multiply_rows<ProcessorTiles>(weights.data(), kWidth, kRows, tokens, {});
    multiply_rows<EmulatedTiles>(weights.data(), kWidth, kRows, again, {});
    return sums == expected;
}
#endif
