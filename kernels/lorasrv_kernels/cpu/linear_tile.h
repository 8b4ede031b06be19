// The linear layer of one instruction set, written over the few vector operations that its file defines before
// including this one:
//
//     LORASRV_TARGET           attribute of every function
//     Element                  of x and of panels: float, or uint16_t for bfloat16
//     Vector, Sum, Table       registers of weights or x, of partial sums, of one block's scaled levels
//     kStep, kLanes            elements of a Vector, sums of a Sum
//     kTileRows, kTileTokens   sums held at a time
//     load, store, zero, load_sum, store_sum, multiply_add, scaled_table, decode, add_lanes, round_sums,
//     fill_scales, arrange (or nullptr)

#include <algorithm>

namespace {

constexpr int64_t kDepth = 1024;  // elements of I at a time, so that a tile's rows stay in the first-level cache
constexpr int64_t kLineBytes = 64;
constexpr int64_t kFetchBytes = 640 << 10;  // what is read next and the present panel, in the second-level cache
constexpr int64_t kPrefetchBytes = 4096;  // of codes, at least
constexpr int kFewTokens = 8;       // computed straight from the codes

// sums [N, kMaxPanelRows, kLanes] of R rows and N tokens over `steps` vectors
template <int R, int N>
LORASRV_TARGET void add_tile(const Element* weights, int64_t stride, const Element* x, int64_t x_stride, int64_t steps,
                             bool first, float* sums) {
    Sum sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n)
            sum[r][n] = first ? zero() : load_sum(sums + (n * kMaxPanelRows + r) * kLanes);
    for (int64_t step = 0; step < steps; ++step) {
        Vector weight[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) weight[r] = load(weights + r * stride + step * kStep);
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) {
            const Vector token = load(x + n * x_stride + step * kStep);
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r) sum[r][n] = multiply_add(sum[r][n], weight[r], token);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store_sum(sums + (n * kMaxPanelRows + r) * kLanes, sum[r][n]);
}

