// Products with a weight that is used where it lies, for a single step: packing would cost more than the
// product.
//
//   c[row][n] = bias[n] + sum over k of a[row][k] * w[n][k]     (the bias starts the sum of the first lane)
//
// Both sides are contiguous in k, so a vector holds one dot product's partial sums of neighbouring k, and the
// lanes are added up at the end. A tile of kWidth dot products (1 x 16, 2 x 8 or 4 x 4 rows and columns) ends
// in one vector. Each element's sums are made in the same order whatever the tile: its bits depend on its own
// row and column only. What it costs: a load of w for each vector of a row group, so at batch 1 the bandwidth
// of the cache that holds w.
#pragma once

#include "gemm.h"

namespace fastseq::FASTSEQ_ISA {

// kWidth * kPair neighbours in k of an operand row and of a weight row.
template <class S, class O>
struct Dot {
  using V = Vec<typename Operand<O>::Scalar>;
  using Loaded = V;
  static constexpr int64_t kStep = V::kWidth;
  template <class T>
  static Loaded load_first(const T* p, int64_t n) {
    return load_upto<V>(p, n);
  }
  static V multiply_add(Loaded a, Loaded b, V c) { return fma(a, b, c); }
};
#if defined(__AVX512BF16__)
template <>
struct Dot<bfloat16, bfloat16> {
  using V = Vec<float>;
  using Loaded = __m512bh;
  static constexpr int64_t kStep = 2 * V::kWidth;
  static Loaded load_first(const bfloat16* p, int64_t n) {
    const __mmask32 mask = n >= kStep ? ~__mmask32(0) : (__mmask32(1) << n) - 1;
    return (__m512bh)_mm512_maskz_loadu_epi16(mask, p);
  }
  static V multiply_add(Loaded a, Loaded b, V c) {
    return V::of((V::Native)_mm512_dpbf16_ps((__m512)c.v, a, b));
  }
};
#endif

// Lane i of the result is the sum of acc[i]'s lanes; acc is used up.
template <int kDistance, class T>
inline Vec<T> sum_lanes(Vec<T>* acc) {
  if constexpr (kDistance == Vec<T>::kWidth) {
    return acc[0];
  } else {
#pragma GCC unroll 16
    for (int i = 0; i < Vec<T>::kWidth; i += 2 * kDistance) {
      exchange_blocks<kDistance>(acc[i], acc[i + kDistance]);
      acc[i] = acc[i] + acc[i + kDistance];
    }
    return sum_lanes<2 * kDistance>(acc);
  }
}

template <class S, class O>
struct InPlaceArgs {
  using Scalar = typename Operand<O>::Scalar;
  int64_t depth;
  const O* a;
  int64_t a_stride;
  const S* weight;
  int64_t weight_stride;
  const S* bias;  // or null
  Scalar* c;
  int64_t c_stride;
};

// `columns` of them for kRows rows, from t on.
template <class S, class O, int kRows>
void dot_tile(const InPlaceArgs<S, O>& t, int64_t columns) {
  using D = Dot<S, O>;
  using V = typename D::V;
  constexpr int kWidth = V::kWidth, kColumns = kWidth / kRows;
  const S* weight[kColumns];
  V acc[kWidth];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kColumns; ++i) {
    const int64_t column = i < columns ? i : 0;
    weight[i] = t.weight + column * t.weight_stride;
    V start(0);
    if (t.bias) start.v[0] = widen(t.bias[column]);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) acc[m * kColumns + i] = start;
  }
  const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    typename D::Loaded a[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) a[m] = D::load_first(t.a + m * t.a_stride + k, n);
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      const typename D::Loaded w = D::load_first(weight[i] + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) acc[m * kColumns + i] = D::multiply_add(a[m], w, acc[m * kColumns + i]);
    }
  };
  int64_t k = 0;
  for (; k + D::kStep <= t.depth; k += D::kStep) add(k, D::kStep);
  if (k < t.depth) add(k, t.depth - k);
  alignas(kVectorBytes) typename V::Scalar sums[kWidth];
  store(sums, sum_lanes<1>(acc));
  for (int m = 0; m < kRows; ++m) {
    const auto copy = [&](int64_t n) __attribute__((always_inline)) {
      std::memcpy(t.c + m * t.c_stride, sums + m * kColumns, size_t(n) * sizeof(typename V::Scalar));
    };
    columns == kColumns ? copy(kColumns) : copy(columns);
  }
}

template <class S, class O, int kRows>
int64_t dot_rows(InPlaceArgs<S, O> t, int64_t row, int64_t rows, int64_t columns) {
  constexpr int kColumns = Vec<typename Operand<O>::Scalar>::kWidth / kRows;
  const int64_t end = row + (rows - row) / kRows * kRows;
  for (int64_t n = 0; n < columns && row < end; n += kColumns) {
    InPlaceArgs<S, O> at = t;
    at.weight += n * t.weight_stride;
    if (t.bias) at.bias += n;
    for (int64_t m = row; m < end; m += kRows) {
      at.a = t.a + m * t.a_stride;
      at.c = t.c + m * t.c_stride + n;
      dot_tile<S, O, kRows>(at, columns - n < kColumns ? columns - n : kColumns);
    }
  }
  return end;
}

template <class S, class O>
void multiply_in_place(const InPlaceArgs<S, O>& t, int64_t rows, int64_t columns) {
  constexpr int kWidth = Vec<typename Operand<O>::Scalar>::kWidth;
  int64_t row = 0;
  if constexpr (kWidth >= 16) row = dot_rows<S, O, 4>(t, row, rows, columns);
  row = dot_rows<S, O, 2>(t, row, rows, columns);
  dot_rows<S, O, 1>(t, row, rows, columns);
}

}  // namespace fastseq::FASTSEQ_ISA
