// Columns of the table of slots (lorasrv_kernels/table.py).

#pragma once

#include <cstdint>

enum Column { kA, kBT, kD, kRank, kBias, kRows };
constexpr int64_t kAbsent = -1;
