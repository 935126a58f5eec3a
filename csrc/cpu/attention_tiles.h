// What the forward and the backward pass of attention share: packed operands, tiles of rows, their products.
//
// Both work on tiles of scores, kQueryTile rows by kKeyTile keys, which lie in the second-level cache. A row is a
// query of one of the query heads that share a key head. Rows are computed in groups of kRowGroup, the rows of a
// register tile, over the keys that a row of the group can see, in whole vectors.
#pragma once

#include <algorithm>
#include <cstring>

#include "attention_scores.h"
#include "attention_sequence.h"
#include "gemm.h"

namespace fastseq::FASTSEQ_ISA {

template <class O>
struct Tiles {
  using T = typename Operand<O>::Scalar;
  using V = Vec<T>;
  static constexpr int kPair = Operand<O>::kPair;
  static constexpr int64_t kWidth = V::kWidth;
  static constexpr int64_t kPanelKeys = kPanelVectors * kWidth;
  static constexpr int64_t kKeyTile = 256 / kPanelKeys * kPanelKeys;
  static constexpr int64_t kRowGroup = tile_rows(kPanelVectors);
  static constexpr int64_t kMostGroups = (kQueryTile + kRowGroup - 1) / kRowGroup;
};

// ---- products ----

// c[rows][vectors] = init + a * panel for one row group; the panel may be wider than what is used of it. Sums over
// features, of which the exponential magnifies errors, are short chains.
constexpr int64_t kScoreDepth = 64;
template <class O, int64_t kMostDepth = kDepth>
void multiply_rows(int64_t rows, int64_t vectors, TileArgs<O> t) {
  const int64_t depth = t.k;
  for (int64_t k = 0;; k += kMostDepth) {
    t.k = std::min(kMostDepth, depth - k);
    multiply_group<O, kPanelVectors>(int(vectors), int(rows), t);
    if (k + kMostDepth >= depth) return;
    t.a += kMostDepth * t.k_stride;
    t.panel += kMostDepth * t.panel_stride;
    t.init = t.c, t.init_stride = t.c_stride;
  }
}

// ---- packed operands ----

// Rows that hold a NaN or an infinity, of keys or values. A weight of zero times such an element must be zero, so the
// packed row is zero, and the row's share is added where its weight is not zero.
struct SpecialRows {
  int64_t count;
  int32_t* row;  // as many as there are rows
};

template <class T>
inline bool all_finite(Vec<T> sum_of_differences) {
  return sum_of_lanes(sum_of_differences) == 0;
}

// [rows][features], features padded with zeros to whole vectors, in panels of at most kPanelVectors vectors, one after
// another; pairs of rows interleaved for dot products of pairs. Rows from `valid` on are zero; `rows` is even.
template <class O, class S>
void pack_right(const S* matrix, int64_t row_stride, int64_t valid, int64_t rows, int64_t features, O* packed,
                SpecialRows& special) {
  using V = typename Tiles<O>::V;
  constexpr int64_t kWidth = V::kWidth;
  constexpr int kPair = Operand<O>::kPair;
  const PanelCut cut{int(group_count(features, kWidth)), kPanelVectors};
  special.count = 0;
  V difference(0);
  const auto load_row = [&](int64_t row, int64_t column) {
    if (row >= valid || column >= features) return V(0);
    const V x = load_upto<V>(matrix + row * row_stride + column, features - column);
    difference = difference + (x - x);
    return x;
  };
  O* to = packed;
  for (int p = 0; p < cut.count(); ++p) {
    for (int64_t row = 0; row < rows; row += kPair) {
      for (int i = 0; i < cut.size(p); ++i, to += kWidth * kPair) {
        const int64_t column = (cut.begin(p) + i) * kWidth;
        if constexpr (kPair == 1) {
          store(to, load_row(row, column));
        } else {
          const V even = load_row(row, column);
          store_pair(to, even, load_row(row + 1, column));
        }
      }
    }
  }
  if (all_finite(difference)) return;
  // Rare: find the rows, and make them zero.
  for (int64_t row = 0; row < valid; ++row) {
    difference = V(0);
    for (int64_t column = 0; column < features; column += kWidth) load_row(row, column);
    if (all_finite(difference)) continue;
    special.row[special.count++] = int32_t(row);
    O* panel = packed;
    for (int p = 0; p < cut.count(); ++p) {
      const int64_t columns = cut.size(p) * kWidth;
      O* const at = panel + row / kPair * columns * kPair + row % kPair;
      for (int64_t i = 0; i < columns; ++i) at[i * kPair] = O{};
      panel += rows * columns;
    }
  }
}

// Panels of kPanelKeys keys, transposed: [panel][feature][key].
template <class O, class S>
void pack_keys(const S* matrix, int64_t row_stride, int64_t keys, int64_t features, O* packed) {
  constexpr int64_t kWidth = Tiles<O>::kWidth, kPanelKeys = Tiles<O>::kPanelKeys;
  constexpr int kPair = Operand<O>::kPair;
  for (int64_t key = 0; key < keys; key += kPanelKeys, packed += pairs<O>(features) * kPair * kPanelKeys) {
    for (int64_t i = 0; i < kPanelKeys; i += kWidth) {
      const int64_t count = keys - key - i;
      pack_transposed<O>(matrix + (count > 0 ? key + i : 0) * row_stride, row_stride, count, features,
                         packed + i * kPair, kPanelKeys);
    }
  }
}

// A row as the left side of a product: in the operand's type, features padded to an even number.
template <class O, class S>
void copy_row(const S* row, int64_t features, O* to) {
  if constexpr (Operand<O>::kPair == 2) {
    std::memcpy(to, row, size_t(features) * sizeof(O));
    if (features % 2) to[features] = O{};
  } else {
    using V = Vec<O>;
    for (int64_t i = 0; i < features; i += V::kWidth)
      store_upto(to + i, load_upto<V>(row + i, features - i), features - i);
  }
}

// c[row] += a[row][special] * matrix[special], where a is not zero. weight(row, special row) gives a.
template <class S, class T, class Weight>
void add_special_rows(const SpecialRows& special, int64_t rows, const S* matrix, int64_t row_stride,
                      int64_t features, T* c, int64_t c_stride, const Weight& weight) {
  for (int64_t n = 0; n < special.count; ++n) {
    const S* const from = matrix + special.row[n] * row_stride;
    for (int64_t row = 0; row < rows; ++row) {
      const T factor = weight(row, special.row[n]);
      if (factor == 0) continue;
      for (int64_t i = 0; i < features; ++i) c[row * c_stride + i] += factor * widen(from[i]);
    }
  }
}

// ---- tiles of rows ----

// How the rows of a unit are cut into tiles: the rows of several short heads, or a part of those of a long one.
struct RowTiles {
  int64_t queries, group_heads, tile_heads, head_tiles;

