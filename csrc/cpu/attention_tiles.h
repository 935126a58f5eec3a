// What the forward and the backward pass of attention share: sequences, packed operands, scores.
//
// Both work on tiles of scores, kQueryTile rows by kKeyTile keys, which lie in the second-level cache. A row is a
// query of one of the query heads that share a key head. Rows are computed in groups of kRowGroup, the rows of a
// register tile, over the keys that a row of the group can see, in whole vectors.
#pragma once

#include <algorithm>
#include <cmath>
#include <utility>

#include "../fastseq.h"
#include "attention_plan.h"
#include "gemm.h"
#include "philox.h"

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

inline int64_t round_up(int64_t n, int64_t size) { return (n + size - 1) / size * size; }
inline int64_t round_down(int64_t n, int64_t size) { return n / size * size; }

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// ---- sequences ----

struct Range {
  int64_t begin, end;
  bool empty() const { return begin >= end; }
};
inline Range join(Range a, Range b) {
  if (a.empty() || b.empty()) return a.empty() ? b : a;
  return {std::min(a.begin, b.begin), std::max(a.end, b.end)};
}

constexpr int64_t kFar = int64_t(1) << 60;  // farther than any key, and no sum with it overflows

// One sequence of the batch, its first rows in the tensors, and what its queries see.
struct Sequence {
  int64_t index;
  int64_t b;  // the index where tensors are not packed, else 0
  int64_t queries, keys, first_query, first_key, offset, left, right;

  Sequence(const AttentionArgs& a, int64_t index)
      : index(index),
        b(a.cu_seqlens_q ? 0 : index),
        first_query(a.cu_seqlens_q ? a.cu_seqlens_q[index] : 0),
        first_key(a.cu_seqlens_k ? a.cu_seqlens_k[index] : 0),
        left(std::min(a.left, kFar)),
        right(std::min(a.right, kFar)) {
    const AttentionLengths lengths(a, index);
    queries = lengths.queries, keys = lengths.keys;
    offset = a.bottom_right ? keys - queries : 0;
  }

  // The keys that query i can see as far as lengths, causality and window go.
  Range visible(int64_t i) const {
    const int64_t at = i + offset;
    Range r{0, keys};
    if (left >= 0) r.begin = std::clamp<int64_t>(at - left, 0, keys);
    if (right >= 0) r.end = std::clamp<int64_t>(at + right + 1, 0, keys);
    return r;
  }

  template <class S>
  S* query_row(const HeadTensor& t, int64_t head, int64_t i) const {
    return static_cast<S*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_query + i) * t.stride[2];
  }
  template <class S>
  S* key_row(const HeadTensor& t, int64_t head, int64_t j) const {
    return static_cast<S*>(t.data) + b * t.stride[0] + head * t.stride[1] + (first_key + j) * t.stride[2];
  }
  template <class T>
  T* of_query(const HeadRows& t, int64_t head, int64_t i) const {
    return static_cast<T*>(t.data) + b * t.stride[0] + head * t.stride[1] + first_query + i;
  }
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

// ---- scores ----

// What a row needs to know for its scores in one tile of keys.
template <class T>
struct ScoreRow {
  Range visible;     // columns of the tile
  const void* mask;  // of the row, at the tile's first key
  T slope;           // of ALiBi, times log2(e)
  T distance;        // of the query's position from the tile's first key
};

enum class ScoreKind { kPlain, kBool, kSame, kFloat32, kAny };

// Calls body with a kind of scores as a constant.
template <class Body>
auto with_kind(ScoreKind kind, const Body& body) {
  switch (kind) {
    case ScoreKind::kPlain:
      return body(std::integral_constant<ScoreKind, ScoreKind::kPlain>());
    case ScoreKind::kBool:
      return body(std::integral_constant<ScoreKind, ScoreKind::kBool>());
    case ScoreKind::kSame:
      return body(std::integral_constant<ScoreKind, ScoreKind::kSame>());
    case ScoreKind::kFloat32:
      return body(std::integral_constant<ScoreKind, ScoreKind::kFloat32>());
    default:
      return body(std::integral_constant<ScoreKind, ScoreKind::kAny>());
  }
}

// Scores, of which factor() makes units of log2: base-2 exponentials of these are the weights.
template <class S, class T>
class Scores {
 public:
  using V = Vec<T>;
  static constexpr int64_t kWidth = V::kWidth;

