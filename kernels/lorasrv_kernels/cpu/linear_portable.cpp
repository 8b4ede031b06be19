// The linear layer in plain C++, eight sums a row and token.

#include "linear.h"

#define LORASRV_TARGET
#define LORASRV_OPERATION inline

namespace {

constexpr int kStep = 8;
constexpr int kLanes = 8;
constexpr int kTileRows = 2;
constexpr int kTileTokens = 2;

using Element = float;
struct Vector {
    float lanes[kLanes];
};
using Sum = Vector;
struct Table {
    float values[16];
};

LORASRV_OPERATION Vector load(const Element* at) {
    Vector value;
    std::memcpy(&value, at, sizeof value);
    return value;
}
LORASRV_OPERATION void store(Element* at, const Vector& value) { std::memcpy(at, &value, sizeof value); }
LORASRV_OPERATION Sum zero() { return {}; }
LORASRV_OPERATION Sum load_sum(const float* at) { return load(at); }
LORASRV_OPERATION void store_sum(float* at, const Sum& value) { store(at, value); }

LORASRV_OPERATION Sum multiply_add(Sum sum, const Vector& a, const Vector& b) {
    for (int i = 0; i < kLanes; ++i) sum.lanes[i] += a.lanes[i] * b.lanes[i];
    return sum;
}

LORASRV_OPERATION Table scaled_table(const float* levels, float scale, bool round) {
    Table table;
    for (int code = 0; code < 16; ++code) {
        const float value = levels[code] * scale;
        table.values[code] = round ? from_bfloat16(to_bfloat16(value)) : value;
    }
    return table;
}

LORASRV_OPERATION Vector decode(const Table& table, const uint8_t* codes, int part) {
    Vector weights;
    for (int i = 0; i < kStep / 2; ++i) {
        const uint8_t pair = codes[part * (kStep / 2) + i];
        weights.lanes[2 * i] = table.values[pair >> 4];
        weights.lanes[2 * i + 1] = table.values[pair & 15];
    }
    return weights;
}

// adds the lanes of each of kLanes sums
LORASRV_OPERATION void add_lanes(const float* sums, float* results) {
    for (int row = 0; row < kLanes; ++row) {
        const float* lanes = sums + row * kLanes;
        results[row] = ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
    }
}

LORASRV_OPERATION void round_sums(const float* values, uint16_t* results) {
    for (int i = 0; i < kLanes; ++i) results[i] = to_bfloat16(values[i]);
}

void fill_scales(const Slice& slice, int64_t first_block, int64_t blocks, float* scales) {
    slice.fill_scales(first_block, blocks, scales);
}

constexpr auto arrange = nullptr;

}  // namespace

#include "linear_tile.h"

const LinearKernels kPortableLinear = kKernels;
