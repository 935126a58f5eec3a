// What is as large as all scores, and so is made by kernels of its own, for those who want it: the weights, or their
// mean over the heads; the gradient of the mask, summed up over what the mask is broadcast over.
//
// A block owns a tile of queries by keys of the result and goes over all that goes into it, in order: heads for the mean
// of weights; batches, heads, and tiles of queries or keys for the gradient of a mask. It adds up in registers and
// writes once: no atomics, the same bits every time. Where a mask's gradient has fewer tiles than a GPU has room, the
// terms are divided into parts, a number that depends on sizes alone, which SumParts adds up.
//
// Cost of a score: D multiply-adds for weights, D + Dv for the gradient of the mask, beside those of the other passes.
#pragma once

#include "attention_backward.h"

namespace fastseq::FASTSEQ_ISA::attention {

// A tile of queries of one head and sequence, by a tile of keys, with the operands in shared memory.
template <class M, class Shape, bool kBackward>
struct Pair {
  using E = typename M::Element;
  using T = typename M::Sum;
  static constexpr int kWarps = Shape::kWarps, kThreads = kWarps * kWarp, kRowTiles = Shape::kRowTiles;
  static constexpr int kRows = kWarps * kRowTiles * 16, kKeys = Shape::kKeys, kKeyTiles = kKeys / 8;
  static_assert(Shape::kColumnWarps == 1);
  using FeatureTile = Tile<E, Shape::kFeatures>;
  static constexpr int kSharedBytes =
      (kBackward ? 2 : 1) * (FeatureTile::bytes(kRows) + FeatureTile::bytes(kKeys));
  using Matrix = Sums<T>[kRowTiles][kKeyTiles];

  const Call& call;
  Scoring<T> scoring;
  Dropout<T> dropout;

  FS_DEVICE explicit Pair(const Call& call) : call(call), scoring(call), dropout(call.a) {}

  // What is made of scores: body(x, dx, query_at, kept) with weights and, in the backward pass, gradients of the
  // products of output gradients and values. Nothing is called where nothing is visible.
  template <class Body>
  FS_DEVICE void run(const Sequence& s, int64_t head, int first_query, int first_key, Body body) const {
    const AttentionArgs& a = call.a;
    const int count = smaller(kRows, s.queries - first_query);
    if (count <= 0) return;
    const Range first = s.visible(first_query), last = s.visible(first_query + count - 1);
    if (first_key >= last.end || first_key + kKeys <= first.begin) return;
    const bool edge = first_key < last.begin || first_key + kKeys > first.end || count < kRows;
    const int64_t kv_head = head / call.group;
    const int features = int(a.head_size), value_features = int(a.value_size);

    constexpr int kOfRows = FeatureTile::bytes(kRows) / int(sizeof(E)),
                  kOfKeys = FeatureTile::bytes(kKeys) / int(sizeof(E));
    E* const shared = reinterpret_cast<E*>(shared_memory());
    const FeatureTile queries{shared}, keys{shared + kOfRows};
    const FeatureTile grads{shared + kOfRows + kOfKeys}, values{shared + 2 * kOfRows + kOfKeys};
    const auto row_at = [&](const HeadTensor& t, int i) {
      return i < count ? s.query_row<const E>(t, head, first_query + i) : nullptr;
    };
    const auto key_at = [&](const HeadTensor& t, int i) {
      return first_key + i < s.keys ? s.key_row<const E>(t, kv_head, first_key + i) : nullptr;
    };
    sync_block();  // nobody reads what was there before
    load_tile<kThreads>(queries, kRows, features, call.aligned_query,
                        [&](int i) { return row_at(a.query, i); });
    load_tile<kThreads>(keys, kKeys, features, call.aligned_key, [&](int i) { return key_at(a.key, i); });
    if constexpr (kBackward) {
      load_tile<kThreads>(grads, kRows, value_features, call.aligned_grad_output,
                          [&](int i) { return row_at(a.grad_output, i); });
      load_tile<kThreads>(values, kKeys, value_features, call.aligned_value,
                          [&](int i) { return key_at(a.value, i); });
    }
    copy_async_commit();
    copy_async_wait<0>();
    sync_block();

    const int first_row = thread_index() / kWarp * kRowTiles * 16;
    Query<T> query[2 * kRowTiles];
    FS_UNROLL
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int row = Orient<true>::of_row(0, 0) + first_row + 8 * i,
                index = first_query + (row < count ? row : 0);
      query[i] = {row < count ? index : kFar, int(head), *s.of_query<T>(a.highest, head, index),
                  *s.of_query<T>(a.inverse_sum, head, index), 0};
      if constexpr (kBackward) {
        query[i].delta = *s.of_query<T>(call.delta, head, index);
      }
    }
    const auto query_at = [&](int m, int, int e) -> const Query<T>& { return query[2 * m + e / 2]; };
    const Orient<true> orient{first_row, first_key};
    const Band band(s);
    if (first_row >= count) return;
    if (a.mask.kind != MaskKind::kNone &&
        !mask_shows_any<E, T, kRowTiles, kKeyTiles>(call, s, orient, query_at))
      return;
    Matrix x, dx;
    multiply<M>(x, queries, first_row, keys, features);
    score<true, E>(call, scoring, s, band, orient, query_at, edge, x);
    if constexpr (kBackward) {
      multiply<M>(dx, grads, first_row, values, value_features);
    } else {
      clear(dx);
    }
    Kept<kRowTiles> kept;
    grad_scores<true, E>(call, scoring, dropout, s, orient, query_at, x, dx, kept);
    body(x, dx, query_at, kept);
  }
};

