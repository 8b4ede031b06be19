// All decoder layers of a step in one call: the kernels beside this file, one after the other, on buffers of the caller.
// Adds no arithmetic but the residual's, which meets the next norm; every row has the bits it has op by op.

#include <vector>

#include "isa.h"
#include "kernel_calls.h"
#include "rowwise.h"
#include "table.h"

// The structures of the C interface (cpu/decoder.py has their twins); every member takes eight bytes.

// Modules that share their input, one weight: NF4 if `packed` is not null, else dense.
struct Projection {
    const uint8_t* packed;
    const uint8_t* absmax;
    const float* nested_absmax;
    const float* offset;
    const void* weight;
    const int64_t* out_features;
    int64_t num_slices;
    int64_t width;  // the sum of out_features
    int64_t in_features;
    const void* bias;
    int64_t first_module;
};

struct NormWeight {
    const void* weight;  // null: there is no such norm
    int64_t module;
};

struct DecoderLayer {
    Projection qkv, output, gate_up, down;
    NormWeight input_norm, post_attention_norm, query_norm, key_norm;
    int64_t window;
};

struct Decoder {
    const DecoderLayer* layers;
    int64_t num_layers;
    NormWeight final_norm;
    int64_t hidden;
    int64_t num_heads;
    int64_t num_kv_heads;
    int64_t head_size;
    double epsilon;
    double scale;
    const float* levels;
    const float* nested_codes;
    int64_t dtype;
};

struct DecoderStep {
    void* x;  // [T, hidden], changed
    int64_t num_tokens;
    const float* angles;  // [T, D]
    // adapters
    const void* arena;
    const int64_t* table;
    int64_t slot_stride;
    int64_t module_stride;
    const int64_t* rows;
    const float* weights;
    const int32_t* tile_slots;
    const int32_t* tile_starts;
    int64_t num_tiles;
    const int64_t* base_rows;
    int64_t num_base_rows;
    // cache [P, L, 2, Hkv, 32, D]; strides count elements
    char* cache;
    int64_t block_stride;
    int64_t layer_stride;
    int64_t value_offset;
    int64_t cache_head_stride;
    int64_t position_stride;
    const int64_t* slot_mapping;
    const int32_t* block_tables;
    int64_t block_table_stride;
    const int32_t* attention_tiles;
    int64_t num_attention_tiles;
    // buffers [T, ...], of the dtype
    void* normed;    // hidden; the result
    void* delta;     // hidden
    char* heads;     // (H + 2 Hkv) D
    void* attended;  // H D
    char* gates;     // twice the inner width
    void* gated;     // the inner width
    void* scratch;   // of the linear layers
    int64_t isa;
    int64_t threads;
};

namespace {

struct Run {
    const Decoder& model;
    const DecoderStep& step;
    std::vector<const void*>& row_weights;
    int32_t dtype = static_cast<int32_t>(model.dtype);
    int32_t isa = static_cast<int32_t>(step.isa);
    int64_t element_bytes = dtype == kBfloat16 ? 2 : 4;

    // y = x W^T, then the adapters' part
    void project(const Projection& projection, const void* x, void* y) const {
        const int32_t threads = static_cast<int32_t>(step.threads);
        if (projection.packed)
            lorasrv_nf4_linear(x, projection.packed, projection.absmax, projection.nested_absmax, projection.offset,
                               model.levels, model.nested_codes, projection.out_features, projection.num_slices,
                               step.num_tokens, projection.in_features, y, step.scratch, dtype, isa, threads);
        else
            lorasrv_dense_linear(x, projection.weight, projection.width, step.num_tokens, projection.in_features, y,
                                 step.scratch, dtype, isa, threads);
        if (!step.num_tiles && !projection.bias) return;
        lorasrv_lora_apply(y, projection.width, x, projection.in_features, projection.in_features, step.arena,
                           step.table + projection.first_module * step.module_stride, step.slot_stride,
                           step.module_stride, projection.out_features, projection.num_slices, step.rows, step.weights,
                           step.tile_slots, step.tile_starts, step.num_tiles, step.base_rows, step.num_base_rows,
                           projection.bias, dtype, isa);
    }