  RowTiles(const Sequence& s, int64_t group_heads)
      : queries(s.queries),
        group_heads(group_heads),
        tile_heads(std::clamp<int64_t>(kQueryTile / std::max<int64_t>(queries, 1), 1, group_heads)),
        head_tiles(group_count(queries, kQueryTile)) {}

  int64_t count() const { return group_count(group_heads, tile_heads) * head_tiles; }
  Range rows(int64_t tile) const {
    const int64_t head = tile / head_tiles * tile_heads, i = tile % head_tiles;
    if (head_tiles == 1) return {head * queries, std::min(head + tile_heads, group_heads) * queries};
    return {head * queries + group_begin(queries, head_tiles, i),
            head * queries + group_begin(queries, head_tiles, i + 1)};
  }
};

// Some rows of a unit, and their register tiles. Row r is query r % queries of the unit's query head
// r / queries.
template <class O>
struct RowTile {
  using T = typename Tiles<O>::T;
  static constexpr int64_t kRowGroup = Tiles<O>::kRowGroup, kWidth = Tiles<O>::kWidth;

  int64_t rows, groups;
  int64_t head[kQueryTile], query[kQueryTile];
  Range visible[kQueryTile];  // keys
  Range all;                  // keys that any row sees
  int64_t first_row[Tiles<O>::kMostGroups + 1];
  Range seen[Tiles<O>::kMostGroups];  // keys that any row of the group sees

