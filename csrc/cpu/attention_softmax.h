// The softmax of a tile of scores, between the two products of the forward pass.
#pragma once

#include "attention_scores.h"
#include "attention_tiles.h"
#include "philox.h"

namespace fastseq::FASTSEQ_ISA {

// A tile of rows on its way.
template <class T>
struct TileState {
  using V = Vec<T>;
  T* products;  // [kQueryTile][kKeyTile]  products, then weights
  T* output;    // [kQueryTile][output_stride]  not yet divided by the sum
  int64_t output_stride;
  T* keep;            // [kKeyTile] of a row: 0 where dropped
  V sum[kQueryTile];  // of weights, lane by lane
  T highest[kQueryTile];
  T rescale[kQueryTile];
  bool touched[kQueryTile];  // of each register tile: whether there is any output yet
  ScoreRow<T> row[kQueryTile];
};

// Products of a row -> scores; returns their maxima lane by lane.
template <ScoreKind kKind, class S, class T>
Vec<T> score_row(const Scores<S, T>& of_call, const ScoreRow<T>& of_row, Range columns, T* x) {
  using V = Vec<T>;
  const Scores<S, T> scores = of_call;  // copies that no store can change
  const ScoreRow<T> row = of_row;
  constexpr int64_t kWidth = V::kWidth;
  V best(-INFINITY), unused(0);
  const auto score = [&](int64_t c) {
    V s = scores.template of<kKind>(row, load<V>(x + c), c, unused);
    if (!Scores<S, T>::all_visible(row, c)) s = Scores<S, T>::within(row, s, c);
    store(x + c, s);
    best = max(best, s);
  };
  if constexpr (kKind != ScoreKind::kPlain) {
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) score(c);
  } else {  // where all is visible, products are scores
    int64_t c = columns.begin;
    for (; c < columns.end && c < row.visible.begin; c += kWidth) score(c);
    for (; c + kWidth <= std::min(columns.end, row.visible.end); c += kWidth)
      best = max(best, load<V>(x + c));
    for (; c < columns.end; c += kWidth) score(c);
  }
  return best;
}
template <class S, class T>
Vec<T> score_row(const Scores<S, T>& scores, const ScoreRow<T>& row, Range columns, T* x) {
  return with_kind(scores.kind(),
                   [&](auto kind) { return score_row<decltype(kind)::value>(scores, row, columns, x); });
}

// Scores of a row -> weights relative to that of the highest, in the operand's type from the row's beginning on, zero where not
// kept. Returns their sum, before any is dropped, lane by lane.
template <class O, bool kDrop, class T>
Vec<T> weigh_row(T factor, T highest, Range columns, const T* keep, T* x) {
  using V = Vec<T>;
  O* const weights = reinterpret_cast<O*>(x);
  V sum(0);
  for (int64_t c = columns.begin; c < columns.end; c += V::kWidth) {
    const V weight = exp2((load<V>(x + c) - highest) * factor);
    sum = sum + weight;
    if constexpr (kDrop) {
      store_operand(weights + c, weight * load<V>(keep + c));
    } else {
      store_operand(weights + c, weight);
    }
  }
  return sum;
}

// Products of all rows of a tile -> weights, with the rows' maxima, sums and what their output has to be multiplied by.
template <class O, class S, class T>
void softmax_tile(const Scores<S, T>& scores, const Dropout& dropout, int64_t first_head,
                  const RowTile<O>& tile, const Range* columns, int64_t first_key, TileState<T>& state) {
  using V = Vec<T>;
  constexpr int64_t kWidth = V::kWidth, kKeyTile = Tiles<O>::kKeyTile;
  const T factor = scores.factor();
  Range of_row[kQueryTile];
  for (int64_t g = 0; g < tile.groups; ++g) {
    for (int64_t r = tile.first_row[g]; r < tile.first_row[g + 1]; ++r) of_row[r] = columns[g];
  }
  for (int64_t first = 0; first < tile.rows; first += kWidth) {
    const int64_t count = std::min(tile.rows - first, kWidth);
    V best[kWidth];
    for (int64_t i = 0; i < kWidth; ++i) {
      best[i] = V(-INFINITY);
      if (i < count) {
        T* const x = state.products + (first + i) * kKeyTile;
        best[i] = score_row(scores, state.row[first + i], of_row[first + i], x);
      }
    }
    const V before = load_upto<V>(state.highest + first, count), highest = max(before, maxima_of_rows(best));
    // The difference first: the weight of the highest is 1 then, however large its score. Without any visible key so
    // far, all weights are exp2(-inf - 0).
    const V shift = select<T>(highest.v == V(-INFINITY).v, V(0), highest);
    T shifts[kWidth];
    store(shifts, shift);
    store_upto(state.highest + first, highest, count);
    store_upto(state.rescale + first, exp2((before - shift) * factor), count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t r = first + i;
      T* const x = state.products + r * kKeyTile;
      const Range c = of_row[r];
      V sum;
      if (dropout.active) {
        dropout.keep(first_head + tile.head[r], tile.query[r], first_key + c.begin, c.end - c.begin,
                     state.keep + c.begin);
        sum = weigh_row<O, true>(factor, shifts[i], c, state.keep, x);
      } else {
        sum = weigh_row<O, false>(factor, shifts[i], c, state.keep, x);
      }
      state.sum[r] = fma(state.sum[r], V(state.rescale[r]), sum);
    }
  }
}

// Of the rows of a tile what has been summed up so far, in units of their highest weight: state.output, or another sum.
template <class O, class T>
void rescale_output(const RowTile<O>& rows, const TileState<T>& state, T* sums) {
  using V = Vec<T>;
  for (int64_t g = 0; g < rows.groups; ++g) {
    for (int64_t r = rows.first_row[g]; r < rows.first_row[g + 1] && state.touched[g]; ++r) {
      if (state.rescale[r] == 1) continue;
      T* const output = sums + r * state.output_stride;
      for (int64_t i = 0; i < state.output_stride; i += V::kWidth) {
        store(output + i, load<V>(output + i) * V(state.rescale[r]));
      }
    }
  }
}

}  // namespace fastseq::FASTSEQ_ISA
