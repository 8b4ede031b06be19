// Instruction sets the kernels have versions for, in order of width. The numbers are part of the C interface
// (cpu/isa.py has their names).

#pragma once

#include <cstdint>

// kAmxEmulated is for tests of what surrounds the tiles, on machines with kAvx512Bf16; lorasrv_cpu_isa() never names it.
enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4, kAmxEmulated = 5 };
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };
