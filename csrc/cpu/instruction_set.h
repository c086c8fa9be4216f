// SPDX-License-Identifier: BSD-3-Clause
#pragma once

namespace online_attention::cpu {

enum class InstructionSet { baseline, avx2, avx512, avx512_bf16, amx_bf16 };

// The widest set that this build, this processor and its system have; the environment variable
// ONLINE_ATTENTION_CPU = baseline | avx2 | avx512 | avx512_bf16 | amx_bf16, read once, asks for a
// narrower one.
InstructionSet chosen_instruction_set();

// Its name, as written above.
const char* instruction_set();

}  // namespace online_attention::cpu
