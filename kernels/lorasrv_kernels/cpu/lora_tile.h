// The two halves of the low-rank update for one instruction set: see lora.cpp.

#include "products.h"

// out[m][n] = x[m] . a[n], rows of x and a of `length` elements
template <int M, int N, typename E>
LORASRV_TARGET void shrink_block(const E* const* x, const E* a, int64_t length, float* out, int64_t out_stride) {
    Lanes dots[M][N];
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) dots[m][n] = broadcast(0.0f);
    // rows are too short for the processor's own prefetching
    add_dots<M, N>(x, a, length, length, dots, N * length);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) out[m * out_stride + n] = sum(dots[m][n]);
}

template <int M, int N, typename E>
LORASRV_TARGET void shrink_rows(const E* const* x, const Shrink& job, float* out) {
    const E* a = static_cast<const E*>(job.a);
    int64_t rank = 0;
    for (; rank + N <= job.num_ranks; rank += N)
        shrink_block<M, N>(x, a + rank * job.length, job.length, out + rank, job.out_stride);
    for (; rank < job.num_ranks; ++rank)
        shrink_block<M, 1>(x, a + rank * job.length, job.length, out + rank, job.out_stride);
}

template <int M, int N, typename E>
LORASRV_TARGET void shrink_some(const Shrink& job, int64_t row) {
    const E* x[M];
    for (int m = 0; m < M; ++m) x[m] = static_cast<const E*>(job.x) + job.rows[row + m] * job.x_stride;
    shrink_rows<M, N>(x, job, job.out + row * job.out_stride);
}

template <typename E>
LORASRV_TARGET void shrink(const Shrink& job) {
    int64_t row = 0;
    for (; row + kRows <= job.num_rows; row += kRows) shrink_some<kRows, kColumns, E>(job, row);
    for (; row < job.num_rows; ++row) shrink_some<1, kColumnsAlone, E>(job, row);
}

// y <- d y + weight * sums + bias in 16 columns, of which `width` exist
template <typename E>
LORASRV_TARGET LORASRV_INLINE void finish(E* y, int64_t column, int64_t width, const Expand& job, float weight,
                                          Lanes sums) {
    Lanes value = load_part(y + column, width);
    if (job.d) value = multiply(value, load_part(job.d + column, width));
    if (job.rank) value = fused(broadcast(weight), sums, value);
    if (job.own_bias)
        value = add(value, load_part(job.own_bias + column, width));
    else if (job.base_bias)
        value = add(value, load_part(static_cast<const E*>(job.base_bias) + column, width));
    store_part(y + column, width, value);
}

template <int M, int N, typename E>
LORASRV_TARGET void expand_block(const Expand& job, int64_t row, int64_t column) {
    const float* weights[M];
    Lanes sums[M][N];
    for (int m = 0; m < M; ++m) {
        weights[m] = job.shrunk + (row + m) * job.rank;
        for (int n = 0; n < N; ++n) sums[m][n] = broadcast(0.0f);
    }
    const int64_t width = job.last_column - column;
    const E* b = static_cast<const E*>(job.b) + column;
    if (width >= N * kLanes)
        add_rows<M, N>(weights, b, job.b_stride, job.rank, N * kLanes, sums, N * kLanes);
    else
        add_rows<M, N>(weights, b, job.b_stride, job.rank, width, sums);
    for (int m = 0; m < M; ++m) {
        E* y = static_cast<E*>(job.y) + job.rows[row + m] * job.y_stride;
        for (int n = 0; n < N; ++n)
            finish(y, column + n * kLanes, width - n * kLanes, job, job.weights[row + m], sums[m][n]);
    }
}

template <int M, int N, typename E>
LORASRV_TARGET void expand_rows(const Expand& job, int64_t row) {
    int64_t column = job.first_column;
    for (; column + N * kLanes <= job.last_column; column += N * kLanes) expand_block<M, N, E>(job, row, column);
    for (; column < job.last_column; column += kLanes) expand_block<M, 1, E>(job, row, column);
}

template <typename E>
LORASRV_TARGET void expand(const Expand& job) {
    int64_t row = 0;
    for (; row + kRows <= job.num_rows; row += kRows) expand_rows<kRows, kColumns, E>(job, row);
    for (; row < job.num_rows; ++row) expand_rows<1, kColumnsAlone, E>(job, row);
}

template <typename E>
LORASRV_TARGET void add_bias(E* y, const E* bias, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes)
        store_part(y + i, count - i, add(load_part(y + i, count - i), load_part(bias + i, count - i)));
}
