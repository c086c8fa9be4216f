// SPDX-License-Identifier: BSD-3-Clause
#pragma once

#include <cstddef>
#include <memory>
#include <new>

#include "cpu/query_tile.h"

namespace online_attention::cpu {

// While it lives, the calling thread may call the kernel that `state` is of.
class InThreadState {
 public:
  explicit InThreadState(const ThreadState& state) : leave_(state.leave) {
    if (state.enter != nullptr) state.enter();
  }
  ~InThreadState() {
    if (leave_ != nullptr) leave_();
  }
  InThreadState(const InThreadState&) = delete;
  InThreadState& operator=(const InThreadState&) = delete;

 private:
  void (*const leave_)();
};

// One thread's working memory, kept between calls because fresh pages cost more than a short call.
class Scratch {
 public:
  // nullptr if there is no memory.
  std::byte* reserve(std::size_t bytes) {
    if (bytes > bytes_) {
      memory_.reset();
      bytes_ = 0;
      memory_.reset(static_cast<std::byte*>(::operator new(bytes, kAlignment, std::nothrow)));
      if (memory_ != nullptr) bytes_ = bytes;
    }
    return memory_.get();
  }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<std::byte, Free> memory_;
  std::size_t bytes_ = 0;
};

}  // namespace online_attention::cpu
