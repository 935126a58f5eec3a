// Attention over dual numbers, backward: the gradients, and their tangents beside them.
//
// For each tile of rows and each tile of keys that one of them sees, a prime marking tangents:
//
//   X = Q K^T      X' = Q' K^T + Q K'^T      P as in the backward pass,  P' = P (S' - mu),  S' as in the forward pass
//   G = dO V^T     G' = dO' V^T + dO V'^T
//   E = G - delta                E' = G' - delta'
//   dS = P E                     dS' = P' E + P E'         and with the slope of a soft cap: dX, dX'
//   dV = dV + P^T dO             dV' = dV' + P'^T dO + P^T dO'
//   dK = dK + dX^T Q             dK' = dK' + dX'^T Q + dX^T Q'
//   dQ = dQ + dX K               dQ' = dQ' + dX' K + dX K'
//
// delta is the row sum of dO O, less the gradient of lse, and delta' its tangent: O, O' and mu, the tangent of lse, come
// from the forward pass. What has no tangent, or is not wanted, is left out: of the second derivatives for Q, K and V,
// where dO has no tangent and only dQ', dK' and dV' are wanted, ten products are left.
//
// A unit of work keeps the sums of its keys, and runs over the tiles of rows; units that add to the same elements of the
// mask's gradient are run in order by one thread. All operands are in the dtype of sums: in 16 bits, what is rounded
// between the products would not cancel as it should.
#include <atomic>

#include "attention_columns.h"
#include "attention_tiles.h"
#include "philox.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// A number and its tangent, or what there is of either.
template <class T>
struct Dual {
  T primal, tangent;
};

template <class S, class O>
class DualBackward {
 public:
  using K = Tiles<O>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;
  static_assert(K::kPair == 1);

  DualBackward(const AttentionDualArgs& d, const AttentionPlan& plan)
      : d_(d),
        a_(d.primal),
        threads_(plan.head_parts),
        scores_(a_),
        dropout_(a_.dropout_p, a_.seed),
        kept_scale_(T(1 / (1 - a_.dropout_p))),
        group_heads_(a_.heads / a_.kv_heads),
        head_columns_(round_up(a_.head_size, kWidth)),
        value_columns_(round_up(a_.value_size, kWidth)) {
    for (int64_t b = 0; b < a_.batch; ++b) most_keys_ = std::max(most_keys_, AttentionLengths(a_, b).keys);
    lay_out();
    arena_.allocate();
    lay_out();
  }

  bool run() {
    const auto units = [](void* self, int thread) { static_cast<DualBackward*>(self)->run_units(thread); };
    return run_team(threads_, units, this);
  }

 private:
  // Rows of a tensor as the right side of products, by tiles.
  struct Packed {
    O* rows;
    SpecialRows* special;  // of each tile
  };
  struct GradRow {
    ScoreRow<T> score;
    T highest, inverse_sum, mu;
    Dual<T> delta, grad_lse;
    const void* mask_tangent;  // at the tile's first key, or null
    Dual<T*> grad_mask;        // likewise
  };
  struct Thread {
    // Of the unit's keys.
    Dual<O*> keys, values;          // transposed panels
    Dual<Packed> key_rows;          // as the right side of dX K
    Dual<T*> grad_key, grad_value;  // [keys][columns]
    // Of a tile of rows.
    Dual<O*> query_left, grad_left;  // [kQueryTile][size]
    Dual<Packed> query_right, grad_right;
    GradRow* row;
    Dual<T*> weights;          // [kQueryTile][kKeyTile]  X, then P; X', then P'
    Dual<T*> gradients;        // likewise G, then dX; G', then dX'
    T* keep;                   // [kKeyTile]
    Dual<T*> grad_query;       // [kQueryTile][head_columns]
    Dual<double*> grad_sinks;  // [group heads]
  };

