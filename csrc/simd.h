// Vectors (the compiler's vector types) for one instruction set: exponential, conversions, register-blocked products.
//
// Included within the namespace of a variant (variants.h), after its target is set, so everything here is compiled once
// per instruction set under its own names. Nothing below may call a function of the standard library: the linker would
// keep one copy of its instantiation for all variants.

template <typename T>
struct VecOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VecOf<T>::type;
template <typename T>
constexpr int64_t kWidth = kVectorBytes / sizeof(T);

template <typename T>
FASTGAN_INLINE int64_t whole_vectors(int64_t elements) {
  return (elements + kWidth<T> - 1) / kWidth<T> * kWidth<T>;
}
FASTGAN_INLINE int64_t whole_rows(int64_t rows) { return (rows + kLeastRows - 1) / kLeastRows * kLeastRows; }

template <typename T>
FASTGAN_INLINE Vec<T> load(const T* from) {
  Vec<T> x;
  __builtin_memcpy(&x, from, sizeof(x));
  return x;
}

template <typename T>
FASTGAN_INLINE void store(T* to, Vec<T> x) {
  __builtin_memcpy(to, &x, sizeof(x));
}

template <typename T>
FASTGAN_INLINE Vec<T> broadcast(T x) {
  return x - Vec<T>{};
}

template <typename To, typename From>
FASTGAN_INLINE To bits_as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  __builtin_memcpy(&y, &x, sizeof(y));
  return y;
}

// The sum of the lanes, in a fixed order.
template <typename T>
FASTGAN_INLINE T sum_lanes(Vec<T> x) {
  T lanes[kWidth<T>];
  store(lanes, x);
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
  return lanes[0];
}

// The largest lane; ignores NaN.
template <typename T>
FASTGAN_INLINE T max_lanes(Vec<T> x) {
  T lanes[kWidth<T>];
  store(lanes, x);
  for (int64_t half = kWidth<T> / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lanes[i] = lanes[i + half] > lanes[i] ? lanes[i + half] : lanes[i];
  return lanes[0];
}

// The parts of 2^t for t <= 0: n = round(t) by adding and subtracting `magic`, whose last bits then hold n; a
// polynomial in t - n, near-minimax with the exact value 1 at 0; and 2^n through the exponent's bits. The polynomial
// is scaled by 2^-offset and the power by 2^offset, so that the product may be a subnormal number.
template <typename T>
struct Exp2;

template <>
struct Exp2<float> {
  using Bits = int32_t;
  static constexpr float magic = 0x1.8p23f, lowest = -160, shrink = 0x1p-64f;
  static constexpr int32_t mantissa = 23, bias = 127 + 64;
  static constexpr int degree = 6;
  static constexpr float coefficients[] = {1.0f,           0.693147188026f,  0.240226507606f,   0.0555035711422f,
                                           0.00961808256f, 0.001339086366f, 0.000154531629451f};
};

template <>
struct Exp2<double> {
  using Bits = int64_t;
  static constexpr double magic = 0x1.8p52, lowest = -1100, shrink = 0x1p-512;
  static constexpr int64_t mantissa = 52, bias = 1023 + 512;
  static constexpr int degree = 11;
  static constexpr double coefficients[] = {1.0,
                                            0.6931471805599453094,
                                            0.2402265069591009822,
                                            0.05550410866482159434,
                                            0.009618129107606888527,
                                            0.001333355814641693531,
                                            0.0001540353044173605015,
                                            0.00001525273382983611839,
                                            1.321544258792168965e-6,
                                            1.017806244584577352e-7,
                                            7.0725859492692237e-9,
                                            4.454960598186518394e-10};
};

template <typename T>
FASTGAN_INLINE Vec<T> exp2_of_negative(Vec<T> t) {
  using E = Exp2<T>;
  using Integers = Vec<typename E::Bits>;
  t = t < broadcast<T>(E::lowest) ? broadcast<T>(E::lowest) : t;  // NaN stays
  const Vec<T> shifted = t + E::magic;
  const Vec<T> rest = t - (shifted - E::magic);
  Vec<T> p = broadcast<T>(E::coefficients[E::degree] * E::shrink);
#pragma GCC unroll 16
  for (int i = E::degree - 1; i >= 0; --i) p = p * rest + E::coefficients[i] * E::shrink;
  return p * bits_as<Vec<T>>((bits_as<Integers>(shifted) << E::mantissa) + (E::bias << E::mantissa));
}

FASTGAN_INLINE float widen(float x) { return x; }
FASTGAN_INLINE double widen(double x) { return x; }
FASTGAN_INLINE float widen(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }
FASTGAN_INLINE float widen(Half x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16, magnitude = x.bits & 0x7fffu;
  const float normal = bits_as<float>((magnitude << 13) + (112u << 23));
  const float subnormal = float(magnitude) * 0x1p-24f;
  const float special = bits_as<float>((magnitude << 13) | 0x7f800000u);
  const float value = magnitude < 0x400u ? subnormal : magnitude < 0x7c00u ? normal : special;
  return bits_as<float>(bits_as<uint32_t>(value) | sign);
}

FASTGAN_INLINE void narrow(float x, float* to) { *to = x; }
FASTGAN_INLINE void narrow(double x, double* to) { *to = x; }
FASTGAN_INLINE void narrow(double x, float* to) { *to = float(x); }
FASTGAN_INLINE void narrow(float x, double* to) { *to = x; }
FASTGAN_INLINE void narrow(float x, BFloat16* to) {
  const uint32_t bits = bits_as<uint32_t>(x);
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fffu + ((bits >> 16) & 1)) >> 16);
}
FASTGAN_INLINE void narrow(float x, Half* to) {
  const uint32_t bits = bits_as<uint32_t>(x), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24.
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfffu + ((magnitude >> 13) & 1)) >> 13;
  const uint32_t finite = magnitude < (113u << 23) ? subnormal : normal;
  to->bits = uint16_t(sign | (magnitude > 0x7f800000u ? 0x7e00u : finite > 0x7c00u ? 0x7c00u : finite));
}

