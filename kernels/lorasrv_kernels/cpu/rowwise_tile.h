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
