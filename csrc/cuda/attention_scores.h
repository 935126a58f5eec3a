// What lies between the products: scores of the products, weights of the scores, dropout.
//
// Everything here goes over the Sums of a warp. Queries are their rows in kernels that own queries, and their columns in
// the one that owns keys; `Orient` says which, so that all kernels share this file. Options are gone through one after
// the other, each in a loop of its own: a call pays for those it has, and the code stays small.
#pragma once

#include "attention_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

// What is known of a query when it meets keys.
template <class T>
struct Query {
  int index;  // in its sequence; kFar where there is none, which sees nothing
  int head;
  T highest, inverse_sum, delta;  // of the backward pass, see attention_rows.h
};
static_assert(sizeof(Query<float>) == query_bytes(4) && sizeof(Query<double>) == query_bytes(8));

// Where the elements of Sums [kRowTiles][kColumnTiles] lie: local numbers of query and key within the warp's part.
template <bool kQueriesAreRows>
struct Orient {
  int first_query, first_key;  // of the warp's part; keys count from the sequence's beginning

  FS_DEVICE static int of_row(int m, int e) { return 16 * m + thread_index() % kWarp / 4 + e / 2 * 8; }
  FS_DEVICE static int of_column(int n, int e) { return 8 * n + 2 * (thread_index() % 4) + e % 2; }
  FS_DEVICE int query(int m, int n, int e) const {
    return first_query + (kQueriesAreRows ? of_row(m, e) : of_column(n, e));
  }
  FS_DEVICE int key(int m, int n, int e) const {
    return first_key + (kQueriesAreRows ? of_column(n, e) : of_row(m, e));
  }
};

// The numbers of a call, in the dtype of sums. A score is `unit` times what the score functions give.
template <class T>
struct Scoring {
  T scale, factor;  // factor makes of scores what power_of() takes
  T cap, cap_scale, unit;

  FS_DEVICE explicit Scoring(const Call& call)
      : scale(T(call.a.scale)),
        factor(T((call.product_units ? call.a.scale : 1) * (sizeof(T) == 4 ? kLog2E : 1))),
        cap(T(call.a.softcap)),
        cap_scale(call.a.softcap > 0 ? T(call.a.scale / call.a.softcap) : T(0)),
        unit(call.product_units ? T(call.a.scale) : T(1)) {}
};

// Calls body(m, n, e) for each element of Sums.
template <int kRowTiles, int kColumnTiles, class Body>
FS_DEVICE void for_elements(Body body) {
  FS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      FS_UNROLL
      for (int e = 0; e < 4; ++e) body(m, n, e);
    }
  }
}

// ---- masks ----

// Calls body(pointer to elements of the mask's type), at the mask of a sequence.
template <class E, class T, class Body>
FS_DEVICE void with_mask(const AttentionMask& mask, const Sequence& s, Body body) {
  const int64_t at = s.b * mask.stride[0];
  if (mask.kind == MaskKind::kBool) {
    body(static_cast<const uint8_t*>(mask.data) + at);
  } else if (mask.kind == MaskKind::kSame) {
    body(static_cast<const E*>(mask.data) + at);
  } else if constexpr (sizeof(E) == 2) {
    body(static_cast<const float*>(mask.data) + at);
  }
}
template <class T>
FS_DEVICE T bias_of(uint8_t x) {
  return x ? T(0) : -T(INFINITY);
}
template <class T, class X>
FS_DEVICE T bias_of(X x) {
  return T(widen(x));
}

