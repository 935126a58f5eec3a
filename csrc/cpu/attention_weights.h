// The weights of attention, for those who want to look at them, or the mean of them over the heads: made once more
// from what the forward pass divided each row by.
//
// A unit of work is a tile of queries by a tile of keys of one sequence, through all heads, so that a mean stays in the
// second-level cache until it is whole. Units share nothing: each packs its keys, which costs some 6 % of its products.
//
// Cost of a vector of weights: D multiply-adds, some 14 operations of the softmax, and one store.
#pragma once

#include <atomic>

#include "attention_softmax.h"
#include "attention_tiles.h"
#include "philox.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {

template <class S, class O>
class Weights {
 public:
  using K = Tiles<O>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;

  explicit Weights(const AttentionArgs& a)
      : a_(a),
        scores_(a),
        dropout_(a.dropout_p, a.seed),
        group_heads_(a.heads / a.kv_heads),
        left_stride_(pairs<O>(a.head_size) * K::kPair),
        mean_(a.weights.stride[1] == 0 && a.heads > 1),
        query_tiles_(group_count(a.queries, kQueryTile)),
        key_tiles_(group_count(a.keys, kKeyTile)) {}

  void run(int threads) {
    threads = int(std::min<int64_t>(threads, std::max<int64_t>(units(), 1)));
    const int64_t bytes = a_.batch * (mean_ ? 1 : a_.heads) * a_.queries * a_.keys * int64_t(sizeof(S));
    advise_large_pages(a_.weights.data, size_t(bytes));
    lay_out(threads);
    arena_.allocate();
    lay_out(threads);
    const auto body = [](void* self, int thread) { static_cast<Weights*>(self)->run_units(thread); };
    share_work(threads, body, this);
  }

 private:
  struct Thread {
    O* left;      // [kQueryTile][left_stride]  queries
    O* keys;      // transposed panels of a tile
    T* products;  // [kQueryTile][kKeyTile]
    T* keep;      // [kKeyTile] of a row: 0 where dropped
    T* sums;      // [kQueryTile][kKeyTile] over the heads
    ScoreRow<T>* row;
  };

  int64_t units() const { return a_.batch * query_tiles_ * key_tiles_; }

  void lay_out(int threads) {
    thread_ = arena_.take<Thread>(threads);
    for (int i = 0; i < threads; ++i) {
      Thread t = {};
      t.left = arena_.take<O>(kQueryTile * left_stride_);
      t.keys = arena_.take<O>(kKeyTile * left_stride_);
      t.products = arena_.take<T>(kQueryTile * kKeyTile);
      t.keep = arena_.take<T>(kKeyTile);
      t.sums = arena_.take<T>(mean_ ? kQueryTile * kKeyTile : 0);
      t.row = arena_.take<ScoreRow<T>>(kQueryTile);
      if (thread_) thread_[i] = t;
    }
  }

  void run_units(int thread) {
    for (int64_t i; (i = next_.fetch_add(1)) < units();) {
      const int64_t tile = i / key_tiles_ % query_tiles_;
      const Range queries{group_begin(a_.queries, query_tiles_, tile),
                          group_begin(a_.queries, query_tiles_, tile + 1)};
      const int64_t first_key = i % key_tiles_ * kKeyTile;
      run_unit(i / (key_tiles_ * query_tiles_), queries, {first_key, std::min(first_key + kKeyTile, a_.keys)},
               thread_[thread]);
    }
  }

