// The products of training a low-rank update for one instruction set: see lora_training.cpp.

#include "products.h"

// what of a matrix is used again and again lies in one piece, widened to float32
template <typename E>
LORASRV_TARGET LORASRV_INLINE void pack(const E* from, int64_t stride, int64_t rows, int64_t width, float* to) {
    for (int64_t row = 0; row < rows; ++row)
        for (int64_t i = 0; i < kPanelColumns; i += kLanes)
            if (i < width) store(to + row * kPanelColumns + i, load_part(from + row * stride + i, width - i));
}

// out[m][n] = or += x[m] . a[n] over `length` elements
template <int M, int N, typename E>
LORASRV_TARGET void add_shrunk(const Shrink& job, int64_t row, int64_t rank, int64_t start, int64_t length) {
    const E* x[M];
    Lanes dots[M][N];
    for (int m = 0; m < M; ++m) {
        x[m] = static_cast<const E*>(job.x) + (row + m) * job.x_stride + start;
        for (int n = 0; n < N; ++n) dots[m][n] = broadcast(0.0f);
    }
    add_dots<M, N>(x, job.a + rank * job.length + start, job.length, length, dots);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < N; ++n) {
            float& at = job.out[(row + m) * job.out_stride + rank + n];
            at = start == 0 ? sum(dots[m][n]) : at + sum(dots[m][n]);
        }
}

template <int N, typename E>
LORASRV_TARGET void shrink_rows(const Shrink& job, int64_t first, int64_t last, int64_t rank, int64_t start,
                                int64_t length) {
    int64_t row = first;
    for (; row + kRows <= last; row += kRows) add_shrunk<kRows, N, E>(job, row, rank, start, length);
    for (; row < last; ++row) add_shrunk<1, N, E>(job, row, rank, start, length);
}

// rows [first, last) of x A^T
template <typename E>
LORASRV_TARGET void shrink(const Shrink& job, int64_t first, int64_t last) {
    for (int64_t start = 0; start < job.length; start += kDepth) {
        const int64_t length = std::min(kDepth, job.length - start);
        int64_t rank = 0;
        for (; rank + kColumns <= job.rank; rank += kColumns)
            shrink_rows<kColumns, E>(job, first, last, rank, start, length);
        for (; rank < job.rank; ++rank) shrink_rows<1, E>(job, first, last, rank, start, length);
    }
}

template <int M, typename E>
LORASRV_TARGET void expand_block(const Expand& job, int64_t row, int64_t column, int64_t width, const float* panel) {
    constexpr int64_t kPrefetchBytes = kColumns * kLanes * sizeof(E), kLineBytes = 64;
    const float* weights[M];
    Lanes sums[M][kColumns];
    for (int m = 0; m < M; ++m) {
        weights[m] = job.shrunk + (row + m) * job.shrunk_stride;
        for (int n = 0; n < kColumns; ++n) sums[m][n] = broadcast(0.0f);
    }
    // the rows' next panel, which lies too far apart for the hardware to foresee
    for (int m = 0; m < M; ++m)
        for (int64_t at = 0; at < kPrefetchBytes; at += kLineBytes) {
            const int64_t next = (column + kPanelColumns) * static_cast<int64_t>(sizeof(E)) + at;
            __builtin_prefetch(static_cast<const char*>(job.out) + (row + m) * job.out_stride * sizeof(E) + next, 1);
            if (job.y)
                __builtin_prefetch(static_cast<const char*>(job.y) + (row + m) * job.y_stride * sizeof(E) + next);
        }
    add_rows<M, kColumns>(weights, panel, kPanelColumns, job.rank, kColumns * kLanes, sums);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < kColumns; ++n) {
            const int64_t at = column + n * kLanes, left = width - n * kLanes;
            if (left <= 0) break;
            Lanes value = sums[m][n];
            if (job.y)
                value = add(value, load_part(static_cast<const E*>(job.y) + (row + m) * job.y_stride + at, left));
            if (job.d) value = multiply(value, load_part(job.d + at, left));
            store_part(static_cast<E*>(job.out) + (row + m) * job.out_stride + at, left, value);
        }
}