template <typename T>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};
template <typename T>
using Wide = typename WideOf<T>::type;

// Calls f with a pointer to elements of this type, at `offset`.
#define FASTGAN_FOR_ELEMENTS(element, data, offset, f)                       \
  switch (element) {                                                         \
    case Element::kFloat: f(static_cast<float*>(data) + (offset)); break;     \
    case Element::kDouble: f(static_cast<double*>(data) + (offset)); break;   \
    case Element::kBFloat16: f(static_cast<BFloat16*>(data) + (offset)); break; \
    case Element::kHalf: f(static_cast<Half*>(data) + (offset)); break;       \
  }

// out[i][j] <- factor in[i][j], each with its own strides, between any two types.
template <typename From, typename To, typename Factor>
FASTGAN_INLINE void convert_strided(const From* in, int64_t in_row, int64_t in_column, To* out, int64_t out_row,
                                    int64_t out_column, int64_t rows, int64_t columns, Factor factor) {
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j)
      narrow(factor * widen(in[i * in_row + j * in_column]), &out[i * out_row + j * out_column]);
}

// The inner loop runs over columns if their stride is 1 on both sides, else over rows.
template <typename From, typename To, typename Factor>
void convert(const From* in, int64_t in_row, int64_t in_column, To* out, int64_t out_row, int64_t out_column,
             int64_t rows, int64_t columns, Factor factor) {
  if (in_column == 1 && out_column == 1)
    convert_strided(in, in_row, 1, out, out_row, 1, rows, columns, factor);
  else if (in_row == 1 && out_row == 1)
    convert_strided(in, in_column, 1, out, out_column, 1, columns, rows, factor);
  else if (in_row == 1)
    convert_strided(in, in_column, 1, out, out_column, out_row, columns, rows, factor);
  else if (out_row == 1)
    convert_strided(in, in_column, in_row, out, out_column, 1, columns, rows, factor);
  else
    convert_strided(in, in_row, in_column, out, out_row, out_column, rows, columns, factor);
}

// Sums of kBlockRows x (kVectors vectors) in registers: out <- a b or out + a b over `depth`.
template <int kBlockRows, int kVectors, bool kTransposed, typename T>
FASTGAN_INLINE void product_block(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, T* out, int64_t ldo,
                                  bool add) {
  Vec<T> sums[kBlockRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = add ? load(out + r * ldo + v * kWidth<T>) : Vec<T>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<T> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + k * ldb + v * kWidth<T>);
#pragma GCC unroll 16
    for (int r = 0; r < kBlockRows; ++r) {
      const T left = kTransposed ? a[k * lda + r] : a[r * lda + k];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] += right[v] * left;
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kBlockRows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) store(out + r * ldo + v * kWidth<T>, sums[r][v]);
}

template <int kVectors, bool kTransposed, typename T>
FASTGAN_INLINE void product_columns(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, int64_t rows,
                                    T* out, int64_t ldo, bool add) {
  const int64_t step = kTransposed ? 1 : lda;
  int64_t i = 0;
  for (; i + kRows <= rows; i += kRows)
    product_block<kRows, kVectors, kTransposed>(a + i * step, lda, b, ldb, depth, out + i * ldo, ldo, add);
  for (; i < rows; i += kLeastRows)
    product_block<kLeastRows, kVectors, kTransposed>(a + i * step, lda, b, ldb, depth, out + i * ldo, ldo, add);
}

// out (rows, columns) <- a b, or out + a b with `add`; a is (rows, depth) or, kTransposed, (depth, rows). `rows` is
// rounded up to kLeastRows and `columns` to a vector, which a, b and out must have room for. Each sum runs over `depth`
// in ascending order, whatever the sizes.
template <bool kTransposed, typename T>
void product(const T* a, int64_t lda, const T* b, int64_t ldb, int64_t depth, int64_t rows, int64_t columns, T* out,
             int64_t ldo, bool add) {
  int64_t j = 0;
  for (; j + kWidth<T> < columns; j += 2 * kWidth<T>)
    product_columns<2, kTransposed>(a, lda, b + j, ldb, depth, rows, out + j, ldo, add);
  if (j < columns) product_columns<1, kTransposed>(a, lda, b + j, ldb, depth, rows, out + j, ldo, add);
}
