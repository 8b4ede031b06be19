// Causal attention over a paged cache, and storing keys and values there. Each query walks the blocks of its sequence in
// order with the online softmax; positions that it does not see are not read, so nothing else is in its sums.

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include "kernel_calls.h"
#include "lanes.h"

namespace {

constexpr int64_t kBlockTokens = 32;
constexpr int64_t kParallelProducts = 1 << 15;

// One head of one token: what it sees, and what the online softmax keeps of it.
struct Row {
    int64_t first_position;
    int64_t position;
    float top;
    float total;
};

struct Block {
    const void* keys;
    const void* values;
    int64_t first_position;
};

// The rows of a query tile that share a KV head; `width` is the head size in whole vectors.
struct Tile {
    Row* rows;
    int64_t num_rows;
    const float* q;  // [num_rows, width]
    float* sums;     // [num_rows, width]
    int64_t width;
    int64_t head_size;
    int64_t position_stride;
};

bool sees_alike(const Row& a, const Row& b, const Block& block) {
    const int64_t start = block.first_position, end = start + kBlockTokens - 1;
    return std::max(a.first_position, start) == std::max(b.first_position, start) &&
           std::min(a.position, end) == std::min(b.position, end);
}

#define LORASRV_TARGET
namespace portable {
#include "attention_tile.h"
}
#undef LORASRV_TARGET

#if defined(__x86_64__)
#define LORASRV_TARGET LORASRV_AVX2
namespace avx2 {
#include "attention_tile.h"
}
#undef LORASRV_TARGET
#define LORASRV_TARGET LORASRV_AVX512
namespace avx512 {
#include "attention_tile.h"
}
#undef LORASRV_TARGET
#endif

template <typename E>
struct Kernels {
    void (*attend)(const Tile&, const Block&);
    void (*load_query)(const E*, float, int64_t, float*);
    void (*store_output)(const float*, float, int64_t, E*);
};

template <typename E>
Kernels<E> kernels(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512::attend<E>, avx512::load_query<E>, avx512::store_output<E>};
    if (isa == kAvx2) return {avx2::attend<E>, avx2::load_query<E>, avx2::store_output<E>};
#endif
    return {portable::attend<E>, portable::load_query<E>, portable::store_output<E>};
}

// One layer's cache [P, 2, Hkv, 32, D]; strides count elements, and D is contiguous.
template <typename E>
struct Cache {
    E* start;
    int64_t block_stride;
    int64_t value_offset;
    int64_t head_stride;
    int64_t position_stride;

    E* keys(int64_t block, int64_t head) const { return start + block * block_stride + head * head_stride; }
};

// Blocks lie anywhere, and a processor's own prefetching ends at the page: without this, memory gives a quarter as much.
template <typename E>
void prefetch(const E* rows, int64_t stride, int64_t head_size) {
    constexpr int64_t kLineElements = 64 / sizeof(E);
    for (int64_t position = 0; position < kBlockTokens; ++position)
        for (int64_t i = 0; i < head_size; i += kLineElements) __builtin_prefetch(rows + position * stride + i);
}

template <typename E>
struct Attention {
    const E* q;
    int64_t token_stride;
    int64_t head_stride;
    E* out;  // [T, H, D]
    Cache<E> cache;
    const int32_t* block_tables;
    int64_t table_stride;
    const int32_t* tiles;  // [K, 4]: sequence, first token row, number of rows, position of the first row
    int64_t num_tiles;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_size;
    float scale;
    int64_t window;
    Kernels<E> kernels;
};

// Kept by every thread, so that no call allocates once the largest has been seen.
struct Scratch {
    std::vector<float> numbers;
    std::vector<Row> rows;
};

