// SPDX-License-Identifier: BSD-3-Clause
// What every layer shares: the host/device function marker, mathematical constants, and the few
// functions that have a fast device form. Compiles with g++, clang++ and nvcc.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

// The project's only macro: a function that host and device code both call.
#if defined(__CUDACC__)
#define ONLINE_ATTENTION_HD __host__ __device__ __forceinline__
#else
#define ONLINE_ATTENTION_HD inline
#endif

namespace online_attention {

inline constexpr double kLog2e = 1.4426950408889634073599246810018921;
inline constexpr double kLn2 = 0.6931471805599453094172321214581766;

template <typename Real>
inline constexpr Real kInfinity = std::numeric_limits<Real>::infinity();

// 2^x. On the device in fp32 this is one ex2.approx (2 ulp, and 2^-inf = 0 exactly); elsewhere the
// C library's, in the type of the argument.
template <typename Real>
ONLINE_ATTENTION_HD Real exp2_of(Real x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
  } else {
    return ::exp2(x);
  }
#else
  return std::exp2(x);
#endif
}

template <typename Real>
ONLINE_ATTENTION_HD Real log2_of(Real x) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    return ::log2f(x);
  } else {
    return ::log2(x);
  }
#else
  return std::log2(x);
#endif
}

// The larger of two; a NaN loses to a number, so that one NaN score cannot hide a row's maximum.
// (The NaN still reaches the row's sum through its weight.)
template <typename Real>
ONLINE_ATTENTION_HD Real max_of(Real a, Real b) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(Real) == sizeof(float)) {
    return ::fmaxf(a, b);
  } else {
    return ::fmax(a, b);
  }
#else
  return std::fmax(a, b);
#endif
}

template <typename Int>
ONLINE_ATTENTION_HD constexpr Int ceil_div(Int a, Int b) {
  return (a + b - 1) / b;
}

}  // namespace online_attention
