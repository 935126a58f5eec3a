// Tiles of numbers and their tangents: the products of a warp, in which both read what they share once.
#pragma once

#include "attention_tiles.h"

namespace fastseq::FASTSEQ_ISA::attention {

// What has no tangent is left out of the products.
template <class E, int kColumns>
struct DualTile {
  Tile<E, kColumns> primal, tangent;
  bool moves;  // whether there is a tangent

  // Whether there is a NaN or an infinity in what this thread has loaded of either.
  template <int kThreads>
  FS_DEVICE bool loaded_special(int rows, int features) const {
    return attention::loaded_special<kThreads>(primal, rows, features) ||
           (moves && attention::loaded_special<kThreads>(tangent, rows, features));
  }
};

// Both halves, of which the tangent is left out if there is none: see load_keys() and load_queries().
template <int kThreads, class E, int kColumns>
FS_DEVICE void load_dual_keys(const DualTile<E, kColumns>& to, const DualCall& call, const Sequence& s,
                              int kv_head, int first, int count) {
  const int features = int(call.a.head_size);
  load_keys<kThreads>(to.primal, call.a.key, s, kv_head, first, count, features, call.aligned_key);
  if (!to.moves) return;
  load_keys<kThreads>(to.tangent, call.tangents.key, s, kv_head, first, count, features,
                      call.aligned_key_tangent);
}
template <int kThreads, class E, int kColumns>
FS_DEVICE void load_dual_values(const DualTile<E, kColumns>& to, const DualCall& call, const Sequence& s,
                                int kv_head, int first, int count) {
  const int features = int(call.a.value_size);
  load_keys<kThreads>(to.primal, call.a.value, s, kv_head, first, count, features, call.aligned_value);
  if (!to.moves) return;
  load_keys<kThreads>(to.tangent, call.tangents.value, s, kv_head, first, count, features,
                      call.aligned_value_tangent);
}
template <int kThreads, class E, int kColumns, int kRows>
FS_DEVICE void load_dual_queries(const DualTile<E, kColumns>& to, const DualCall& call,
                                 const RowTile<kRows>& rows) {
  const int features = int(call.a.head_size);
  load_queries<kThreads>(to.primal, call.a.query, rows, features, call.aligned_query);
  if (!to.moves) return;
  load_queries<kThreads>(to.tangent, call.tangents.query, rows, features, call.aligned_query_tangent);
}
template <int kThreads, class E, int kColumns, int kRows>
FS_DEVICE void load_dual_grads(const DualTile<E, kColumns>& to, const DualCall& call,
                               const RowTile<kRows>& rows) {
  const int features = int(call.a.value_size);
  load_queries<kThreads>(to.primal, call.a.grad_output, rows, features, call.aligned_grad_output);
  if (!to.moves) return;
  load_queries<kThreads>(to.tangent, call.tangents.grad_output, rows, features,
                         call.aligned_grad_output_tangent);
}

// x = left right^T, and its tangent left' right^T + left right'^T.
template <class M, int kRowTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply_dual(Sums<typename M::Sum> (&x)[kRowTiles][kColumnTiles],
                             Sums<typename M::Sum> (&tangent)[kRowTiles][kColumnTiles],
                             const DualTile<typename M::Element, kColumns>& left, int first_row,
                             const DualTile<typename M::Element, kColumns>& right, int features) {
  clear(x), clear(tangent);
  // d += a b, of columns that are rows of a tile from k on; also(n, b) for whom else they are.
  const auto multiply = [](auto& d, const auto& a, Tile<typename M::Element, kColumns> tile, int k,
                           const auto& also) {
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; n += M::kRights) {
      typename M::Right b[M::kRights];
      M::load_columns(b, tile, 8 * n, k);
      FS_UNROLL
      for (int i = 0; i < M::kRights; ++i) {
        FS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) M::multiply(d[m][n + i], a[m], b[i]);
        also(n + i, b[i]);
      }
    }
  };
  const auto load = [&](auto& a, Tile<typename M::Element, kColumns> tile, int k) {
    FS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) M::load(a[m], tile, first_row + 16 * m, k);
  };
  FS_NO_UNROLL
  for (int k = 0; k < features; k += M::kDepth) {
    typename M::Left a[kRowTiles];
    load(a, left.primal, k);
    const auto nothing = [](int, const auto&) {};
    if (left.moves) {
      typename M::Left change[kRowTiles];
      load(change, left.tangent, k);
      multiply(x, a, right.primal, k, [&](int n, const auto& b) {
        FS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) M::multiply(tangent[m][n], change[m], b);
      });
    } else {
      multiply(x, a, right.primal, k, nothing);
    }
    if (right.moves) multiply(tangent, a, right.tangent, k, nothing);
  }
}

