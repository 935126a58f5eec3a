// Gradients of weights and biases from a chunk of rows: a^T b and column sums of a, dealt out among threads.
//
// Each element is one thread's and grows in the order of the chunks, so that its bits are the same every run.
#pragma once

#include "recurrent_common.h"

namespace fastseq::FASTSEQ_ISA {

constexpr int64_t kChunkDepth = 1024;  // rows that are packed, and multiplied, at a time, at most

template <class O>
struct TransposedProduct {
  using Scalar = typename Operand<O>::Scalar;
  const O* a;  // [depth][m], row stride a_stride: columns of pre-activation gradients
  int64_t a_stride;
  int64_t m;
  const Panels<O>* right;  // b [depth][n], packed
  Scalar* sum;             // [m][n]
  bool add;                // to what is there; else it is overwritten
};

// This thread's share of sum (+)= a^T b. `left` is its room for a block of a^T, where kPackLeft.
template <class O>
void add_transposed_product(const TransposedProduct<O>& p, int64_t depth, int rank, int ranks,
                            typename Operand<O>::Element* left) {
  using Scalar = typename Operand<O>::Scalar;
  using V = Vec<Scalar>;
  const int64_t n = p.right->blocks.n, parts = round_up(group_count(p.m, kBlockRows), ranks);
  TileBuffer<Scalar> sums;
  for (int64_t part = rank; part < parts; part += ranks) {
    const Range own = share(p.m, parts, part);
    if (own.size() == 0) continue;
    TileArgs<O> tile{
        pairs<O>(depth), elements(p.a + own.begin), 1, p.a_stride, nullptr, sums.data, 0, nullptr, 0};
    if constexpr (kPackLeft<O>) {
      pack_left(p.a + own.begin, p.a_stride, own.size(), depth, left);
      tile.a = left, tile.k_stride = 0;
    }
    for (int64_t j = 0; j < p.right->blocks.count(); ++j) {
      const int64_t columns = p.right->columns(j), valid = p.right->blocks.size(j);
      Scalar* const to = p.sum + own.begin * n + p.right->blocks.begin(j);
      if (p.add) {  // the sums arrive from memory while the product runs
        for (int64_t row = 0; row < own.size(); ++row) {
          for (int64_t i = 0; i < valid; i += V::kWidth) __builtin_prefetch(to + row * n + i, 1);
        }
      }
      tile.panel = p.right->at(j), tile.c_stride = columns;
      multiply<O>(p.right->cut(j), own.size(), tile);
      for_each_vector<V::kWidth>(own.size(), valid, [&](int64_t row, int64_t i, int64_t count) FS_BODY {
        V sum = load<V>(sums.data + row * columns + i);
        Scalar* const at = to + row * n + i;
        if (p.add) sum = sum + load_upto<V>(at, count);
        store_upto(at, sum, count);
      });
    }
  }
}

// This thread's share of sum[column] += column sums of rows [depth][columns]; columns are whole vectors. Sums
// of a few rows in registers, those of all rows in double: tens of thousands of rows may go into one.
template <class O>
void add_column_sums(const O* rows, int64_t row_stride, int64_t depth, int64_t columns, int rank, int ranks,
                     double* sum) {
  using Scalar = typename Operand<O>::Scalar;
  using V = Vec<Scalar>;
  constexpr int64_t kFewRows = 32, kWide = kPanelVectors * V::kWidth;
  for (int64_t column = rank * kWide; column < columns; column += ranks * kWide) {
    const int64_t n = least(kWide, columns - column);
    for (int64_t begin = 0; begin < depth; begin += kFewRows) {
      V few[kPanelVectors];
      for (V& sum : few) sum = V(0);
      for (int64_t row = begin; row < least(begin + kFewRows, depth); ++row) {
        const O* const from = rows + row * row_stride + column;
        for (int64_t i = 0; i * V::kWidth < n; ++i) few[i] = few[i] + load<V>(from + i * V::kWidth);
      }
      Scalar values[kWide];
      for (int64_t i = 0; i < kPanelVectors; ++i) store(values + i * V::kWidth, few[i]);
      for (int64_t i = 0; i < n; ++i) sum[column + i] += values[i];
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
