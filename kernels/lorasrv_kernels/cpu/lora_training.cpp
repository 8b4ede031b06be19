// The products of training a low-rank update, of one adapter's tokens and one slice at a time: x A^T, its products with
// B^T, sums over tokens. Activations are float32 or bfloat16 and are widened once; everything else is float32.
//
// Threads share rows where a row is a result, and columns where rows are added up. Every sum is a chain, or chains of
// fixed length added in order, so threads and neighbours change no bit.

#include <algorithm>
#include <type_traits>
#include <vector>

#include "lanes.h"

namespace {

constexpr int64_t kDepth = 1024;       // elements of a dot product at a time: some rows of A stay in the first-level cache
constexpr int64_t kPanelColumns = 64;  // columns of a packed panel
constexpr int64_t kBlockTokens = 64;
constexpr int64_t kParallelProducts = 1 << 15;

// out [tokens, rank] = x [tokens, length] a^T
struct Shrink {
    const void* x;
    int64_t x_stride;
    int64_t tokens;
    const float* a;  // [rank, length]
    int64_t length;
    int64_t rank;
    float* out;
    int64_t out_stride;
};

// out [tokens, width] = d * (y + shrunk b_t); y and d may be null
struct Expand {
    const float* shrunk;  // [tokens, rank]
    int64_t shrunk_stride;
    int64_t tokens;
    int64_t rank;
    const float* b_t;  // [rank, width]
    int64_t width;
    const void* y;
    int64_t y_stride;
    const float* d;
    void* out;
    int64_t out_stride;
};

// out [rank, width] = shrunk_t x
struct Outer {
    const float* shrunk_t;  // [rank, tokens]
    int64_t tokens;
    int64_t rank;
    const void* x;  // [tokens, width]
    int64_t x_stride;
    int64_t width;
    float* out;
};

// scaled [tokens, width] = d * grad, and sums [width] of grad * y
struct Scale {
    const void* grad;
    int64_t grad_stride;
    const void* y;
    int64_t y_stride;
    const float* d;
    int64_t tokens;
    int64_t width;
    void* scaled;
    int64_t scaled_stride;
    float* sums;
};

#define LORASRV_TARGET
namespace portable {
#include "lora_training_tile.h"
}
#undef LORASRV_TARGET

#if defined(__x86_64__)
#define LORASRV_TARGET LORASRV_AVX2
namespace avx2 {
#include "lora_training_tile.h"
}
#undef LORASRV_TARGET
#define LORASRV_TARGET LORASRV_AVX512
namespace avx512 {
#include "lora_training_tile.h"
}
#undef LORASRV_TARGET
#endif

struct Kernels {
    void (*shrink)(const Shrink&, int64_t, int64_t);
    void (*expand)(const Expand&, int64_t, int64_t, float*);
    void (*outer)(const Outer&, int64_t, int64_t, float*);
    void (*scale)(const Scale&, int64_t, int64_t);
};

template <typename E>
Kernels kernels_for(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512::shrink<E>, avx512::expand<E>, avx512::outer<E>, avx512::scale<E>};
    if (isa == kAvx2) return {avx2::shrink<E>, avx2::expand<E>, avx2::outer<E>, avx2::scale<E>};
#endif
    return {portable::shrink<E>, portable::expand<E>, portable::outer<E>, portable::scale<E>};
}

Kernels kernels_for(int32_t dtype, int32_t isa) {
    return dtype == kBfloat16 ? kernels_for<Bfloat16>(isa) : kernels_for<float>(isa);
}

// Calls run(start, stop, panel) for runs of at most `step` of [0, count); a panel has `panel_rows` rows.
template <typename F>
void share(int64_t count, int64_t step, int64_t products, int64_t panel_rows, F&& run) {
    const int64_t runs = (count + step - 1) / step;
#pragma omp parallel for schedule(static) if (products >= kParallelProducts)
    for (int64_t index = 0; index < runs; ++index) {
        static thread_local std::vector<float> panel;
        if (panel.size() < static_cast<size_t>(panel_rows * kPanelColumns)) panel.resize(panel_rows * kPanelColumns);
        run(index * step, std::min(count, (index + 1) * step), panel.data());
    }
}

}  // namespace

// Rows are contiguous and `stride` elements apart; x, y, grad, scaled and the result of expand are of `dtype`.

extern "C" void lorasrv_lora_training_shrink(const void* x, int64_t x_stride, int64_t tokens, const float* a,
                                             int64_t length, int64_t rank, float* out, int64_t out_stride,
                                             int32_t dtype, int32_t isa) {
    const Shrink job{x, x_stride, tokens, a, length, rank, out, out_stride};
    const Kernels kernels = kernels_for(dtype, isa);
    share(tokens, kBlockTokens, tokens * rank * length, 0,
          [&](int64_t start, int64_t stop, float*) { kernels.shrink(job, start, stop); });
}

extern "C" void lorasrv_lora_training_expand(const float* shrunk, int64_t shrunk_stride, int64_t tokens, int64_t rank,
                                             const float* b_t, int64_t width, const void* y, int64_t y_stride,
                                             const float* d, void* out, int64_t out_stride, int32_t dtype,
                                             int32_t isa) {
    const Expand job{shrunk, shrunk_stride, tokens, rank, b_t, width, y, y_stride, d, out, out_stride};
    const Kernels kernels = kernels_for(dtype, isa);
    share(tokens, kBlockTokens, tokens * (rank + 1) * width, rank,
          [&](int64_t start, int64_t stop, float* panel) { kernels.expand(job, start, stop, panel); });
}

extern "C" void lorasrv_lora_training_outer(const float* shrunk_t, int64_t tokens, int64_t rank, const void* x,
                                            int64_t x_stride, int64_t width, float* out, int32_t dtype, int32_t isa) {
    const Outer job{shrunk_t, tokens, rank, x, x_stride, width, out};
    const Kernels kernels = kernels_for(dtype, isa);
    share(width, kPanelColumns, tokens * rank * width, kBlockTokens, [&](int64_t start, int64_t stop, float* panel) {
        kernels.outer(job, start, stop - start, panel);
    });
}

extern "C" void lorasrv_lora_training_scale(const void* grad, int64_t grad_stride, const void* y, int64_t y_stride,
                                            const float* d, int64_t tokens, int64_t width, void* scaled,
                                            int64_t scaled_stride, float* sums, int32_t dtype, int32_t isa) {
    const Scale job{grad, grad_stride, y, y_stride, d, tokens, width, scaled, scaled_stride, sums};
    const Kernels kernels = kernels_for(dtype, isa);
    share(width, kPanelColumns, tokens * width, 0,
          [&](int64_t start, int64_t stop, float*) { kernels.scale(job, start, stop); });
}