// Calls body(m, n, e, bias) for each element of the warp's part, with what the mask adds to its score: -inf where it hides,
// and where sees(query, key) is false. If the part is not `whole`, some of it may be behind the last query or key: there
// the mask is that of the last. `pairs`: see Call::pairs_of_mask.
template <class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries, class Sees, class Body>
FS_DEVICE void for_mask(const AttentionMask& of, bool pairs, const Sequence& s, const O& orient,
                        const Queries& queries, bool whole, Sees sees, Body body) {
  constexpr bool kQueriesAreRows = std::is_same_v<O, Orient<true>>;
  const int64_t* const stride = of.stride;
  with_mask<E, T>(of, s, [&](auto* mask) {
    using X = std::remove_cv_t<std::remove_pointer_t<decltype(mask)>>;
    const auto row = [&](const Query<T>& q) {
      return mask + q.head * stride[1] + smaller(q.index, s.queries - 1) * stride[2];
    };
    if (!whole || !pairs) {
      for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
        const Query<T>& q = queries(m, n, e);
        const int key = orient.key(m, n, e), known = smaller(key, s.keys - 1);
        body(m, n, e, sees(q.index, key) ? bias_of<T>(row(q)[known * stride[3]]) : -T(INFINITY));
      });
    } else if constexpr (kQueriesAreRows) {
      FS_UNROLL
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int m = i / 2, e = i % 2 * 2;
        const X* const from = row(queries(m, 0, e)) + orient.key(m, 0, e);
        FS_UNROLL
        for (int n = 0; n < kColumnTiles; ++n) {
          const Two<X> two = *reinterpret_cast<const Two<X>*>(from + 8 * n);
          body(m, n, e, bias_of<T>(two.value[0]));
          body(m, n, e + 1, bias_of<T>(two.value[1]));
        }
      }
    } else {
      FS_UNROLL
      for (int i = 0; i < 2 * kColumnTiles; ++i) {
        const int n = i / 2, e = i % 2;
        const X* const from = row(queries(0, n, e)) + orient.key(0, n, 0);
        FS_UNROLL
        for (int j = 0; j < 2 * kRowTiles; ++j) body(j / 2, n, e + j % 2 * 2, bias_of<T>(from[8 * j]));
      }
    }
  });
}

// The same wherever the mask is.
template <class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries, class Body>
FS_DEVICE void for_mask(const AttentionMask& mask, bool pairs, const Sequence& s, const O& orient,
                        const Queries& queries, Body body) {
  constexpr int kKeys = std::is_same_v<O, Orient<true>> ? 8 * kColumnTiles : 16 * kRowTiles;
  for_mask<E, T, kRowTiles, kColumnTiles>(
      mask, pairs, s, orient, queries, orient.first_key + kKeys <= s.keys, [](int, int) { return true; },
      body);
}

// Whether the mask shows any element of the warp's part. Asked before the products, so that what is hidden whole costs
// no more than that; where the answer is yes, what was read is in the first-level cache.
template <class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries>
FS_DEVICE bool mask_shows_any(const Call& call, const Sequence& s, const O& orient, const Queries& queries) {
  bool any = false;
  for_mask<E, T, kRowTiles, kColumnTiles>(call.a.mask, call.pairs_of_mask, s, orient, queries,
                                          [&](int, int, int, T bias) { any |= bias != -T(INFINITY); });
  return any_in_warp(any);
}

// x + bias, but for a bias of -inf, which hides what may be NaN. Large biases leave no infinity.
template <class T>
FS_DEVICE T add_bias(T x, T bias) {
  return bias == -T(INFINITY) ? bias : x + bias;
}

// ---- scores ----

// -inf for keys that lengths, causality or window hide.
template <class T, int kRowTiles, int kColumnTiles, class O, class Queries>
FS_DEVICE void hide_edge(const Band& band, const O& orient, const Queries& queries,
                         Sums<T> (&x)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    if (!band.shows(queries(m, n, e).index, orient.key(m, n, e))) x[m][n][e] = -T(INFINITY);
  });
}

// Products -> scores, -inf where the key is hidden; `edge` where some are by lengths, causality or window.
template <bool kAny, class E, class T, int kRowTiles, int kColumnTiles, class O, class Queries>
FS_DEVICE void score(const Call& call, const Scoring<T>& scoring, const Sequence& s, const Band& band,
                     const O& orient, const Queries& queries, bool edge,
                     Sums<T> (&x)[kRowTiles][kColumnTiles]) {
  const AttentionArgs& a = call.a;
  if constexpr (kAny) {
    if (scoring.cap != 0) {
      for_elements<kRowTiles, kColumnTiles>(
          [&](int m, int n, int e) { x[m][n][e] = tanh(x[m][n][e] * scoring.cap_scale) * scoring.cap; });
    } else if (!call.product_units) {
      for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) { x[m][n][e] *= scoring.scale; });
    }
    if (a.alibi.data) {
      const T* const slopes = static_cast<const T*>(a.alibi.data) + s.index * a.alibi.stride[0];
      for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
        const Query<T>& q = queries(m, n, e);
        const int distance = q.index + s.offset - orient.key(m, n, e);
        x[m][n][e] =
            fma(-slopes[q.head * a.alibi.stride[1]], T(distance < 0 ? -distance : distance), x[m][n][e]);
      });
    }
    if (a.mask.kind != MaskKind::kNone) {
      for_mask<E, T, kRowTiles, kColumnTiles>(
          a.mask, call.pairs_of_mask, s, orient, queries,
          [&](int m, int n, int e, T bias) { x[m][n][e] = add_bias(x[m][n][e], bias); });
    }
  }
  if (edge) hide_edge(band, orient, queries, x);
}