  void lay_out() {
    thread_ = arena_.take<Thread>(threads_);
    const int64_t tiles = group_count(most_keys_, kKeyTile), keys = tiles * kKeyTile;
    const int64_t head = a_.head_size, value = a_.value_size;
    const auto take = [&](int64_t size) { return Dual<T*>{arena_.take<T>(size), arena_.take<T>(size)}; };
    const auto pack = [&](int64_t rows, int64_t tile_rows, int64_t columns) {
      const int64_t count = group_count(rows, tile_rows);
      const Packed packed{arena_.take<O>(rows * columns), arena_.take<SpecialRows>(count)};
      int32_t* const special = arena_.take<int32_t>(rows);
      for (int64_t i = 0; thread_ && i < count; ++i) packed.special[i] = {0, special + i * tile_rows};
      return packed;
    };
    const auto pack_both = [&](int64_t rows, int64_t tile_rows, int64_t columns) {
      const Packed primal = pack(rows, tile_rows, columns);
      return Dual<Packed>{primal, pack(rows, tile_rows, columns)};
    };
    for (int i = 0; i < threads_; ++i) {
      Thread t = {};
      t.keys = take(keys * head), t.values = take(keys * value);
      t.key_rows = pack_both(keys, kKeyTile, head_columns_);
      t.grad_key = take(keys * head_columns_), t.grad_value = take(keys * value_columns_);
      t.query_left = take(kQueryTile * head), t.grad_left = take(kQueryTile * value);
      t.query_right = pack_both(kQueryTile, kQueryTile, head_columns_);
      t.grad_right = pack_both(kQueryTile, kQueryTile, value_columns_);
      t.row = arena_.take<GradRow>(kQueryTile);
      t.weights = take(kQueryTile * kKeyTile), t.gradients = take(kQueryTile * kKeyTile);
      t.keep = arena_.take<T>(kKeyTile);
      t.grad_query = take(kQueryTile * head_columns_);
      t.grad_sinks = {arena_.take<double>(group_heads_), arena_.take<double>(group_heads_)};
      if (thread_) thread_[i] = t;
    }
  }

  // ---- units ----

  void run_units(int thread) {
    const bool of_mask = a_.grad_mask || d_.grad_mask;
    const int64_t batch = of_mask && a_.grad_mask_stride[0] == 0 ? 1 : a_.batch;
    const int64_t heads = of_mask && a_.grad_mask_stride[1] == 0 ? 1 : a_.kv_heads;
    for (int64_t lane; (lane = next_.fetch_add(1)) < batch * heads;) {
      for (int64_t b = lane / heads; b < a_.batch; b += batch) {
        for (int64_t head = lane % heads; head < a_.kv_heads; head += heads)
          run_unit(b, head, thread_[thread]);
      }
    }
  }

  void run_unit(int64_t b, int64_t kv_head, Thread& t) {
    const Sequence s(a_, b);
    const Unit u{s, b, kv_head, 0, 1, {0, s.keys}};
    pack_unit(u, t);
    const int64_t keys = round_up(s.keys, kKeyTile);
    for (T* sums : {t.grad_key.primal, t.grad_key.tangent}) std::fill_n(sums, keys * head_columns_, T(0));
    for (T* sums : {t.grad_value.primal, t.grad_value.tangent})
      std::fill_n(sums, keys * value_columns_, T(0));
    for (double* sums : {t.grad_sinks.primal, t.grad_sinks.tangent}) std::fill_n(sums, group_heads_, 0.0);
    const RowTiles tiles(s, group_heads_);
    for (int64_t i = 0; i < tiles.count(); ++i) run_tile(u, tiles.rows(i), t);
    write_unit(u, t);
  }

