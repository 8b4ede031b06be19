// The NF4 and the dense linear layer: shares output rows among threads and panels, and calls the version of one
// instruction set (linear.h). The reduction over I is never shared out.

#include <omp.h>

#include <algorithm>

#include "isa.h"
#include "kernel_calls.h"
#include "linear.h"

namespace {

constexpr int64_t kPanelBytes = 512 << 10;  // of dequantized weights, in the second-level cache
constexpr int64_t kPanelPad = 64;           // bytes between rows, so that they do not share cache sets
constexpr int64_t kRowGroup = 16;           // rows a thread takes at least
constexpr int64_t kParallelWork = 1 << 15;  // blocks times tokens below which waking threads costs more

// [dtype][isa]
const LinearKernels& kernels_of(int32_t isa, int32_t dtype) {
#if defined(__x86_64__)
    static const LinearKernels* const versions[2][6] = {
        {&kPortableLinear, &kAvx2Linear, &kAvx512Linear, &kAvx512Linear, &kAvx512Linear, &kAvx512Linear},
        {&kPortableLinear, &kAvx2Linear, &kAvx512Linear, &kAvx512Bf16Linear, &kAmxLinear, &kAmxEmulatedLinear},
    };
    return *versions[dtype][isa];
#else
    return kPortableLinear;
#endif
}

int64_t round_up(int64_t number, int64_t multiple) { return (number + multiple - 1) / multiple * multiple; }

bool widens(const LinearKernels& kernels, int32_t dtype) {
    return dtype == kBfloat16 && kernels.element_bytes == sizeof(float);
}

// What a call needs beyond its arguments; offsets are in bytes.
struct Scratch {
    int64_t panel_rows;
    int64_t panel_stride;  // elements
    int64_t x_bytes;
    int64_t scales_offset;  // within a thread's part
    int64_t thread_bytes;

    Scratch(const LinearKernels& kernels, int64_t tokens, int64_t in_features, int32_t dtype) {
        const int64_t row_bytes = round_up(in_features * kernels.element_bytes, 64) + kPanelPad;
        panel_rows = std::clamp(kPanelBytes / row_bytes / kRowGroup * kRowGroup, kRowGroup, kMaxPanelRows);
        panel_stride = row_bytes / kernels.element_bytes;
        const bool prepare = widens(kernels, dtype) || kernels.arrange;
        x_bytes = prepare ? round_up(tokens * in_features * kernels.element_bytes, 64) : 0;
        scales_offset = panel_rows * row_bytes;
        thread_bytes = scales_offset + round_up(panel_rows * (in_features / kBlock) * sizeof(float), 64);
    }
};

void widen(const uint16_t* from, int64_t blocks, void* to) {
    for (int64_t i = 0; i < blocks * kBlock; ++i) static_cast<float*>(to)[i] = from_bfloat16(from[i]);
}

void widen_tokens(const TokenBlocks& blocks, void* to) {
    const int64_t start = blocks.first * kBlock;
    widen(blocks.x + start, blocks.last - blocks.first, static_cast<float*>(to) + start);
}

char* aligned(void* pointer) {
    return reinterpret_cast<char*>(round_up(reinterpret_cast<intptr_t>(pointer), 64));
}

struct Layer {
    Slice first;  // its offset unset
    const float* offset;
    const int64_t* out_features;
    int64_t num_slices;
    int64_t row_blocks;

