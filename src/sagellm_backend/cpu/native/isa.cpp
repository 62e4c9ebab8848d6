#include "isa.hpp"

#include <stdexcept>

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace sage {

#if defined(__x86_64__)
namespace avx512_bf16 {
const Kernels& table(const char* name);
}
namespace avx512_vnni {
const Kernels& table(const char* name);
}
namespace avx2_vnni {
const Kernels& table(const char* name);
}
namespace avx2 {
const Kernels& table(const char* name);
}
#endif
#if defined(__aarch64__) && defined(__linux__)
namespace neon {
const Kernels& table(const char* name);
}
#endif
namespace portable {
const Kernels& table(const char* name);
}

std::vector<const Kernels*> supported_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();  // looks at CPUID and at what the operating system saves
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                          __builtin_cpu_supports("avx512vnni");
  if (has_avx512 && __builtin_cpu_supports("avx512bf16")) found.push_back(&avx512_bf16::table("avx512_bf16"));
  if (has_avx512) found.push_back(&avx512_vnni::table("avx512_vnni"));
  if (has_avx2 && __builtin_cpu_supports("avxvnni")) found.push_back(&avx2_vnni::table("avx2_vnni"));
  if (has_avx2) found.push_back(&avx2::table("avx2"));
#endif
#if defined(__aarch64__) && defined(__linux__)
  if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) found.push_back(&neon::table("neon"));
#endif
  found.push_back(&portable::table("portable"));
  return found;
}

const Kernels& kernels_of(const std::string& name) {
  const auto found = supported_kernels();
  if (name.empty()) return *found.front();
  std::string names;
  for (const Kernels* k : found) {
    if (name == k->name) return *k;
    names += (names.empty() ? "" : ", ") + std::string(k->name);
  }
  throw std::invalid_argument("instruction set '" + name + "' is not available here: use one of " + names);
}

}  // namespace sage
