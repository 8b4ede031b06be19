// How one slice of an NF4 weight lies in memory, and the exact arithmetic of its scales.

#pragma once

#include <cstdint>
#include <cstring>

constexpr int64_t kBlock = 64;         // weights per scale
constexpr int64_t kNestedBlock = 256;  // scales per nested scale

// One slice's storage, from its own first block on.
struct Slice {
    const uint8_t* packed;
    const uint8_t* absmax;
    const float* nested_absmax;
    float offset;
    const float* levels;        // [16]
    const float* nested_codes;  // [256]

    float scale(int64_t block) const {
        const float product = nested_codes[absmax[block]] * nested_absmax[block / kNestedBlock];
        return product + offset;
    }

    void fill_scales(int64_t first_block, int64_t blocks, float* scales) const {
        for (int64_t i = 0; i < blocks; ++i) scales[i] = scale(first_block + i);
    }

    // The slice after this one, which has `blocks` blocks; its offset is for the caller to set.
    Slice next(int64_t blocks) const {
        return {packed + blocks * (kBlock / 2),
                absmax + blocks,
                nested_absmax + (blocks + kNestedBlock - 1) / kNestedBlock,
                0,
                levels,
                nested_codes};
    }
};

inline uint16_t to_bfloat16(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return static_cast<uint16_t>(value != value ? 0x7fc0 : rounded);
}

inline float from_bfloat16(uint16_t value) {
    const uint32_t bits = static_cast<uint32_t>(value) << 16;
    float result;
    std::memcpy(&result, &bits, sizeof result);
    return result;
}