  RowTile(const Sequence& s, int64_t first_head, Range of_unit) {
    const int64_t begin = of_unit.begin;
    rows = of_unit.end - begin;
    groups = group_count(rows, kRowGroup);
    all = {0, 0};
    int64_t h = first_head + begin / s.queries, i = begin % s.queries;
    for (int64_t r = 0; r < rows; ++r) {
      head[r] = h, query[r] = i;
      visible[r] = s.visible(i);
      if (++i == s.queries) ++h, i = 0;
    }
    for (int64_t g = 0; g <= groups; ++g) first_row[g] = group_begin(rows, groups, g);
    for (int64_t g = 0; g < groups; ++g) {
      seen[g] = {0, 0};
      for (int64_t r = first_row[g]; r < first_row[g + 1]; ++r) seen[g] = join(seen[g], visible[r]);
      all = join(all, seen[g]);
    }
  }

  // Columns of a tile of `keys` keys from first_key on that a group computes, in whole vectors.
  Range columns(int64_t group, int64_t first_key, int64_t keys) const {
    const int64_t begin = std::max<int64_t>(seen[group].begin - first_key, 0);
    const int64_t end = std::min(seen[group].end - first_key, keys);
    if (begin >= end) return {0, 0};
    return {round_down(begin, kWidth), round_up(end, kWidth)};
  }
};

// products[rows][kKeyTile] = rows of a times a tile of transposed keys, where a group's columns say, but for hidden
// panels; added to what is there if kAdd. ahead(group, columns) is called before each register tile, to ask for what its
// scores will need.
template <class O, bool kAdd = false, class Ahead>
void multiply_keys(const RowTile<O>& tile, const Range* columns, const bool* hidden, const O* left,
                   int64_t left_stride, int64_t features, const O* panels, typename Tiles<O>::T* products,
                   const Ahead& ahead) {
  using K = Tiles<O>;
  const int64_t panel_size = pairs<O>(features) * K::kPair * K::kPanelKeys;
  for (int64_t first = 0, p = 0; first < K::kKeyTile; first += K::kPanelKeys, ++p, panels += panel_size) {
    if (hidden[p]) continue;
    for (int64_t g = 0; g < tile.groups; ++g) {
      const int64_t begin = std::max(columns[g].begin, first),
                    end = std::min(columns[g].end, first + K::kPanelKeys);
      if (begin >= end) continue;
      ahead(g, Range{begin, end});
      TileArgs<O> t = {};
      t.k = pairs<O>(features);
      t.a = reinterpret_cast<const typename Operand<O>::Element*>(left + tile.first_row[g] * left_stride);
      t.row_stride = left_stride / K::kPair, t.k_stride = 1;
      t.panel = panels + (begin - first) * K::kPair;
      t.panel_stride = K::kPanelKeys * K::kPair;
      t.c = products + tile.first_row[g] * K::kKeyTile + begin;
      t.c_stride = K::kKeyTile;
      if constexpr (kAdd) t.init = t.c, t.init_stride = t.c_stride;
      multiply_rows<O, kScoreDepth>(tile.first_row[g + 1] - tile.first_row[g], (end - begin) / K::kWidth, t);
    }
  }
}

// Finds the panels of a tile of keys that the mask hides from all rows, of which row_of(r) is what row r knows.
// Returns the columns from the first panel to the last that somebody sees.
template <class O, class S, class T, class RowOf>
Range find_hidden(const Scores<S, T>& scores, int64_t rows, const RowOf& row_of, bool* hidden) {
  constexpr int64_t kPanelKeys = Tiles<O>::kPanelKeys;
  Range shown{0, 0};
  for (int64_t p = 0; p < Tiles<O>::kKeyTile / kPanelKeys; ++p) {
    const Range panel{p * kPanelKeys, (p + 1) * kPanelKeys};
    hidden[p] = true;
    for (int64_t r = 0; r < rows && hidden[p]; ++r) hidden[p] = scores.hides(row_of(r), panel);
    if (!hidden[p]) shown = join(shown, panel);
  }
  return shown;
}

// What rows know of a tile of `keys` keys from first_key on, and which columns they compute. False if no row sees any of
// them. hidden[panel] is set for panels that the mask hides from all rows; those at the edges are taken off the columns.
template <class O, class P, class S, class T>
bool look(const AttentionArgs& a, const Scores<S, T>& scores, const Sequence& s, const RowTile<P>& rows,
          int64_t first_key, int64_t keys, Range* columns, bool* hidden, ScoreRow<T>* row) {
  bool any = false;
  for (int64_t g = 0; g < rows.groups; ++g) {
    columns[g] = rows.columns(g, first_key, keys);
    any |= !columns[g].empty();
  }
  if (!any) return false;
  for (int64_t r = 0; r < rows.rows; ++r) {
    row[r] = scores.row(a, s, rows.head[r], rows.query[r], first_key, rows.visible[r]);
    row[r].visible.end = std::min(row[r].visible.end, keys);
  }
  if (!scores.masked()) return true;
  const Range shown =
      find_hidden<O>(scores, rows.rows, [&](int64_t r) -> const ScoreRow<T>& { return row[r]; }, hidden);
  for (int64_t g = 0; g < rows.groups; ++g) {
    columns[g] = {std::max(columns[g].begin, shown.begin), std::min(columns[g].end, shown.end)};
    if (columns[g].empty()) columns[g] = {0, 0};
  }
  return !shown.empty();
}

// Of a register tile's rows the masks, asked for ahead of its products. row_of(r) is what row r knows.
template <class O, class S, class T, class RowOf>
auto prefetch_masks(const Scores<S, T>& scores, const RowTile<O>& rows, const RowOf& row_of) {
  return [&](int64_t g, Range columns) {
    if (!scores.masked()) return;
    for (int64_t r = rows.first_row[g]; r < rows.first_row[g + 1]; ++r) scores.prefetch(row_of(r), columns);
  };
}

// The rows of a tile as the left side of a product.
template <class S, class P>
void copy_rows(const HeadTensor& from, int64_t features, const Sequence& s, const RowTile<P>& rows, P* left,
               int64_t stride) {
  for (int64_t r = 0; r < rows.rows; ++r)
    copy_row(s.template query_row<const S>(from, rows.head[r], rows.query[r]), features, left + r * stride);
}

// A matrix of keys or values as the right side of a product, from one tile of keys on.
template <class S, class O>
struct RightSide {
  const O* packed;  // by pack_right
  int64_t columns;  // of it
  const SpecialRows& special;
  const S* matrix;
  int64_t row_stride, features;  // of the matrix
};

// sums[row] += left[row] * right, over the columns of each group of rows, of `count` keys in all. left is a tile of
// operands, its rows left_stride elements apart. A group that is not yet `touched` begins with zero; null: all are.
template <class S, class O>
void add_weighted(const RowTile<O>& tile, const Range* columns, int64_t count, const O* left,
                  int64_t left_stride, const RightSide<S, O>& right, typename Tiles<O>::T* sums,
                  const bool* touched) {
  using K = Tiles<O>;
  using T = typename K::T;
  const PanelCut cut{int(right.columns / K::kWidth), kPanelVectors};
  const O* panel = right.packed;
  for (int p = 0; p < cut.count(); ++p) {
    const int64_t width = cut.size(p) * K::kWidth;
    for (int64_t g = 0; g < tile.groups; ++g) {
      if (columns[g].empty()) continue;
      const int64_t row = tile.first_row[g];
      TileArgs<O> t = {};
      t.k = pairs<O>(std::min(columns[g].end, count) - columns[g].begin);
      t.a =
          reinterpret_cast<const typename Operand<O>::Element*>(left + row * left_stride + columns[g].begin);
      t.row_stride = left_stride / K::kPair, t.k_stride = 1;
      t.panel = panel + columns[g].begin * width;
      t.panel_stride = width * K::kPair;
      t.c = sums + row * right.columns + cut.begin(p) * K::kWidth;
      t.c_stride = right.columns;
      if (!touched || touched[g]) t.init = t.c, t.init_stride = t.c_stride;
      multiply_rows(tile.first_row[g + 1] - row, cut.size(p), t);
    }
    panel += round_up(count, K::kWidth) * width;
  }
  for (int64_t g = 0; g < tile.groups && right.special.count > 0; ++g) {
    const int64_t row = tile.first_row[g];
    add_special_rows(right.special, tile.first_row[g + 1] - row, right.matrix, right.row_stride,
                     right.features, sums + row * right.columns, right.columns, [&](int64_t r, int64_t key) {
                       if (key < columns[g].begin || key >= columns[g].end) return T(0);
                       return T(widen(left[(row + r) * left_stride + key]));
                     });
  }
}

}  // namespace fastseq::FASTSEQ_ISA
