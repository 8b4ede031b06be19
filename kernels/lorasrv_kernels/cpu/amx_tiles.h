// AMX tiles: the processor's, and the same in software for tests and for checking the processor's. Included after
// LORASRV_TARGET is defined.
//
// A pair is two bfloat16 numbers, neighbours in I. add<C, A, B>() adds to every number of C [rows, columns] the products
// of a row of A [rows, pairs] and a column of B [pairs, columns], in this order: one chain of fused multiply-adds over the
// first numbers of the pairs, one over the second, the two added, their sum added to C. Subnormal numbers count as zero.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace {

constexpr int64_t kTileSide = 16;                   // rows of a tile, and 32-bit numbers in a row
constexpr int64_t kTileDepth = 2 * kTileSide;       // bfloat16 numbers in a row
constexpr int64_t kTileRowBytes = 4 * kTileSide;

// As the processor reads it; rows and row_bytes of a tile are both zero or neither.
struct alignas(64) TileConfig {
    uint8_t palette = 1;
    uint8_t start_row = 0;
    uint8_t reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};

    void set(int tile, int64_t tile_rows, int64_t tile_row_bytes) {
        rows[tile] = static_cast<uint8_t>(tile_rows);
        row_bytes[tile] = static_cast<uint16_t>(tile_row_bytes);
    }
};
static_assert(sizeof(TileConfig) == 64);

// Ends the process where the processor would refuse an instruction.
class EmulatedTiles {
   public:
    void configure(const TileConfig& config) {
        for (int tile = 0; tile < 8; ++tile) {
            const int rows = config.rows[tile], row_bytes = config.row_bytes[tile];
            require(rows <= kTileSide && row_bytes <= kTileRowBytes && !rows == !row_bytes);
        }
        config_ = config;
    }

    template <int T>
    void zero() {
        require(config_.rows[T]);
        std::memset(tiles_[T], 0, sizeof tiles_[T]);
    }

    template <int T>
    void load(const void* at, int64_t stride) {
        zero<T>();
        for (int row = 0; row < config_.rows[T]; ++row)
            std::memcpy(tiles_[T][row], static_cast<const char*>(at) + row * stride, config_.row_bytes[T]);
    }

    template <int T>
    void store(void* at, int64_t stride) const {
        require(config_.rows[T]);
        for (int row = 0; row < config_.rows[T]; ++row)
            std::memcpy(static_cast<char*>(at) + row * stride, tiles_[T][row], config_.row_bytes[T]);
    }

    template <int C, int A, int B>
    LORASRV_TARGET void add() {
        require(config_.rows[C] && config_.rows[C] == config_.rows[A] && config_.row_bytes[C] == config_.row_bytes[B] &&
                config_.row_bytes[A] == 4 * config_.rows[B]);
        constexpr uint32_t kSubnormalsAreZero = 0x8040;  // operands and results
        const __m512i second = _mm512_set1_epi32(-0x10000);
        const uint32_t control = _mm_getcsr();
        _mm_setcsr(control | kSubnormalsAreZero);
        for (int row = 0; row < config_.rows[C]; ++row) {
            __m512 sums[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
            for (int pair = 0; pair < config_.row_bytes[A] / 4; ++pair) {
                const __m512i a = _mm512_set1_epi32(static_cast<int>(tiles_[A][row][pair]));
                const __m512i b = _mm512_loadu_si512(tiles_[B][pair]);
                sums[0] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_slli_epi32(a, 16)),
                                          _mm512_castsi512_ps(_mm512_slli_epi32(b, 16)), sums[0]);
                sums[1] = _mm512_fmadd_ps(_mm512_castsi512_ps(_mm512_and_si512(a, second)),
                                          _mm512_castsi512_ps(_mm512_and_si512(b, second)), sums[1]);
            }
            const __m512 before = _mm512_loadu_ps(tiles_[C][row]);
            _mm512_storeu_ps(tiles_[C][row], _mm512_add_ps(before, _mm512_add_ps(sums[0], sums[1])));
        }
        _mm_setcsr(control);
    }

   private:
    static void require(bool allowed) {
        if (!allowed) std::abort();
    }

    TileConfig config_;
    uint32_t tiles_[8][kTileSide][kTileSide];
};

#if __has_include(<amxbf16intrin.h>) || __has_include(<amxintrin.h>)
#define LORASRV_AMX 1

// Instructions are written out: GCC's own functions take tiles as literals only, and may read memory before it is written.
class ProcessorTiles {
   public:
    ~ProcessorTiles() { asm volatile("tilerelease"); }

    // also needed at every call: whoever used tiles before may have left others, or none
    void configure(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }

    template <int T>
    void zero() {
        asm volatile("tilezero %%tmm%c0" ::"i"(T));
    }

    template <int T>
    void load(const void* at, int64_t stride) {
        asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(at), "r"(stride), "i"(T) : "memory");
    }

    template <int T>
    void store(void* at, int64_t stride) const {
        asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(at), "r"(stride), "i"(T) : "memory");
    }

    template <int C, int A, int B>
    void add() {
        asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(C), "i"(A), "i"(B));
    }
};
#else
// a compiler that does not know AMX; check_amx_linear() says so
#define LORASRV_AMX 0
using ProcessorTiles = EmulatedTiles;
#endif

}  // namespace