// d score / d product, divided by the scale, of products under a soft cap.
template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void multiply_by_slope_of_cap(const Scoring<T>& scoring,
                                        const Sums<T> (&products)[kRowTiles][kColumnTiles],
                                        Sums<T> (&grads)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>([&](int m, int n, int e) {
    const T t = tanh(products[m][n][e] * scoring.cap_scale);
    // What is hidden has no gradient, whatever its product is.
    if (grads[m][n][e] != 0) grads[m][n][e] *= fma(-t, t, T(1));
  });
}

// 2^x, one instruction; of doubles e^x, for the rounding of log2 e would be that of a wrong temperature.
FS_DEVICE float power_of(float x) { return exp2(x); }
FS_DEVICE double power_of(double x) { return exp(x); }

// A score's weight beside that of the highest. The difference comes first: the weight of the highest is 1 then, however
// large it is. One multiply-add less, score * factor - highest * factor, is what others do; from scores of 2^31 on the
// rounding of the second product overflows.
template <class T>
FS_DEVICE T weight_of(T score, T highest, T factor) {
  return power_of((score - highest) * factor);
}

// Scores -> weights relative to that of the highest so far; calls rescale(m, half, factor) with what makes that which was
// summed up before, of the rows of a half of row tile m, relative to it too.
template <class T, int kRowTiles, int kColumnTiles, class Rescale>
FS_DEVICE void weigh(const Scoring<T>& scoring, Sums<T> (&x)[kRowTiles][kColumnTiles],
                     T (&highest)[2 * kRowTiles], T (&sum)[2 * kRowTiles], Rescale rescale) {
  FS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    FS_UNROLL
    for (int half = 0; half < 2; ++half) {
      const int i = 2 * m + half;
      T most = highest[i];
      FS_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) most = max(most, max(x[m][n][2 * half], x[m][n][2 * half + 1]));
      most = max(most, shuffle_xor(most, 1));
      most = max(most, shuffle_xor(most, 2));
      // Without any visible key so far, all weights are those of -inf beside 0.
      const T from = most == -T(INFINITY) ? T(0) : most;
      const T factor = weight_of(highest[i], from, scoring.factor);
      highest[i] = most;
      T total = 0;
      FS_UNROLL
      for (int n = 0; n < kColumnTiles; ++n) {
        FS_UNROLL
        for (int e = 2 * half; e < 2 * half + 2; ++e) {
          x[m][n][e] = weight_of(x[m][n][e], from, scoring.factor);
          total += x[m][n][e];
        }
      }
      sum[i] = fma(sum[i], factor, total);
      rescale(m, half, factor);
    }
  }
}
// The sums of the rows of a half of row tile m.
template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void rescale_rows(Sums<T> (&sums)[kRowTiles][kColumnTiles], int m, int half, T factor) {
  FS_UNROLL
  for (int n = 0; n < kColumnTiles; ++n) sums[m][n][2 * half] *= factor, sums[m][n][2 * half + 1] *= factor;
}

// ---- dropout ----

// Of each element of Sums whether its weight is kept.
template <int kRowTiles>
struct Kept {
  uint32_t word[kRowTiles];
  FS_DEVICE bool operator()(int m, int n, int e) const { return word[m] >> (4 * n + e) & 1; }
};

