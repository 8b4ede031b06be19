// Which instruction sets this machine has. The compiler's own check asks the operating system too.

#include "isa.h"

namespace {

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

bool has_avx512_bf16() {
    return __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vbmi");
}
#endif

}  // namespace

// The widest instruction set of this machine; it has the narrower ones too.
extern "C" int32_t lorasrv_cpu_isa() {
#if defined(__x86_64__)
    if (!has_avx2()) return kPortable;
    if (!has_avx512()) return kAvx2;
    return has_avx512_bf16() ? kAvx512Bf16 : kAvx512;
#else
    return kPortable;
#endif
}