template <class M, class Shape>
struct Weights {
  using P = Pair<M, Shape, false>;
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = P::kThreads, kSharedBytes = P::kSharedBytes, kRows = P::kRows,
                       kKeys = P::kKeys;
  static constexpr int kRowTiles = P::kRowTiles, kKeyTiles = P::kKeyTiles;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const bool mean = a.weights.stride[1] == 0 && a.heads > 1;
    const int64_t key_tiles = (a.keys + kKeys - 1) / kKeys, query_tiles = (a.queries + kRows - 1) / kRows;
    int64_t index = block_index();
    const int first_key = int(index % key_tiles * kKeys),
              first_query = int(index / key_tiles % query_tiles * kRows);
    index /= key_tiles * query_tiles;
    const int64_t heads = mean ? 1 : a.heads, first_head = index % heads;
    const Sequence s(a, int(index / heads));
    const P pair(call);
    typename P::Matrix sums;
    clear(sums);
    for (int64_t head = first_head; head < (mean ? a.heads : first_head + 1); ++head) {
      pair.run(s, head, first_query, first_key, [&](auto& x, auto&, const auto&, const auto& kept) {
        if (pair.dropout.active) {
          for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) {
            x[m][n][e] = kept(m, n, e) ? x[m][n][e] * pair.dropout.kept_scale : T(0);
          });
        }
        for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) { sums[m][n][e] += x[m][n][e]; });
      });
    }
    const T share = T(1) / T(mean ? a.heads : 1);
    for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) {
      const int query = first_query + thread_index() / kWarp * kRowTiles * 16 + Orient<true>::of_row(m, e);
      const int key = first_key + Orient<true>::of_column(n, e);
      if (query < a.queries && key < a.keys)
        narrow(sums[m][n][e] * share, s.query_row<E>(a.weights, first_head, query)[key]);
    });
  }
};

// Of what a block of the mask's gradient goes over, and where the mask is not broadcast owns one.
struct MaskTerms {
  int64_t batches, heads, query_tiles, key_tiles;

  FS_DEVICE int64_t count() const { return batches * heads * query_tiles * key_tiles; }
};

template <class M, class Shape>
struct GradMask {
  using P = Pair<M, Shape, true>;
  using E = typename M::Element;
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = P::kThreads, kRows = P::kRows, kKeys = P::kKeys, kWarps = P::kWarps;
  static constexpr int kRowTiles = P::kRowTiles, kKeyTiles = P::kKeyTiles;
  static constexpr int kSharedBytes = P::kSharedBytes;
  static_assert(kSharedBytes >= kWarps * kKeys * int(sizeof(T)));

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    const int64_t* const stride = a.grad_mask_stride;
    const MaskTerms all{a.batch, a.heads, (a.queries + kRows - 1) / kRows, (a.keys + kKeys - 1) / kKeys};
    const MaskTerms own{stride[0] ? all.batches : 1, stride[1] ? all.heads : 1,
                        stride[2] ? all.query_tiles : 1, stride[3] ? all.key_tiles : 1};
    const MaskTerms terms{stride[0] ? 1 : all.batches, stride[1] ? 1 : all.heads,
                          stride[2] ? 1 : all.query_tiles, stride[3] ? 1 : all.key_tiles};
    int64_t index = block_index();
    const int64_t key_tile = index % own.key_tiles, query_tile = index / own.key_tiles % own.query_tiles;
    index /= own.key_tiles * own.query_tiles;
    const int64_t head = index % own.heads, batch = index / own.heads % own.batches;
    const int64_t part = index / own.heads / own.batches;