  void pack_unit(const Unit& u, const Thread& t) const {
    for (int64_t first = 0, tile = 0; first < u.s.keys; first += kKeyTile, ++tile) {
      const int64_t count = std::min(kKeyTile, u.s.keys - first);
      const auto rows = [&](const HeadTensor& from) {
        return u.s.template key_row<const S>(from, u.kv_head, first);
      };
      const auto panels = [&](const HeadTensor& from, int64_t features, O* to) {
        if (from.data) pack_keys<O>(rows(from), from.stride[2], count, features, to + first * features);
      };
      const auto right = [&](const HeadTensor& from, const Packed& to) {
        if (!from.data) return;
        pack_right<O>(rows(from), from.stride[2], count, round_up(count, kWidth), a_.head_size,
                      to.rows + first * head_columns_, to.special[tile]);
      };
      panels(a_.key, a_.head_size, t.keys.primal), panels(d_.key, a_.head_size, t.keys.tangent);
      panels(a_.value, a_.value_size, t.values.primal), panels(d_.value, a_.value_size, t.values.tangent);
      right(a_.key, t.key_rows.primal), right(d_.key, t.key_rows.tangent);
    }
  }

  void write_unit(const Unit& u, const Thread& t) const {
    const auto write = [&](const HeadTensor& to, const T* from, int64_t columns, int64_t features, T factor) {
      if (!to.data) return;
      const int64_t behind = a_.cu_seqlens_k ? u.s.keys : a_.keys;  // of the sequence's length
      for (int64_t j = 0; j < behind; ++j, from += columns) {
        S* const row = u.s.template key_row<S>(to, u.kv_head, j);
        if (j < u.s.keys) {
          write_row(row, from, features, factor);
        } else {
          std::memset(row, 0, size_t(features) * sizeof(S));
        }
      }
    };
    write(a_.grad_key, t.grad_key.primal, head_columns_, a_.head_size, T(a_.scale));
    write(d_.grad_key, t.grad_key.tangent, head_columns_, a_.head_size, T(a_.scale));
    write(a_.grad_value, t.grad_value.primal, value_columns_, a_.value_size, kept_scale_);
    write(d_.grad_value, t.grad_value.tangent, value_columns_, a_.value_size, kept_scale_);
    const auto write_sinks = [&](void* to, const double* from) {
      T* const at = static_cast<T*>(to) + u.b * a_.heads + u.kv_head * group_heads_;
      for (int64_t h = 0; to && h < group_heads_; ++h) at[h] = T(from[h]);
    };
    write_sinks(a_.grad_sinks, t.grad_sinks.primal);
    write_sinks(d_.grad_sinks, t.grad_sinks.tangent);
  }
  static void write_row(S* to, const T* from, int64_t features, T factor) {
    for (int64_t i = 0; i < features; i += kWidth)
      store_upto(to + i, load<V>(from + i) * V(factor), features - i);
  }

  // ---- one tile of rows ----

  void run_tile(const Unit& u, Range of_unit, Thread& t) const {
    const RowTile<O> rows(u.s, u.kv_head * group_heads_, of_unit);
    start(u, rows, t);
    for (T* sums : {t.grad_query.primal, t.grad_query.tangent})
      std::fill_n(sums, rows.rows * head_columns_, T(0));
    for (int64_t first = round_down(rows.all.begin, kKeyTile); first < rows.all.end; first += kKeyTile)
      run_keys(u, rows, first, t);
    const auto write = [&](const HeadTensor& to, const T* from) {
      for (int64_t r = 0; to.data && r < rows.rows; ++r) {
        write_row(u.s.template query_row<S>(to, rows.head[r], rows.query[r]), from + r * head_columns_,
                  a_.head_size, T(a_.scale));
      }
    };
    write(a_.grad_query, t.grad_query.primal);
    write(d_.grad_query, t.grad_query.tangent);
  }

