// SPDX-License-Identifier: BSD-3-Clause
#include "cpu/instruction_set.h"

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include "cpu/amx_tiles.h"
#endif

namespace online_attention::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16", "amx_bf16"};

InstructionSet widest() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  if (avx512 && __builtin_cpu_supports("avx512bf16")) {
    return amx_bf16::tiles_granted() ? InstructionSet::amx_bf16 : InstructionSet::avx512_bf16;
  }
  if (avx512) return InstructionSet::avx512;
  if (avx2) return InstructionSet::avx2;
#endif
  return InstructionSet::baseline;
}

InstructionSet choose() {
  const InstructionSet supported = widest();
  const char* wanted = std::getenv("ONLINE_ATTENTION_CPU");
  for (int i = 0; wanted != nullptr && i < static_cast<int>(supported); ++i) {
    if (std::strcmp(wanted, kNames[i]) == 0) return static_cast<InstructionSet>(i);
  }
  return supported;
}

}  // namespace

InstructionSet chosen_instruction_set() {
  static const InstructionSet chosen = choose();
  return chosen;
}

const char* instruction_set() { return kNames[static_cast<int>(chosen_instruction_set())]; }

}  // namespace online_attention::cpu
