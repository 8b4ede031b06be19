// What lies between the products of a layer: rotary positions and the gated activation. Every number is computed by
// itself, so a row's bits depend on nothing else.

#include <type_traits>

#include "lanes.h"

namespace {

constexpr int64_t kParallelElements = 1 << 16;

#define LORASRV_TARGET
namespace portable {
#include "rowwise_tile.h"
}
#undef LORASRV_TARGET

#if defined(__x86_64__)
#define LORASRV_TARGET LORASRV_AVX2
namespace avx2 {
#include "rowwise_tile.h"
}
#undef LORASRV_TARGET
#define LORASRV_TARGET LORASRV_AVX512
namespace avx512 {
#include "rowwise_tile.h"
}
#undef LORASRV_TARGET
#endif

template <typename E>
struct Kernels {
    void (*silu_mul)(const E*, const E*, int64_t, E*);
    void (*rotate)(E*, const float*, int64_t);
};

template <typename E>
Kernels<E> kernels(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512::silu_mul<E>, avx512::rotate<E>};
    if (isa == kAvx2) return {avx2::silu_mul<E>, avx2::rotate<E>};
#endif
    return {portable::silu_mul<E>, portable::rotate<E>};
}

template <typename Run>
void with_element(int32_t dtype, const Run& run) {
    if (dtype == kBfloat16)
        run(static_cast<Bfloat16*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}

}  // namespace

// Rows of gate and up are `count` contiguous elements, `stride` apart; out [num_rows, count].
extern "C" void lorasrv_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
                                 int64_t num_rows, int64_t count, int32_t dtype, int32_t isa) {
    with_element(dtype, [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        const auto row = kernels<E>(isa).silu_mul;
#pragma omp parallel for schedule(static) if (num_rows * count >= kParallelElements)
        for (int64_t i = 0; i < num_rows; ++i)
            row(static_cast<const E*>(gate) + i * gate_stride, static_cast<const E*>(up) + i * up_stride, count,
                static_cast<E*>(out) + i * count);
    });
}

// heads [num_rows, num_heads, 2 half], the last dimension contiguous; angles [num_rows, 2 half].
extern "C" void lorasrv_rotate(void* heads, int64_t row_stride, int64_t head_stride, const float* angles,
                               int64_t num_rows, int64_t num_heads, int64_t half, int32_t dtype, int32_t isa) {
    with_element(dtype, [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        const auto rotate = kernels<E>(isa).rotate;
#pragma omp parallel for schedule(static) if (num_rows * num_heads * half >= kParallelElements)
        for (int64_t i = 0; i < num_rows; ++i)
            for (int64_t head = 0; head < num_heads; ++head)
                rotate(static_cast<E*>(heads) + i * row_stride + head * head_stride, angles + 2 * half * i, half);
    });
}