    // calls use(slice, first row in slice, count, output row) for the runs of [start, stop) within one slice
    template <typename Use>
    void runs(int64_t start, int64_t stop, const Use& use) const {
        Slice slice = first;
        int64_t slice_row = 0;
        for (int64_t index = 0; index < num_slices && slice_row < stop; ++index) {
            slice.offset = offset[index];
            const int64_t low = std::max(start, slice_row), high = std::min(stop, slice_row + out_features[index]);
            if (low < high) use(slice, low - slice_row, high - low, low);
            slice_row += out_features[index];
            slice = slice.next(out_features[index] * row_blocks);
        }
    }
};

Tokens at_row(const Tokens& tokens, int64_t row) {
    Tokens moved = tokens;
    moved.out = static_cast<char*>(tokens.out) + row * (tokens.bfloat16_out ? 2 : 4);
    return moved;
}

void nf4_rows(const LinearKernels& kernels, const Layer& layer, const Tokens& tokens, bool bfloat16, int64_t start,
              int64_t stop, const Scratch& scratch, char* memory) {
    float* scales = reinterpret_cast<float*>(memory + scratch.scales_offset);
    layer.runs(start, stop, [&](const Slice& slice, int64_t slice_row, int64_t count, int64_t out_row) {
        for (int64_t row = 0; row < count; row += scratch.panel_rows) {
            const int64_t rows = std::min(scratch.panel_rows, count - row);
            const int64_t block = (slice_row + row) * layer.row_blocks;
            kernels.fill_scales(slice, block, rows * layer.row_blocks, scales);
            const CodeRows codes{slice.packed + block * (kBlock / 2), scales, slice.levels, rows, bfloat16};
            const Tokens part = at_row(tokens, out_row + row);
            if (tokens.count <= kernels.few_tokens) {
                kernels.multiply_codes(codes, part);
            } else {
                kernels.dequantize(codes, tokens.in_features, memory, scratch.panel_stride);
                const char* end = reinterpret_cast<const char*>(codes.packed + rows * layer.row_blocks * (kBlock / 2));
                const int64_t next = std::min(scratch.panel_rows, count - row - rows);
                kernels.multiply(memory, scratch.panel_stride, rows, part,
                                 {end, next * layer.row_blocks * (kBlock / 2)});
            }
        }
    });
}

// bfloat16 weights are widened into `panel` where there is one
void dense_rows(const LinearKernels& kernels, const void* weight, const Tokens& tokens, int64_t start, int64_t stop,
                const Scratch& scratch, char* panel) {
    for (int64_t row = start; row < stop; row += scratch.panel_rows) {
        const int64_t rows = std::min(scratch.panel_rows, stop - row);
        const Tokens part = at_row(tokens, row);
        if (panel) {
            const uint16_t* from = static_cast<const uint16_t*>(weight) + row * tokens.in_features;
            float* to = reinterpret_cast<float*>(panel);
            for (int64_t r = 0; r < rows; ++r)
                widen(from + r * tokens.in_features, tokens.in_features / kBlock, to + r * scratch.panel_stride);
            kernels.multiply(panel, scratch.panel_stride, rows, part, {});
        } else {
            const char* from = static_cast<const char*>(weight) + row * tokens.in_features * kernels.element_bytes;
            const int64_t row_bytes = tokens.in_features * kernels.element_bytes;
            kernels.multiply(from, tokens.in_features, rows, part,
                             {from + rows * row_bytes, std::min(scratch.panel_rows, stop - row - rows) * row_bytes});
        }
    }
}

// Tokens as the kernels take them, if that is not as they are: `change` writes them to `to`.
struct Prepared {
    void (*change)(const TokenBlocks& blocks, void* to);
    int64_t group;
    const void* from;
    void* to;
    int64_t tokens;
    int64_t in_features;

    const void* x() const { return change ? to : from; }
    void part(int64_t thread, int64_t count) const {
        const int64_t blocks = (tokens + group - 1) / group * (in_features / kBlock);
        change({static_cast<const uint16_t*>(from), tokens, in_features, blocks * thread / count,
                blocks * (thread + 1) / count},
               to);
    }
};

// use(start, stop, thread) over all rows, whole groups of them to each thread, once the tokens are prepared
template <typename Use>
void share_rows(int64_t rows, int64_t work, int32_t threads, const Prepared& tokens, const Use& use) {
    const int64_t groups = (rows + kRowGroup - 1) / kRowGroup;
#pragma omp parallel num_threads(threads) if (threads > 1 && work >= kParallelWork)
    {
        const int64_t thread = omp_get_thread_num(), count = omp_get_num_threads();
        if (tokens.change) {
            tokens.part(thread, count);
#pragma omp barrier
        }
        const int64_t start = groups * thread / count * kRowGroup;
        const int64_t stop = std::min(rows, groups * (thread + 1) / count * kRowGroup);
        if (start < stop) use(start, stop, thread);
    }
}

}  // namespace

