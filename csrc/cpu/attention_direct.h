// Products of few rows with keys and values as they lie in memory: each is read once for kDirectGroup rows, and nothing
// is packed.
#pragma once

#include <type_traits>

#include "attention_sequence.h"
#include "vec.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int kDirectGroup = 4;  // rows that share a reading of keys and values

// products[row][key] of kRows rows with kWidth keys from `keys` on, the first `count` of which exist.
template <int kRows, class S, class T>
void dot_keys(const T* const* rows, const S* keys, int64_t stride, int64_t count, int64_t features,
              T* products, int64_t products_stride) {
  using V = Vec<T>;
  constexpr int64_t kWidth = V::kWidth;
  V sums[kRows][kWidth];
  for (int64_t j = 0; j < kWidth; ++j) {
    const S* const key = keys + std::min(j, count - 1) * stride;
    V sum[kRows];
    for (int r = 0; r < kRows; ++r) sum[r] = V(0);
    int64_t i = 0;
    for (; i + kWidth <= features; i += kWidth) {
      const V k = load<V>(key + i);
      for (int r = 0; r < kRows; ++r) sum[r] = fma(load<V>(rows[r] + i), k, sum[r]);
    }
    if (i < features) {
      const V k = load_upto<V>(key + i, features - i);
      for (int r = 0; r < kRows; ++r) sum[r] = fma(load_upto<V>(rows[r] + i, features - i), k, sum[r]);
    }
    for (int r = 0; r < kRows; ++r) sums[r][j] = sum[r];
  }
  for (int r = 0; r < kRows; ++r) {
    store(products + r * products_stride, sums_of_rows(sums[r]));
  }
}

// output[row] += sum over keys of weights[row][key] * values[key], for kVectors vectors of features.
template <int kRows, int kVectors, class S, class T>
void add_values(const T* weights, int64_t weights_stride, Range columns, const S* values, int64_t stride,
                int64_t features, T* output, int64_t output_stride) {
  using V = Vec<T>;
  constexpr int64_t kWidth = V::kWidth;
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) sum[r][i] = V(0);
  }
  for (int64_t j = columns.begin; j < columns.end; ++j) {
    T weight[kRows];
    bool any_zero = false, any = false;
    for (int r = 0; r < kRows; ++r) {
      weight[r] = weights[r * weights_stride + j];
      any_zero |= weight[r] == 0, any |= weight[r] != 0;
    }
    if (!any) continue;  // hidden: may hold anything
    for (int i = 0; i < kVectors; ++i) {
      const int64_t left = features - i * kWidth;
      if (left <= 0) continue;
      const V value = load_upto<V>(values + j * stride + i * kWidth, left);
      for (int r = 0; r < kRows; ++r) {
        const V next = fma(V(weight[r]), value, sum[r][i]);
        sum[r][i] = any_zero && weight[r] == 0 ? sum[r][i] : next;
      }
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int i = 0; i < kVectors; ++i) {
      T* const to = output + r * output_stride + i * kWidth;
      store(to, load<V>(to) + sum[r][i]);
    }
  }
}

template <int kRows = kDirectGroup, class F>
void with_rows(int64_t rows, const F& call) {
  if (rows == kRows) {
    call(std::integral_constant<int, kRows>());
  } else if constexpr (kRows > 1) {
    with_rows<kRows - 1>(rows, call);
  }
}

// products[row][column] = left[row] * keys[column], of which the first `count` exist.
template <class S, class T>
void multiply_directly(const T* left, int64_t rows, const S* keys, int64_t stride, int64_t features,
                       Range columns, int64_t count, T* products, int64_t products_stride) {
  constexpr int64_t kWidth = Vec<T>::kWidth;
  for (int64_t first = 0; first < rows; first += kDirectGroup) {
    with_rows(std::min<int64_t>(rows - first, kDirectGroup), [&](auto group) {
      constexpr int kRows = decltype(group)::value;
      const T* of_row[kRows];
      for (int r = 0; r < kRows; ++r) of_row[r] = left + (first + r) * features;
      for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
        dot_keys<kRows>(of_row, keys + c * stride, stride, std::min(kWidth, count - c), features,
                        products + first * products_stride + c, products_stride);
      }
    });
  }
}

// output[row] += weights[row] * values.
template <class S, class T>
void add_directly(const T* weights, int64_t weights_stride, int64_t rows, Range columns, const S* values,
                  int64_t stride, int64_t features, T* output, int64_t output_stride) {
  constexpr int64_t kWidth = Vec<T>::kWidth;
  for (int64_t first = 0; first < rows; first += kDirectGroup) {
    with_rows(std::min<int64_t>(rows - first, kDirectGroup), [&](auto group) {
      constexpr int kRows = decltype(group)::value;
      const T* const of_rows = weights + first * weights_stride;
      T* const to = output + first * output_stride;
      int64_t i = 0;
      for (; features - i > 3 * kWidth; i += 4 * kWidth) {
        add_values<kRows, 4>(of_rows, weights_stride, columns, values + i, stride, features - i, to + i,
                             output_stride);
      }
      for (; i < features; i += kWidth) {
        add_values<kRows, 1>(of_rows, weights_stride, columns, values + i, stride, features - i, to + i,
                             output_stride);
      }
    });
  }
}

}  // namespace fastseq::FASTSEQ_ISA
