// Rotation and gated activation of one row for one instruction set: see rowwise.cpp.

#include "exponential.h"
#include "products.h"

// The value as it is stored: rounded to E.
template <typename E>
LORASRV_TARGET LORASRV_INLINE Lanes rounded(Lanes value) {
    E stored[kLanes];
    store(stored, value);
    return load(stored);
}

// out = gate / (1 + e^-gate), rounded, times up; the exponent is never positive, so nothing overflows.
template <typename E>
LORASRV_TARGET void silu_mul(const E* gate, const E* up, int64_t count, E* out) {
    const Lanes zero = broadcast(0.0f), one = broadcast(1.0f);
    for (int64_t i = 0; i < count; i += kLanes) {
        const Lanes value = load_part(gate + i, count - i);
        const Lanes positive = largest(zero, value), negative = largest(zero, subtract(zero, value));
        const Lanes power = exp_of_negative(subtract(zero, add(positive, negative)));
        const Lanes above = subtract(positive, multiply(negative, power));
        const Lanes silu = rounded<E>(divide(above, add(one, power)));
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
