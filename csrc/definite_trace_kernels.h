// The steps of definite_trace.h for one instruction set. Included like simd.h, after spectral_norm_kernels.h.
// Matrices have rows of definite_stride(d) entries; only the lower triangle of a symmetric one is read.

FASTGAN_INLINE double magnitude(double x) { return x < 0 ? -x : x; }

FASTGAN_INLINE double dot(const double* a, const double* b, int64_t count) {
  Accumulator<double> sum;
  sum.add(a, b, count);
  return sum.total();
}

// The power of two at or below the largest magnitude, 1 for zero.
FASTGAN_INLINE double power_of_two_below(double largest) {
  if (!(largest > 0)) return 1;
  const double power = bits_as<double>(bits_as<uint64_t>(largest) & 0x7ff0000000000000u);
  return power > 0 ? power : 0x1p-1022;
}

// Writes the symmetric part of x / scale and returns scale; 0 for a matrix that is not finite and symmetric.
template <typename T>
FASTGAN_INLINE double scaled_symmetric(const T* x, int64_t d, double* out) {
  const int64_t stride = definite_stride(d);
  double largest = 0, gap = 0, poison = 0;  // 0 * x is NaN for every x that is not finite
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const double a = x[i * d + j], b = x[j * d + i];
      const double difference = magnitude(a - b), larger = magnitude(a) > magnitude(b) ? magnitude(a) : magnitude(b);
      gap = difference > gap ? difference : gap;
      largest = larger > largest ? larger : largest;
      poison += 0 * a + 0 * b;
    }
  if (poison != 0 || gap > kAsymmetricShare * largest) return 0;
  const double scale = power_of_two_below(largest), inverse = 1 / scale;
  for (int64_t i = 0; i < stride; ++i)
    for (int64_t j = 0; j < stride; ++j) out[i * stride + j] = 0;
  for (int64_t i = 0; i < d; ++i)
    for (int64_t j = 0; j <= i; ++j) {
      const double mean = 0.5 * (x[i * d + j] * inverse + x[j * d + i] * inverse);
      out[i * stride + j] = out[j * stride + i] = mean;
    }
  return scale;
}

template <typename T>
double definite_factor(const void* a, int64_t d, double* lower) {
  const int64_t stride = definite_stride(d);
  const double scale = scaled_symmetric(static_cast<const T*>(a), d, lower);
  double largest = 0;
  for (int64_t i = 0; i < d; ++i) largest = lower[i * stride + i] > largest ? lower[i * stride + i] : largest;
  const double least = double(16 * d) * kEigenRounding * largest;
  for (int64_t i = 0; scale > 0 && i < d; ++i) {
    double* row = lower + i * stride;
    for (int64_t j = 0; j < i; ++j) {
      const double* above = lower + j * stride;
      row[j] = (row[j] - dot(row, above, j)) / above[j];
    }
    const double square = row[i] - dot(row, row, i);
    if (!(square > least)) return 0;
    row[i] = __builtin_sqrt(square);
    for (int64_t j = i + 1; j < d; ++j) row[j] = 0;
  }
  return scale;
}

// out <- the lower triangle of L^T B L, in blocks that skip most of the zeros of L; `product_room` <- B L.
FASTGAN_INLINE void sandwich(const double* lower, const double* b, int64_t d, double* product_room, double* out) {
  constexpr int64_t kBlock = 32;
  const int64_t stride = definite_stride(d);
  for (int64_t j = 0; j < d; j += kBlock)
    product<false>(b + j, stride, lower + j * stride + j, stride, d - j, d, smaller(kBlock, d - j), product_room + j,
                   stride, false);
  for (int64_t i = 0; i < d; i += kBlock) {
    const int64_t rows = smaller(kBlock, d - i);
    product<true>(lower + i * stride + i, stride, product_room + i * stride, stride, d - i, rows, i + rows,
                  out + i * stride, stride, false);
  }
}

// Householder's reduction of the lower triangle of x to a tridiagonal matrix: `diagonal`, and `beside` from index 1. It
// starts at the last row. Each reflection is applied while the next product is computed, so a row takes one pass.
FASTGAN_INLINE void tridiagonalize(double* x, int64_t d, double* diagonal, double* beside, double* vectors) {
  const int64_t stride = definite_stride(d);
  double *v = vectors, *w = vectors + stride, *next = vectors + 2 * stride, *sums = vectors + 3 * stride;
  bool pending = false;  // x still lacks the update x - v w^T - w v^T
  for (int64_t i = d - 1; i >= 0; --i) {
    double* row = x + i * stride;
    if (pending)
      for (int64_t k = 0; k <= i; ++k) row[k] -= v[i] * w[k] + w[i] * v[k];
    diagonal[i] = row[i];
    if (i == 0) return;
    const double alpha = row[i - 1], rest = dot(row, row, i - 1);
    beside[i] = alpha;
    double tau = 0;
    if (rest > 0) {
      const double length = __builtin_sqrt(alpha * alpha + rest), beta = alpha > 0 ? -length : length;
      tau = (beta - alpha) / beta;
      beside[i] = beta;
      for (int64_t k = 0; k < i - 1; ++k) next[k] = row[k] / (alpha - beta);
      next[i - 1] = 1;
    } else {
      for (int64_t k = 0; k < i; ++k) next[k] = 0;
    }
    for (int64_t k = 0; k < i; ++k) sums[k] = 0;
    for (int64_t r = 0; r < i; ++r) {
      double* line = x + r * stride;
      const double a = pending ? v[r] : 0, b = pending ? w[r] : 0, factor = next[r];
      Vec<double> products = {};
      int64_t k = 0;
      for (; k + kWidth<double> <= r; k += kWidth<double>) {
        Vec<double> entries = load(line + k);
        if (pending) {
          entries -= a * load(w + k) + b * load(v + k);
          store(line + k, entries);
        }
        products += entries * load(next + k);
        store(sums + k, load(sums + k) + entries * factor);
      }
      double product = sum_lanes<double>(products);
      for (; k < r; ++k) {
        if (pending) line[k] -= a * w[k] + b * v[k];
        product += line[k] * next[k];
        sums[k] += line[k] * factor;
      }
      if (pending) line[r] -= 2 * a * w[r];
      sums[r] += product + line[r] * factor;
    }
    const double half = 0.5 * tau * tau * dot(sums, next, i);
    for (int64_t k = 0; k < i; ++k) {
      w[k] = tau * sums[k] - half * next[k];
      v[k] = next[k];
    }
    pending = tau != 0;
  }
}

