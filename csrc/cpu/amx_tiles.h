// SPDX-License-Identifier: BSD-3-Clause
// AMX: eight tile registers of 16 rows of 64 bytes, and the instruction that multiplies two of them
// as matrices of bf16. One function for each instruction; tests/emulated has the same in plain C++.
//
// Written as assembly, because g++'s own functions do not say that they read and write memory.
// In an unnamed namespace, for the reason that query_tile.h gives.
#pragma once

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace online_attention::cpu::amx_bf16 {
namespace {

// Whether the processor has the instructions, and the system keeps the registers and lets this
// process use them: Linux has to be asked, once for all threads.
[[maybe_unused]] bool tiles_granted() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  constexpr unsigned kHasXgetbv = 1u << 27;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & kHasXgetbv)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & (kBf16 | kTile)) != (kBf16 | kTile)) {
    return false;
  }
  constexpr unsigned kTileStates = 3u << 17;
  asm volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  if ((a & kTileStates) != kTileStates) return false;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

struct Tiles {
  static constexpr int kRows = 16, kRowBytes = 64;

  // Of the calling thread, before its first tile: all eight in full size.
  static void configure() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } shape;
    for (int tile = 0; tile < 8; ++tile) {
      shape.row_bytes[tile] = kRowBytes;
      shape.rows[tile] = kRows;
    }
    asm volatile("ldtilecfg %0" : : "m"(shape));
  }
  // After its last: the system need not keep the registers any more.
  static void release() { asm volatile("tilerelease" : : : "memory"); }

  template <int kTile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" : : "i"(kTile));
  }
  // Rows are `stride` bytes apart.
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(kTile) : "memory");
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(kTile) : "memory");
  }
  // sum[row][column] += sum over steps of <a[row][step], b[step][column]>: floats, and pairs of
  // bf16.
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(kSum), "i"(kA), "i"(kB));
  }
};

}  // namespace
}  // namespace online_attention::cpu::amx_bf16
