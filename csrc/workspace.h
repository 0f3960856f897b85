// Memory and threads of the operators on CPU tensors.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <memory>
#include <optional>
#include <stdexcept>

#include "attention.h"
#include "recycled.h"

namespace fastgan {

inline Element element_of(const torch::stable::Tensor& tensor) {
  using torch::headeronly::ScalarType;
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Element::kFloat;
    case ScalarType::Double: return Element::kDouble;
    case ScalarType::BFloat16: return Element::kBFloat16;
    case ScalarType::Half: return Element::kHalf;
    default: throw std::runtime_error("fastgan: expected a tensor of float32, float64, bfloat16 or float16");
  }
}

constexpr size_t kCacheLine = 64;

// Memory that shares no cache line with other memory.
class Room {
 public:
  explicit Room(size_t bytes) : memory_(new char[bytes + kCacheLine]) {}

  void* data() const {
    void* start = memory_.get();
    size_t space = 2 * kCacheLine;
    return std::align(kCacheLine, kCacheLine, start, space);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

// Packed operands: float64 for float64 tensors, otherwise float32.
class Workspace {
 public:
  explicit Workspace(const torch::stable::Tensor& like)
      : like_(like), size_(like.scalar_type() == torch::headeronly::ScalarType::Double ? 8 : 4) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() {
    if (memory_) Recycler::instance().give(*memory_);
  }

  size_t bytes(int64_t elements) const { return size_t(elements * size_); }

  // Allocates memory for each operand.
  void take(const Sizes& sizes) {
    int64_t total = kPadding;
    for (const Size& size : sizes) total += size.slices * padded(size.elements);
    memory_ = Recycler::instance().take(like_, size_t(total * size_));
    char* next = static_cast<char*>(memory_->data_ptr());
    for (const Size& size : sizes) {
      *size.operand = {next, padded(size.elements)};
      next += size.slices * padded(size.elements) * size_;
    }
  }

 private:
  torch::stable::Tensor like_;
  std::optional<torch::stable::Tensor> memory_;
  int64_t size_;
};

template <typename Operands>
void in_parallel(int64_t tasks, void (*kernel)(const Operands&, int64_t, int64_t), const Operands& x) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) { kernel(x, begin, end); });
}

// The same with scratch memory for each thread.
template <typename Operands>
void in_parallel(int64_t tasks, void (*kernel)(const Operands&, int64_t, int64_t, void*), const Operands& x,
                 size_t bytes) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const Room room(bytes);
    kernel(x, begin, end, room.data());
  });
}

}  // namespace fastgan