    const P pair(call);
    typename P::Matrix sums;
    clear(sums);
    const int64_t end = (part + 1) * terms.count() / call.mask_parts;
    for (int64_t i = part * terms.count() / call.mask_parts; i < end; ++i) {
      const int64_t of_key = i % terms.key_tiles, of_query = i / terms.key_tiles % terms.query_tiles;
      const int64_t outer = i / terms.key_tiles / terms.query_tiles;
      const Sequence s(a, int(batch + outer / terms.heads));
      pair.run(
          s, head + outer % terms.heads, int((query_tile + of_query) * kRows),
          int((key_tile + of_key) * kKeys), [&](auto& x, auto& dx, const auto& query_at, const auto&) {
            finish_grad_scores<true>(query_at, x, dx);
            for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) { sums[m][n][e] += dx[m][n][e]; });
          });
    }
    const int64_t at = batch * stride[0] + head * stride[1];
    const int first_row = int(query_tile) * kRows + thread_index() / kWarp * kRowTiles * 16;
    const bool whole = (stride[0] || a.batch == 1) && (stride[1] || a.heads == 1) &&
                       (stride[2] || a.queries == 1) && (stride[3] || a.keys == 1);
    if (whole) {
      write(call, static_cast<E*>(a.grad_mask), at, first_row, int(key_tile) * kKeys, sums);
      return;
    }
    int64_t size = 1;
    if (stride[0]) size *= a.batch;
    if (stride[1]) size *= a.heads;
    if (stride[2]) size *= a.queries;
    if (stride[3]) size *= a.keys;
    T* const to = static_cast<T*>(call.mask_parts > 1 ? call.part_output : a.grad_mask) + part * size + at;
    reduce(call, to, first_row, int(key_tile) * kKeys, sums);
  }

 private:
  template <class To>
  static FS_DEVICE void write_as(const Call& call, To* to, int first_row, int first_key,
                                 const typename P::Matrix& sums) {
    const AttentionArgs& a = call.a;
    for_elements<kRowTiles, kKeyTiles>([&](int m, int n, int e) {
      const int query = first_row + Orient<true>::of_row(m, e),
                key = first_key + Orient<true>::of_column(n, e);
      if (query < a.queries && key < a.keys)
        narrow(sums[m][n][e], to[query * a.grad_mask_stride[2] + key * a.grad_mask_stride[3]]);
    });
  }
  static FS_DEVICE void write(const Call& call, E* to, int64_t at, int first_row, int first_key,
                              const typename P::Matrix& sums) {
    if constexpr (sizeof(E) == 2) {
      if (call.a.mask.kind == MaskKind::kFloat32)
        return write_as(call, static_cast<float*>(call.a.grad_mask) + at, first_row, first_key, sums);
    }
    write_as(call, to + at, first_row, first_key, sums);
  }

  // Sums over the block's queries or keys where the mask is broadcast over these.
  static FS_DEVICE void reduce(const Call& call, T* to, int first_row, int first_key,
                               typename P::Matrix& sums) {
    const AttentionArgs& a = call.a;
    const int64_t* const stride = a.grad_mask_stride;
    if (stride[2] && stride[3]) return write_as(call, to, first_row, first_key, sums);
    const int lane = thread_index() % kWarp, warp = thread_index() / kWarp;
    T* const of_warps = reinterpret_cast<T*>(shared_memory());  // [kWarps][kKeys]
    if (!stride[3]) {                                           // rows become one column
      FS_UNROLL
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        T sum = 0;
        FS_UNROLL
        for (int n = 0; n < kKeyTiles; ++n) sum += sums[i / 2][n][i % 2 * 2] + sums[i / 2][n][i % 2 * 2 + 1];
        sum += shuffle_xor(sum, 1);
        sum += shuffle_xor(sum, 2);
        const int query = first_row + lane / 4 + 8 * i;
        if (stride[2] && lane % 4 == 0 && query < a.queries) to[query * stride[2]] = sum;
        FS_UNROLL
        for (int n = 0; n < kKeyTiles; ++n)
          sums[i / 2][n][i % 2 * 2] = n == 0 ? sum : T(0), sums[i / 2][n][i % 2 * 2 + 1] = 0;
      }
      if (stride[2]) return;
    }
    sync_block();  // the operands are not needed any more
    FS_UNROLL
    for (int n = 0; n < kKeyTiles; ++n) {
      FS_UNROLL
      for (int e = 0; e < 2; ++e) {
        T sum = 0;
        FS_UNROLL
        for (int m = 0; m < kRowTiles; ++m) sum += sums[m][n][e] + sums[m][n][e + 2];
        FS_UNROLL
        for (int mask = 4; mask < kWarp; mask *= 2) sum += shuffle_xor(sum, mask);
        if (lane < 4) of_warps[warp * kKeys + Orient<true>::of_column(n, e)] = sum;
      }
    }
    sync_block();
    const int column = thread_index();
    if (column >= (stride[3] ? kKeys : 1) || first_key + column >= a.keys) return;
    T sum = 0;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * kKeys + column];
    to[(first_key + column) * stride[3]] = sum;
  }
};

// Adds up parts of the mask's gradient, in order. A thread has an element.
template <class M>
struct SumParts {
  using T = typename M::Sum;
  using Args = Call;
  static constexpr int kThreads = 128, kRows = kThreads;

  static FS_DEVICE void run(const Call& call) {
    const AttentionArgs& a = call.a;
    int64_t size = 1;
    if (a.grad_mask_stride[0]) size *= a.batch;
    if (a.grad_mask_stride[1]) size *= a.heads;
    if (a.grad_mask_stride[2]) size *= a.queries;
    if (a.grad_mask_stride[3]) size *= a.keys;
    const int64_t i = int64_t(block_index()) * kThreads + thread_index();
    if (i >= size) return;
    T sum = 0;
    for (int part = 0; part < call.mask_parts; ++part)
      sum += static_cast<const T*>(call.part_output)[part * size + i];
    static_cast<T*>(a.grad_mask)[i] = sum;
  }
};

}  // namespace fastseq::FASTSEQ_ISA::attention
