// From products of queries and keys to scores: scale, soft cap, ALiBi, mask, and what a row sees.
#pragma once

#include <algorithm>
#include <cmath>

#include "attention_sequence.h"
#include "gemm.h"

namespace fastseq::FASTSEQ_ISA {

constexpr double kLog2E = 1.4426950408889634074, kLn2 = 0.69314718055994530942;

// What a row needs to know for its scores in one tile of keys.
template <class T>
struct ScoreRow {
  Range visible;     // columns of the tile
  const void* mask;  // of the row, at the tile's first key
  T slope;           // of ALiBi
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

// Scores, in units of unit().
template <class S, class T>
class Scores {
 public:
  using V = Vec<T>;
  static constexpr int64_t kWidth = V::kWidth;

  explicit Scores(const AttentionArgs& a)
      : scale_(T(a.scale)),
        cap_(T(a.softcap)),
        cap_scale_(a.softcap > 0 ? T(a.scale / a.softcap) : T(0)),
        mask_(a.mask),
        alibi_(a.alibi.data != nullptr),
        // Under a very small scale a sink in units of products might overflow.
        stays_product_(!capped() && !alibi_ && !adds_mask() && a.scale > 1e-6),
        unit_(stays_product_ ? a.scale : 1) {}

  bool masked() const { return mask_.kind != MaskKind::kNone; }
  bool capped() const { return cap_ != 0; }
  bool adds_mask() const { return mask_.kind == MaskKind::kSame || mask_.kind == MaskKind::kFloat32; }

  ScoreRow<T> row(const AttentionArgs& a, const Sequence& s, int64_t head, int64_t query, int64_t first_key,
                  Range visible) const {
    ScoreRow<T> r = {};
    r.visible = {visible.begin - first_key, visible.end - first_key};
    if (masked()) r.mask = mask_at(s.b, head, query, first_key);
    if (alibi_) {
      const T* const slopes = static_cast<const T*>(a.alibi.data);
      r.slope = T(slopes[s.index * a.alibi.stride[0] + head * a.alibi.stride[1]]);
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

  // Calls body with a pointer to elements of a float mask's type.
  template <class Body>
  void with_mask(void* p, const Body& body) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (mask_.kind == MaskKind::kFloat32) return body(static_cast<float*>(p));
    }
    body(static_cast<S*>(p));
  }

  // What makes scores of products: nothing, or a mask with a key's element next to the other, or anything.
  ScoreKind kind() const {
    if (capped() || alibi_ || (masked() && mask_.stride[3] != 1)) return ScoreKind::kAny;
    if (adds_mask()) return mask_.kind == MaskKind::kSame ? ScoreKind::kSame : ScoreKind::kFloat32;
    if (!stays_product_) return ScoreKind::kAny;
    return masked() ? ScoreKind::kBool : ScoreKind::kPlain;
  }

  // A score is unit() times what of() gives; factor() makes logarithms to base 2 of that.
  double unit() const { return unit_; }
  T factor() const { return T(unit_ * kLog2E); }

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
      return fma_or_lowest(product, V(scale_), load_next<S>(row.mask, column, n));
    } else if constexpr (kKind == ScoreKind::kFloat32) {
      if constexpr (sizeof(T) == sizeof(float))
        return fma_or_lowest(product, V(scale_), load_next<float>(row.mask, column, n));
      return hidden;  // no float masks beside float64
    } else {
      V scale(scale_), x = product;
      if (capped()) {
        const V t = tanh(product * cap_scale_);
        kept = fma(-t, t, V(1));
        x = t * cap_, scale = V(1);
      }
      if (alibi_) {
        const V distance = magnitude(V(row.distance - T(column)) - lane_numbers<T>());
        x = fma(x, scale, V(-row.slope) * distance), scale = V(1);
      }
      if (adds_mask()) return fma_or_lowest(x, scale, load_mask(row.mask, column, n));
      if (!stays_product_) x = x * scale;
      return masked() ? select_bool(row.mask, column, n, x, hidden) : x;
    }
  }

  // The derivative by the product of what `kept` becomes there.
  V bend(V product, V kept) const { return tanh(product * cap_scale_) * kept * V(-2 * cap_scale_); }

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

  const T scale_, cap_, cap_scale_;
  const AttentionMask mask_;
  const bool alibi_;
  const bool stays_product_;  // where it is the score but for the scale
  const double unit_;
};

}  // namespace fastseq::FASTSEQ_ISA