  explicit Scores(const AttentionArgs& a)
      : scale_(T(a.scale * kLog2E)),
        mask_scale_(T(1 / a.scale)),
        cap_(T(a.softcap * kLog2E)),
        cap_scale_(a.softcap > 0 ? T(a.scale / a.softcap) : T(0)),
        mask_(a.mask),
        alibi_(a.alibi.data != nullptr) {}

  bool masked() const { return mask_.kind != MaskKind::kNone; }
  bool capped() const { return cap_ != 0; }

  ScoreRow<T> row(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t query, int64_t first_key,
                  Range visible) const {
    ScoreRow<T> r = {};
    r.visible = {visible.begin - first_key, visible.end - first_key};
    if (masked()) r.mask = mask_at(s.b, head, query, first_key);
    if (alibi_) {
      const T* const slopes = static_cast<const T*>(a.alibi.data);
      r.slope = T(slopes[s.index * a.alibi.stride[0] + head * a.alibi.stride[1]] * kLog2E);
      r.distance = T(query + s.offset - first_key);
    }
    return r;
  }

  // Asks for what will be read of a row's mask: each row lies on other pages, too short for the hardware to foresee.
  void prefetch(const ScoreRow<T>& row, Range columns) const {
    const int64_t size = mask_.kind == MaskKind::kBool   ? 1
                         : mask_.kind == MaskKind::kSame ? sizeof(S)
                                                         : sizeof(float);
    if (mask_.stride[3] != 1 || mask_.stride[2] == 0) return;
    const char* const p = static_cast<const char*>(row.mask);
    const int64_t end = std::min(columns.end, row.visible.end) * size;
    for (int64_t at = columns.begin * size; at < end; at += kLineBytes) __builtin_prefetch(p + at, 0, 2);
  }

  // Whether the mask hides all of these columns from this row, as far as it could see them.
  bool hides(const ScoreRow<T>& row, Range columns) const {
    const int64_t begin = std::max(columns.begin, row.visible.begin);
    const int64_t end = std::min(columns.end, row.visible.end);
    const int64_t step = mask_.stride[3] == 0 ? std::max<int64_t>(end - begin, 1) : 1;
    for (int64_t i = begin; i < end; i += step) {
      if (is_visible(row.mask, i * mask_.stride[3])) return false;
    }
    return true;
  }

  // Whether nothing but a mask makes scores of products, which then stay in their units. Under a very small scale a mask
  // in those might overflow.
  bool in_units_of_products() const { return cap_ == 0 && !alibi_ && scale_ > T(1) / (1 << 20); }
  // What makes scores of products: nothing, or a mask with a key's element next to the other, or anything.
  ScoreKind kind() const {
    if (!in_units_of_products() || (masked() && mask_.stride[3] != 1)) return ScoreKind::kAny;
    if (!masked()) return ScoreKind::kPlain;
    return mask_.kind == MaskKind::kBool   ? ScoreKind::kBool
           : mask_.kind == MaskKind::kSame ? ScoreKind::kSame
                                           : ScoreKind::kFloat32;
  }

  T factor() const { return in_units_of_products() ? scale_ : T(1); }

  // The score of a vector of products from this column on; -inf where the key is not visible. If the products are
  // capped, `kept` becomes the derivative of the cap.
  template <ScoreKind kKind>
  V of(const ScoreRow<T>& row, V product, int64_t column, V& kept) const {
    const V hidden(-INFINITY);
    const int64_t n = row.visible.end - column;
    if constexpr (kKind == ScoreKind::kPlain) {
      return product;
    } else if constexpr (kKind == ScoreKind::kBool) {
      return select_by_bytes<T>(static_cast<const uint8_t*>(row.mask) + column, n, product, hidden);
    } else if constexpr (kKind == ScoreKind::kSame) {
      return fma_or_lowest(load_next<S>(row.mask, column, n), V(mask_scale_), product);
    } else if constexpr (kKind == ScoreKind::kFloat32) {
      if constexpr (sizeof(T) == sizeof(float))
        return fma_or_lowest(load_next<float>(row.mask, column, n), V(mask_scale_), product);
      return hidden;  // no float masks beside float64
    } else {
      V x;
      if (in_units_of_products()) {
        x = product;
      } else if (capped()) {
        const V t = tanh(product * cap_scale_);
        kept = fma(-t, t, V(1));
        x = t * cap_;
      } else {
        x = product * scale_;
      }
      if (alibi_) x = fma(V(-row.slope), magnitude(V(row.distance - T(column)) - lane_numbers<T>()), x);
      if (mask_.kind == MaskKind::kBool) return select_bool(row.mask, column, n, x, hidden);
      if (!masked()) return x;
      return fma_or_lowest(load_mask(row.mask, column, n),
                           V(in_units_of_products() ? mask_scale_ : T(kLog2E)), x);
    }
  }

