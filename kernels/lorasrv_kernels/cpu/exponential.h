// The exponential of all kernels, the same arithmetic in every lane. Included once per instruction set.

// e^x for x <= 0: x = n ln 2 + r, then a polynomial of degree 6 in r (Taylor; below 2e-7 for |r| <= ln 2 / 2). e^0 is 1
// exactly, and what lies below the smallest normal number is 0.
LORASRV_TARGET LORASRV_INLINE Lanes exp_of_negative(Lanes x) {
    const Lanes shift = broadcast(12582912.0f);  // 1.5 * 2^23: the sum has n in its lowest bits
    const Lanes lowest = broadcast(-87.3f);
    const Lanes bounded = largest(lowest, x);
    const Lanes shifted = fused(bounded, broadcast(1.44269504f), shift);
    const Lanes n = subtract(shifted, shift);
    Lanes r = fused(n, broadcast(-0.693359375f), bounded);
    r = fused(n, broadcast(2.12194440e-4f), r);
    Lanes value = fused(broadcast(1.0f / 720), r, broadcast(1.0f / 120));
    value = fused(value, r, broadcast(1.0f / 24));
    value = fused(value, r, broadcast(1.0f / 6));
    value = fused(value, r, broadcast(0.5f));
    value = fused(fused(value, r, broadcast(1.0f)), r, broadcast(1.0f));
    return zero_below(x, lowest, multiply(value, power_of_rounded(shifted)));
}
