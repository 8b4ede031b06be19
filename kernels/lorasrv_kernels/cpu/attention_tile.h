// The rows of one query tile that share a KV head, for one instruction set: see attention.cpp.

#include "exponential.h"
#include "products.h"

// Dot products of M rows of q with 16 keys.
template <int M, typename E>
LORASRV_TARGET LORASRV_INLINE void score_keys(const float* const* q, const E* keys, int64_t stride, int64_t head_size,
                                              Lanes (&scores)[M]) {
    Lanes folded[M][4];
    for (int four = 0; four < 4; ++four) {
        Lanes dots[M][4];
        for (int m = 0; m < M; ++m)
            for (int n = 0; n < 4; ++n) dots[m][n] = broadcast(0.0f);
        add_dots<M, 4>(q, keys + 4 * four * stride, stride, head_size, dots);
        for (int m = 0; m < M; ++m) folded[m][four] = fold(dots[m]);
    }
    for (int m = 0; m < M; ++m) scores[m] = sums(folded[m]);
}

// Scores of one row to weights; returns the factor for what the row has summed so far.
LORASRV_TARGET LORASRV_INLINE float weigh(Row& row, float* weights, int64_t first, int64_t last) {
    for (int64_t key = 0; key < first; ++key) weights[key] = -INFINITY;
    for (int64_t key = last; key < kBlockTokens; ++key) weights[key] = -INFINITY;
    const Lanes low = load(weights), high = load(weights + kLanes);
    const float top = std::max(row.top, largest_lane(largest(low, high)));
    const Lanes origin = broadcast(top);
    const Lanes low_weights = exp_of_negative(subtract(low, origin));
    const Lanes high_weights = exp_of_negative(subtract(high, origin));
    store(weights, low_weights);
    store(weights + kLanes, high_weights);
    float decay[kLanes];
    store(decay, exp_of_negative(broadcast(row.top - top)));
    row.total = row.total * decay[0] + sum(add(low_weights, high_weights));
    row.top = top;
    return decay[0];
}

// sums[m] <- decay[m] sums[m] + weights[m] V
template <int M, int N, typename E>
LORASRV_TARGET LORASRV_INLINE void add_values(const float* const* weights, const float* decay, const E* values,
                                              int64_t stride, int64_t count, int64_t width, float* const* to) {
    Lanes sums[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) sums[m][n] = multiply(load(to[m] + n * kLanes), broadcast(decay[m]));
    add_rows<M, N>(weights, values, stride, count, width, sums);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) store(to[m] + n * kLanes, sums[m][n]);
}

// M rows that see the keys [first, last) of a block.
template <int M, typename E>
LORASRV_TARGET void attend_rows(const Tile& tile, const Block& block, int64_t index, int64_t first, int64_t last) {
    const E* keys = static_cast<const E*>(block.keys);
    const E* values = static_cast<const E*>(block.values) + first * tile.position_stride;
    alignas(64) float weights[M][kBlockTokens];
    const float* q[M];
    const float* seen[M];
    float* out[M];
    float decay[M];
    for (int m = 0; m < M; ++m) {
        q[m] = tile.q + (index + m) * tile.width;
        out[m] = tile.sums + (index + m) * tile.width;
        seen[m] = weights[m] + first;
    }
    for (int64_t half = 0; half < kBlockTokens; half += kLanes) {
        Lanes scores[M];
        for (int m = 0; m < M; ++m) scores[m] = broadcast(0.0f);
        if (half < last && half + kLanes > first)
            score_keys<M>(q, keys + half * tile.position_stride, tile.position_stride, tile.head_size, scores);
        for (int m = 0; m < M; ++m) store(weights[m] + half, scores[m]);
    }
    for (int m = 0; m < M; ++m) decay[m] = weigh(tile.rows[index + m], weights[m], first, last);
    int64_t column = 0;
    for (; column + kValueColumns * kLanes <= tile.head_size; column += kValueColumns * kLanes) {
        add_values<M, kValueColumns>(seen, decay, values + column, tile.position_stride, last - first,
                                     kValueColumns * kLanes, out);
        for (int m = 0; m < M; ++m) out[m] += kValueColumns * kLanes;
    }
    for (; column < tile.head_size; column += kLanes) {
        add_values<M, 1>(seen, decay, values + column, tile.position_stride, last - first, tile.head_size - column, out);
        for (int m = 0; m < M; ++m) out[m] += kLanes;
    }
}

// One block for all rows; rows that see the same keys are taken together, which changes no bit of theirs.
template <typename E>
LORASRV_TARGET void attend(const Tile& tile, const Block& block) {
    for (int64_t index = 0; index < tile.num_rows;) {
        const Row& row = tile.rows[index];
        const int64_t first = std::max<int64_t>(row.first_position - block.first_position, 0);
        const int64_t last = std::min<int64_t>(row.position + 1 - block.first_position, kBlockTokens);
        bool alike = index + kScoreRows <= tile.num_rows;
        for (int64_t m = 1; alike && m < kScoreRows; ++m) alike = sees_alike(row, tile.rows[index + m], block);
        if (first >= last) {
            ++index;
        } else if (alike) {
            attend_rows<kScoreRows, E>(tile, block, index, first, last);
            index += kScoreRows;
        } else {
            attend_rows<1, E>(tile, block, index++, first, last);
        }
    }
}

template <typename E>
LORASRV_TARGET void load_query(const E* q, float scale, int64_t head_size, float* to) {
    for (int64_t i = 0; i < head_size; i += kLanes)
        store(to + i, multiply(load_part(q + i, head_size - i), broadcast(scale)));
}

template <typename E>
LORASRV_TARGET void store_output(const float* sums, float total, int64_t head_size, E* out) {
    for (int64_t i = 0; i < head_size; i += kLanes)
        store_part(out + i, head_size - i, divide(load(sums + i), broadcast(total)));
}
