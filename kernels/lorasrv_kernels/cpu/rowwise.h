// The norm as other kernels call it; what stands in place of a row's weight is theirs to find.

#pragma once

#include <cstdint>

// x [num_rows, num_heads, count] in place if there is a delta (contiguous, with one head); strides count elements.
struct Norm {
    void* x;
    int64_t row_stride;
    int64_t head_stride;
    const void* delta;
    const void* weight;              // of every row, or null
    const void* const* row_weights;  // of each row, in place of `weight`
    float epsilon;
    void* out;  // may be x
    int64_t out_row_stride;
    int64_t out_head_stride;
    int64_t num_rows;
    int64_t num_heads;
    int64_t count;
};

void rms_norm_rows(const Norm& call, int32_t dtype, int32_t isa);
