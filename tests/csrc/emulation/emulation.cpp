// How cuda_runtime.h runs blocks. Not instrumented itself: EMULATED_THREAD and EMULATED_ADDRESS name the sanitizer that
// the kernels are built with.
#include "cuda_runtime.h"

#ifdef EMULATED_THREAD
#include <sanitizer/tsan_interface.h>
#endif
#ifdef EMULATED_ADDRESS
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulated {

dim3 thread_index, block_index, block_dim, grid_dim;

struct Fiber {
  enum State { kReady, kBlock, kWarp, kDone } state = kReady;
  void* pointer = nullptr;  // of its stack, where it waits
  std::unique_ptr<char[]> stack;
  dim3 index;
  int parity = 0;
#ifdef EMULATED_THREAD
  void* tsan = nullptr;
#endif
#ifdef EMULATED_ADDRESS
  void* fake_stack = nullptr;
#endif
};

constexpr size_t kStack = 1 << 16;

// Saves what the ABI wants saved, and goes on where `to` waits. x86-64.
extern "C" void emulated_switch(void** from, void* to);
asm(R"(
.text
.weak emulated_switch
.type emulated_switch, @function
emulated_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

class Block {
 public:
  static Block& get() {
    static Block block;
    return block;
  }

  void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& body) {
    static std::mt19937 generator(std::getenv("FASTGAN_EMULATED_SEED") ? std::atoi(std::getenv("FASTGAN_EMULATED_SEED")) : 0);
    if (block.x * block.y * block.z == 0 || block.x * block.y * block.z > 1024 || grid.x == 0 || grid.y == 0 ||
        grid.y > 65535 || grid.z == 0 || grid.z > 65535 || grid.x > 2147483647u || shared > shared_limit_)
      return fail("invalid configuration");
    shared_limit_ = 48 << 10;
    body_ = &body;
    grid_dim = grid, block_dim = block;
    const size_t threads = size_t(block.x) * block.y * block.z, blocks = size_t(grid.x) * grid.y * grid.z;
    std::vector<size_t> order(blocks);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), generator);
    for (size_t b : order) {
      block_index = dim3(b % grid.x, b / grid.x % grid.y, b / (size_t(grid.x) * grid.y));
#ifdef EMULATED_THREAD
      used_.push_back(std::move(dynamic_));  // nothing orders the end of a block before the start of the next
      used_.push_back(std::move(static_));
#endif
      dynamic_.reset(static_cast<char*>(std::malloc(std::max<size_t>(shared, 1))));
      std::memset(dynamic_.get(), 0xff, shared);
      static_.reset(static_cast<char*>(std::malloc(kStatic)));
      std::memset(static_.get(), 0xff, kStatic);
      placed_.clear();
      release(&launch_tag_);
      start(threads, block);
      // Warps in a shuffled order, each as far as it comes; its threads in a shuffled order as well.
      std::vector<size_t> warps((threads + 31) / 32);
      std::iota(warps.begin(), warps.end(), 0);
      do {
        std::shuffle(warps.begin(), warps.end(), generator);
        for (size_t w : warps) run_warp(32 * w, std::min(threads, 32 * w + 32), generator());
      } while (release_barrier());
      for (size_t t = 0; t < threads; ++t)
        if (fibers_[t].state != Fiber::kDone) {
          std::fprintf(stderr, "emulated: deadlock: thread %zu waits at a barrier that others passed by\n", t);
          std::abort();
        }
      finish(threads);
    }
    acquire(&end_tag_);
    dynamic_.reset();
    static_.reset();
    used_.clear();
    used_stacks_.clear();
  }

  void wait(Fiber::State state) {
    Fiber& fiber = *current_;
    void* tag = state == Fiber::kBlock ? &block_tag_ : nullptr;  // a shuffle orders no memory
    if (tag) release(tag);
    fiber.state = state;
    leave(fiber, false);
    if (tag) acquire(tag);
  }

  double shuffle(double x, int mask) {
    Fiber& fiber = *current_;
    const size_t me = 2 * (current_ - fibers_.data()) + (fiber.parity ^= 1);
    slots_[me] = x;
    wait(Fiber::kWarp);
    return slots_[me ^ size_t(2 * mask)];
  }

  void* dynamic() { return dynamic_.get(); }

  // Room for the __shared__ variable of this key, the same for all threads of the block.
  void* place(const void* key, size_t bytes) {
    size_t offset = 0;
    for (const auto& [other, begin, size] : placed_) {
      if (other == key) return static_.get() + begin;
      offset = begin + (size + 63) / 64 * 64;
    }
    if (offset + bytes > kStatic) std::abort();
    placed_.push_back({key, offset, bytes});
    return static_.get() + offset;
  }

  void allow_shared(size_t bytes) { shared_limit_ = bytes; }
  int take_error() { return std::exchange(error_, 0); }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };

  void fail(const char* what) {
    std::fprintf(stderr, "emulated: %s\n", what);
    error_ = 9;
  }

  void start(size_t threads, dim3 block) {
    fibers_.resize(std::max(fibers_.size(), threads));
    slots_.resize(2 * fibers_.size());
    count_ = threads;
    for (size_t t = 0; t < threads; ++t) {
      Fiber& f = fibers_[t];
#ifdef EMULATED_THREAD
      if (f.stack) used_stacks_.push_back(std::move(f.stack));
#endif
      if (!f.stack) f.stack.reset(new char[kStack]);
      auto* top = reinterpret_cast<void**>((reinterpret_cast<uintptr_t>(f.stack.get()) + kStack) & ~uintptr_t(15));
      *--top = nullptr;
      *--top = reinterpret_cast<void*>(&Block::entry);
      for (int i = 0; i < 6; ++i) *--top = nullptr;
      f.pointer = top;
      f.parity = 0;
      f.state = Fiber::kReady;
      f.index = dim3(t % block.x, t / block.x % block.y, t / (size_t(block.x) * block.y));
#ifdef EMULATED_THREAD
      f.tsan = __tsan_create_fiber(0);
#endif
    }
  }

  void finish(size_t threads) {
    (void)threads;
#ifdef EMULATED_THREAD
    for (size_t t = 0; t < threads; ++t) __tsan_destroy_fiber(fibers_[t].tsan);
#endif
  }

  static void entry() {
    Block& b = get();
#ifdef EMULATED_ADDRESS
    __sanitizer_finish_switch_fiber(nullptr, &b.main_bottom_, &b.main_size_);
#endif
    b.acquire(&b.launch_tag_);
    (*b.body_)();
    b.release(&b.end_tag_);
    b.current_->state = Fiber::kDone;
    b.leave(*b.current_, true);
  }

  void resume(Fiber& f) {
    current_ = &f;
    thread_index = f.index;
#ifdef EMULATED_THREAD
    main_tsan_ = __tsan_get_current_fiber();
    __tsan_switch_to_fiber(f.tsan, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATED_ADDRESS
    __sanitizer_start_switch_fiber(&main_fake_, f.stack.get(), kStack);
#endif
    emulated_switch(&main_, f.pointer);
#ifdef EMULATED_ADDRESS
    __sanitizer_finish_switch_fiber(main_fake_, nullptr, nullptr);
#endif
  }

  void leave(Fiber& f, bool done) {
    (void)done;
#ifdef EMULATED_THREAD
    __tsan_switch_to_fiber(main_tsan_, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef EMULATED_ADDRESS
    __sanitizer_start_switch_fiber(done ? nullptr : &f.fake_stack, main_bottom_, main_size_);
#endif
    emulated_switch(&f.pointer, main_);
#ifdef EMULATED_ADDRESS
    __sanitizer_finish_switch_fiber(f.fake_stack, &main_bottom_, &main_size_);
#endif
  }

  void run_warp(size_t begin, size_t end, unsigned seed) {
    for (bool again = true; again;) {
      seed = seed * 1664525u + 1013904223u;
      for (size_t i = 0; i < 32; ++i) {
        const size_t t = begin + ((i ^ (seed >> 27)) * (2 * ((seed >> 20) & 15) + 1)) % 32;
        if (t < end && fibers_[t].state == Fiber::kReady) resume(fibers_[t]);
      }
      again = true;
      for (size_t t = begin; t < end; ++t) again = again && fibers_[t].state == Fiber::kWarp;
      for (size_t t = begin; again && t < end; ++t) fibers_[t].state = Fiber::kReady;
    }
  }

  bool release_barrier() {
    for (size_t t = 0; t < count_; ++t)
      if (fibers_[t].state != Fiber::kBlock) return false;
    for (size_t t = 0; t < count_; ++t) fibers_[t].state = Fiber::kReady;
    return true;
  }

#ifdef EMULATED_THREAD
  void release(void* tag) { __tsan_release(tag); }
  void acquire(void* tag) { __tsan_acquire(tag); }
#else
  void release(void*) {}
  void acquire(void*) {}
#endif

  std::vector<Fiber> fibers_;
  std::vector<double> slots_;
  size_t count_ = 0;
  Fiber* current_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  static constexpr size_t kStatic = 48 << 10;
  std::unique_ptr<char, Free> dynamic_, static_;
  std::vector<std::unique_ptr<char, Free>> used_;
  std::vector<std::unique_ptr<char[]>> used_stacks_;
  struct Placed {
    const void* key;
    size_t begin, size;
  };
  std::vector<Placed> placed_;
  void* main_ = nullptr;
  size_t shared_limit_ = 48 << 10;
  int error_ = 0;
  char launch_tag_, block_tag_, end_tag_;
#ifdef EMULATED_THREAD
  void* main_tsan_ = nullptr;
#endif
#ifdef EMULATED_ADDRESS
  void* main_fake_ = nullptr;
  const void* main_bottom_ = nullptr;
  size_t main_size_ = 0;
#endif
};

}  // namespace emulated

namespace emulated {
void run(dim3 grid, dim3 block, size_t shared, const std::function<void()>& thread) { Block::get().run(grid, block, shared, thread); }
void sync_threads() { Block::get().wait(Fiber::kBlock); }
double shuffle(double x, int mask) { return Block::get().shuffle(x, mask); }
void* static_shared(const void* key, size_t bytes) { return Block::get().place(key, bytes); }
void* dynamic_shared() { return Block::get().dynamic(); }
void allow_shared(size_t bytes) { Block::get().allow_shared(bytes); }
int take_error() { return Block::get().take_error(); }
}  // namespace emulated