// rows [first, last) of d * (y + shrunk B^T)
template <typename E>
LORASRV_TARGET void expand(const Expand& job, int64_t first, int64_t last, float* panel) {
    for (int64_t start = 0; start < job.width; start += kPanelColumns) {
        const int64_t panel_width = std::min(kPanelColumns, job.width - start);
        pack(job.b_t + start, job.width, job.rank, panel_width, panel);
        for (int64_t column = 0; column < panel_width; column += kColumns * kLanes) {
            const int64_t width = panel_width - column;
            int64_t row = first;
            for (; row + kRows <= last; row += kRows)
                expand_block<kRows, E>(job, row, start + column, width, panel + column);
            for (; row < last; ++row) expand_block<1, E>(job, row, start + column, width, panel + column);
        }
    }
}

template <int M>
LORASRV_TARGET void outer_block(const Outer& job, int64_t rank, int64_t token, int64_t tokens, int64_t column,
                                int64_t width, const float* panel) {
    const float* weights[M];
    Lanes sums[M][kColumns];
    for (int m = 0; m < M; ++m) {
        weights[m] = job.shrunk_t + (rank + m) * job.tokens + token;
        for (int n = 0; n < kColumns; ++n) {
            const int64_t left = width - n * kLanes;
            const float* at = job.out + (rank + m) * job.width + column + n * kLanes;
            sums[m][n] = token == 0 || left <= 0 ? broadcast(0.0f) : load_part(at, left);
        }
    }
    add_rows<M, kColumns>(weights, panel, kPanelColumns, tokens, kColumns * kLanes, sums);
    for (int m = 0; m < M; ++m)
        for (int n = 0; n < kColumns; ++n)
            if (width > n * kLanes)
                store_part(job.out + (rank + m) * job.width + column + n * kLanes, width - n * kLanes, sums[m][n]);
}

// columns [start, start + width) of shrunk^T x, at most a panel; tokens are added in ascending order
template <typename E>
LORASRV_TARGET void outer(const Outer& job, int64_t start, int64_t width, float* panel) {
    for (int64_t token = 0; token < job.tokens; token += kBlockTokens) {
        const int64_t tokens = std::min(kBlockTokens, job.tokens - token);
        pack(static_cast<const E*>(job.x) + token * job.x_stride + start, job.x_stride, tokens, width, panel);
        for (int64_t column = 0; column < width; column += kColumns * kLanes) {
            int64_t rank = 0;
            for (; rank + kRows <= job.rank; rank += kRows)
                outer_block<kRows>(job, rank, token, tokens, start + column, width - column, panel + column);
            for (; rank < job.rank; ++rank)
                outer_block<1>(job, rank, token, tokens, start + column, width - column, panel + column);
        }
    }
}

// columns [start, stop): scaled = d * grad, sums = column sums of grad * y, tokens in ascending order
template <typename E>
LORASRV_TARGET void scale(const Scale& job, int64_t start, int64_t stop) {
    for (int64_t column = start; column < stop; column += kLanes) {
        const int64_t left = stop - column;
        const Lanes d = load_part(job.d + column, left);
        Lanes total = broadcast(0.0f);
        for (int64_t token = 0; token < job.tokens; ++token) {
            const Lanes grad = load_part(static_cast<const E*>(job.grad) + token * job.grad_stride + column, left);
            const Lanes y = load_part(static_cast<const E*>(job.y) + token * job.y_stride + column, left);
            store_part(static_cast<E*>(job.scaled) + token * job.scaled_stride + column, left, multiply(grad, d));
            total = fused(grad, y, total);
        }
        store_part(job.sums + column, left, total);
    }
}
