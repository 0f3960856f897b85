// The Device of iteration.h on the CPU: products by ATen, terms in parallel loops.
#include <algorithm>
#include <memory>
#include <numeric>

#include "small_trace.h"
#include "torch_ops.h"

namespace fastgan {
namespace {

constexpr int64_t kChunk = 1 << 15;

class CpuDevice {
 public:
  template <typename T>
  using Matrix = TensorMatrix<T>;

  explicit CpuDevice(const Tensor& like) : like_(like) {}

  template <typename T>
  Matrix<T> empty(int64_t count, int64_t rows, int64_t cols) {
    return new_matrix<T>(like_, count, rows, cols);
  }

  template <typename T>
  void multiply(const Matrix<T>& a, const Matrix<T>& b, bool transpose_b, Matrix<T>& out) {
    aten::bmm_out(a.tensor, transpose_b ? torch::stable::transpose(b.tensor, 1, 2) : b.tensor, out.tensor);
  }

  template <class F>
  void map(int64_t count, int64_t size, const F& f) {
    for_chunks(count, size, [&](int64_t i, int64_t, int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) f(i, k);
    });
  }

  template <class F>
  void sum(int64_t count, int64_t size, const F& f, double* out) {
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    std::vector<double> partial(count * chunks);
    for_chunks(count, size, [&](int64_t i, int64_t chunk, int64_t begin, int64_t end) {
      double total = 0;
      for (int64_t k = begin; k < end; ++k) total += f(i, k);
      partial[i * chunks + chunk] = total;
    });
    for (int64_t i = 0; i < count; ++i)
      out[i] = std::accumulate(partial.begin() + i * chunks, partial.begin() + (i + 1) * chunks, 0.0);
  }

  bool finished(const double* flags, int64_t count) {
    return std::all_of(flags, flags + count, [](double flag) { return flag != 0; });
  }

 private:
  // Calls visit(matrix, chunk, begin, end) for chunks of entries of each matrix.
  template <class Visit>
  void for_chunks(int64_t count, int64_t size, const Visit& visit) {
    const int64_t chunks = (size + kChunk - 1) / kChunk;
    const int64_t grain = std::max<int64_t>(1, kChunk / std::max<int64_t>(size, 1));
    torch::stable::parallel_for(0, count * chunks, grain, [&](int64_t first, int64_t last) {
      for (int64_t n = first; n < last; ++n) {
        const int64_t begin = n % chunks * kChunk;
        visit(n / chunks, n % chunks, begin, std::min(size, begin + kChunk));
      }
    });
  }

  Tensor like_;
};

struct OneThread {
  int worker() const { return 0; }
  int workers() const { return 1; }
  int lane() const { return 0; }
  int lanes() const { return 1; }
  double sum(double x) const { return x; }
  void sync() const {}
};

template <typename T>
void small_traces(const Tensor& a, const Tensor& b, const Tensor& pairs, double* out) {
  const int64_t d = a.size(1);
  const auto *x = static_cast<const T*>(a.data_ptr()), *y = static_cast<const T*>(b.data_ptr());
  const auto* index = static_cast<const int64_t*>(pairs.data_ptr());
  torch::stable::parallel_for(0, pairs.size(0), 1, [&](int64_t begin, int64_t end) {
    const auto workspace = std::make_unique<double[]>(small_workspace(d));
    OneThread group;
    SmallTrace<OneThread, T> solver(group, int(d), workspace.get());
    for (int64_t n = begin; n < end; ++n)
      solver.run(x + index[2 * n] * d * d, y + index[2 * n + 1] * d * d, out + 3 * n);
  });
}

// Rows (value, error bound, 1 or 0 for semi-definite) for the index pairs into a and b (n, d, d), d <= 64.
Tensor small_trace_cpu(const Tensor& a, const Tensor& b, const Tensor& pairs) {
  const Tensor dense_a = torch::stable::contiguous(a), dense_b = torch::stable::contiguous(b);
  Tensor rows = torch::stable::new_empty(a, {pairs.size(0), 3}, ScalarType::Double);
  auto* out = static_cast<double*>(rows.data_ptr());
  if (a.scalar_type() == ScalarType::Float)
    small_traces<float>(dense_a, dense_b, torch::stable::contiguous(pairs), out);
  else
    small_traces<double>(dense_a, dense_b, torch::stable::contiguous(pairs), out);
  return rows;
}

}  // namespace
}  // namespace fastgan

STABLE_TORCH_LIBRARY_FRAGMENT(fastgan_C, m) {
  m.def("nuclear_norm(Tensor m, bool low_precision, float tolerance) -> (Tensor, Tensor)");
  m.def("sqrtm(Tensor a, bool inverse) -> Tensor");
  m.def("small_trace(Tensor a, Tensor b, Tensor pairs) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(fastgan_C, CPU, m) {
  m.impl("nuclear_norm", TORCH_BOX(&fastgan::nuclear_norm<fastgan::CpuDevice>));
  m.impl("sqrtm", TORCH_BOX(&fastgan::sqrtm<fastgan::CpuDevice>));
  m.impl("small_trace", TORCH_BOX(&fastgan::small_trace_cpu));
}
