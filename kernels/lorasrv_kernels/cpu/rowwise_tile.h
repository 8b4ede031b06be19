// Norm, rotation and gated activation of one row for one instruction set: see rowwise.cpp.

#include "exponential.h"
#include "products.h"

// out = gate / (1 + e^-gate), rounded, times up; the exponent is never positive, so nothing overflows.
template <typename E>
LORASRV_TARGET void silu_mul(const E* gate, const E* up, int64_t count, E* out) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes value = load_part(gate + i, count - i);
        const Lanes positive = largest(zero, value), negative = largest(zero, subtract(zero, value));
        const Lanes power = exp_of_negative(subtract(zero, add(positive, negative)));
        const Lanes above = subtract(positive, multiply(negative, power));
        const Lanes silu = rounded(divide(above, add(one, power)), gate);
        store_part(out + i, count - i, multiply(silu, load_part(up + i, count - i)));
    }
}

// One head [D]: its halves turned by angles [D], cosines first; products are rounded before they are added.
template <typename E>
LORASRV_TARGET void rotate(E* head, const float* angles, int64_t half) {
    for (int64_t i = 0; i < half; i += kLanes) {
        const Lanes first = load_part(head + i, half - i), second = load_part(head + half + i, half - i);
        const Lanes cosine = load_part(angles + i, half - i), sine = load_part(angles + half + i, half - i);
        store_part(head + i, half - i, subtract(multiply(first, cosine), multiply(second, sine)));
        store_part(head + half + i, half - i, add(multiply(second, cosine), multiply(first, sine)));
    }
}

// Adds delta, where there is one, to up to 16 of the numbers of x; adds their squares to a sum.
template <typename E>
LORASRV_TARGET LORASRV_INLINE void add_squares(E* x, const E* delta, int64_t count, Lanes& squares) {
    Lanes value = load_part(x, count);
    if (delta) {
        value = rounded(add(value, load_part(delta, count)), x);
        store_part(x, count, value);
    }
    squares = fused(value, value, squares);
}

// x <- x + delta, where there is a delta; out = x / sqrt(mean(x^2) + epsilon), rounded, times weight, where there is one.
// Each lane of the four sums takes every 64th number; out may be x.
template <typename E>
LORASRV_TARGET void rms_norm(E* x, const E* delta, const E* weight, float epsilon, int64_t count, E* out) {
    Lanes squares[4] = {broadcast(0.0f), broadcast(0.0f), broadcast(0.0f), broadcast(0.0f)};
    for (int64_t i = 0; i < count; i += 4 * kLanes)
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) {
            const int64_t at = i + part * kLanes;
            if (at < count) add_squares(x + at, delta ? delta + at : nullptr, count - at, squares[part]);
        }
    const float total = sum(add(add(squares[0], squares[1]), add(squares[2], squares[3])));
    const Lanes inverse = broadcast(1.0f / __builtin_sqrtf(total / count + epsilon));
    for (int64_t i = 0; i < count; i += kLanes) {
        Lanes value = rounded(multiply(load_part(x + i, count - i), inverse), x);
        if (weight) value = multiply(value, load_part(weight + i, count - i));
        store_part(out + i, count - i, value);
    }
}

// The gradient of silu_mul: with s = 1 / (1 + e^-gate), those of gate and of up.
template <typename E>
LORASRV_TARGET void silu_mul_grad(const E* grad, const E* gate, const E* up, int64_t count, E* gate_out, E* up_out) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes value = load_part(gate + i, count - i), incoming = load_part(grad + i, count - i);
        const Lanes positive = largest(zero, value), negative = largest(zero, subtract(zero, value));
        const Lanes power = exp_of_negative(subtract(zero, add(positive, negative)));
        const Lanes inverse = divide(one, add(one, power));
        // the larger and the smaller one of s and 1 - s
        const Lanes other = multiply(power, inverse);
        const Lanes sigmoid = add(other, zero_below(value, zero, subtract(inverse, other)));
        const Lanes slope = multiply(sigmoid, fused(value, subtract(one, sigmoid), one));
        store_part(gate_out + i, count - i,
                   multiply(multiply(incoming, load_part(up + i, count - i)), slope));
        store_part(up_out + i, count - i, multiply(incoming, multiply(value, sigmoid)));
    }
}

// The gradient of rms_norm without a delta: with r = 1 / sqrt(mean(x^2) + epsilon) and g = grad * weight,
// out = r g - x r^3 mean(g x).
template <typename E>
LORASRV_TARGET void rms_norm_grad(const E* grad, const E* x, const E* weight, float epsilon, int64_t count, E* out) {
    Lanes squares = broadcast(0.0f), products = broadcast(0.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes value = load_part(x + i, count - i);
        Lanes incoming = load_part(grad + i, count - i);
        if (weight) incoming = multiply(incoming, load_part(weight + i, count - i));
        squares = fused(value, value, squares);
        products = fused(value, incoming, products);
    }
    const float inverse = 1.0f / __builtin_sqrtf(sum(squares) / count + epsilon);
    const Lanes factor = broadcast(inverse), along = broadcast(-inverse * inverse * inverse * sum(products) / count);
    for (int64_t i = 0; i < count; i += kLanes) {
        Lanes incoming = load_part(grad + i, count - i);
        if (weight) incoming = multiply(incoming, load_part(weight + i, count - i));
        store_part(out + i, count - i, fused(load_part(x + i, count - i), along, multiply(incoming, factor)));
    }
}
