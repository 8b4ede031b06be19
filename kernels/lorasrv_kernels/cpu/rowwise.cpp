// What lies between the products of a layer: norms, rotary positions and the gated activation. A row's bits depend on
// that row alone.

#include <type_traits>

#include "kernel_calls.h"
#include "lanes.h"
#include "rowwise.h"

namespace {

constexpr int64_t kParallelElements = 1 << 14;

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
    void (*rms_norm)(E*, const E*, const E*, float, int64_t, E*);
    void (*silu_mul_grad)(const E*, const E*, const E*, int64_t, E*, E*);
    void (*rms_norm_grad)(const E*, const E*, const E*, float, int64_t, E*);
};

template <typename E>
Kernels<E> kernels(int32_t isa) {
#if defined(__x86_64__)
    if (isa >= kAvx512) return {avx512::silu_mul<E>, avx512::rotate<E>, avx512::rms_norm<E>, avx512::silu_mul_grad<E>,
                avx512::rms_norm_grad<E>};
    if (isa == kAvx2) return {avx2::silu_mul<E>, avx2::rotate<E>, avx2::rms_norm<E>, avx2::silu_mul_grad<E>,
                avx2::rms_norm_grad<E>};
#endif
    return {portable::silu_mul<E>, portable::rotate<E>, portable::rms_norm<E>, portable::silu_mul_grad<E>,
                portable::rms_norm_grad<E>};
}

template <typename Run>
void with_element(int32_t dtype, const Run& run) {
    if (dtype == kBfloat16)
        run(static_cast<Bfloat16*>(nullptr));
    else
        run(static_cast<float*>(nullptr));
}

}  // namespace

void rms_norm_rows(const Norm& call, int32_t dtype, int32_t isa) {
    with_element(dtype, [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        const auto norm = kernels<E>(isa).rms_norm;
        const int64_t vectors = call.num_rows * call.num_heads;
#pragma omp parallel for schedule(static) if (vectors * call.count >= kParallelElements)
        for (int64_t i = 0; i < vectors; ++i) {
            const int64_t row = i / call.num_heads, head = i % call.num_heads;
            const void* weight = call.row_weights ? call.row_weights[row] : call.weight;
            norm(static_cast<E*>(call.x) + row * call.row_stride + head * call.head_stride,
                 call.delta ? static_cast<const E*>(call.delta) + i * call.count : nullptr,
                 static_cast<const E*>(weight), call.epsilon, call.count,
                 static_cast<E*>(call.out) + row * call.out_row_stride + head * call.out_head_stride);
        }
    });
}

// x [num_rows, num_heads, count], the last dimension contiguous; out the same, contiguous; weight may be null.
extern "C" void lorasrv_rms_norm(const void* x, int64_t row_stride, int64_t head_stride, const void* weight,
                                 float epsilon, void* out, int64_t num_rows, int64_t num_heads, int64_t count,
                                 int32_t dtype, int32_t isa) {
    // without a delta x is only read
    rms_norm_rows({const_cast<void*>(x), row_stride, head_stride, nullptr, weight, nullptr, epsilon, out,
                   num_heads * count, count, num_rows, num_heads, count},
                  dtype, isa);
}

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

// grad [num_rows, count] and out [num_rows, 2 count], the gradient of gate beside that of up, contiguous.
extern "C" void lorasrv_silu_mul_grad(const void* grad, const void* gate, int64_t gate_stride, const void* up,
                                      int64_t up_stride, void* out, int64_t num_rows, int64_t count, int32_t dtype,
                                      int32_t isa) {
    with_element(dtype, [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        const auto row = kernels<E>(isa).silu_mul_grad;
#pragma omp parallel for schedule(static) if (num_rows * count >= kParallelElements)
        for (int64_t i = 0; i < num_rows; ++i) {
            E* target = static_cast<E*>(out) + 2 * count * i;
            row(static_cast<const E*>(grad) + i * count, static_cast<const E*>(gate) + i * gate_stride,
                static_cast<const E*>(up) + i * up_stride, count, target, target + count);
        }
    });
}

// grad, x and out [num_rows, count], contiguous; weight may be null.
extern "C" void lorasrv_rms_norm_grad(const void* grad, const void* x, const void* weight, float epsilon, void* out,
                                      int64_t num_rows, int64_t count, int32_t dtype, int32_t isa) {
    with_element(dtype, [&](auto* element) {
        using E = std::remove_pointer_t<decltype(element)>;
        const auto row = kernels<E>(isa).rms_norm_grad;
#pragma omp parallel for schedule(static) if (num_rows * count >= kParallelElements)
        for (int64_t i = 0; i < num_rows; ++i)
            row(static_cast<const E*>(grad) + i * count, static_cast<const E*>(x) + i * count,
                static_cast<const E*>(weight), epsilon, count, static_cast<E*>(out) + i * count);
    });
}
