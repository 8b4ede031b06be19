// Which instruction sets this machine has. The compiler's own check asks the operating system too.

#include "isa.h"
#include "linear.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// Tiles are state that the processor has, the system keeps at a change of thread, and a process must ask for.
bool has_amx() {
#if defined(__linux__)
    constexpr uint32_t kBf16Bit = 1u << 22, kTileBit = 1u << 24, kTileState = 3u << 17;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // of arch_prctl
    uint32_t a, b, c, features, enabled, upper;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &features)) return false;
    if (~features & (kBf16Bit | kTileBit)) return false;
    asm volatile("xgetbv" : "=a"(enabled), "=d"(upper) : "c"(0));
    if (~enabled & kTileState) return false;
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0 && check_amx_linear();
#else
    return false;
#endif
}
#endif

}  // namespace

// The widest instruction set of this machine; it has the narrower ones too.
extern "C" int32_t lorasrv_cpu_isa() {
#if defined(__x86_64__)
    if (!has_avx2()) return kPortable;
    if (!has_avx512()) return kAvx2;
    if (!has_avx512_bf16()) return kAvx512;
    static const bool amx = has_amx();  // once a process
    return amx ? kAmx : kAvx512Bf16;
#else
    return kPortable;
#endif
}