// the same over all of I, with weights straight from their codes
template <int R, int N>
LORASRV_TARGET void add_codes(const uint8_t* packed, const float* scales, const float* levels, bool round,
                              const Element* x, int64_t in_features, float* sums) {
    const int64_t blocks = in_features / kBlock;
    Sum sum[R][N];
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) sum[r][n] = zero();
    const int64_t row_bytes = blocks * (kBlock / 2);
    const int64_t ahead = (kPrefetchBytes + R * row_bytes - 1) / (R * row_bytes) * (R * row_bytes);
    for (int64_t block = 0; block < blocks; ++block) {
        Table table[R];
#pragma GCC unroll 16
        for (int r = 0; r < R; ++r) {
            table[r] = scaled_table(levels, scales[r * blocks + block], round);
            // rows are too short for the processor's own prefetching
            __builtin_prefetch(packed + r * row_bytes + block * (kBlock / 2) + ahead);
        }
#pragma GCC unroll 16
        for (int part = 0; part < kBlock / kStep; ++part) {
            Vector weight[R];
#pragma GCC unroll 16
            for (int r = 0; r < R; ++r)
                weight[r] = decode(table[r], packed + r * row_bytes + block * (kBlock / 2), part);
#pragma GCC unroll 16
            for (int n = 0; n < N; ++n) {
                const Vector token = load(x + n * in_features + block * kBlock + part * kStep);
#pragma GCC unroll 16
                for (int r = 0; r < R; ++r) sum[r][n] = multiply_add(sum[r][n], weight[r], token);
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
        for (int n = 0; n < N; ++n) store_sum(sums + (n * kMaxPanelRows + r) * kLanes, sum[r][n]);
}

template <typename T>
LORASRV_TARGET void copy(const T (&from)[kLanes], int64_t width, T* to) {
    if (width == kLanes)
        std::memcpy(to, from, sizeof from);
    else
        std::memcpy(to, from, width * sizeof(T));
}

// adds the lanes of `count` tokens' sums and writes them out
LORASRV_TARGET void write_sums(const float* sums, int64_t rows, int64_t count, const Tokens& tokens, int64_t token) {
    for (int64_t n = 0; n < count; ++n) {
        for (int64_t row = 0; row < rows; row += kLanes) {
            float results[kLanes];
            add_lanes(sums + (n * kMaxPanelRows + row) * kLanes, results);
            const int64_t width = std::min<int64_t>(kLanes, rows - row);
            const int64_t position = (token + n) * tokens.out_stride + row;
            if (tokens.bfloat16_out) {
                uint16_t rounded[kLanes];
                round_sums(results, rounded);
                copy(rounded, width, static_cast<uint16_t*>(tokens.out) + position);
            } else {
                copy(results, width, static_cast<float*>(tokens.out) + position);
            }
        }
    }
}

// Fetches a call's share of what is read next.
struct Fetch {
    const char* at;
    const char* end;
    int64_t share;

    void some() {
        for (const char* stop = std::min(end, at + share); at < stop; at += kLineBytes) __builtin_prefetch(at, 0, 2);
    }
};

template <int N>
LORASRV_TARGET void multiply_tokens(const Element* weights, int64_t stride, int64_t rows, const Tokens& tokens,
                                    int64_t token, Fetch& fetch) {
    alignas(64) float sums[N * kMaxPanelRows * kLanes];
    const Element* x = static_cast<const Element*>(tokens.x) + token * tokens.in_features;
    // weights that are used once are read in the order in which they lie
    const int64_t depth = tokens.count <= kTileTokens ? tokens.in_features : kDepth;
    for (int64_t k = 0; k < tokens.in_features; k += depth) {
        const int64_t steps = std::min(depth, tokens.in_features - k) / kStep;
        int64_t row = 0;
        for (; row + kTileRows <= rows; row += kTileRows) {
            fetch.some();
            add_tile<kTileRows, N>(weights + row * stride + k, stride, x + k, tokens.in_features, steps, k == 0,
                                   sums + row * kLanes);
        }
        for (; row < rows; ++row)
            add_tile<1, N>(weights + row * stride + k, stride, x + k, tokens.in_features, steps, k == 0,
                           sums + row * kLanes);
    }
    write_sums(sums, rows, N, tokens, token);
}

template <int N>
LORASRV_TARGET void multiply_few(const CodeRows& codes, const Tokens& tokens) {
    alignas(64) float sums[N * kMaxPanelRows * kLanes];
    const Element* x = static_cast<const Element*>(tokens.x);
    const int64_t blocks = tokens.in_features / kBlock;
    constexpr int kRows = N <= 4 ? 4 : N <= 6 ? 3 : 2;  // as many sums as there are registers
    int64_t row = 0;
    for (; row + kRows <= codes.rows; row += kRows)
        add_codes<kRows, N>(codes.packed + row * blocks * (kBlock / 2), codes.scales + row * blocks, codes.levels,
                        codes.bfloat16_weights, x, tokens.in_features, sums + row * kLanes);
    for (; row < codes.rows; ++row)
        add_codes<1, N>(codes.packed + row * blocks * (kBlock / 2), codes.scales + row * blocks, codes.levels,
                        codes.bfloat16_weights, x, tokens.in_features, sums + row * kLanes);
    write_sums(sums, codes.rows, N, tokens, 0);
}

LORASRV_TARGET void dequantize_rows(const CodeRows& codes, int64_t in_features, void* panel, int64_t stride) {
    const int64_t blocks = in_features / kBlock;
    for (int64_t row = 0; row < codes.rows; ++row) {
        Element* out = static_cast<Element*>(panel) + row * stride;
        for (int64_t block = 0; block < blocks; ++block) {
            const Table table =
                scaled_table(codes.levels, codes.scales[row * blocks + block], codes.bfloat16_weights);
            const uint8_t* packed = codes.packed + (row * blocks + block) * (kBlock / 2);
            for (int part = 0; part < kBlock / kStep; ++part)
                store(out + block * kBlock + part * kStep, decode(table, packed, part));
        }
    }
}

// the function for `count` tokens among those for 1 ... N
template <int N>
void multiply_count(int64_t count, const Element* weights, int64_t stride, int64_t rows, const Tokens& tokens,
                    int64_t token, Fetch& fetch) {
    if (count == N)
        multiply_tokens<N>(weights, stride, rows, tokens, token, fetch);
    else if constexpr (N > 1)
        multiply_count<N - 1>(count, weights, stride, rows, tokens, token, fetch);
}

template <int N>
void multiply_few_count(const CodeRows& codes, const Tokens& tokens) {
    if (tokens.count == N)
        multiply_few<N>(codes, tokens);
    else if constexpr (N > 1)
        multiply_few_count<N - 1>(codes, tokens);
}

void multiply_rows(const void* weights, int64_t stride, int64_t rows, const Tokens& tokens, const Next& next) {
    // tiles of almost equal width: a last tile of one token would cost as much as one of several
    const int64_t tiles = (tokens.count + kTileTokens - 1) / kTileTokens;
    const int64_t calls = std::max<int64_t>(tiles * (rows / kTileRows) * (tokens.in_features / kDepth), 1);
    // weights that are used once come at the memory's pace as they are
    const bool fits = rows * stride * static_cast<int64_t>(sizeof(Element)) + next.size <= kFetchBytes;
    const int64_t size = tiles > 1 && fits ? next.size : 0;
    Fetch fetch{next.start, next.start + size, (size / calls / kLineBytes + 1) * kLineBytes};
    for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t token = tile * tokens.count / tiles;
        const int64_t count = (tile + 1) * tokens.count / tiles - token;
        multiply_count<kTileTokens>(count, static_cast<const Element*>(weights), stride, rows, tokens, token,
                                    fetch);
    }
}

constexpr LinearKernels kKernels{sizeof(Element), kFewTokens,      1,             arrange,
                                 fill_scales,     dequantize_rows, multiply_rows, multiply_few_count<kFewTokens>};

}  // namespace
