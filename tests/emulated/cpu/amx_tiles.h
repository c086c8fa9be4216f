// SPDX-License-Identifier: BSD-3-Clause
// csrc/cpu/amx_tiles.h in plain C++: in its place where the build is told to emulate AMX, so that
// the kernels for it run, and every access to memory is seen by the sanitizers, on a machine
// without it.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

namespace online_attention::cpu::amx_bf16 {
namespace {

[[maybe_unused]] bool tiles_granted() { return true; }

struct Tiles {
  static constexpr int kRows = 16, kRowBytes = 64;

  static void configure() {
    registers().configured = true;
    std::memset(registers().tiles, 0, sizeof registers().tiles);
  }
  static void release() { registers().configured = false; }

  template <int kTile>
  static void zero() {
    std::memset(tile(kTile), 0, kRows * kRowBytes);
  }
  template <int kTile>
  static void load(const void* from, int64_t stride) {
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(tile(kTile)[row], static_cast<const char*>(from) + row * stride, kRowBytes);
    }
  }
  template <int kTile>
  static void store(void* to, int64_t stride) {
    for (int row = 0; row < kRows; ++row) {
      std::memcpy(static_cast<char*>(to) + row * stride, tile(kTile)[row], kRowBytes);
    }
  }

  // As the instruction is specified: the first and the second elements of pairs are summed apart,
  // the two sums then added, and numbers below the smallest normal one are taken and left as 0.
  template <int kSum, int kA, int kB>
  static void multiply_add() {
    float sum[kRows][kColumns], a[kRows][2 * kColumns], b[kRows][2 * kColumns];
    std::memcpy(sum, tile(kSum), sizeof sum);
    widen(tile(kA), a);
    widen(tile(kB), b);
    for (int row = 0; row < kRows; ++row) {
      float products[2][kColumns] = {};
      for (int step = 0; step < kColumns; ++step) {
        for (int column = 0; column < kColumns; ++column) {
          for (int i = 0; i < 2; ++i) {
            float& product = products[i][column];
            product =
                flushed(__builtin_fmaf(a[row][2 * step + i], b[step][2 * column + i], product));
          }
        }
      }
      for (int column = 0; column < kColumns; ++column) {
        const float both = flushed(products[0][column] + products[1][column]);
        sum[row][column] = flushed(flushed(sum[row][column]) + both);
      }
    }
    std::memcpy(tile(kSum), sum, sizeof sum);
  }

 private:
  static constexpr int kColumns = kRowBytes / static_cast<int>(sizeof(float));

  struct Registers {
    bool configured = false;
    unsigned char tiles[8][kRows][kRowBytes];
  };
  static Registers& registers() {
    thread_local Registers of_thread;
    return of_thread;
  }

  // The processor faults where a thread has not configured its tiles.
  static unsigned char (*tile(int index)) [kRowBytes] {
    if (!registers().configured) std::abort();
    return registers().tiles[index];
  }

  static float flushed(float x) {
    return __builtin_fabsf(x) < 0x1p-126F ? 0.0F : x;
  }

  static void widen(const unsigned char (*from)[kRowBytes], float (*to)[2 * kColumns]) {
    for (int row = 0; row < kRows; ++row) {
      for (int i = 0; i < 2 * kColumns; ++i) {
        uint16_t half;
        std::memcpy(&half, from[row] + i * sizeof half, sizeof half);
        const uint32_t bits = static_cast<uint32_t>(half) << 16;
        std::memcpy(&to[row][i], &bits, sizeof bits);
        to[row][i] = flushed(to[row][i]);
      }
    }
  }
};

}  // namespace
}  // namespace online_attention::cpu::amx_bf16