// Bytes of scratch memory for a call.
extern "C" int64_t lorasrv_linear_scratch(int64_t tokens, int64_t in_features, int32_t dtype, int32_t isa,
                                          int32_t threads) {
    const Scratch scratch(kernels_of(isa, dtype), tokens, in_features, dtype);
    return 64 + scratch.x_bytes + threads * scratch.thread_bytes;
}

// out [tokens, O] = x [tokens, I] W^T for W of slices; I a multiple of 64; x, out contiguous and of `dtype`. The caller
// has checked every size.
extern "C" void lorasrv_nf4_linear(const void* x, const uint8_t* packed, const uint8_t* absmax,
                                   const float* nested_absmax, const float* offset, const float* levels,
                                   const float* nested_codes, const int64_t* out_features, int64_t num_slices,
                                   int64_t tokens, int64_t in_features, void* out, void* memory, int32_t dtype,
                                   int32_t isa, int32_t threads) {
    const LinearKernels& kernels = kernels_of(isa, dtype);
    const Scratch scratch(kernels, tokens, in_features, dtype);
    const int64_t row_blocks = in_features / kBlock;
    const Layer layer{{packed, absmax, nested_absmax, 0, levels, nested_codes},
                      offset, out_features, num_slices, row_blocks};
    int64_t rows = 0;
    for (int64_t index = 0; index < num_slices; ++index) rows += out_features[index];
    char* base = aligned(memory);
    const bool bfloat16 = dtype == kBfloat16;
    const Prepared prepared{widens(kernels, dtype) ? widen_tokens : kernels.arrange, kernels.group, x, base, tokens,
                            in_features};
    const Tokens all{prepared.x(), tokens, in_features, out, rows, bfloat16};
    share_rows(rows, rows * row_blocks * (tokens + 4), threads, prepared,
               [&](int64_t start, int64_t stop, int64_t thread) {
                   nf4_rows(kernels, layer, all, bfloat16, start, stop, scratch,
                            base + scratch.x_bytes + thread * scratch.thread_bytes);
               });
}

// out [tokens, O] = x [tokens, I] W^T for W [rows, I]; I a multiple of 64; all contiguous and of `dtype`.
extern "C" void lorasrv_dense_linear(const void* x, const void* weight, int64_t rows, int64_t tokens,
                                     int64_t in_features, void* out, void* memory, int32_t dtype, int32_t isa,
                                     int32_t threads) {
    const LinearKernels& kernels = kernels_of(isa, dtype);
    const Scratch scratch(kernels, tokens, in_features, dtype);
    char* base = aligned(memory);
    const int64_t row_blocks = in_features / kBlock;
    const bool widened = widens(kernels, dtype);
    const Prepared prepared{widened ? widen_tokens : kernels.group > 1 ? kernels.arrange : nullptr, kernels.group, x,
                            base, tokens, in_features};
    const Tokens all{prepared.x(), tokens, in_features, out, rows, dtype == kBfloat16};
    share_rows(rows, rows * row_blocks * (tokens + 4), threads, prepared,
               [&](int64_t start, int64_t stop, int64_t thread) {
                   char* panel = base + scratch.x_bytes + thread * scratch.thread_bytes;
                   dense_rows(kernels, weight, all, start, stop, scratch, widened ? panel : nullptr);
               });
}
