// Kernels that another kernel calls; each is described where it is defined.

#pragma once

#include <cstdint>

extern "C" {
void lorasrv_nf4_linear(const void* x, const uint8_t* packed, const uint8_t* absmax, const float* nested_absmax,
                        const float* offset, const float* levels, const float* nested_codes,
                        const int64_t* out_features, int64_t num_slices, int64_t tokens, int64_t in_features, void* out,
                        void* memory, int32_t dtype, int32_t isa, int32_t threads);
void lorasrv_dense_linear(const void* x, const void* weight, int64_t rows, int64_t tokens, int64_t in_features,
                          void* out, void* memory, int32_t dtype, int32_t isa, int32_t threads);
void lorasrv_lora_apply(void* y, int64_t y_stride, const void* x, int64_t x_stride, int64_t in_features,
                        const void* arena, const int64_t* table, int64_t slot_stride, int64_t slice_stride,
                        const int64_t* out_features, int64_t num_slices, const int64_t* rows, const float* weights,
                        const int32_t* tile_slots, const int32_t* tile_starts, int64_t num_tiles,
                        const int64_t* base_rows, int64_t num_base_rows, const void* base_bias, int32_t dtype,
                        int32_t isa);
void lorasrv_paged_attention(const void* q, int64_t token_stride, int64_t head_stride, void* out, const void* cache,
                             int64_t block_stride, int64_t value_offset, int64_t cache_head_stride,
                             int64_t position_stride, const int32_t* block_tables, int64_t table_stride,
                             const int32_t* tiles, int64_t num_tiles, int64_t num_heads, int64_t num_kv_heads,
                             int64_t head_size, float scale, int64_t window, int32_t dtype, int32_t isa);
void lorasrv_store_kv(char* cache, int64_t block_stride, int64_t value_offset, int64_t cache_head_stride,
                      int64_t position_stride, const char* k, int64_t k_token_stride, int64_t k_head_stride,
                      const char* v, int64_t v_token_stride, int64_t v_head_stride, const int64_t* slot_mapping,
                      int64_t num_tokens, int64_t num_heads, int64_t row_bytes);
void lorasrv_silu_mul(const void* gate, int64_t gate_stride, const void* up, int64_t up_stride, void* out,
                      int64_t num_rows, int64_t count, int32_t dtype, int32_t isa);
void lorasrv_rotate(void* heads, int64_t row_stride, int64_t head_stride, const float* angles, int64_t num_rows,
                    int64_t num_heads, int64_t half, int32_t dtype, int32_t isa);
}
