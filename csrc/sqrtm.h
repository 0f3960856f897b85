// A^{1/2} and A^{-1/2} of symmetric positive semi-definite A by the coupled, scaled Newton-Schulz iteration, from
// matrix products alone (Higham, "Functions of Matrices", 2008, section 6.7). Does not depend on torch: see
// iteration.h. newton_schulz in fastgan/linalg/_sqrtm.py takes the same steps.
#pragma once

#include "iteration.h"

namespace fastgan {

struct SquareRoot {
  double* value;
  FASTGAN_HD void operator()(int64_t i, int64_t) const { value[i] = sqrt(value[i]); }
};

struct Identity {
  double* out;
  int64_t rows;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const {
    out[i * rows * rows + k] = k / rows == k % rows ? 1.0 : 0.0;
  }
};

// t <- linear I - cubic t
struct Polynomial {
  double* t;
  int64_t rows;
  double linear, cubic;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const {
    double& entry = t[i * rows * rows + k];
    entry = (k / rows == k % rows ? linear : 0.0) - cubic * entry;
  }
};

// out <- (a + a^T) / 2 times the square root of the scale, or divided by it.
struct Symmetrized {
  const double* a;
  double* out;
  const double* scale;
  int64_t rows;
  bool inverse;
  FASTGAN_HD void operator()(int64_t i, int64_t k) const {
    const double* matrix = a + i * rows * rows;
    const double entry = 0.5 * (matrix[k] + matrix[(k % rows) * rows + k / rows]);
    const double root = sqrt(scale[i]);
    out[i * rows * rows + k] = inverse ? entry / root : entry * root;
  }
};

// Writes A^{1/2}, or A^{-1/2} if `inverse`, of each matrix of `a` to `root`; returns the number of iterations. Resolves
// eigenvalues down to 1e-10 of |A|_F, or 1e-16 for the inverse. Rounding leaves the zero eigenvalues of a singular
// matrix at about -1e-17, and negative eigenvalues would grow without bound in further iterations.
template <class Device>
int coupled_newton_schulz(Device& device, typename Device::template Matrix<double> a,
                          typename Device::template Matrix<double> root, bool inverse) {
  const double smallest = inverse ? 1e-8 : 1e-5;
  const int64_t count = a.count, rows = a.rows, size = rows * rows;
  auto matrix = [&] { return device.template empty<double>(count, rows, rows); };
  auto y = matrix(), z = matrix(), t = matrix(), next = matrix();
  auto scale = device.template empty<double>(1, 1, count), none_done = device.template empty<double>(1, 1, count);
  device.map(count, 1, Fill{none_done.data, 1, 0});
  device.sum(count, size, SquareOf{a.data, size}, scale.data);
  device.map(count, 1, SquareRoot{scale.data});
  device.map(count, size, Scale<double, double>{a.data, y.data, scale.data, none_done.data, size});
  device.map(count, size, Identity{z.data, rows});
  const auto steps = scaled_newton_schulz(smallest);
  for (const Step& step : steps) {
    device.multiply(z, y, false, t);
    device.map(count, size, Polynomial{t.data, rows, step.linear, step.cubic});
    device.multiply(y, t, false, next);
    std::swap(y, next);
    device.multiply(t, z, false, next);
    std::swap(z, next);
  }
  device.map(count, size, Symmetrized{inverse ? z.data : y.data, root.data, scale.data, rows, inverse});
  return int(steps.size());
}

}  // namespace fastgan