// Writes the eigenvalues of a symmetric tridiagonal matrix to `diagonal`, unordered, by the root-free QL iteration
// (Pal, Walker and Kahan; LAPACK's sterf). Overwrites `beside`. Returns false if the iteration does not converge.
FASTGAN_INLINE bool tridiagonal_eigenvalues(int64_t d, double* diagonal, double* beside) {
  constexpr double kEpsilon = 0x1p-53, kSquare = kEpsilon * kEpsilon;
  double* squares = beside + 1;  // squares[i] joins i and i + 1
  for (int64_t i = 0; i + 1 < d; ++i) squares[i] *= squares[i];
  int64_t steps = 60 * d;
  for (int64_t first = 0; first < d;) {
    int64_t last = first;  // end of the block that begins at `first` and has no square at rounding level
    while (last + 1 < d && squares[last] > kSquare * magnitude(diagonal[last] * diagonal[last + 1])) ++last;
    if (last + 1 < d) squares[last] = 0;
    if (last == first) {
      ++first;
      continue;
    }
    if (--steps < 0) return false;
    if (magnitude(diagonal[last]) < magnitude(diagonal[first])) {  // the smaller end is found first
      for (int64_t i = first, j = last; i < j; ++i, --j) {
        const double x = diagonal[i];
        diagonal[i] = diagonal[j], diagonal[j] = x;
      }
      for (int64_t i = first, j = last - 1; i < j; ++i, --j) {
        const double x = squares[i];
        squares[i] = squares[j], squares[j] = x;
      }
    }
    const double root = __builtin_sqrt(squares[first]), p0 = diagonal[first];
    const double half = (diagonal[first + 1] - p0) / (2 * root), length = __builtin_sqrt(half * half + 1);
    const double sigma = p0 - root / (half + (half < 0 ? -length : length));
    double c = 1, s = 0, gamma = diagonal[last] - sigma, p = gamma * gamma;
    for (int64_t i = last - 1; i >= first; --i) {
      const double square = squares[i], r = p + square, old_c = c, old_gamma = gamma, alpha = diagonal[i];
      if (i != last - 1) squares[i + 1] = s * r;
      c = p / r;
      s = square / r;
      gamma = c * (alpha - sigma) - s * old_gamma;
      diagonal[i + 1] = old_gamma + (alpha - gamma);
      p = c != 0 ? gamma * gamma / c : old_c * square;
    }
    squares[first] = s * p;
    diagonal[first] = sigma + gamma;
  }
  return true;
}

// Like root_sum in fastgan/linalg/_nuclear_norm.py, which explains the error.
FASTGAN_INLINE bool sum_of_roots(const double* eigenvalues, int64_t d, double tolerance, double* value, double* bound) {
  double squares = 0, smallest = eigenvalues[0], sum = 0, inverses = 0, lost = 0;
  for (int64_t i = 0; i < d; ++i) squares += eigenvalues[i] * eigenvalues[i];
  const double noise = kEigenRounding * __builtin_sqrt(squares);
  for (int64_t i = 0; i < d; ++i) {
    const double x = eigenvalues[i] > 0 ? eigenvalues[i] : 0;
    smallest = eigenvalues[i] < smallest ? eigenvalues[i] : smallest;
    sum += __builtin_sqrt(x);
    if (eigenvalues[i] <= 4 * noise)
      lost += __builtin_sqrt(noise + x);
    else
      inverses += 1 / x;
  }
  *value = sum;
  *bound = 0.5 * noise * __builtin_sqrt(inverses) + lost;
  return smallest >= -noise && *bound <= tolerance * sum && squares > 0x1p-400;
}

template <typename T>
bool definite_trace(const double* lower, double scale, const void* b, int64_t d, double tolerance, double* room,
                    double* value, double* bound) {
  const int64_t stride = definite_stride(d), elements = definite_elements(d);
  double *matrix = room, *products = room + elements, *diagonal = products + elements, *beside = diagonal + stride;
  const double own_scale = scaled_symmetric(static_cast<const T*>(b), d, matrix);
  if (own_scale == 0) return false;
  sandwich(lower, matrix, d, products, matrix);
  tridiagonalize(matrix, d, diagonal, beside, beside + 2 * stride);
  if (!tridiagonal_eigenvalues(d, diagonal, beside) || !sum_of_roots(diagonal, d, tolerance, value, bound))
    return false;
  // Two roots, since the product of the scales may leave float64's range when the value does not.
  const double first = __builtin_sqrt(scale), second = __builtin_sqrt(own_scale);
  *value = *value * first * second;
  *bound = *bound * first * second;
  return true;
}

template <typename T>
constexpr DefiniteTraceKernels definite_trace_table() {
  return {definite_factor<T>, definite_trace<T>};
}
