// tr((A B)^(1/2)) of definite A on a CPU: the sum of the square roots of the eigenvalues of L^T B L with A = L L^T, for
// matrices that fit a core's caches. This is the interface of the operator (cpu.cpp) to the kernels
// (definite_trace_kernels.h); it does not depend on torch. Matrices are float32 or float64; computation is in float64.
#pragma once

#include "attention.h"

namespace fastgan {

constexpr int64_t kLargestDefinite = 256;
// The constants of fastgan/linalg/_symmetric.py and _checks.py.
constexpr double kEigenRounding = 4 * 0x1p-52, kAsymmetricShare = 1e-5;

// Rows and columns of the working matrices, padded with zeros.
constexpr int64_t definite_stride(int64_t d) { return padded(d); }
constexpr int64_t definite_elements(int64_t d) { return definite_stride(d) * definite_stride(d); }
// Float64 values per pair: B, B L and eight vectors.
constexpr int64_t definite_room(int64_t d) { return 2 * definite_elements(d) + 8 * definite_stride(d); }

struct DefiniteTraceKernels {
  // The lower factor of A / scale, scale a power of two; 0 for a matrix that is not finite, symmetric up to rounding
  // and definite beyond it.
  double (*factor)(const void* a, int64_t d, double* lower);
  // Computes the value and a bound on its error. Returns false if B is not finite or not symmetric up to rounding, if
  // the bound exceeds `tolerance` times the value, or if an eigenvalue is negative.
  bool (*trace)(const double* lower, double scale, const void* b, int64_t d, double tolerance, double* room,
                double* value, double* bound);
};

const DefiniteTraceKernels& definite_trace_kernels(bool is_double);

}  // namespace fastgan
