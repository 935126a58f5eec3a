// Products of the backward pass into the gradients of keys and values: a tile of rows by keys, transposed, times rows.
#pragma once

#include "attention_tiles.h"

namespace fastseq::FASTSEQ_ISA {

// Element of a tile of operands: [kQueryTile][kKeyTile], of pairs a pair of rows in the even one's place.
template <class O>
typename Tiles<O>::T element(const typename Tiles<O>::T* tile, int64_t row, int64_t column) {
  constexpr int64_t kKeyTile = Tiles<O>::kKeyTile;
  if constexpr (Tiles<O>::kPair == 1) {
    return tile[row * kKeyTile + column];
  } else {
    const O* const pair = reinterpret_cast<const O*>(tile + row / 2 * 2 * kKeyTile);
    return widen(pair[column * 2 + row % 2]);
  }
}

// sums[key] += tile^T right: rows of the result are keys, and only rows that see one of a group of keys count.
template <class O>
void add_columns(const RowTile<O>& rows, const Range* columns, Range all, const typename Tiles<O>::T* tile,
                 const O* right, int64_t right_columns, typename Tiles<O>::T* sums) {
  using K = Tiles<O>;
  constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;
  constexpr int kPair = K::kPair;
  const PanelCut cut{int(right_columns / kWidth), kPanelVectors};
  const int64_t keys = all.end - all.begin, groups = group_count(keys, K::kRowGroup);
  const int64_t padded_rows = round_up(rows.rows, kPair);
  for (int64_t n = 0; n < groups; ++n) {
    const int64_t begin = all.begin + group_begin(keys, groups, n),
                  end = all.begin + group_begin(keys, groups, n + 1);
    Range seen{padded_rows, 0};
    for (int64_t g = 0; g < rows.groups; ++g) {
      if (columns[g].empty() || columns[g].end <= begin || columns[g].begin >= end) continue;
      seen = {std::min(seen.begin, round_down(rows.first_row[g], kPair)),
              round_up(rows.first_row[g + 1], kPair)};
    }
    if (seen.empty()) continue;
    for (int p = 0; p < cut.count(); ++p) {
      const int64_t width = cut.size(p) * kWidth;
      TileArgs<O> t = {};
      t.k = (seen.end - seen.begin) / kPair;
      t.a = reinterpret_cast<const typename Operand<O>::Element*>(tile + seen.begin * kKeyTile + begin);
      t.row_stride = 1, t.k_stride = kKeyTile * kPair;
      t.panel = right + padded_rows * cut.begin(p) * kWidth + seen.begin * width;
      t.panel_stride = width * kPair;
      t.c = sums + begin * right_columns + cut.begin(p) * kWidth;
      t.c_stride = right_columns;
      t.init = t.c, t.init_stride = t.c_stride;
      multiply_rows(end - begin, cut.size(p), t);
    }
  }
}

// The share of rows that hold a NaN or an infinity.
template <class O>
void add_special_columns(const SpecialRows& special, Range all, const typename Tiles<O>::T* tile,
                         const O* left, int64_t stride, int64_t features, typename Tiles<O>::T* sums,
                         int64_t sums_stride) {
  add_special_rows(special, all.end - all.begin, left, stride, features, sums + all.begin * sums_stride,
                   sums_stride,
                   [&](int64_t key, int64_t row) { return element<O>(tile, row, all.begin + key); });
}

}  // namespace fastseq::FASTSEQ_ISA
