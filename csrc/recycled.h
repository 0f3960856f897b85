// Outputs and workspaces whose memory serves again: what one leaves goes to the next one of about its size. glibc returns blocks of
// megabytes to the system, and to touch such a block anew takes longer than to write it.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstddef>
#include <cstdlib>
#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

namespace fastgan {

// Blocks of memory that no tensor uses. A tensor owns its block until its storage ends, wherever and however late.
class Recycler {
 public:
  using Tensor = torch::stable::Tensor;

  static Recycler& instance() {
    static Recycler* recycler = new Recycler;  // never deleted: tensors may outlive static objects
    return *recycler;
  }

  // An uninitialized tensor of the sizes and strides of `like`, whose elements lie densely.
  Tensor empty_like(const Tensor& like, torch::headeronly::ScalarType dtype) {
    const size_t bytes = size_t(like.numel()) * element_size(dtype);
    if (bytes < kLeastBytes) return fresh(like, dtype);
    const Block block = take(like, bytes);
    void* const data = block.data_ptr();
    return torch::stable::from_blob(data, like.sizes(), like.strides(), like.device(), dtype,
                                    [this, block](void*) { give(block); });
  }

  // A tensor of at least so many bytes, for its owner to give back.
  Tensor take(const Tensor& like, size_t bytes) {
    if (bytes >= kLeastBytes) {
      // The lock is tried only: in a child process that was forked while another thread held it, it stays locked.
      const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
      const auto found = lock.owns_lock() ? blocks_.lower_bound(bytes) : blocks_.end();
      if (found != blocks_.end() && found->first <= bytes + bytes / 4) {
        const Block block = found->second;
        bytes_ -= found->first;
        blocks_.erase(found);
        return block;
      }
    }
    return torch::stable::new_empty(like, {int64_t(bytes)}, torch::headeronly::ScalarType::Byte);
  }

  void give(const Tensor& block) {
    const size_t bytes = size_t(block.numel());
    if (bytes < kLeastBytes) return;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock.owns_lock() || bytes_ + bytes > limit_) return;
    blocks_.emplace_hint(blocks_.lower_bound(bytes), bytes, block);  // the last one used is the next: caches may hold it
    bytes_ += bytes;
  }

  // Returns unused blocks to the allocator, and how many bytes they were.
  int64_t release() {
    std::multimap<size_t, Block> blocks;
    const std::lock_guard<std::mutex> lock(mutex_);
    blocks.swap(blocks_);
    const size_t bytes = bytes_;
    bytes_ = 0;
    return int64_t(bytes);
  }

 private:
  using Block = Tensor;  // of bytes, from torch's allocator

  static constexpr size_t kLeastBytes = 1 << 16;  // of smaller blocks malloc takes good care

  static size_t element_size(torch::headeronly::ScalarType dtype) {
    using torch::headeronly::ScalarType;
    return dtype == ScalarType::Double ? 8 : dtype == ScalarType::Float ? 4 : 2;
  }

  static size_t limit_of_environment() {
    const char* megabytes = std::getenv("FASTGAN_CPU_CACHE_MB");
    if (!megabytes) return size_t(1) << 30;
    char* end = nullptr;
    const long long given = std::strtoll(megabytes, &end, 10);
    if (end == megabytes || *end || given < 0 || given > (1LL << 30))
      throw std::runtime_error("FASTGAN_CPU_CACHE_MB must be a number of megabytes, got " + std::string(megabytes));
    return size_t(given) << 20;
  }

  static Tensor fresh(const Tensor& like, torch::headeronly::ScalarType dtype) {
    if (dtype == like.scalar_type()) return torch::stable::empty_like(like);
    const size_t bytes = size_t(like.numel()) * element_size(dtype);
    const Block block = torch::stable::new_empty(like, {int64_t(bytes)}, torch::headeronly::ScalarType::Byte);
    return torch::stable::from_blob(block.data_ptr(), like.sizes(), like.strides(), like.device(), dtype,
                                    [block](void*) {});
  }

  const size_t limit_ = limit_of_environment();
  std::mutex mutex_;
  std::multimap<size_t, Block> blocks_;
  size_t bytes_ = 0;
};

}  // namespace fastgan