  // The same for columns that are not all within the row's visible ones.
  static V within(const ScoreRow<T>& row, V x, int64_t column) {
    const V at = lane_numbers<T>() + T(column);
    const T most = T(1 << 20), begin = T(std::max<int64_t>(row.visible.begin, 0));
    const T end = row.visible.end > (1 << 20) ? most : T(std::max<int64_t>(row.visible.end, 0));
    return select<T>((at.v >= begin) & (at.v < end), x, V(-INFINITY));
  }
  static bool all_visible(const ScoreRow<T>& row, int64_t column) {
    return column >= row.visible.begin && column + kWidth <= row.visible.end;
  }

 private:
  const void* mask_at(int64_t b, int64_t head, int64_t query, int64_t key) const {
    const int64_t* const s = mask_.stride;
    const int64_t at = b * s[0] + head * s[1] + query * s[2] + key * s[3];
    switch (mask_.kind) {
      case MaskKind::kBool:
        return static_cast<const uint8_t*>(mask_.data) + at;
      case MaskKind::kSame:
        return static_cast<const S*>(mask_.data) + at;
      default:
        return static_cast<const float*>(mask_.data) + at;
    }
  }

  bool is_visible(const void* mask, int64_t i) const {
    switch (mask_.kind) {
      case MaskKind::kBool:
        return static_cast<const uint8_t*>(mask)[i] != 0;
      case MaskKind::kSame:
        return widen(static_cast<const S*>(mask)[i]) != -INFINITY;
      default:
        return static_cast<const float*>(mask)[i] != -INFINITY;
    }
  }

  template <class M>
  static V load_next(const void* mask, int64_t column, int64_t n) {
    const M* const p = static_cast<const M*>(mask) + column;
    return n >= kWidth ? load<V>(p) : load_strided<V>(p, 1, n);
  }
  V select_bool(const void* mask, int64_t column, int64_t n, V x, V hidden) const {
    const uint8_t* const p = static_cast<const uint8_t*>(mask);
    const int64_t stride = mask_.stride[3];
    if (stride == 1) return select_by_bytes<T>(p + column, n, x, hidden);
    uint8_t bytes[kVectorBytes] = {};
    for (int64_t i = 0; i < std::min(n, kWidth); ++i) bytes[i] = p[(column + i) * stride];
    return select_by_bytes<T>(bytes, kWidth, x, hidden);
  }
  V load_mask(const void* mask, int64_t column, int64_t n) const {
    if (mask_.kind == MaskKind::kSame) return load_values(static_cast<const S*>(mask), column, n);
    if constexpr (sizeof(T) == sizeof(float)) return load_values(static_cast<const float*>(mask), column, n);
    return V(0);
  }
  template <class M>
  V load_values(const M* p, int64_t column, int64_t n) const {
    return load_strided<V>(p + column * mask_.stride[3], mask_.stride[3], n);
  }

  const T scale_, mask_scale_, cap_, cap_scale_;
  const AttentionMask mask_;
  const bool alibi_;
};

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
// panels. ahead(group, columns) is called before each register tile, to ask for what its scores will need.
template <class O, class Ahead>
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
      multiply_rows<O, kScoreDepth>(tile.first_row[g + 1] - tile.first_row[g], (end - begin) / K::kWidth, t);
    }
  }
}

// Finds the panels of a tile of keys that the mask hides from all rows, of which score_row(r) is what row r knows.
// Returns the columns from the first panel to the last that somebody sees.
template <class O, class S, class T, class RowOf>
Range find_hidden(const Scores<S, T>& scores, int64_t rows, const RowOf& score_row, bool* hidden) {
  constexpr int64_t kPanelKeys = Tiles<O>::kPanelKeys;
  Range shown{0, 0};
  for (int64_t p = 0; p < Tiles<O>::kKeyTile / kPanelKeys; ++p) {
    const Range panel{p * kPanelKeys, (p + 1) * kPanelKeys};
    hidden[p] = true;
    for (int64_t r = 0; r < rows && hidden[p]; ++r) hidden[p] = scores.hides(score_row(r), panel);
    if (!hidden[p]) shown = join(shown, panel);
  }
  return shown;
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
