// Tiles of rows in shared memory: loading them, and the products of a warp.
#pragma once

#include "attention_call.h"
#include "attention_math.h"

namespace fastseq::FASTSEQ_ISA::attention {

constexpr int round_up(int n, int size) { return (n + size - 1) / size * size; }
constexpr int kFeatureQuantum = 16;  // columns are zero from the last feature to the next multiple of this

// Calls body(row, chunk) for the chunks of a tile that are this thread's, of so many threads: one column of them, or few.
template <int kThreads, class E, int kColumns, class Body>
FS_DEVICE void for_chunks(Tile<E, kColumns>, int rows, int features, Body body) {
  using T = Tile<E, kColumns>;
  constexpr int kAcross = T::kChunks < kThreads ? T::kChunks : kThreads, kDown = kThreads / kAcross;
  static_assert(kThreads % kAcross == 0 && T::kChunks % kAcross == 0);
  const int used = round_up(features, kFeatureQuantum) / T::kChunk;
  FS_UNROLL
  for (int i = 0; i < T::kChunks; i += kAcross) {
    const int c = i + thread_index() % kAcross;
    if (c >= used) continue;
    FS_NO_UNROLL  // the kernels have no registers to spare for several addresses
        for (int row = thread_index() / kAcross; row < rows; row += kDown) body(row, c);
  }
}

// Brings rows into a tile, row r from address(r), zeros where that is null. With `aligned` rows it is on its way when
// this returns, and there after copy_async_wait().
template <int kThreads, class E, int kColumns, class Address>
FS_DEVICE void load_tile(Tile<E, kColumns> tile, int rows, int features, bool aligned, Address address) {
  constexpr int kChunk = Tile<E, kColumns>::kChunk;
  const auto elements_of = [&](int c) { return smaller(larger(features - c * kChunk, 0), kChunk); };
  if (aligned) {
    for_chunks<kThreads>(tile, rows, features, [&](int row, int c) {
      const E* const from = address(row);
      const int count = from ? elements_of(c) : 0;
      copy_async_or_zero(tile.chunk(row, c), count ? from + c * kChunk : from, count * int(sizeof(E)));
    });
    return;
  }
  for_chunks<kThreads>(tile, rows, features, [&](int row, int c) {
    const E* const from = address(row);
    const int count = from ? elements_of(c) : 0;
    alignas(16) E elements[kChunk] = {};
    FS_UNROLL
    for (int e = 0; e < kChunk; ++e) {
      if (e < count) elements[e] = from[c * kChunk + e];
    }
    Vector16 words;
    memcpy(&words, elements, 16);
    *reinterpret_cast<Vector16*>(tile.chunk(row, c)) = words;
  });
}

// Keys, or values, of a head from `first` on: `count` of them, zeros behind the last of the sequence.
template <int kThreads, class E, int kColumns>
FS_DEVICE void load_keys(Tile<E, kColumns> tile, const HeadTensor& from, const Sequence& s, int kv_head,
                         int first, int count, int features, bool aligned) {
  load_tile<kThreads>(tile, count, features, aligned, [&](int i) {
    return first + i < s.keys ? s.key_row<const E>(from, kv_head, first + i) : nullptr;
  });
}
template <int kThreads, class E, int kColumns, int kRows>
FS_DEVICE void load_queries(Tile<E, kColumns> tile, const HeadTensor& from, const RowTile<kRows>& rows,
                            int features, bool aligned) {
  load_tile<kThreads>(tile, kRows, features, aligned, [&](int i) {
    return i < rows.count ? rows.s.template query_row<const E>(from, rows.head(i), rows.query(i)) : nullptr;
  });
}

// Whether there is a NaN or an infinity in what this thread has loaded.
template <int kThreads, class E, int kColumns>
FS_DEVICE bool loaded_special(Tile<E, kColumns> tile, int rows, int features) {
  uint32_t carries = 0;
  for_chunks<kThreads>(tile, rows, features, [&](int row, int c) {
    carries |= carries_of<E>(*reinterpret_cast<const Vector16*>(tile.chunk(row, c)));
  });
  return carries != 0;
}

template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void clear(Sums<T> (&d)[kRowTiles][kColumnTiles]) {
  FS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      FS_UNROLL
      for (int e = 0; e < 4; ++e) d[m][n][e] = 0;
    }
  }
}

template <class T, int kRowTiles, int kColumnTiles>
FS_DEVICE void copy_sums(Sums<T> (&to)[kRowTiles][kColumnTiles],
                         const Sums<T> (&from)[kRowTiles][kColumnTiles]) {
  FS_UNROLL
  for (int m = 0; m < kRowTiles; ++m) {
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; ++n) {
      FS_UNROLL
      for (int e = 0; e < 4; ++e) to[m][n][e] = from[m][n][e];
    }
  }
}

// d = left right^T: columns of d are rows of `right`.
template <class M, int kRowTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply(Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                        Tile<typename M::Element, kColumns> left, int first_row,
                        Tile<typename M::Element, kColumns> right, int features) {
  clear(d);
  FS_NO_UNROLL
  for (int k = 0; k < features; k += M::kDepth) {
    typename M::Left a[kRowTiles];
    FS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) M::load(a[m], left, first_row + 16 * m, k);
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; n += M::kRights) {
      typename M::Right b[M::kRights];
      M::load_columns(b, right, 8 * n, k);
      FS_UNROLL
      for (int i = 0; i < M::kRights; ++i) {
        FS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) M::multiply(d[m][n + i], a[m], b[i]);
      }
    }
  }
}

