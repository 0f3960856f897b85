// tr((A B)^(1/2)) of definite A on a CPU: the sum of the square roots of the eigenvalues of L^T B L with A = L L^T, for
// matrices that fit a core's caches. What an operator (cpu.cpp) hands to the kernels (definite_trace_kernels.h). Free of
// torch. Matrices are float32 or float64; all is computed in float64.
#pragma once

#include "attention.h"

namespace fastgan {

constexpr int64_t kLargestDefinite = 256;
// The constants of fastgan/linalg/_symmetric.py and _checks.py.
constexpr double kEigenRounding = 4 * 0x1p-52, kAsymmetricShare = 1e-5;

// Rows and columns of the working matrices, whose further entries are zero.
constexpr int64_t definite_stride(int64_t d) { return padded(d); }
constexpr int64_t definite_elements(int64_t d) { return definite_stride(d) * definite_stride(d); }
// Of float64, for one pair: B, and B L; and eight vectors.
constexpr int64_t definite_room(int64_t d) { return 2 * definite_elements(d) + 8 * definite_stride(d); }

struct DefiniteTraceKernels {
  // The lower factor of A / scale, scale a power of two; 0 for a matrix that is not finite, symmetric up to rounding
  // and definite beyond it.
  double (*factor)(const void* a, int64_t d, double* lower);
  // The value and a bound on its error; false if B is not finite and symmetric up to rounding, or if the bound is above
  // `tolerance` of the value or an eigenvalue below zero.
  bool (*trace)(const double* lower, double scale, const void* b, int64_t d, double tolerance, double* room,
                double* value, double* bound);
};

const DefiniteTraceKernels& definite_trace_kernels(bool is_double);

}  // namespace fastgan