template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void drop(const Kept<kRowTiles>& kept, Sums<T> (&x)[kRowTiles][kColumnTiles]) {
  for_elements<kRowTiles, kColumnTiles>(
      [&](int m, int n, int e) { x[m][n][e] = kept(m, n, e) ? x[m][n][e] : T(0); });
}

// Which weights are kept: a function of seed, head and query, and key alone, the same as in csrc/cpu/philox.h. Of each
// 64 keys, from a multiple of 64 on, key 16 w + i takes word w of the counter's lane i.
template <class T>
struct Dropout {
  bool active;
  uint32_t threshold;  // kept where the word is below
  uint64_t seed;
  T kept_scale;

  FS_DEVICE explicit Dropout(const AttentionArgs& a)
      : active(a.dropout_p > 0),
        threshold(uint32_t((1 - a.dropout_p) * 4294967295.0 + 0.5)),
        seed(active && a.seed_address ? uint64_t(*a.seed_address) : a.seed),
        kept_scale(T(1 / (1 - a.dropout_p))) {}

  // The words of a counter under a key: Philox4x32-10 (Salmon et al. 2011). A call, for it is long, and has few registers.
  FS_DEVICE_CALL static Vector16 philox(uint64_t key, uint32_t first, uint32_t second, uint32_t third) {
    Vector16 x{{first, second, third, 0}};
    uint32_t low = uint32_t(key), high = uint32_t(key >> 32);
    FS_UNROLL
    for (int round = 0; round < 10; ++round) {
      const uint64_t a = uint64_t(0xD2511F53u) * x.word[0], b = uint64_t(0xCD9E8D57u) * x.word[2];
      x = {{uint32_t(b >> 32) ^ x.word[1] ^ low, uint32_t(b), uint32_t(a >> 32) ^ x.word[3] ^ high,
            uint32_t(a)}};
      low += 0x9E3779B9u, high += 0xBB67AE85u;
    }
    return x;
  }
  FS_DEVICE Vector16 words(const AttentionArgs& a, const Sequence& s, const Query<T>& q, int key) const {
    return philox(seed, uint32_t(key / 64 * 16 + key % 16), uint32_t(q.index),
                  uint32_t(s.index * a.heads + q.head));
  }

  // The keys of a lane that share a counter are taken together: a tile of 64 keys in one row, whose columns they are,
  // leaves no word unused. In loops where something is not a register's number, for Philox is long.
  template <int kRowTiles, int kColumnTiles, class O, class Queries>
  FS_DEVICE Kept<kRowTiles> kept(const AttentionArgs& a, const Sequence& s, const O& orient,
                                 const Queries& queries) const {
    static_assert(kColumnTiles <= 8);
    Kept<kRowTiles> bits = {};
    const auto keep = [&](int m, int n, int e, const Vector16& words) {
      const int w = orient.key(m, n, e) / 16 % 4;
      const uint32_t word = w == 0   ? words.word[0]
                            : w == 1 ? words.word[1]
                            : w == 2 ? words.word[2]
                                     : words.word[3];
      bits.word[m] |= uint32_t(word < threshold) << (4 * n + e);
    };
    if constexpr (std::is_same_v<O, Orient<true>>) {
      constexpr int kApart = kColumnTiles > 1 ? 2 : 1;  // even and odd tiles
      FS_UNROLL
      for (int m = 0; m < kRowTiles; ++m) {
        FS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const Query<T>& q = queries(m, 0, 2 * half);
          FS_NO_UNROLL
          for (int i = 0; i < 2 * kApart; ++i) {
            const int first = i / 2, e = 2 * half + i % 2;
            const Vector16 words = this->words(a, s, q, orient.key(m, first, e));
            FS_UNROLL
            for (int n = 0; n < kColumnTiles; n += kApart) keep(m, first + n, e, words);
          }
        }
      }
    } else {
      FS_NO_UNROLL
      for (int i = 0; i < 2 * kColumnTiles; ++i) {
        const int n = i / 2;
        const Query<T>& q = queries(0, n, i % 2);
        FS_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int e = 2 * half + i % 2;
          const Vector16 words = this->words(a, s, q, orient.key(0, n, e));
          FS_UNROLL
          for (int m = 0; m < kRowTiles; ++m) keep(m, n, e, words);
        }
      }
    }
    return bits;
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