// d += left right, of the columns of `right` from first_column on.
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply_sums(Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                             const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                             Tile<typename M::Element, kColumns> right, int first_column, int features) {
  constexpr int kSteps = kDepthTiles * 8 / M::kDepth;
  FS_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    typename M::Left a[kRowTiles];
    FS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) M::take(a[m], &left[m][k * M::kDepth / 8]);
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; n += M::kRights) {
      if (first_column + 8 * n >= features) continue;
      typename M::Right b[M::kRights];
      M::load_rows(b, right, k * M::kDepth, first_column + 8 * n);
      FS_UNROLL
      for (int i = 0; i < M::kRights; ++i) {
        FS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) M::multiply(d[m][n + i], a[m], b[i]);
      }
    }
  }
}

// The same where `right` holds NaN or infinity: what is not finite counts for those rows of d alone whose factor in
// `left` is not zero, for zero means hidden. Beside the product of what is finite, two more count what is not, with
// its sign: if all of the n contributions are +inf the sum of signs is n, if all are -inf it is -n, else there is a
// NaN among them, or they make one.
//
// It is a call, in loops, on arrays in memory: hardly anybody needs it, and it is to cost nobody else registers.
// Without kFinite the product of what is finite is left to somebody else. Each kShape has a copy: what a call leaves to its
// callers of registers is the same for all of them.
template <class M, bool kFinite, int kShape = 0, int kColumns>
FS_DEVICE_CALL void add_special_product(Sums<typename M::Sum>* d, int row_tiles, int column_tiles,
                                        const Sums<typename M::Sum>* left, int depth_tiles,
                                        Tile<typename M::Element, kColumns> right, int first_column,
                                        int features) {
  using T = typename M::Sum;
  constexpr int kTilesOfLeft = M::kDepth / 8;
  FS_NO_UNROLL
  for (int i = 0; i < row_tiles * column_tiles; ++i) {
    const int m = i / column_tiles, n = i % column_tiles;
    if (first_column + 8 * n >= features) continue;
    Sums<T> sums, counts = {}, signs = {};
    for (int e = 0; e < 4; ++e) sums[e] = d[i][e];
    FS_NO_UNROLL
    for (int k = 0; k < depth_tiles; k += kTilesOfLeft) {
      typename M::Right rights[M::kRights];
      M::load_rows(rights, right, 8 * k, first_column + 8 * (n - n % M::kRights));
      const typename M::Right b = M::kRights == 2 && n % 2 == 1 ? rights[M::kRights - 1] : rights[0];
      const auto multiply = [&](Sums<T>& to, auto of_left, auto of_right) {
        Sums<T> tiles[kTilesOfLeft];
        FS_UNROLL
        for (int j = 0; j < kTilesOfLeft; ++j) {
          FS_UNROLL
          for (int e = 0; e < 4; ++e) tiles[j][e] = of_left(left[m * depth_tiles + k + j][e]);
        }
        typename M::Left a;
        M::take(a, tiles);
        M::multiply(to, a, M::map(b, of_right));
      };
      if constexpr (kFinite)
        multiply(sums, [](T x) { return x; }, [](T x) { return is_finite(x) ? x : T(0); });
      multiply(signs, [](T x) { return sign_of(x); }, [](T x) { return is_finite(x) ? T(0) : sign_of(x); });
      multiply(
          counts, [](T x) { return sign_of(x) * sign_of(x); },
          [](T x) { return is_finite(x) ? T(0) : T(1); });
    }
    for (int e = 0; e < 4; ++e) {
      const T infinite = T(INFINITY);
      T special = 0;
      if (counts[e] != 0)
        special = signs[e] == counts[e] ? infinite : signs[e] == -counts[e] ? -infinite : T(NAN);
      d[i][e] = counts[e] != 0 ? sums[e] + special : sums[e];
    }
  }
}
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply_special_sums(Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                                     const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                                     Tile<typename M::Element, kColumns> right, int first_column,
                                     int features) {
  // Copies, element by element: or their address would be known, and they would be in memory everywhere else, too.
  Sums<typename M::Sum> to[kRowTiles][kColumnTiles], from[kRowTiles][kDepthTiles];
  copy_sums(to, d), copy_sums(from, left);
  constexpr int kShape = (kRowTiles * 64 + kColumnTiles) * 64 + kDepthTiles;
  add_special_product<M, true, kShape>(to[0], kRowTiles, kColumnTiles, from[0], kDepthTiles, right,
                                       first_column, features);
  copy_sums(d, to);
}
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void add_product(bool special, Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                           const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                           Tile<typename M::Element, kColumns> right, int first_column, int features) {
  if (special) {
    multiply_special_sums<M>(d, left, right, first_column, features);
  } else {
    multiply_sums<M>(d, left, right, first_column, features);
  }
}

}  // namespace fastseq::FASTSEQ_ISA::attention
