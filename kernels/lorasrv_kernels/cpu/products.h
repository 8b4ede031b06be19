// The two products all kernels are made of. Every number is a chain of its own over the reduced dimension, in ascending
// order, so how many rows and columns are computed together changes no bit. Included once per instruction set.

// Sixteen elements, or the first `count` of them followed by zeros.
template <typename T>
LORASRV_TARGET LORASRV_INLINE Lanes load_part(const T* from, int64_t count) {
    if (count >= kLanes) return load(from);
    T padded[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) padded[i] = from[i];
    return load(padded);
}

template <typename T>
LORASRV_TARGET LORASRV_INLINE void store_part(T* to, int64_t count, Lanes value) {
    if (count >= kLanes) return store(to, value);
    T padded[kLanes];
    store(padded, value);
    for (int64_t i = 0; i < count; ++i) to[i] = padded[i];
}

// Adds products of rows of x and rows of a, element by element, to lanes whose sum is the dot product. What lies `ahead`
// elements behind a is fetched, if that is not 0.
template <int M, int N, typename X, typename A>
LORASRV_TARGET LORASRV_INLINE void add_dots(const X* const* x, const A* a, int64_t a_stride, int64_t length,
                                            Lanes (&dots)[M][N], int64_t ahead = 0) {
    const int64_t whole = length / kLanes * kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) {
        Lanes row[M];
        for (int m = 0; m < M; ++m) row[m] = load(x[m] + i);
        for (int n = 0; n < N; ++n) {
            if (ahead) __builtin_prefetch(a + n * a_stride + i + ahead);
            const Lanes column = load(a + n * a_stride + i);
            for (int m = 0; m < M; ++m) dots[m][n] = fused(row[m], column, dots[m][n]);
        }
    }
    if (whole == length) return;
    for (int n = 0; n < N; ++n) {
        const Lanes column = load_part(a + n * a_stride + whole, length - whole);
        for (int m = 0; m < M; ++m)
            dots[m][n] = fused(load_part(x[m] + whole, length - whole), column, dots[m][n]);
    }
}

// Adds weights[m][k] * rows[k] over k to sums[m], 16 N columns of them, of which `width` exist. What lies `ahead` elements
// behind the rows is fetched, if that is not 0.
template <int M, int N, typename E>
LORASRV_TARGET LORASRV_INLINE void add_rows(const float* const* weights, const E* rows, int64_t stride, int64_t count,
                                            int64_t width, Lanes (&sums)[M][N], int64_t ahead = 0) {
    constexpr int kLine = 64 / (sizeof(E) * kLanes);
    for (int64_t k = 0; k < count; ++k) {
        Lanes row[N];
        if (ahead)
            for (int n = 0; n < N; n += kLine) __builtin_prefetch(rows + k * stride + n * kLanes + ahead);
        for (int n = 0; n < N; ++n) row[n] = load_part(rows + k * stride + n * kLanes, width - n * kLanes);
        for (int m = 0; m < M; ++m) {
            const Lanes weight = broadcast(weights[m][k]);
            for (int n = 0; n < N; ++n) sums[m][n] = fused(weight, row[n], sums[m][n]);
        }
    }
}
