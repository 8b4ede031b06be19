// The batched low-rank update over ragged ranks: y <- d y + w B (A x) + bias, every token row with its own adapters.
//
// First x A^T of every tile and slice, then the products with B in panels of columns. A row may be in several tiles, so
// threads share out columns, never tiles. No sum is split: a row's bits depend on I, R and its own adapters alone.

#include <omp.h>

#include <algorithm>
#include <numeric>
#include <type_traits>
#include <vector>

#include "kernel_calls.h"
#include "lanes.h"
#include "table.h"

namespace {

constexpr int64_t kJobRanks = 8;
constexpr int64_t kMinPanelColumns = 128, kMaxPanelColumns = 512;
constexpr int64_t kParallelProducts = 1 << 15;

// Dot products of the rows of a tile with some rows of A.
struct Shrink {
    const void* x;
    int64_t x_stride;
    const int64_t* rows;
    int64_t num_rows;
    const void* a;  // [num_ranks, length]
    int64_t length;
    int64_t num_ranks;
    float* out;
    int64_t out_stride;
};

// Some columns of one slice of y, in the rows of a tile; pointers begin at the slice's own first column.
struct Expand {
    void* y;
    int64_t y_stride;
    const int64_t* rows;
    const float* weights;
    int64_t num_rows;
    const float* shrunk;  // [num_rows, rank]
    const void* b;        // [rank, b_stride]
    int64_t b_stride;
    int64_t rank;
    const float* d;
    const float* own_bias;
    const void* base_bias;
    int64_t first_column;
    int64_t last_column;
};

#define LORASRV_TARGET
namespace portable {
#include "lora_tile.h"
}
#undef LORASRV_TARGET

#if defined(__x86_64__)
#define LORASRV_TARGET LORASRV_AVX2
namespace avx2 {
#include "lora_tile.h"
}
#undef LORASRV_TARGET
#define LORASRV_TARGET LORASRV_AVX512
namespace avx512 {
#include "lora_tile.h"
}
#undef LORASRV_TARGET
#endif

template <typename E>
struct Kernels {
    void (*shrink)(const Shrink&);
    void (*expand)(const Expand&);
    void (*add_bias)(E*, const E*, int64_t);
};

template <typename E>
Kernels<E> kernels(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512::shrink<E>, avx512::expand<E>, avx512::add_bias<E>};
    if (isa == kAvx2) return {avx2::shrink<E>, avx2::expand<E>, avx2::add_bias<E>};
#endif
    return {portable::shrink<E>, portable::expand<E>, portable::add_bias<E>};
}

template <typename E>
struct Update {
    E* y;
    int64_t y_stride;
    const E* x;
    int64_t x_stride;
    int64_t in_features;
    const E* arena;
    const int64_t* table;
    int64_t slot_stride;
    int64_t slice_stride;
    const int64_t* out_features;
    int64_t num_slices;
    const int64_t* rows;
    const float* weights;
    const int32_t* tile_slots;
    const int32_t* tile_starts;
    int64_t num_tiles;
    const int64_t* base_rows;
    int64_t num_base_rows;
    const E* bias;
    Kernels<E> kernels;

    const int64_t* entry(int64_t tile, int64_t slice) const {
        return table + tile_slots[tile] * slot_stride + slice * slice_stride;
    }
    int64_t y_width() const { return std::accumulate(out_features, out_features + num_slices, int64_t{0}); }
    int64_t num_rows(int64_t tile) const { return tile_starts[tile + 1] - tile_starts[tile]; }
    const float* floats(int64_t offset) const {
        return offset == kAbsent ? nullptr : reinterpret_cast<const float*>(arena + offset);
    }
};

// Some columns of one slice; every tile is walked for them.
struct Panel {
    int64_t slice;
    int64_t slice_start;
    int64_t first_column;
    int64_t last_column;
};

// Kept by the calling thread, so that no call allocates once the largest has been seen.
struct Scratch {
    std::vector<float> shrunk;
    std::vector<int64_t> places;  // [num_tiles, num_slices], where each one's part of `shrunk` begins
    std::vector<Shrink> jobs;
    std::vector<Panel> panels;
};