// d += left right, and its tangent += left' right + left right', of the columns of `right` from first_column on; `moves`:
// whether there is a left'.
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply_dual_sums(Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                                  Sums<typename M::Sum> (&tangent)[kRowTiles][kColumnTiles],
                                  const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                                  const Sums<typename M::Sum> (&change)[kRowTiles][kDepthTiles], bool moves,
                                  const DualTile<typename M::Element, kColumns>& right, int first_column,
                                  int features) {
  constexpr int kSteps = kDepthTiles * 8 / M::kDepth;
  const auto multiply = [](auto& d, int n, const auto& a, const auto& b) {
    FS_UNROLL
    for (int i = 0; i < M::kRights; ++i) {
      FS_UNROLL
      for (int m = 0; m < kRowTiles; ++m) M::multiply(d[m][n + i], a[m], b[i]);
    }
  };
  FS_UNROLL
  for (int k = 0; k < kSteps; ++k) {
    typename M::Left a[kRowTiles], of_change[kRowTiles];
    FS_UNROLL
    for (int m = 0; m < kRowTiles; ++m) {
      M::take(a[m], &left[m][k * M::kDepth / 8]);
      M::take(of_change[m], &change[m][k * M::kDepth / 8]);
    }
    FS_UNROLL
    for (int n = 0; n < kColumnTiles; n += M::kRights) {
      if (first_column + 8 * n >= features) continue;
      typename M::Right b[M::kRights];
      M::load_rows(b, right.primal, k * M::kDepth, first_column + 8 * n);
      multiply(d, n, a, b);
      if (moves) multiply(tangent, n, of_change, b);
      if (!right.moves) continue;
      M::load_rows(b, right.tangent, k * M::kDepth, first_column + 8 * n);
      multiply(tangent, n, a, b);
    }
  }
}
// The same where `right` holds NaN or infinity: see add_special_product(). All sums are copied before the first of the
// calls, so that none of them is in a register meanwhile.
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void multiply_special_dual_sums(Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                                          Sums<typename M::Sum> (&tangent)[kRowTiles][kColumnTiles],
                                          const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                                          const Sums<typename M::Sum> (&change)[kRowTiles][kDepthTiles],
                                          bool moves, const DualTile<typename M::Element, kColumns>& right,
                                          int first_column, int features) {
  Sums<typename M::Sum> to[2][kRowTiles][kColumnTiles], from[2][kRowTiles][kDepthTiles];
  copy_sums(to[0], d), copy_sums(to[1], tangent), copy_sums(from[0], left), copy_sums(from[1], change);
  constexpr int kShape = (kRowTiles * 64 + kColumnTiles) * 64 + kDepthTiles;
  const auto add = [&](auto& to, auto& from, Tile<typename M::Element, kColumns> right) {
    add_special_product<M, true, kShape>(to[0], kRowTiles, kColumnTiles, from[0], kDepthTiles, right,
                                         first_column, features);
  };
  add(to[0], from[0], right.primal);
  if (moves) add(to[1], from[1], right.primal);
  if (right.moves) add(to[1], from[0], right.tangent);
  copy_sums(d, to[0]), copy_sums(tangent, to[1]);
}
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void add_dual_product(bool special, Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                                Sums<typename M::Sum> (&tangent)[kRowTiles][kColumnTiles],
                                const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                                const Sums<typename M::Sum> (&change)[kRowTiles][kDepthTiles], bool moves,
                                const DualTile<typename M::Element, kColumns>& right, int first_column,
                                int features) {
  if (special) {
    multiply_special_dual_sums<M>(d, tangent, left, change, moves, right, first_column, features);
  } else {
    multiply_dual_sums<M>(d, tangent, left, change, moves, right, first_column, features);
  }
}

// The tangent alone: d += left' right + left right'.
template <class M, int kRowTiles, int kDepthTiles, int kColumnTiles, int kColumns>
FS_DEVICE void add_tangent_of_product(bool special, Sums<typename M::Sum> (&d)[kRowTiles][kColumnTiles],
                                      const Sums<typename M::Sum> (&left)[kRowTiles][kDepthTiles],
                                      const Sums<typename M::Sum> (&change)[kRowTiles][kDepthTiles],
                                      const DualTile<typename M::Element, kColumns>& right, int first_column,
                                      int features) {
  if (!special) {
    multiply_sums<M>(d, change, right.primal, first_column, features);
    if (right.moves) multiply_sums<M>(d, left, right.tangent, first_column, features);
    return;
  }
  Sums<typename M::Sum> to[kRowTiles][kColumnTiles], from[2][kRowTiles][kDepthTiles];
  copy_sums(to, d), copy_sums(from[0], change), copy_sums(from[1], left);
  constexpr int kShape = (kRowTiles * 64 + kColumnTiles) * 64 + kDepthTiles;
  add_special_product<M, true, kShape>(to[0], kRowTiles, kColumnTiles, from[0][0], kDepthTiles, right.primal,
                                       first_column, features);
  if (right.moves) {
    add_special_product<M, true, kShape>(to[0], kRowTiles, kColumnTiles, from[1][0], kDepthTiles,
                                         right.tangent, first_column, features);
  }
  copy_sums(d, to);
}

}  // namespace fastseq::FASTSEQ_ISA::attention
