// What a version of the linear layer for one instruction set offers to the driver (linear.cpp).
//
// Every version adds in one order, which depends on I alone: lane l of a sum takes every kLanes-th run of weights in
// ascending order (within a block of NF4 weights in one that the version chooses), and the lanes are added in a fixed tree
// at the end. How many rows and tokens are computed at a time changes no bit.

#pragma once

#include <cstdint>

#include "nf4_slice.h"

constexpr int64_t kMaxPanelRows = 64;

// x [tokens, I], or what `arrange` made of it, and out [tokens, O], both with rows of their own stride.
struct Tokens {
    const void* x;
    int64_t count;
    int64_t in_features;
    void* out;  // at the first output row of the call
    int64_t out_stride;
    bool bfloat16_out;
};

// Blocks [first, last) of x [tokens, I], counted along I for one token, or group of tokens, after the other.
struct TokenBlocks {
    const uint16_t* x;
    int64_t tokens;
    int64_t in_features;
    int64_t first;
    int64_t last;
};

// Rows of codes of one slice, with their scales.
struct CodeRows {
    const uint8_t* packed;
    const float* scales;  // [rows, I / 64]
    const float* levels;  // [16]
    int64_t rows;
    bool bfloat16_weights;  // round weights to bfloat16, whatever the panel's type
};

// What the caller reads next, fetched little by little in the course of a call; empty where `size` is 0.
struct Next {
    const char* start;
    int64_t size;
};

struct LinearKernels {
    int32_t element_bytes;     // of x and of a panel
    int64_t few_tokens;        // up to here `multiply_codes` serves; -1 for never
    int64_t group;             // tokens that `arrange` puts together; if more than 1, over dense weights too
    // null, or puts `blocks` in the order in which `dequantize` and `multiply_codes` take weights
    void (*arrange)(const TokenBlocks& blocks, void* to);
    // the scales of `blocks` blocks, with the bits of Slice::scale
    void (*fill_scales)(const Slice& slice, int64_t first_block, int64_t blocks, float* scales);
    // weights of `codes` into panel [rows, I], rows `stride` elements apart
    void (*dequantize)(const CodeRows& codes, int64_t in_features, void* panel, int64_t stride);
    // out = x W^T, W [rows, I], rows `stride` elements apart; at most kMaxPanelRows rows
    void (*multiply)(const void* weights, int64_t stride, int64_t rows, const Tokens& tokens, const Next& next);
    // the same straight from the codes, without a panel
    void (*multiply_codes)(const CodeRows& codes, const Tokens& tokens);
};

extern const LinearKernels kPortableLinear;
extern const LinearKernels kAvx2Linear;
extern const LinearKernels kAvx512Linear;
extern const LinearKernels kAvx512Bf16Linear;
extern const LinearKernels kAmxLinear;
extern const LinearKernels kAmxEmulatedLinear;

// Whether tiles give what their emulation gives; only where the processor has them and the system lets them be used.
bool check_amx_linear();