  // `keys` may lie behind the sequence's last one.
  void run_unit(int64_t b, Range queries, Range keys, Thread& t) const {
    const Sequence s(a_, b);
    const int64_t count = std::min(keys.end, s.keys) - keys.begin;
    if (mean_) std::fill_n(t.sums, (queries.end - queries.begin) * kKeyTile, T(0));
    for (int64_t head = 0; head < a_.heads; ++head) {
      const RowTile<O> rows(s, head, queries);
      Range columns[K::kMostGroups];
      bool hidden[kKeyTile / K::kPanelKeys] = {};
      const int64_t kv_head = head / group_heads_;
      const bool fresh = head % group_heads_ == 0;
      if (fresh && count > 0) {
        pack_keys<O>(s.template key_row<const S>(a_.key, kv_head, keys.begin), a_.key.stride[2], count,
                     a_.head_size, t.keys);
      }
      if (count <= 0 || !look<O>(a_, scores_, s, rows, keys.begin, count, columns, hidden, t.row)) {
        std::fill_n(columns, rows.groups, Range{0, 0});
      } else {
        copy_rows<S>(a_.query, a_.head_size, s, rows, t.left, left_stride_);
        const auto row_of = [&](int64_t r) -> const ScoreRow<T>& { return t.row[r]; };
        multiply_keys<O>(rows, columns, hidden, t.left, left_stride_, a_.head_size, t.keys, t.products,
                         prefetch_masks<O>(scores_, rows, row_of));
      }
      for (int64_t g = 0; g < rows.groups; ++g) {
        for (int64_t r = rows.first_row[g]; r < rows.first_row[g + 1]; ++r)
          show_row(s, head, rows.query[r], r, columns[g], keys, t);
      }
    }
    for (int64_t r = 0; mean_ && r < queries.end - queries.begin; ++r) {
      S* const to = s.template query_row<S>(a_.weights, 0, queries.begin + r) + keys.begin;
      const V share(T(1) / T(a_.heads));
      for (int64_t c = 0, n = keys.end - keys.begin; c < n; c += kWidth)
        store_upto(to + c, load<V>(t.sums + r * kKeyTile + c) * share, n - c);
    }
  }

  // The weights of row r of the tile from its products, written or added up; zero outside of its columns.
  void show_row(const Sequence& s, int64_t head, int64_t query, int64_t r, Range columns, Range keys,
                const Thread& t) const {
    if (mean_) {
      T* const sum = t.sums + r * kKeyTile;
      const auto add = [=](int64_t c, V weight) { store(sum + c, load<V>(sum + c) + weight); };
      if (!columns.empty()) weigh(s, head, query, keys.begin, t, r, columns, add);
      return;
    }
    S* const to = s.template query_row<S>(a_.weights, head, query) + keys.begin;
    const int64_t count = keys.end - keys.begin;
    const auto write = [=](int64_t c, V weight) { store_upto(to + c, weight, count - c); };
    for (int64_t c = 0; c < columns.begin; c += kWidth) write(c, V(0));
    if (!columns.empty()) weigh(s, head, query, keys.begin, t, r, columns, write);
    for (int64_t c = columns.end; c < count; c += kWidth) write(c, V(0));
  }

  // Calls take(column, vector of weights).
  template <class Take>
  void weigh(const Sequence& s, int64_t head, int64_t query, int64_t first_key, const Thread& t, int64_t r,
             Range columns, const Take& take) const {
    const T highest = *s.template of_query<const T>(a_.highest, head, query);
    const T inverse_sum = *s.template of_query<const T>(a_.inverse_sum, head, query);
    const T scale = scores_.factor(), factor = T(inverse_sum / (1 - a_.dropout_p));
    T* const x = t.products + r * kKeyTile;
    const T* const keep = t.keep;
    score_row(scores_, t.row[r], columns, x);
    const auto weight = [=](int64_t c) { return exp2((load<V>(x + c) - highest) * scale); };
    // What is hidden may hold anything, and so may the sum of a row that sees a NaN elsewhere.
    const auto finish = [=](int64_t c, V w) { take(c, select<T>(w.v == V(0).v, V(0), w * factor)); };
    if (dropout_.active) {
      dropout_.keep(s.index * a_.heads + head, query, first_key + columns.begin, columns.end - columns.begin,
                    t.keep + columns.begin);
      for (int64_t c = columns.begin; c < columns.end; c += kWidth) finish(c, weight(c) * load<V>(keep + c));
    } else {
      for (int64_t c = columns.begin; c < columns.end; c += kWidth) finish(c, weight(c));
    }
  }

  const AttentionArgs& a_;
  const Scores<S, T> scores_;
  const Dropout dropout_;
  const int64_t group_heads_, left_stride_;
  const bool mean_;
  const int64_t query_tiles_, key_tiles_;
  std::atomic<int64_t> next_{0};
  Arena arena_;
  Thread* thread_ = nullptr;
};

}  // namespace fastseq::FASTSEQ_ISA
