// Instruction sets the kernels have versions for, in order of width. The numbers are part of the C interface
// (cpu/isa.py has their names); AMX tiles would be the next.

#pragma once

#include <cstdint>

enum Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3 };
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 1 };