  void start(const Unit& u, const RowTile<O>& rows, const Thread& t) const {
    const auto copy = [&](const HeadTensor& from, int64_t features, O* left, const Packed& right) {
      if (!from.data) return;
      copy_rows<S>(from, features, u.s, rows, left, features);
      pack_right<O>(left, features, rows.rows, rows.rows, features, right.rows, *right.special);
    };
    copy(a_.query, a_.head_size, t.query_left.primal, t.query_right.primal);
    copy(d_.query, a_.head_size, t.query_left.tangent, t.query_right.tangent);
    copy(a_.grad_output, a_.value_size, t.grad_left.primal, t.grad_right.primal);
    copy(d_.grad_output, a_.value_size, t.grad_left.tangent, t.grad_right.tangent);
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t head = rows.head[r], query = rows.query[r], h = head - u.kv_head * group_heads_;
      const auto number = [&](const HeadRows& of) {
        return of.data ? *u.s.template of_query<const T>(of, head, query) : T(0);
      };
      GradRow& row = t.row[r];
      row.highest = number(a_.highest), row.inverse_sum = number(a_.inverse_sum), row.mu = number(d_.lse);
      row.grad_lse = {number(a_.grad_lse), number(d_.grad_lse)};
      row.delta = find_delta(u, head, query, t.grad_left, r);
      row.delta.primal -= row.grad_lse.primal, row.delta.tangent -= row.grad_lse.tangent;
      if (!a_.sinks) continue;
      const double sink = static_cast<const T*>(a_.sinks)[head];
      const double weight = std::exp(sink - scores_.unit() * double(row.highest)) * double(row.inverse_sum);
      if (!(weight != 0)) continue;
      const double change = (d_.sinks ? double(static_cast<const T*>(d_.sinks)[head]) : 0.0) - double(row.mu);
      t.grad_sinks.primal[h] -= weight * double(row.delta.primal);
      t.grad_sinks.tangent[h] -= weight * (change * double(row.delta.primal) + double(row.delta.tangent));
    }
  }

  // dO O, and its tangent.
  Dual<T> find_delta(const Unit& u, int64_t head, int64_t query, const Dual<O*>& grad_left, int64_t r) const {
    const auto row_of = [&](const HeadTensor& of) {
      return of.data ? u.s.template query_row<const S>(of, head, query) : nullptr;
    };
    const S *const output = row_of(a_.output), *const remainder = row_of(a_.remainder);
    const S *const tangent = row_of(d_.output), *const tangent_remainder = row_of(d_.remainder);
    const auto grads = [&](const HeadTensor& of, const O* left) {
      return of.data ? left + r * a_.value_size : nullptr;
    };
    const O *const grad = grads(a_.grad_output, grad_left.primal), *const grad_tangent = grads(
                                                                       d_.grad_output, grad_left.tangent);
    V sum(0), sum_tangent(0), largest(0);
    for (int64_t i = 0; i < a_.value_size; i += kWidth) {
      const int64_t n = a_.value_size - i;
      const auto of = [&](const auto* from) { return from ? load_upto<V>(from + i, n) : V(0); };
      const V o = of(output) + of(remainder), do_ = of(grad);
      sum = fma(do_, o, sum);
      const V change = of(tangent) + of(tangent_remainder);
      sum_tangent = fma(of(grad_tangent), o, fma(do_, change, sum_tangent));
      largest = max(largest, max(magnitude(o), magnitude(change)));
    }
    // Of a row whose output is zero, as where it sees nothing, the gradient may be anything.
    const auto nothing = largest.v == V(0).v;
    if (sum_of_lanes(select<T>(nothing, V(0), V(1))) == 0) return {0, 0};
    return {sum_of_lanes(sum), sum_of_lanes(sum_tangent)};
  }

  // ---- one tile of rows and keys ----

  void run_keys(const Unit& u, const RowTile<O>& rows, int64_t first_key, Thread& t) const {
    const int64_t count = std::min(kKeyTile, u.s.keys - first_key);
    Range columns[K::kMostGroups], all{0, 0};
    for (int64_t g = 0; g < rows.groups; ++g) {
      columns[g] = rows.columns(g, first_key, count);
      all = join(all, columns[g]);
    }
    if (all.empty()) return;
    for (int64_t r = 0; r < rows.rows; ++r) look(u, rows, r, first_key, count, t.row[r]);
    bool hidden[kKeyTile / K::kPanelKeys] = {};
    const auto row_of = [&](int64_t r) -> const ScoreRow<T>& { return t.row[r].score; };
    if (scores_.masked() && find_hidden<O>(scores_, rows.rows, row_of, hidden).empty()) return;

    const auto multiply = [&](const HeadTensor& left_of, const O* left, const HeadTensor& keys_of,
                              const O* keys, int64_t size, bool& begun, T* products) {
      if (!left_of.data || !keys_of.data) return;
      const auto nothing = [](int64_t, Range) {};
      const O* const panels = keys + first_key * size;
      if (begun) {
        multiply_keys<O, true>(rows, columns, hidden, left, size, size, panels, products, nothing);
      } else {
        multiply_keys<O>(rows, columns, hidden, left, size, size, panels, products, nothing);
      }
      begun = true;
    };
    const auto multiply_both = [&](const HeadTensor& left_of, const HeadTensor& left_tangent_of,
                                   const Dual<O*>& left, const HeadTensor& keys_of,
                                   const HeadTensor& key_tangents_of, const Dual<O*>& keys, int64_t size,
                                   const Dual<T*>& products) {
      bool primal = false, tangent = false;
      multiply(left_of, left.primal, keys_of, keys.primal, size, primal, products.primal);
      multiply(left_tangent_of, left.tangent, keys_of, keys.primal, size, tangent, products.tangent);
      multiply(left_of, left.primal, key_tangents_of, keys.tangent, size, tangent, products.tangent);
      if (!primal) std::fill_n(products.primal, rows.rows * kKeyTile, T(0));
      if (!tangent) std::fill_n(products.tangent, rows.rows * kKeyTile, T(0));
    };
    multiply_both(a_.query, d_.query, t.query_left, a_.key, d_.key, t.keys, a_.head_size, t.weights);
    multiply_both(a_.grad_output, d_.grad_output, t.grad_left, a_.value, d_.value, t.values, a_.value_size,
                  t.gradients);
    for (int64_t g = 0; g < rows.groups; ++g) {
      for (int64_t r = rows.first_row[g]; r < rows.first_row[g + 1]; ++r) {
        with_kind(scores_.kind(), [&](auto kind) {
          differentiate<decltype(kind)::value>(u, rows, r, first_key, columns[g], all, count, t);
        });
      }
    }
    add_to_keys(rows, columns, all, first_key, t);
    add_to_queries(u, rows, columns, first_key, count, t);
  }

  void look(const Unit& u, const RowTile<O>& rows, int64_t r, int64_t first_key, int64_t count,
            GradRow& row) const {
    const int64_t head = rows.head[r], query = rows.query[r];
    row.score = scores_.row(a_, u.s, head, query, first_key, rows.visible[r]);
    row.score.visible.end = std::min(row.score.visible.end, count);
    const auto at = [&](const int64_t* s) {
      return u.s.b * s[0] + head * s[1] + query * s[2] + first_key * s[3];
    };
    row.mask_tangent = nullptr;
    if (d_.mask.data) {
      scores_.with_mask(const_cast<void*>(d_.mask.data),
                        [&](auto* mask) { row.mask_tangent = mask + at(d_.mask.stride); });
    }
    const auto grad = [&](void* of) { return of ? static_cast<T*>(of) + at(a_.grad_mask_stride) : nullptr; };
    row.grad_mask = {grad(a_.grad_mask), grad(d_.grad_mask)};
  }

  // Products of a row -> P and P' (dropped, not yet divided by what is kept), dX and dX'; zero in the rest of `all`.
  template <ScoreKind kKind>
  void differentiate(const Unit& u, const RowTile<O>& rows, int64_t r, int64_t first_key, Range columns,
                     Range all, int64_t count, Thread& t) const {
    const int64_t at = r * kKeyTile;
    T *const x = t.weights.primal + at, *const dx = t.weights.tangent + at;
    T *const g = t.gradients.primal + at, *const dg = t.gradients.tangent + at;
    for (T* row : {x, dx, g, dg}) {
      for (int64_t c = all.begin; c < std::min(columns.begin, all.end); c += kWidth) store(row + c, V(0));
      for (int64_t c = std::max(columns.end, all.begin); c < all.end; c += kWidth) store(row + c, V(0));
    }
    const T* const keep = t.keep;
    if (dropout_.active && !columns.empty()) {
      dropout_.keep(u.b * a_.heads + rows.head[r], rows.query[r], first_key + columns.begin,
                    columns.end - columns.begin, t.keep + columns.begin);
    }
    const Scores<S, T> scores = scores_;  // copies that no store can change
    GradRow row = t.row[r];
    const T factor = scores.factor(), scale = T(a_.scale), kept_scale = kept_scale_;
    const bool dropped = dropout_.active, capped = scores.capped();

    // p, p', and the products times what is kept; calls done(c, visible, p, p', dp, dp', slope, bend).
    const auto visit = [&](auto done) {
      for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
        const V product = load<V>(x + c), change = load<V>(dx + c);
        V slope(1), p = (scores.template of<kKind>(row.score, product, c, slope) - row.highest) * factor;
        if (!Scores<S, T>::all_visible(row.score, c)) p = Scores<S, T>::within(row.score, p, c);
        p = exp2(p);
        const auto visible = p.v != V(0).v;
        // What is hidden may hold anything, and so may the sum of a row that sees a NaN elsewhere.
        p = select<T>(visible, p * row.inverse_sum, V(0));
        V tangent = change * scale, bend(0);
        if (capped) tangent = tangent * slope, bend = scores.bend(product, slope) * change;
        if (row.mask_tangent)
          tangent = tangent + mask_tangent(row.mask_tangent, c, row.score.visible.end - c);
        const V dp = select<T>(visible, p * (tangent - row.mu), V(0));
        V grad = load<V>(g + c), grad_tangent = load<V>(dg + c);
        if (dropped) {
          const V kept = load<V>(keep + c) * V(kept_scale);
          grad = grad * kept, grad_tangent = grad_tangent * kept;
        }
        done(c, visible, p, dp, grad, grad_tangent, slope, bend);
      }
    };
    if (u.s.keys <= kFewKeys) row.delta = delta_of_few(row, visit);
    visit([&](int64_t c, auto visible, V p, V dp, V grad, V grad_tangent, V slope, V bend) {
      const V rest = grad - row.delta.primal, rest_tangent = grad_tangent - row.delta.tangent;
      V ds = select<T>(visible, p * rest, V(0));
      V ds_tangent = select<T>(visible, fma(dp, rest, p * rest_tangent), V(0));
      if (row.grad_mask.primal) add_mask_gradient(row.grad_mask.primal, c, count, ds);
      if (row.grad_mask.tangent) add_mask_gradient(row.grad_mask.tangent, c, count, ds_tangent);
      if (capped) {
        ds_tangent = select<T>(visible, fma(bend, ds, ds_tangent * slope), V(0));
        ds = select<T>(visible, ds * slope, V(0));
      }
      if (dropped) {
        const V kept = load<V>(keep + c);
        p = p * kept, dp = dp * kept;
      }
      store(x + c, p), store(dx + c, dp);
      store(g + c, ds), store(dg + c, ds_tangent);
    });
  }

  // As in the backward pass: of few keys rounding cancels where their own sum is taken.
  static constexpr int64_t kFewKeys = 16;
  template <class Visit>
  static Dual<T> delta_of_few(const GradRow& row, const Visit& visit) {
    V sum(0), sum_tangent(0);
    visit([&](int64_t, auto visible, V p, V dp, V grad, V grad_tangent, V, V) {
      sum = sum + select<T>(visible, p * grad, V(0));
      sum_tangent = sum_tangent + select<T>(visible, fma(dp, grad, p * grad_tangent), V(0));
    });
    return {sum_of_lanes(sum) - row.grad_lse.primal, sum_of_lanes(sum_tangent) - row.grad_lse.tangent};
  }

  V mask_tangent(const void* row, int64_t column, int64_t n) const {
    if (n <= 0) return V(0);
    const int64_t stride = d_.mask.stride[3];
    if (d_.mask.kind == MaskKind::kSame)
      return load_strided<V>(static_cast<const S*>(row) + column * stride, stride, n);
    if constexpr (sizeof(T) == sizeof(float)) {
      return load_strided<V>(static_cast<const float*>(row) + column * stride, stride, n);
    }
    return V(0);
  }

  void add_mask_gradient(T* grad_mask, int64_t c, int64_t count, V grad) const {
    if (a_.grad_mask_stride[3] == 0) {
      *grad_mask += sum_of_lanes(grad);
    } else if (c < count) {
      store_upto(grad_mask + c, load_upto<V>(grad_mask + c, count - c) + grad, count - c);
    }
  }

  // ---- the products into the gradients ----

  void add_to_keys(const RowTile<O>& rows, const Range* columns, Range all, int64_t first_key,
                   const Thread& t) const {
    const auto add = [&](const T* tile, const HeadTensor& of, const Packed& right, const O* left,
                         int64_t size, int64_t width, T* sums) {
      if (!of.data) return;
      T* const to = sums + first_key * width;
      add_columns<O>(rows, columns, all, tile, right.rows, width, to);
      add_special_columns<O>(*right.special, all, tile, left, size, size, to, width);
    };
    const auto add_both = [&](const HeadTensor& wanted, const HeadTensor& wanted_tangent,
                              const Dual<T*>& tile, const HeadTensor& of, const HeadTensor& tangent_of,
                              const Dual<Packed>& right, const Dual<O*>& left, int64_t size, int64_t width,
                              const Dual<T*>& sums) {
      if (wanted.data) add(tile.primal, of, right.primal, left.primal, size, width, sums.primal);
      if (!wanted_tangent.data) return;
      add(tile.tangent, of, right.primal, left.primal, size, width, sums.tangent);
      add(tile.primal, tangent_of, right.tangent, left.tangent, size, width, sums.tangent);
    };
    add_both(a_.grad_value, d_.grad_value, t.weights, a_.grad_output, d_.grad_output, t.grad_right,
             t.grad_left, a_.value_size, value_columns_, t.grad_value);
    add_both(a_.grad_key, d_.grad_key, t.gradients, a_.query, d_.query, t.query_right, t.query_left,
             a_.head_size, head_columns_, t.grad_key);
  }

  void add_to_queries(const Unit& u, const RowTile<O>& rows, const Range* columns, int64_t first_key,
                      int64_t count, const Thread& t) const {
    const auto add = [&](const T* tile, const HeadTensor& of, const Packed& right, T* sums) {
      if (!of.data) return;
      add_weighted<S, O>(
          rows, columns, count, tile, kKeyTile,
          {right.rows + first_key * head_columns_, head_columns_, right.special[first_key / kKeyTile],
           u.s.template key_row<const S>(of, u.kv_head, first_key), of.stride[2], a_.head_size},
          sums, nullptr);
    };
    if (a_.grad_query.data) add(t.gradients.primal, a_.key, t.key_rows.primal, t.grad_query.primal);
    if (!d_.grad_query.data) return;
    add(t.gradients.tangent, a_.key, t.key_rows.primal, t.grad_query.tangent);
    add(t.gradients.primal, d_.key, t.key_rows.tangent, t.grad_query.tangent);
  }

  const AttentionDualArgs& d_;
  const AttentionArgs& a_;
  const int threads_;
  const Scores<S, T> scores_;
  const Dropout dropout_;
  const T kept_scale_;
  const int64_t group_heads_, head_columns_, value_columns_;
  int64_t most_keys_ = 0;
  std::atomic<int64_t> next_{0};
  Arena arena_;
  Thread* thread_;
};

}  // namespace

bool attention_dual_backward(const AttentionDualArgs& args, const AttentionPlan& plan) {
  switch (args.primal.dtype) {
    default:
      return DualBackward<float, float>(args, plan).run();
    case DType::kFloat64:
      return DualBackward<double, double>(args, plan).run();
    case DType::kBFloat16:
      return DualBackward<bfloat16, float>(args, plan).run();
    case DType::kFloat16:
      return DualBackward<float16, float>(args, plan).run();
  }
}

}  // namespace fastseq::FASTSEQ_ISA