// Returns the number of products, a measure of the work.
template <typename E>
int64_t plan(const Update<E>& update, Scratch& scratch) {
    scratch.places.clear();
    scratch.jobs.clear();
    scratch.panels.clear();
    int64_t size = 0, products = 0, start = 0;
    for (int64_t tile = 0; tile < update.num_tiles; ++tile)
        for (int64_t slice = 0; slice < update.num_slices; ++slice) {
            const int64_t numbers = update.num_rows(tile) * update.entry(tile, slice)[kRank];
            scratch.places.push_back(size);
            size += numbers;
            products += numbers * (update.in_features + update.out_features[slice]);
        }
    scratch.shrunk.resize(size);
    for (int64_t tile = 0; tile < update.num_tiles; ++tile)
        for (int64_t slice = 0; slice < update.num_slices; ++slice) {
            const int64_t* entry = update.entry(tile, slice);
            float* out = scratch.shrunk.data() + scratch.places[tile * update.num_slices + slice];
            for (int64_t rank = 0; rank < entry[kRank]; rank += kJobRanks)
                scratch.jobs.push_back({update.x, update.x_stride, update.rows + update.tile_starts[tile],
                                        update.num_rows(tile), update.arena + entry[kA] + rank * update.in_features,
                                        update.in_features, std::min(kJobRanks, entry[kRank] - rank), out + rank,
                                        entry[kRank]});
        }
    // wide panels read memory in a row, narrow ones give every thread several
    const int64_t share = update.y_width() / (2 * omp_get_max_threads()) / kMinPanelColumns * kMinPanelColumns;
    const int64_t columns = std::clamp(share, kMinPanelColumns, kMaxPanelColumns);
    for (int64_t slice = 0; slice < update.num_slices; start += update.out_features[slice++])
        for (int64_t column = 0; column < update.out_features[slice]; column += columns)
            scratch.panels.push_back({slice, start, column, std::min(column + columns, update.out_features[slice])});
    return products;
}

template <typename E>
void expand_panel(const Update<E>& update, const Panel& panel, const float* shrunk, const int64_t* places) {
    E* y = update.y + panel.slice_start;
    const E* bias = update.bias ? update.bias + panel.slice_start : nullptr;
    for (int64_t tile = 0; tile < update.num_tiles; ++tile) {
        const int64_t* entry = update.entry(tile, panel.slice);
        if (entry[kRank] == 0 && entry[kD] == kAbsent && entry[kBias] == kAbsent && !bias) continue;
        const int64_t first = update.tile_starts[tile];
        update.kernels.expand({y, update.y_stride, update.rows + first, update.weights + first, update.num_rows(tile),
                               shrunk + places[tile * update.num_slices + panel.slice],
                               entry[kRank] ? update.arena + entry[kBT] : update.arena,
                               update.out_features[panel.slice], entry[kRank], update.floats(entry[kD]),
                               update.floats(entry[kBias]), bias, panel.first_column, panel.last_column});
    }
    if (!bias) return;
    for (int64_t row = 0; row < update.num_base_rows; ++row)
        update.kernels.add_bias(y + update.base_rows[row] * update.y_stride + panel.first_column,
                                bias + panel.first_column, panel.last_column - panel.first_column);
}

template <typename E>
void apply(const Update<E>& update) {
    static thread_local Scratch scratch;
    const bool parallel = plan(update, scratch) >= kParallelProducts;
    const Shrink* jobs = scratch.jobs.data();
    const Panel* panels = scratch.panels.data();
    const float* shrunk = scratch.shrunk.data();
    const int64_t* places = scratch.places.data();
    const int64_t num_jobs = scratch.jobs.size(), num_panels = scratch.panels.size();
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t job = 0; job < num_jobs; ++job) update.kernels.shrink(jobs[job]);
#pragma omp parallel for schedule(static) if (parallel)
    for (int64_t panel = 0; panel < num_panels; ++panel) expand_panel(update, panels[panel], shrunk, places);
}

}  // namespace

// Arguments as in the op's contract, which has checked them; rows of y and x are contiguous and `stride` elements apart.
// Strides of the table count numbers; base_bias is null where the base has none.
extern "C" void lorasrv_lora_apply(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in_features,
                                   const void* arena, const int64_t* table, int64_t slot_stride, int64_t slice_stride,
                                   const int64_t* out_features, int64_t num_slices, const int64_t* rows,
                                   const float* weights, const int32_t* tile_slots, const int32_t* tile_starts,
                                   int64_t num_tiles, const int64_t* base_rows, int64_t num_base_rows,
                                   const void* base_bias, int32_t dtype, int32_t isa) {
    // batches of a fixed size end in tiles and rows that are not there
    while (num_tiles && tile_slots[num_tiles - 1] < 0) --num_tiles;
    while (num_base_rows && base_rows[num_base_rows - 1] < 0) --num_base_rows;
    const auto run = [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        apply<E>({static_cast<E*>(y), y_stride, static_cast<const E*>(x), x_stride, in_features,
                  static_cast<const E*>(arena), table, slot_stride, slice_stride, out_features, num_slices, rows,
                  weights, tile_slots, tile_starts, num_tiles, base_rows, num_base_rows,
                  static_cast<const E*>(base_bias), kernels<E>(isa)});
    };
    if (dtype == kBfloat16)
        run(static_cast<Bfloat16*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}