template <typename E>
void attend_tile(const Attention<E>& call, int64_t index, int64_t kv_head) {
    static thread_local Scratch scratch;
    const int32_t* place = call.tiles + 4 * index;
    const int64_t group = call.num_heads / call.num_kv_heads, first_token = place[1], first_position = place[3];
    const int64_t num_rows = place[2] * group, width = (call.head_size + kLanes - 1) / kLanes * kLanes;
    if (num_rows == 0) return;
    scratch.numbers.resize(2 * num_rows * width);
    scratch.rows.resize(num_rows);
    float* q = scratch.numbers.data();
    float* sums = q + num_rows * width;
    Row* rows = scratch.rows.data();
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t token = row / group, head = kv_head * group + row % group, position = first_position + token;
        rows[row] = {call.window ? std::max<int64_t>(position - call.window + 1, 0) : 0, position, -INFINITY, 0.0f};
        call.kernels.load_query(call.q + (first_token + token) * call.token_stride + head * call.head_stride,
                                call.scale, call.head_size, q + row * width);
    }
    std::fill(sums, sums + num_rows * width, 0.0f);
    const Tile tile{rows, num_rows, q, sums, width, call.head_size, call.cache.position_stride};
    const int64_t last_block = rows[num_rows - 1].position / kBlockTokens;
    const int32_t* blocks = call.block_tables + place[0] * call.table_stride;
    for (int64_t block = rows[0].first_position / kBlockTokens; block <= last_block; ++block) {
        const E* keys = call.cache.keys(blocks[block], kv_head);
        if (block < last_block) {
            const E* next = call.cache.keys(blocks[block + 1], kv_head);
            prefetch(next, call.cache.position_stride, call.head_size);
            prefetch(next + call.cache.value_offset, call.cache.position_stride, call.head_size);
        }
        call.kernels.attend(tile, {keys, keys + call.cache.value_offset, block * kBlockTokens});
    }
    for (int64_t row = 0; row < num_rows; ++row) {
        const int64_t head = kv_head * group + row % group;
        call.kernels.store_output(sums + row * width, rows[row].total, call.head_size,
                                  call.out + ((first_token + row / group) * call.num_heads + head) * call.head_size);
    }
}

template <typename E>
void attend_all(const Attention<E>& call) {
    int64_t products = 0;
    for (int64_t tile = 0; tile < call.num_tiles; ++tile) {
        const int64_t position = call.tiles[4 * tile + 3];
        const int64_t seen = call.window ? std::min(position, call.window) : position;
        products += call.tiles[4 * tile + 2] * (seen + 1) * call.num_heads * call.head_size;
    }
    const int64_t num_items = call.num_tiles * call.num_kv_heads;
#pragma omp parallel for schedule(dynamic) if (products >= kParallelProducts)
    for (int64_t item = 0; item < num_items; ++item)
        attend_tile(call, item / call.num_kv_heads, item % call.num_kv_heads);
}

}  // namespace

// Arguments as in the op's contract, which has checked them; strides count elements, the last dimension of q and of the
// cache is contiguous, and so is out.
extern "C" void lorasrv_paged_attention(const void* q, int64_t token_stride, int64_t head_stride, void* out,
                                        const void* cache, int64_t block_stride, int64_t value_offset,
                                        int64_t cache_head_stride, int64_t position_stride,
                                        const int32_t* block_tables, int64_t table_stride, const int32_t* tiles,
                                        int64_t num_tiles, int64_t num_heads, int64_t num_kv_heads, int64_t head_size,
                                        float scale, int64_t window, int32_t dtype, int32_t isa) {
    const auto run = [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        E* start = const_cast<E*>(static_cast<const E*>(cache));
        attend_all<E>({static_cast<const E*>(q), token_stride, head_stride, static_cast<E*>(out),
                       {start, block_stride, value_offset, cache_head_stride, position_stride}, block_tables,
                       table_stride, tiles, num_tiles, num_heads, num_kv_heads, head_size, scale, window,
                       kernels<E>(isa)});
    };
    if (dtype == kBfloat16)
        run(static_cast<Bfloat16*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}

// Copies rows of k and v [T, Hkv, D] to their places in the cache; strides and `row_bytes` count bytes.
extern "C" void lorasrv_store_kv(char* cache, int64_t block_stride, int64_t value_offset, int64_t cache_head_stride,
                                 int64_t position_stride, const char* k, int64_t k_token_stride, int64_t k_head_stride,
                                 const char* v, int64_t v_token_stride, int64_t v_head_stride,
                                 const int64_t* slot_mapping, int64_t num_tokens, int64_t num_heads,
                                 int64_t row_bytes) {
    for (int64_t token = 0; token < num_tokens; ++token) {
        if (slot_mapping[token] < 0) continue;
        char* place = cache + slot_mapping[token] / kBlockTokens * block_stride +
                      slot_mapping[token] % kBlockTokens * position_stride;
        for (int64_t head = 0; head < num_heads; ++head, place += cache_head_stride) {
            std::memcpy(place, k + token * k_token_stride + head * k_head_stride, row_bytes);
            std::memcpy(place + value_offset, v + token * v_token_stride + head * v_head_stride, row_bytes);
        }
    }
}
