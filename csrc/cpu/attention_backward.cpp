// Attention, backward: from what the forward pass divided each row by, without any matrix of queries by keys.
//
// For each tile of rows and each tile of keys that one of them sees:
//
//   S = Q K^T,  P = exp(S - highest) / sum      as in the forward pass, both known
//   dP = dO V^T,  dS = P (dP - delta)          delta = row sums of dO O, less the gradient of lse
//   dV = dV + P^T dO,  dK = dK + dS^T Q,  dQ = dQ + dS K
//
// A unit of work keeps dK and dV of its keys, in the dtype of sums, and runs over the tiles of rows; dQ of a tile is
// finished after its last key. Where the keys of a head are divided among threads, each part leaves its dQ, and these
// are added up in order; the same parts are added in the same order where one thread has them all, so that the bits do
// not depend on it.
//
// Cost of a vector of scores: 2 D + D + 2 Dv multiply-adds, and some 18 operations between them. Scratch: keys times
// (3 D + 2 Dv) for each thread, and, where keys are divided, the queries for each part.
#include <atomic>
#include <type_traits>

#include "attention_columns.h"
#include "attention_tiles.h"
#include "philox.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// A row of a tile.
template <class S, class T>
struct GradRow {
  ScoreRow<T> score;
  T highest, inverse_sum;  // see AttentionArgs
  T delta, grad_lse;
  const S* grad_weights;  // at the tile's first key, or null
  T* grad_mask;           // at the tile's first key, or null: summed up
  void* written_mask;     // at the tile's first key, or null: written, in the mask's dtype
};

// What lies between the products of a call. Held by value where it is used, so that no store can change it.
template <class S, class T>
struct Weigher {
  using V = Vec<T>;
  Scores<S, T> scores;
  T factor;  // of scores
  bool dropped;
  T kept_scale;
  int64_t grad_mask_stride;  // of keys: 1, or 0

  // A vector of products of queries and keys, and of output gradients and values -> weights (dropped, not yet divided
  // by what is kept) and gradients of the products.
  template <bool kSimple, ScoreKind kKind>
  void weigh(const GradRow<S, T>& row, int64_t c, int64_t count, const T* x, const T* dx, const T* keep,
             V& weight, V& grad) const {
    const V product = load<V>(x);
    V kept_slope(1), p;
    p = (scores.template of<kKind>(row.score, product, c, kept_slope) - row.highest) * factor;
    if (!Scores<S, T>::all_visible(row.score, c)) p = Scores<S, T>::within(row.score, p, c);
    p = exp2(p);
    const auto visible = p.v != V(0).v;
    // What is hidden may hold anything, and so may the sum of a row that sees a NaN elsewhere.
    p = select<T>(visible, p * row.inverse_sum, V(0));
    weight = p;
    grad = load<V>(dx);
    if constexpr (!kSimple) {
      if (row.grad_weights) grad = grad + load_upto<V>(row.grad_weights + c, count - c);
      if (dropped) {
        weight = p * load<V>(keep);
        grad = grad * load<V>(keep) * kept_scale;
      }
    }
    grad = select<T>(visible, p * (grad - row.delta), V(0));
    if constexpr (!kSimple) {
      if (row.grad_mask) add_mask_gradient(row.grad_mask, c, count, grad);
      if (row.written_mask) {
        scores.with_mask(row.written_mask, [&](auto* mask) { store_upto(mask + c, grad, count - c); });
      }
      if (scores.capped()) grad = select<T>(visible, grad * kept_slope, V(0));
    }
  }

  void add_mask_gradient(T* grad_mask, int64_t c, int64_t count, V grad) const {
    if (grad_mask_stride == 0) {
      *grad_mask += sum_of_lanes(grad);
    } else {
      store_upto(grad_mask + c, load_upto<V>(grad_mask + c, count - c) + grad, count - c);
    }
  }
};