    // the weight of every row where a slot has its own, else null
    const void* const* own_weights(const NormWeight& norm) const {
        bool found = false;
        // batches of a fixed size end in tiles that are not there
        for (int64_t tile = 0; tile < step.num_tiles && step.tile_slots[tile] >= 0; ++tile) {
            const int64_t place = step.table[step.tile_slots[tile] * step.slot_stride +
                                             norm.module * step.module_stride + kRows];
            if (place == kAbsent) continue;
            if (!found) row_weights.assign(step.num_tokens, norm.weight);
            found = true;
            for (int64_t entry = step.tile_starts[tile]; entry < step.tile_starts[tile + 1]; ++entry)
                row_weights[step.rows[entry]] = static_cast<const char*>(step.arena) + place * element_bytes;
        }
        return found ? row_weights.data() : nullptr;
    }

    // x <- x + delta, if there is one; out = the norm of x
    void norm_rows(const NormWeight& norm, const void* delta, void* out) const {
        rms_norm_rows({step.x, model.hidden, 0, delta, norm.weight, own_weights(norm),
                       static_cast<float>(model.epsilon), out, model.hidden, 0, step.num_tokens, 1, model.hidden},
                      dtype, isa);
    }

    void norm_heads(const NormWeight& norm, char* heads, int64_t row, int64_t num_heads) const {
        if (!norm.weight) return;
        const int64_t size = model.head_size;
        rms_norm_rows({heads, row, size, nullptr, norm.weight, own_weights(norm), static_cast<float>(model.epsilon),
                       heads, row, size, step.num_tokens, num_heads, size},
                      dtype, isa);
    }

    void attend(const DecoderLayer& layer, int64_t index) const {
        const int64_t size = model.head_size, row = layer.qkv.width, heads = model.num_heads;
        const int64_t kv_heads = model.num_kv_heads, bytes = element_bytes;
        char* key = step.heads + heads * size * bytes;
        const char* value = key + kv_heads * size * bytes;
        norm_heads(layer.query_norm, step.heads, row, heads);
        norm_heads(layer.key_norm, key, row, kv_heads);
        lorasrv_rotate(step.heads, row, size, step.angles, step.num_tokens, heads + kv_heads, size / 2, dtype, isa);
        char* cache = step.cache + index * step.layer_stride * bytes;
        lorasrv_store_kv(cache, step.block_stride * bytes, step.value_offset * bytes, step.cache_head_stride * bytes,
                         step.position_stride * bytes, key, row * bytes, size * bytes, value, row * bytes,
                         size * bytes, step.slot_mapping, step.num_tokens, kv_heads, size * bytes);
        lorasrv_paged_attention(step.heads, row, size, step.attended, cache, step.block_stride, step.value_offset,
                                step.cache_head_stride, step.position_stride, step.block_tables,
                                step.block_table_stride, step.attention_tiles, step.num_attention_tiles, heads,
                                kv_heads, size, static_cast<float>(model.scale), layer.window, dtype, isa);
    }

    void layers() const {
        const void* delta = nullptr;
        for (int64_t index = 0; index < model.num_layers; ++index) {
            const DecoderLayer& layer = model.layers[index];
            norm_rows(layer.input_norm, delta, step.normed);
            project(layer.qkv, step.normed, step.heads);
            attend(layer, index);
            project(layer.output, step.attended, step.delta);
            norm_rows(layer.post_attention_norm, step.delta, step.normed);
            project(layer.gate_up, step.normed, step.gates);
            const int64_t inner = layer.down.in_features;
            lorasrv_silu_mul(step.gates, 2 * inner, step.gates + inner * element_bytes, 2 * inner, step.gated,
                             step.num_tokens, inner, dtype, isa);
            project(layer.down, step.gated, step.delta);
            delta = step.delta;
        }
        norm_rows(model.final_norm, delta, step.normed);
    }
};

}  // namespace

// step.normed = the final norm of x after all layers. The caller has checked every size.
extern "C" void lorasrv_decoder_layers(const Decoder* model, const DecoderStep* step) {
    static thread_local std::vector<const void*> row_weights;
    Run{*model, *step, row_weights}.layers();
}
