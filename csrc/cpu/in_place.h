// Products with a weight that is used where it lies, for a single step: packing would cost more than the
// product.
//
//   c[row][n] = bias[n] + sum over k of a[row][k] * w[n][k]     (the bias starts the sum of the first lane)
//
// Both sides are contiguous in k, so a vector holds one dot product's partial sums of neighbouring k, and the
// lanes are added up at the end. A tile is a few rows by at most kWidth columns, so that a row's sums end in one
// vector. Each element's sums are made in the same order whatever the tile: its bits depend on its own row and
// column only. What it costs: a load of w for each vector of a row group, so at batch 1 the bandwidth of the
// cache that holds w. Of a large batch as many rows as fit into half a first-level cache pass over w at a time.
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

// Lane i of the result is the sum of acc[i]'s lanes, i < kCount; acc is used up. Neighbouring lanes are added
// first, then sums of two, of four, ...: the same additions for every kCount.
template <int kCount, int kDistance = 1, class T>
inline Vec<T> sum_lanes(Vec<T>* acc) {
  if constexpr (kDistance == Vec<T>::kWidth) {
    return acc[0];
  } else {
    Vec<T> copy = acc[0];
    if constexpr (kDistance >= kCount) {
      exchange_blocks<kDistance>(acc[0], copy);
      acc[0] = acc[0] + copy;
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < kCount; i += 2 * kDistance) {
        exchange_blocks<kDistance>(acc[i], acc[i + kDistance]);
        acc[i] = acc[i] + acc[i + kDistance];
      }
    }
    return sum_lanes<kCount, 2 * kDistance>(acc);
  }
}

// Columns of a tile of so many rows: registers for the sums, a vector of each row, and one of w.
template <class V>
constexpr int dot_columns(int rows) {
  return rows == 1 || V::kWidth < 4 ? V::kWidth : 4;
}
constexpr int kDotRows = kFewRegisters ? 3 : 4;

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
  constexpr int kColumns = dot_columns<V>(kRows);
  const S* weight[kColumns];
  V acc[kRows][kColumns];
#pragma GCC unroll 16
  for (int64_t i = 0; i < kColumns; ++i) {
    const int64_t column = i < columns ? i : 0;
    weight[i] = t.weight + column * t.weight_stride;
    V start(0);
    if (t.bias) start.v[0] = widen(t.bias[column]);
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) acc[m][i] = start;
  }
  const auto add = [&](int64_t k, int64_t n) __attribute__((always_inline)) {
    typename D::Loaded a[kRows];
#pragma GCC unroll 4
    for (int m = 0; m < kRows; ++m) a[m] = D::load_first(t.a + m * t.a_stride + k, n);
#pragma GCC unroll 16
    for (int i = 0; i < kColumns; ++i) {
      const typename D::Loaded w = D::load_first(weight[i] + k, n);
#pragma GCC unroll 4
      for (int m = 0; m < kRows; ++m) acc[m][i] = D::multiply_add(a[m], w, acc[m][i]);
    }
  };
  int64_t k = 0;
  for (; k + D::kStep <= t.depth; k += D::kStep) add(k, D::kStep);
  if (k < t.depth) add(k, t.depth - k);
#pragma GCC unroll 4
  for (int m = 0; m < kRows; ++m) {
    alignas(kVectorBytes) typename V::Scalar sums[V::kWidth];
    store(sums, sum_lanes<kColumns>(acc[m]));
    const auto copy = [&](int64_t n) __attribute__((always_inline)) {
      std::memcpy(t.c + m * t.c_stride, sums, size_t(n) * sizeof(typename V::Scalar));
    };
    columns >= kColumns ? copy(kColumns) : copy(columns);
  }
}

template <class S, class O, int kRows>
void dot_rows(int64_t rows, const InPlaceArgs<S, O>& t, int64_t columns) {
  if (rows == kRows) {
    dot_tile<S, O, kRows>(t, columns);
  } else if constexpr (kRows > 1) {
    dot_rows<S, O, kRows - 1>(rows, t, columns);
  }
}

template <class S, class O>
void multiply_in_place(const InPlaceArgs<S, O>& t, int64_t rows, int64_t columns) {
  using V = Vec<typename Operand<O>::Scalar>;
  constexpr int64_t kNearBytes = 16 * 1024;
  const int64_t groups_near = kNearBytes / (kDotRows * (t.depth + 1) * int64_t(sizeof(O)));
  const int64_t block = kDotRows * (groups_near > 1 ? groups_near : 1), blocks = group_count(rows, block);
  for (int64_t b = 0; b < blocks; ++b) {
    const int64_t first = group_begin(rows, blocks, b), count = group_begin(rows, blocks, b + 1) - first;
    const int64_t groups = group_count(count, kDotRows);
    const int64_t step = dot_columns<V>(int(group_begin(count, groups, 1)));  // of all tiles
    for (int64_t n = 0; n < columns; n += step) {
      InPlaceArgs<S, O> at = t;
      at.weight += n * t.weight_stride;
      if (t.bias) at.bias += n;
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t row = group_begin(count, groups, i), end = group_begin(count, groups, i + 1);
        at.a = t.a + (first + row) * t.a_stride;
        at.c = t.c + (first + row) * t.c_stride + n;
        dot_rows<S, O, kDotRows>(end - row, at, columns - n);
      }
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