template <class S, class O>
class Backward {
 public:
  using K = Tiles<O>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;
  static constexpr int kPair = K::kPair;

  Backward(const AttentionArgs& a, const AttentionPlan& plan)
      : a_(a),
        plan_(plan),
        scores_(a),
        dropout_(a.dropout_p, a.seed),
        kept_scale_(T(1 / (1 - a.dropout_p))),
        group_heads_(a.heads / a.kv_heads),
        head_columns_(round_up(a.head_size, kWidth)),
        value_columns_(round_up(a.value_size, kWidth)),
        head_stride_(pairs<O>(a.head_size) * kPair),
        value_stride_(pairs<O>(a.value_size) * kPair),
        wants_scores_(a.grad_query.data || a.grad_key.data || a.grad_mask),
        kind_(scores_.kind()),
        copies_(grad_mask_copies(a)),
        mask_size_(grad_mask_size(a)),
        writes_mask_(a.grad_mask && !is_broadcast(a)),
        simple_(!dropout_.active && !a.grad_weights.data && !a.grad_mask && !scores_.capped()) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const AttentionLengths s(a, b);
      most_keys_ = std::max(most_keys_, plan.split ? part_size(s.keys) : s.keys);
      most_rows_ = std::max(most_rows_, group_heads_ * s.queries);
    }
    lay_out();
    arena_.allocate();
    lay_out();
    std::fill_n(mask_copies_, (copies_ - 1) * mask_size_, T(0));
  }

  bool run() {
    next_ = 0;
    const auto units = [](void* self, int thread) { static_cast<Backward*>(self)->run_units(thread); };
    if (!run_team(plan_.head_parts, units, this)) return false;
    if (plan_.split && a_.grad_query.data) {
      next_ = 0;
      const auto join = [](void* self, int thread) { static_cast<Backward*>(self)->join_parts(thread); };
      share_work(plan_.head_parts, join, this);
    }
    T* const grad_mask = static_cast<T*>(a_.grad_mask);
    for (int64_t copy = 1; copy < copies_; ++copy) {
      for (int64_t i = 0; i < mask_size_; ++i) grad_mask[i] += mask_copies_[(copy - 1) * mask_size_ + i];
    }
    return true;
  }

 private:
  struct Thread {
    // Of the unit's keys.
    O *keys, *values;           // transposed panels
    O* key_rows;                // as the right side of dS K
    SpecialRows* special_keys;  // of each tile
    int32_t* special_rows;
    T *grad_key, *grad_value;  // [keys][columns]
    // Of a tile of rows.
    O *query_left, *query_right, *grad_left, *grad_right;
    SpecialRows special_query, special_grad;
    GradRow<S, T>* row;
    T *products,
        *grad_products;  // [kQueryTile][kKeyTile]; then P and dS, of a pair of rows in that of the even one
    O* grad_rows;        // [kQueryTile][kKeyTile]  dS by rows, where the operands are pairs
    T* keep;             // [2][kKeyTile]
    T* mask_sums;        // [kKeyTile]
    T *grad_query, *part_grad_query;  // [kQueryTile][head_columns]
    double* grad_sinks;               // [group heads]
  };

  int64_t part_size(int64_t keys) const {
    return round_up(group_count(keys, backward_key_parts(keys)), kKeyTile);
  }

  void lay_out() {
    thread_ = arena_.take<Thread>(plan_.head_parts);
    const int64_t tiles = group_count(most_keys_, kKeyTile), keys = tiles * kKeyTile;
    for (int i = 0; i < plan_.head_parts; ++i) {
      Thread t = {};
      t.keys = arena_.take<O>(keys * head_stride_);
      t.values = arena_.take<O>(keys * value_stride_);
      t.key_rows = arena_.take<O>(keys * head_columns_);
      t.special_keys = arena_.take<SpecialRows>(tiles);
      t.special_rows = arena_.take<int32_t>(keys);
      t.grad_key = arena_.take<T>(keys * head_columns_);
      t.grad_value = arena_.take<T>(keys * value_columns_);
      t.query_left = arena_.take<O>(kQueryTile * head_stride_);
      t.query_right = arena_.take<O>(kQueryTile * head_columns_);
      t.grad_left = arena_.take<O>(kQueryTile * value_stride_);
      t.grad_right = arena_.take<O>(kQueryTile * value_columns_);
      t.special_query.row = arena_.take<int32_t>(kQueryTile);
      t.special_grad.row = arena_.take<int32_t>(kQueryTile);
      t.row = arena_.take<GradRow<S, T>>(kQueryTile);
      t.products = arena_.take<T>(kQueryTile * kKeyTile);
      t.grad_products = arena_.take<T>(kQueryTile * kKeyTile);
      t.grad_rows = arena_.take<O>(kPair == 2 ? kQueryTile * kKeyTile : 0);
      t.keep = arena_.take<T>(2 * kKeyTile);
      t.mask_sums = arena_.take<T>(kKeyTile);
      t.grad_query = arena_.take<T>(kQueryTile * head_columns_);
      t.part_grad_query = arena_.take<T>(kQueryTile * head_columns_);
      t.grad_sinks = arena_.take<double>(group_heads_);
      if (thread_) thread_[i] = t;
    }
    mask_copies_ = arena_.take<T>((copies_ - 1) * mask_size_);
    if (plan_.split) {
      part_grad_query_ =
          arena_.take<T>(a_.batch * a_.kv_heads * plan_.key_parts * most_rows_ * head_columns_);
    }
  }

  // ---- units ----

  void run_units(int thread) {
    const int64_t parts = plan_.split ? plan_.key_parts : 1;
    const AttentionLanes l(a_, parts);
    for (int64_t lane; (lane = next_.fetch_add(1)) < l.count();) {
      const int64_t b0 = lane / (l.heads * l.parts), head0 = lane / l.parts % l.heads, part0 = lane % l.parts;
      for (int64_t b = b0; b < a_.batch; b += l.batch) {
        for (int64_t head = head0; head < a_.kv_heads; head += l.heads) {
          for (int64_t part = part0; part < parts; part += l.parts) run_unit(b, head, part, thread_[thread]);
        }
      }
    }
  }

  void run_unit(int64_t b, int64_t kv_head, int64_t part, Thread& t) {
    const Sequence s(a_, b);
    const int64_t parts = backward_key_parts(s.keys), size = part_size(s.keys);
    if (plan_.split && part >= parts) return;
    Unit u{s, b, kv_head, part, parts, {0, s.keys}};
    if (plan_.split) u.keys = {std::min(part * size, s.keys), std::min((part + 1) * size, s.keys)};
    pack(u, t);
    std::fill_n(t.grad_sinks, group_heads_, 0.0);
    const RowTiles tiles(s, group_heads_);
    for (int64_t i = 0; i < tiles.count(); ++i) run_tile(u, tiles.rows(i), t);
    write_unit(u, t);
  }

  void pack(const Unit& u, Thread& t) {
    const int64_t keys = u.keys.end - u.keys.begin;
    for (int64_t first = 0, tile = 0; first < keys; first += kKeyTile, ++tile) {
      const int64_t count = std::min(kKeyTile, keys - first);
      const S* const key = u.s.template key_row<const S>(a_.key, u.kv_head, u.keys.begin + first);
      const S* const value = u.s.template key_row<const S>(a_.value, u.kv_head, u.keys.begin + first);
      pack_keys<O>(key, a_.key.stride[2], count, a_.head_size, t.keys + first * head_stride_);
      pack_keys<O>(value, a_.value.stride[2], count, a_.value_size, t.values + first * value_stride_);
      t.special_keys[tile].row = t.special_rows + first;
      pack_right<O>(key, a_.key.stride[2], count, round_up(count, kWidth), a_.head_size,
                    t.key_rows + first * head_columns_, t.special_keys[tile]);
    }
    std::fill_n(t.grad_key, round_up(keys, kKeyTile) * head_columns_, T(0));
    std::fill_n(t.grad_value, round_up(keys, kKeyTile) * value_columns_, T(0));
  }

  void write_unit(const Unit& u, const Thread& t) const {
    const auto write = [&](const HeadTensor& to, const T* from, int64_t columns, int64_t features,
                           double factor) {
      if (!to.data) return;
      for (int64_t j = u.keys.begin; j < u.keys.end; ++j, from += columns) {
        write_row(u.s.template key_row<S>(to, u.kv_head, j), from, features, T(factor));
      }
      const bool last = !plan_.split || u.part == u.parts - 1;
      for (int64_t j = u.s.keys; last && !a_.cu_seqlens_k && j < a_.keys;
           ++j) {  // behind the sequence's length
        std::memset(u.s.template key_row<S>(to, u.kv_head, j), 0, size_t(features) * sizeof(S));
      }
    };
    write(a_.grad_key, t.grad_key, head_columns_, a_.head_size, a_.scale);
    write(a_.grad_value, t.grad_value, value_columns_, a_.value_size, kept_scale_);
    if (a_.grad_sinks && u.part == 0) {
      T* const to = static_cast<T*>(a_.grad_sinks) + u.b * a_.heads + u.kv_head * group_heads_;
      for (int64_t h = 0; h < group_heads_; ++h) to[h] = T(t.grad_sinks[h]);
    }
  }

  static void write_row(S* to, const T* from, int64_t features, T factor) {
    for (int64_t i = 0; i < features; i += kWidth)
      store_upto(to + i, load<V>(from + i) * V(factor), features - i);
  }

  void join_parts(int thread) {
    T* const sum = thread_[thread].grad_query;
    for (int64_t i; (i = next_.fetch_add(1)) < a_.batch * a_.kv_heads;) {
      const int64_t b = i / a_.kv_heads, kv_head = i % a_.kv_heads;
      const Sequence s(a_, b);
      for (int64_t row = 0; row < group_heads_ * s.queries; ++row) {
        std::fill_n(sum, head_columns_, T(0));
        for (int64_t p = 0; p < backward_key_parts(s.keys); ++p) add_row(part_row(b, kv_head, p, row), sum);
        S* const to =
            s.template query_row<S>(a_.grad_query, kv_head * group_heads_ + row / s.queries, row % s.queries);
        write_row(to, sum, a_.head_size, T(a_.scale));
      }
    }
  }
  T* part_row(int64_t b, int64_t kv_head, int64_t part, int64_t row) const {
    const int64_t index = ((b * a_.kv_heads + kv_head) * plan_.key_parts + part) * most_rows_ + row;
    return part_grad_query_ + index * head_columns_;
  }
  void add_row(const T* from, T* sum) const {
    for (int64_t i = 0; i < head_columns_; i += kWidth) store(sum + i, load<V>(sum + i) + load<V>(from + i));
  }

  // ---- one tile of rows ----

  void run_tile(const Unit& u, Range of_unit, Thread& t) {
    const RowTile<O> rows(u.s, u.kv_head * group_heads_, of_unit);
    start(u, rows, t);
    std::fill_n(t.grad_query, rows.rows * head_columns_, T(0));
    const int64_t size = part_size(u.s.keys);
    for (int64_t part = u.part; part < (plan_.split ? u.part + 1 : u.parts); ++part) {
      T* const sum = plan_.split ? part_row(u.b, u.kv_head, part, of_unit.begin) : t.part_grad_query;
      std::fill_n(sum, rows.rows * head_columns_, T(0));
      const Range keys{std::max(part * size, rows.all.begin), std::min((part + 1) * size, rows.all.end)};
      for (int64_t first = round_down(keys.begin, kKeyTile); first < keys.end; first += kKeyTile) {
        run_keys(u, rows, first, sum, t);
      }
      for (int64_t r = 0; !plan_.split && r < rows.rows; ++r) {
        add_row(sum + r * head_columns_, t.grad_query + r * head_columns_);
      }
    }
    if (writes_mask_) clear_unseen(u, rows);
    if (plan_.split || !a_.grad_query.data) return;
    for (int64_t r = 0; r < rows.rows; ++r) {
      write_row(u.s.template query_row<S>(a_.grad_query, rows.head[r], rows.query[r]),
                t.grad_query + r * head_columns_, a_.head_size, T(a_.scale));
    }
  }

  // The mask's gradient of keys whose tiles no row of this one saw, and of those behind the sequence's length.
  void clear_unseen(const Unit& u, const RowTile<O>& rows) const {
    Range seen{std::max(round_down(rows.all.begin, kKeyTile), u.keys.begin),
               std::min(round_up(rows.all.end, kKeyTile), u.keys.end)};
    if (rows.all.empty() || seen.empty()) seen = {u.keys.begin, u.keys.begin};
    const bool last = !plan_.split || u.part == u.parts - 1;
    clear_mask(u, rows, {u.keys.begin, seen.begin});
    clear_mask(u, rows, {seen.end, last ? a_.keys : u.keys.end});
  }
  void clear_mask(const Unit& u, const RowTile<O>& rows, Range keys) const {
    for (int64_t r = 0; r < rows.rows && !keys.empty(); ++r) {
      scores_.with_mask(a_.grad_mask, [&](auto* mask) {
        std::fill_n(mask + of_mask(u, rows.head[r], rows.query[r], keys.begin), keys.end - keys.begin,
                    std::remove_reference_t<decltype(*mask)>{});
      });
    }
  }
  int64_t of_mask(const Unit& u, int64_t head, int64_t query, int64_t key) const {
    const int64_t* const s = a_.grad_mask_stride;
    return u.s.b * s[0] + head * s[1] + query * s[2] + key * s[3];
  }

  // Operands, log-sum-exps and deltas of the rows.
  void start(const Unit& u, const RowTile<O>& rows, Thread& t) const {
    const bool first_part = u.part == 0;
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t head = rows.head[r], query = rows.query[r];
      copy_row(u.s.template query_row<const S>(a_.query, head, query), a_.head_size,
               t.query_left + r * head_stride_);
      copy_row(u.s.template query_row<const S>(a_.grad_output, head, query), a_.value_size,
               t.grad_left + r * value_stride_);
      if (r % kWidth == 0) find_deltas(u, rows, r, t.row);
      GradRow<S, T>& row = t.row[r];
      row.highest = *u.s.template of_query<const T>(a_.highest, head, query);
      row.inverse_sum = *u.s.template of_query<const T>(a_.inverse_sum, head, query);
      row.grad_lse = a_.grad_lse.data ? *u.s.template of_query<const T>(a_.grad_lse, head, query) : T(0);
      row.delta -= row.grad_lse;
      if (a_.sinks && first_part) {
        const double sink = static_cast<const T*>(a_.sinks)[head];
        const double weight = std::exp(sink - scores_.unit() * double(row.highest)) * double(row.inverse_sum);
        if (weight != 0) t.grad_sinks[head - u.kv_head * group_heads_] -= weight * double(row.delta);
      }
      row.grad_weights = nullptr, row.grad_mask = nullptr, row.written_mask = nullptr;
    }
    const int64_t padded = round_up(rows.rows, kPair);
    pack_right<O>(t.query_left, head_stride_, rows.rows, padded, a_.head_size, t.query_right,
                  t.special_query);
    pack_right<O>(t.grad_left, value_stride_, rows.rows, padded, a_.value_size, t.grad_right, t.special_grad);
  }

  // Of up to kWidth rows from `first` on, in lanes: the products of output gradients and output. Added up in the order
  // in which those with values are, so that what is rounded cancels where a row's output is nearly one value.
  void find_deltas(const Unit& u, const RowTile<O>& rows, int64_t first, GradRow<S, T>* row) const {
    const int64_t count = std::min(rows.rows - first, kWidth);
    V sum(0), chain(0), largest(0);
    for (int64_t i = 0; i < a_.value_size; i += kWidth) {
      const int64_t n = a_.value_size - i;
      V grad[kWidth], output[kWidth];
      for (int64_t r = 0; r < kWidth; ++r) {
        grad[r] = output[r] = V(0);
        if (r >= count) continue;
        const int64_t head = rows.head[first + r], query = rows.query[first + r];
        grad[r] = load_upto<V>(u.s.template query_row<const S>(a_.grad_output, head, query) + i, n);
        output[r] = load_upto<V>(u.s.template query_row<const S>(a_.output, head, query) + i, n);
        if (!a_.remainder.data) continue;
        output[r] =
            output[r] + load_upto<V>(u.s.template query_row<const S>(a_.remainder, head, query) + i, n);
      }
      transpose(grad);
      transpose(output);
      for (int64_t k = 0; k < std::min(n, kWidth); ++k) {
        chain = fma(grad[k], output[k], chain);
        largest = max(largest, magnitude(output[k]));
      }
      if ((i + kWidth) % kScoreDepth == 0 || n <= kWidth) sum = sum + chain, chain = V(0);
    }
    T deltas[kWidth], most[kWidth];
    store(deltas, sum);
    store(most, largest);
    // Of a row whose output is zero, as where it sees nothing, the gradient may be anything.
    for (int64_t r = 0; r < count; ++r) row[first + r].delta = most[r] == 0 ? T(0) : deltas[r];
  }

  void run_keys(const Unit& u, const RowTile<O>& rows, int64_t first_key, T* grad_query, Thread& t) {
    const int64_t at = first_key - u.keys.begin, count = std::min(kKeyTile, u.keys.end - first_key);
    Range columns[K::kMostGroups], all{0, 0};
    bool whole = true;
    for (int64_t g = 0; g < rows.groups; ++g) {
      columns[g] = rows.columns(g, first_key, count);
      all = join(all, columns[g]);
      whole &= columns[g].begin == 0 && columns[g].end >= count;
    }
    // What follows writes the mask's gradient where columns are.
    if (writes_mask_ && !whole) clear_mask(u, rows, {first_key, first_key + count});
    if (all.empty()) return;
    for (int64_t r = 0; r < rows.rows; ++r) look(u, rows, r, first_key, count, t.row[r]);
    // Rows that share a gradient of the mask are summed up for themselves first: shorter chains are more exact.
    T* const shared_mask = t.row[0].grad_mask;
    const bool shares = a_.grad_mask && !writes_mask_ && a_.grad_mask_stride[2] == 0 &&
                        t.row[rows.rows - 1].grad_mask == shared_mask;
    if (shares) {
      std::fill_n(t.mask_sums, kKeyTile, T(0));
      for (int64_t r = 0; r < rows.rows; ++r) t.row[r].grad_mask = t.mask_sums;
    }
    bool hidden[kKeyTile / K::kPanelKeys] = {};
    const auto row_of = [&](int64_t r) -> const ScoreRow<T>& { return t.row[r].score; };
    if (scores_.masked() && find_hidden<O>(scores_, rows.rows, row_of, hidden).empty()) {
      if (writes_mask_ && whole) clear_mask(u, rows, {first_key, first_key + count});
      return;
    }

    multiply_keys<O>(rows, columns, hidden, t.query_left, head_stride_, a_.head_size,
                     t.keys + at * head_stride_, t.products, prefetch_masks<O>(scores_, rows, row_of));
    if (wants_scores_) {
      multiply_keys<O>(rows, columns, hidden, t.grad_left, value_stride_, a_.value_size,
                       t.values + at * value_stride_, t.grad_products, [](int64_t, Range) {});
    }
    for (int64_t g = 0, r = 0; g < rows.groups; ++g) {
      for (; r < rows.first_row[g + 1]; r += kPair) {
        // A pair may have its second row in the next group.
        const int64_t next = r + 1 < rows.first_row[g + 1] || g + 1 == rows.groups ? g : g + 1;
        const Range pair = kPair == 1 ? columns[g] : join(columns[g], columns[next]);
        with_kind(kind_, [&](auto kind) {
          if (simple_) {
            grad_scores<true, decltype(kind)::value>(u, rows, r, first_key, pair, all, count, t);
          } else {
            grad_scores<false, decltype(kind)::value>(u, rows, r, first_key, pair, all, count, t);
          }
        });
      }
    }
    for (int64_t i = 0; shares && i < (a_.grad_mask_stride[3] ? count : 1); ++i)
      shared_mask[i] += t.mask_sums[i];
    if (a_.grad_value.data) {
      add_columns(rows, columns, all, t.products, t.grad_right, value_columns_,
                  t.grad_value + at * value_columns_);
      add_special_columns(t.special_grad, all, t.products, t.grad_left, value_stride_, a_.value_size,
                          t.grad_value + at * value_columns_, value_columns_);
    }
    if (a_.grad_key.data) {
      add_columns(rows, columns, all, t.grad_products, t.query_right, head_columns_,
                  t.grad_key + at * head_columns_);
      add_special_columns(t.special_query, all, t.grad_products, t.query_left, head_stride_, a_.head_size,
                          t.grad_key + at * head_columns_, head_columns_);
    }
    if (!a_.grad_query.data) return;
    const O* const by_rows = kPair == 1 ? reinterpret_cast<const O*>(t.grad_products) : t.grad_rows;
    add_weighted<S, O>(
        rows, columns, count, by_rows, kKeyTile,
        {t.key_rows + at * head_columns_, head_columns_, t.special_keys[at / kKeyTile],
         u.s.template key_row<const S>(a_.key, u.kv_head, first_key), a_.key.stride[2], a_.head_size},
        grad_query, nullptr);
  }

  void look(const Unit& u, const RowTile<O>& rows, int64_t r, int64_t first_key, int64_t count,
            GradRow<S, T>& row) const {
    const int64_t head = rows.head[r], query = rows.query[r];
    row.score = scores_.row(a_, u.s, head, query, first_key, rows.visible[r]);
    row.score.visible.end = std::min(row.score.visible.end, count);
    if (a_.grad_weights.data) {
      row.grad_weights = u.s.template query_row<const S>(a_.grad_weights, head, query) + first_key;
    }
    if (writes_mask_) {
      scores_.with_mask(a_.grad_mask,
                        [&](auto* mask) { row.written_mask = mask + of_mask(u, head, query, first_key); });
    } else if (a_.grad_mask) {
      const int64_t copy = a_.grad_mask_stride[0] ? 0 : u.b % copies_;
      T* const mask = copy ? mask_copies_ + (copy - 1) * mask_size_ : static_cast<T*>(a_.grad_mask);
      row.grad_mask = mask + of_mask(u, head, query, first_key);
    }
  }

  // ---- between the products ----

  // Products of a row, or of a pair of rows -> weights (dropped, not yet divided by what is kept) and gradients of the
  // scores, as operands; zero in the rest of `all`.
  template <bool kSimple, ScoreKind kKind>
  void grad_scores(const Unit& u, const RowTile<O>& rows, int64_t r, int64_t first_key, Range columns,
                   Range all, int64_t count, Thread& t) const {
    T* const x = t.products + r * kKeyTile;
    T* const dx = t.grad_products + r * kKeyTile;
    const bool odd = kPair == 2 && r + 1 < rows.rows;
    const Weigher<S, T> weigher{scores_, scores_.factor(), dropout_.active, kept_scale_,
                                a_.grad_mask_stride[3]};
    GradRow<S, T> row = t.row[r], next_row = t.row[r + odd];
    T* const keep = t.keep;
    O* const grad_rows = t.grad_rows + r * kKeyTile;
    for (int i = 0; !kSimple && i <= int(odd) && dropout_.active; ++i) {
      dropout_.keep(u.b * a_.heads + rows.head[r + i], rows.query[r + i], first_key + columns.begin,
                    columns.end - columns.begin, t.keep + i * kKeyTile + columns.begin);
    }
    const auto zero = [&](int64_t c) {
      store(x + c, V(0));
      store(dx + c, V(0));
      for (int i = 0; i < kPair && kPair == 2; ++i) store_operand(grad_rows + i * kKeyTile + c, V(0));
    };
    for (int64_t c = all.begin; c < std::min(columns.begin, all.end); c += kWidth) zero(c);
    for (int64_t c = std::max(columns.end, all.begin); c < all.end; c += kWidth) zero(c);
    if (u.s.keys <= kFewKeys && !scores_.capped() && !a_.grad_weights.data) {
      row.delta = delta_of_few<kSimple, kKind>(weigher, row, columns, count, x, dx, keep);
      if (odd) {
        next_row.delta = delta_of_few<kSimple, kKind>(weigher, next_row, columns, count, x + kKeyTile,
                                                      dx + kKeyTile, keep + kKeyTile);
      }
    }
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      V weight, grad;
      weigher.template weigh<kSimple, kKind>(row, c, count, x + c, dx + c, keep + c, weight, grad);
      if constexpr (kPair == 1) {
        store(x + c, weight);
        store(dx + c, grad);
      } else {
        V weight_odd(0), grad_odd(0);
        if (odd) {
          weigher.template weigh<kSimple, kKind>(next_row, c, count, x + kKeyTile + c, dx + kKeyTile + c,
                                                 keep + kKeyTile + c, weight_odd, grad_odd);
        }
        store_operand_pairs(reinterpret_cast<O*>(x + c), weight, weight_odd);
        store_operand_pairs(reinterpret_cast<O*>(dx + c), grad, grad_odd);
        store_operand(grad_rows + c, grad);
        store_operand(grad_rows + kKeyTile + c, grad_odd);
      }
    }
  }

  // The row sum of weights times their gradients, of which few cancel more of what the output's rounding leaves in
  // delta: with 3 keys the gradients of scores were 2.5 times as wrong as torch's, with 16 they are 1.3 times so.
  static constexpr int64_t kFewKeys = 16;
  template <bool kSimple, ScoreKind kKind>
  static T delta_of_few(const Weigher<S, T>& weigher, GradRow<S, T> row, Range columns, int64_t count,
                        const T* x, const T* dx, const T* keep) {
    row.delta = 0, row.grad_mask = nullptr, row.written_mask = nullptr;
    V sum(0), weight, grad;
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      weigher.template weigh<kSimple, kKind>(row, c, count, x + c, dx + c, keep + c, weight, grad);
      sum = sum + grad;
    }
    return sum_of_lanes(sum) - row.grad_lse;
  }

  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Scores<S, T> scores_;
  const Dropout dropout_;
  const T kept_scale_;
  const int64_t group_heads_, head_columns_, value_columns_, head_stride_, value_stride_;
  const bool wants_scores_;
  const ScoreKind kind_;
  const int64_t copies_, mask_size_;
  const bool writes_mask_;
  const bool simple_;  // nothing between the weights and the gradients of the scores
  int64_t most_keys_ = 0, most_rows_ = 0;
  std::atomic<int64_t> next_{0};
  Arena arena_;
  Thread* thread_;
  T *part_grad_query_ = nullptr, *mask_copies_ = nullptr;
};

}  // namespace

bool attention_backward(const AttentionArgs& args, const AttentionPlan& plan) {
  return with_types(args.dtype, [&](auto storage, auto operand) {
    return Backward<decltype(storage), decltype(operand)>(args, plan).run();
  });
}

}  // namespace fastseq::FASTSEQ_ISA
