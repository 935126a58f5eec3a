// Attention over dual numbers, forward: the tangents stream beside the primal, in one pass over the keys.
//
// What attention_forward.cpp does for a tile of rows and a tile of keys, and beside it, with S' the tangent of the scores:
//
//   S' = Q' K^T + Q K'^T     times the scale and the slope of the soft cap, plus the mask's tangent
//   D = P (S' - c)           c is a constant of the row, near the mean of S': what is summed up stays small
//   L = L exp(m - m') + row sums of D
//   O' = O' exp(m - m') + D V + P V'
//
// and at the end mu = c + L / l, the tangent of lse, and O' / l - (L / l) O / l, that of the output: the sum of
// P / l (S' - mu) V + P / l V'. Sinks are one more score, without a value.
//
// Cost of a vector of scores: 6 * D / 2 multiply-adds where D = Dv, three times those of the primal, and some 22
// operations of the softmax. Keys, values and their tangents are packed once for each unit of work.
#include <atomic>
#include <new>

#include "attention_softmax.h"
#include "attention_tiles.h"
#include "philox.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// What a group of threads shares: the packed keys and values of its unit, by tiles of keys.
template <class O>
struct Group {
  Group(int threads, Barrier::Flag* flags) : barrier(threads, flags) {}

  Barrier barrier;
  int64_t unit = 0;
  std::atomic<int64_t> next_tile{0};
  O *keys = nullptr, *key_tangents = nullptr;      // transposed panels
  O *values = nullptr, *value_tangents = nullptr;  // as right sides
  SpecialRows *special = nullptr, *special_tangents = nullptr;
};

template <class S, class O>
class DualForward {
 public:
  using K = Tiles<O>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;

  DualForward(const AttentionDualArgs& d, const AttentionPlan& plan)
      : d_(d),
        a_(d.primal),
        plan_(plan),
        scores_(a_),
        dropout_(a_.dropout_p, a_.seed),
        group_heads_(a_.heads / a_.kv_heads),
        value_columns_(round_up(a_.value_size, kWidth)),
        left_stride_(pairs<O>(a_.head_size) * K::kPair),
        threads_(plan.head_parts * plan.row_parts),
        moves_products_(d.query.data || d.key.data),
        moves_scores_(moves_products_ || d.mask.data) {
    for (int64_t b = 0; b < a_.batch; ++b) most_keys_ = std::max(most_keys_, AttentionLengths(a_, b).keys);
    lay_out();
    arena_.allocate();
    lay_out();
  }

  bool run() {
    const auto attend = [](void* self, int thread) { static_cast<DualForward*>(self)->attend_units(thread); };
    return run_team(threads_, attend, this);
  }

 private:
  struct Thread {
    TileState<T> tile;
    O *left, *left_tangent;  // [kQueryTile][left_stride]  queries
    T* tangents;             // [kQueryTile][kKeyTile]  S', then D
    T* output_tangent;       // like tile.output
    V sum_tangent[kQueryTile];
    T center[kQueryTile];  // c
    bool centered[kQueryTile];
  };

  // ---- units: as in the forward pass, but keys are never cut ----

  Unit unit_at(int64_t index) const {
    const int64_t b = index / a_.kv_heads;
    Unit u{Sequence(a_, b), b, index % a_.kv_heads, 0, 1, {0, 0}};
    if (u.s.queries > 0) {
      u.keys = {round_down(u.s.visible(0).begin, kKeyTile), u.s.visible(u.s.queries - 1).end};
      u.keys.end = std::max(u.keys.begin, u.keys.end);
    }
    return u;
  }

  void lay_out() {
    groups_ = arena_.take<Group<O>>(plan_.head_parts);
    thread_ = arena_.take<Thread>(threads_);
    Barrier::Flag* const flags = arena_.take<Barrier::Flag>(threads_);
    const int64_t tiles = group_count(most_keys_, kKeyTile), keys = tiles * kKeyTile;
    for (int g = 0; g < plan_.head_parts; ++g) {
      O* const packed_keys = arena_.take<O>(keys * left_stride_);
      O* const key_tangents = arena_.take<O>(d_.key.data ? keys * left_stride_ : 0);
      O* const values = arena_.take<O>(keys * value_columns_);
      O* const value_tangents = arena_.take<O>(d_.value.data ? keys * value_columns_ : 0);
      SpecialRows* const special = arena_.take<SpecialRows>(2 * tiles);
      int32_t* const rows = arena_.take<int32_t>(2 * keys);
      if (!groups_) continue;
      Barrier::Flag* const first = flags + g * plan_.row_parts;
      for (int i = 0; i < plan_.row_parts; ++i) new (first + i) Barrier::Flag;
      Group<O>& group = *new (groups_ + g) Group<O>(plan_.row_parts, first);
      group.keys = packed_keys, group.key_tangents = key_tangents;
      group.values = values, group.value_tangents = value_tangents;
      group.special = special, group.special_tangents = special + tiles;
      for (int64_t t = 0; t < 2 * tiles; ++t) special[t] = {0, rows + t * kKeyTile};
    }
    for (int i = 0; i < threads_; ++i) {
      T* const products = arena_.take<T>(kQueryTile * kKeyTile);
      T* const tangents = arena_.take<T>(kQueryTile * kKeyTile);
      T* const output = arena_.take<T>(kQueryTile * value_columns_);
      T* const output_tangent = arena_.take<T>(kQueryTile * value_columns_);
      T* const keep = arena_.take<T>(kKeyTile);
      O* const left = arena_.take<O>(kQueryTile * left_stride_);
      O* const left_tangent = arena_.take<O>(kQueryTile * left_stride_);
      if (!thread_) continue;
      Thread& t = thread_[i];
      t.left = left, t.left_tangent = left_tangent, t.tangents = tangents, t.output_tangent = output_tangent;
      t.tile.products = products, t.tile.output = output, t.tile.output_stride = value_columns_,
      t.tile.keep = keep;
    }
  }

  void attend_units(int thread) {
    Group<O>& group = groups_[thread / plan_.row_parts];
    const int member = thread % plan_.row_parts;
    for (;;) {
      if (member == 0) {
        group.unit = next_unit_.fetch_add(1);
        group.next_tile = 0;
      }
      group.barrier.wait(member);
      if (group.unit >= a_.batch * a_.kv_heads) return;
      const Unit u = unit_at(group.unit);
      pack(u, group, member);
      group.barrier.wait(member);
      const RowTiles tiles(u.s, group_heads_);
      const int64_t count = tiles.count();
      for (int64_t i; (i = group.next_tile.fetch_add(1)) < count;) {
        // Under causality the last tiles take longest.
        const RowTile<O> rows(u.s, u.kv_head * group_heads_, tiles.rows(count - 1 - i));
        attend(u, group, rows, thread_[thread]);
        finish(u, rows, thread_[thread]);
      }
      group.barrier.wait(member);
    }
  }

  void pack(const Unit& u, const Group<O>& group, int member) const {
    const int64_t tiles = group_count(u.keys.end - u.keys.begin, kKeyTile);
    for (int64_t t = member; t < tiles; t += plan_.row_parts) {
      const int64_t first = u.keys.begin + t * kKeyTile, keys = std::min(kKeyTile, u.keys.end - first);
      const auto pack_panels = [&](const HeadTensor& from, O* to) {
        if (!from.data) return;
        pack_keys<O>(u.s.template key_row<const S>(from, u.kv_head, first), from.stride[2], keys,
                     a_.head_size, to + t * kKeyTile * left_stride_);
      };
      const auto pack_rows = [&](const HeadTensor& from, O* to, SpecialRows& special) {
        if (!from.data) return;
        pack_right<O>(u.s.template key_row<const S>(from, u.kv_head, first), from.stride[2], keys,
                      round_up(keys, kWidth), a_.value_size, to + t * kKeyTile * value_columns_, special);
      };
      pack_panels(a_.key, group.keys);
      pack_panels(d_.key, group.key_tangents);
      pack_rows(a_.value, group.values, group.special[t]);
      pack_rows(d_.value, group.value_tangents, group.special_tangents[t]);
    }
  }

  // ---- one tile of rows ----

  void start(const Unit& u, const RowTile<O>& rows, Thread& t) const {
    TileState<T>& state = t.tile;
    for (int64_t r = 0; r < rows.rows; ++r) {
      state.highest[r] = sink_of(rows.head[r]);
      state.sum[r] = V(0);
      state.sum[r].v[0] = state.highest[r] > -INFINITY ? 1 : 0;
      t.sum_tangent[r] = V(0), t.center[r] = 0, t.centered[r] = false;
    }
    std::fill_n(state.touched, rows.groups, false);
    if (!moves_scores_ && !d_.value.data) std::fill_n(t.output_tangent, rows.rows * value_columns_, T(0));
    if (!moves_products_) std::fill_n(t.tangents, kQueryTile * kKeyTile, T(0));
    copy_rows<S>(a_.query, a_.head_size, u.s, rows, t.left, left_stride_);
    if (d_.query.data) copy_rows<S>(d_.query, a_.head_size, u.s, rows, t.left_tangent, left_stride_);
  }
  // In the engine's units; -inf if there is none.
  T sink_of(int64_t head) const {
    return a_.sinks ? T(double(static_cast<const T*>(a_.sinks)[head]) / scores_.unit()) : T(-INFINITY);
  }

  void attend(const Unit& u, const Group<O>& group, const RowTile<O>& rows, Thread& t) const {
    start(u, rows, t);
    const Range keys{std::max(rows.all.begin, u.keys.begin), std::min(rows.all.end, u.keys.end)};
    if (keys.empty()) return;
    for (int64_t tile = (keys.begin - u.keys.begin) / kKeyTile; u.keys.begin + tile * kKeyTile < keys.end;
         ++tile) {
      const int64_t first_key = u.keys.begin + tile * kKeyTile;
      Range columns[K::kMostGroups];
      bool hidden[kKeyTile / K::kPanelKeys] = {};
      const int64_t count = std::min(kKeyTile, u.keys.end - first_key);
      if (!look<O>(a_, scores_, u.s, rows, first_key, count, columns, hidden, t.tile.row)) continue;
      multiply(group, tile, rows, columns, hidden, t);
      softmax(u, rows, columns, first_key, t);
      rescale_output(rows, t.tile, t.tile.output);
      rescale_output(rows, t.tile, t.output_tangent);
      const auto right = [&](const HeadTensor& from, const O* packed, const SpecialRows& special) {
        return RightSide<S, O>{packed + tile * kKeyTile * value_columns_,
                               value_columns_,
                               special,
                               u.s.template key_row<const S>(from, u.kv_head, first_key),
                               from.stride[2],
                               a_.value_size};
      };
      const auto add = [&](const T* weights, const RightSide<S, O>& values, T* output) {
        add_weighted<S, O>(rows, columns, count, reinterpret_cast<const O*>(weights),
                           kKeyTile * int64_t(sizeof(T) / sizeof(O)), values, output, t.tile.touched);
      };
      const RightSide<S, O> values = right(a_.value, group.values, group.special[tile]);
      add(t.tile.products, values, t.tile.output);
      if (moves_scores_) add(t.tangents, values, t.output_tangent);
      const auto touch = [&] {
        for (int64_t g = 0; g < rows.groups; ++g) t.tile.touched[g] |= !columns[g].empty();
      };
      if (moves_scores_) touch();
      if (d_.value.data) {
        add(t.tile.products, right(d_.value, group.value_tangents, group.special_tangents[tile]),
            t.output_tangent);
      }
      touch();
    }
  }

  void multiply(const Group<O>& group, int64_t tile, const RowTile<O>& rows, const Range* columns,
                const bool* hidden, Thread& t) const {
    const int64_t at = tile * kKeyTile * left_stride_, size = a_.head_size;
    const auto row_of = [&](int64_t r) -> const ScoreRow<T>& { return t.tile.row[r]; };
    const auto nothing = [](int64_t, Range) {};
    multiply_keys<O>(rows, columns, hidden, t.left, left_stride_, size, group.keys + at, t.tile.products,
                     prefetch_masks<O>(scores_, rows, row_of));
    if (d_.query.data) {
      multiply_keys<O>(rows, columns, hidden, t.left_tangent, left_stride_, size, group.keys + at, t.tangents,
                       nothing);
    }
    if (!d_.key.data) return;
    if (d_.query.data) {
      multiply_keys<O, true>(rows, columns, hidden, t.left, left_stride_, size, group.key_tangents + at,
                             t.tangents, nothing);
    } else {
      multiply_keys<O>(rows, columns, hidden, t.left, left_stride_, size, group.key_tangents + at, t.tangents,
                       nothing);
    }
  }

  // Products of all rows -> weights relative to that of the highest, and D; see softmax_tile.
  void softmax(const Unit& u, const RowTile<O>& rows, const Range* columns, int64_t first_key,
               Thread& t) const {
    TileState<T>& state = t.tile;
    const T factor = scores_.factor();
    Range of_row[kQueryTile];
    for (int64_t g = 0; g < rows.groups; ++g) {
      for (int64_t r = rows.first_row[g]; r < rows.first_row[g + 1]; ++r) of_row[r] = columns[g];
    }
    for (int64_t first = 0; first < rows.rows; first += kWidth) {
      const int64_t count = std::min(rows.rows - first, kWidth);
      V best[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) {
        best[i] = V(-INFINITY);
        const int64_t r = first + i, at = r * kKeyTile;
        if (i >= count) continue;
        best[i] = scores_.capped() ? cap_row(state.row[r], of_row[r], state.products + at, t.tangents + at)
                                   : score_row(scores_, state.row[r], of_row[r], state.products + at);
      }
      const V before = load_upto<V>(state.highest + first, count),
              highest = max(before, maxima_of_rows(best));
      const V shift = select<T>(highest.v == V(-INFINITY).v, V(0), highest);
      T shifts[kWidth];
      store(shifts, shift);
      store_upto(state.highest + first, highest, count);
      store_upto(state.rescale + first, exp2((before - shift) * factor), count);
      for (int64_t i = 0; i < count; ++i)
        weigh_row(u, rows, first + i, of_row[first + i], first_key, shifts[i], t);
    }
  }

  // Products of a row -> scores, and their tangents times the slope of the cap; returns the scores' maxima.
  V cap_row(const ScoreRow<T>& of_row, Range columns, T* x, T* tangents) const {
    const Scores<S, T> scores = scores_;
    const ScoreRow<T> row = of_row;
    V best(-INFINITY);
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      V slope(0);
      V s = scores.template of<ScoreKind::kAny>(row, load<V>(x + c), c, slope);
      if (!Scores<S, T>::all_visible(row, c)) s = Scores<S, T>::within(row, s, c);
      store(x + c, s);
      store(tangents + c, load<V>(tangents + c) * slope);
      best = max(best, s);
    }
    return best;
  }

  void weigh_row(const Unit& u, const RowTile<O>& rows, int64_t r, Range columns, int64_t first_key, T shift,
                 Thread& t) const {
    T* const x = t.tile.products + r * kKeyTile;
    T* const dx = t.tangents + r * kKeyTile;
    const T factor = scores_.factor(), scale = T(a_.scale);
    V sum(0), weighted(0);
    for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
      const V weight = exp2((load<V>(x + c) - shift) * factor);
      store(x + c, weight);
      sum = sum + weight;
    }
    t.tile.sum[r] = fma(t.tile.sum[r], V(t.tile.rescale[r]), sum);
    if (moves_scores_) {
      const int64_t n = first_key;
      const auto with_mask = [&](auto add) {
        for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
          const V weight = load<V>(x + c);
          // What is hidden may have any tangent.
          const V tangent = select<T>(weight.v == V(0).v, V(0), add(load<V>(dx + c) * scale, c));
          store(dx + c, tangent);
          weighted = fma(weight, tangent, weighted);
        }
      };
      if (d_.mask.data) {
        const MaskRow mask(d_.mask, u.s.b, rows.head[r], rows.query[r], n);
        const int64_t end = t.tile.row[r].visible.end;
        with_mask([&](V tangent, int64_t c) { return tangent + mask.load(c, end - c); });
      } else {
        with_mask([](V tangent, int64_t) { return tangent; });
      }
      if (!t.centered[r]) {
        const T of_tile = sum_of_lanes(sum), center = sum_of_lanes(weighted) / of_tile;
        t.centered[r] = of_tile > 0;
        t.center[r] = std::isfinite(center) ? center : T(0);
      }
    }
    const T center = t.center[r];
    const T* const keep = t.tile.keep;
    if (dropout_.active) {
      dropout_.keep(u.b * a_.heads + rows.head[r], rows.query[r], first_key + columns.begin,
                    columns.end - columns.begin, t.tile.keep + columns.begin);
    }
    O *const weights = reinterpret_cast<O*>(x), *const changes = reinterpret_cast<O*>(dx);
    V sum_tangent(0);
    const auto store_all = [&](auto kept) {
      for (int64_t c = columns.begin; c < columns.end; c += kWidth) {
        const V weight = load<V>(x + c);
        store_operand(weights + c, kept(weight, c));
        if (!moves_scores_) continue;
        const V change = select<T>(weight.v == V(0).v, V(0), weight * (load<V>(dx + c) - center));
        sum_tangent = sum_tangent + change;
        store_operand(changes + c, kept(change, c));
      }
    };
    if (dropout_.active) {
      store_all([=](V weight, int64_t c) { return weight * load<V>(keep + c); });
    } else {
      store_all([](V weight, int64_t) { return weight; });
    }
    t.sum_tangent[r] = fma(t.sum_tangent[r], V(t.tile.rescale[r]), sum_tangent);
  }

  // A row of the mask's tangent, from the tile's first key on.
  struct MaskRow {
    const void* data;
    MaskKind kind;
    int64_t stride;

    MaskRow(const AttentionMask& m, int64_t b, int64_t head, int64_t query, int64_t key)
        : kind(m.kind), stride(m.stride[3]) {
      const int64_t at = b * m.stride[0] + head * m.stride[1] + query * m.stride[2] + key * m.stride[3];
      if (kind == MaskKind::kSame) {
        data = static_cast<const S*>(m.data) + at;
      } else {
        data = static_cast<const float*>(m.data) + at;
      }
    }
    V load(int64_t column, int64_t n) const {
      if (n <= 0) return V(0);
      if (kind == MaskKind::kSame)
        return load_strided<V>(static_cast<const S*>(data) + column * stride, stride, n);
      if constexpr (sizeof(T) == sizeof(float)) {
        return load_strided<V>(static_cast<const float*>(data) + column * stride, stride, n);
      }
      return V(0);
    }
  };

  // ---- results ----

  void finish(const Unit& u, const RowTile<O>& rows, Thread& t) const {
    TileState<T>& state = t.tile;
    for (int64_t g = 0; g < rows.groups; ++g) {
      if (state.touched[g]) continue;
      const int64_t first = rows.first_row[g] * value_columns_;
      const int64_t count = rows.first_row[g + 1] * value_columns_ - first;
      std::fill_n(state.output + first, count, T(0));
      std::fill_n(t.output_tangent + first, count, T(0));
    }
    for (int64_t r = 0; r < rows.rows; ++r) {
      const int64_t head = rows.head[r], query = rows.query[r];
      const T sum = sum_of_lanes(state.sum[r]), highest = state.highest[r];
      const bool nothing = sum == 0;
      const T inverse = nothing ? T(0) : 1 / sum;
      T change = sum_of_lanes(t.sum_tangent[r]);
      if (d_.sinks || (a_.sinks && moves_scores_)) change += sink_change(head, highest, t.center[r]);
      change *= inverse;
      const T kept = inverse * T(1 / (1 - a_.dropout_p));
      write_row(u, head, query, state.output + r * value_columns_, t.output_tangent + r * value_columns_,
                kept, change);
      const double lse = double(highest) * scores_.unit() + std::log(double(sum));
      *u.s.template of_query<T>(a_.lse, head, query) = nothing ? T(-INFINITY) : T(lse);
      *u.s.template of_query<T>(d_.lse, head, query) = nothing ? T(0) : t.center[r] + change;
      *u.s.template of_query<T>(a_.highest, head, query) = std::isfinite(highest) ? highest : T(0);
      *u.s.template of_query<T>(a_.inverse_sum, head, query) = inverse;
    }
  }

  // What a sink adds to the sum of D.
  T sink_change(int64_t head, T highest, T center) const {
    const T weight = T(std::exp2(double(sink_of(head) - highest) * double(scores_.factor())));
    if (!(weight != 0) || !std::isfinite(sink_of(head))) return T(0);
    return weight * ((d_.sinks ? static_cast<const T*>(d_.sinks)[head] : T(0)) - center);
  }

  void write_row(const Unit& u, int64_t head, int64_t query, const T* output, const T* tangent, T kept,
                 T change) const {
    const auto row_of = [&](const HeadTensor& to) { return u.s.template query_row<S>(to, head, query); };
    S *const to = row_of(a_.output), *const to_tangent = row_of(d_.output);
    S* const remainder = a_.remainder.data ? row_of(a_.remainder) : nullptr;
    S* const remainder_tangent = d_.remainder.data ? row_of(d_.remainder) : nullptr;
    for (int64_t i = 0; i < a_.value_size; i += kWidth) {
      const int64_t n = a_.value_size - i;
      const V x = load<V>(output + i) * V(kept);
      write(to + i, remainder ? remainder + i : nullptr, x, n);
      const V dx = fma(V(-change), x, load<V>(tangent + i) * V(kept));
      write(to_tangent + i, remainder_tangent ? remainder_tangent + i : nullptr, dx, n);
    }
  }
  static void write(S* to, S* remainder, V x, int64_t n) {
    store_upto(to, x, n);
    if (!remainder) return;
    const V rest = x - load_upto<V>(to, n);
    store_upto(remainder, select<T>((rest - rest).v == V(0).v, rest, V(0)), n);
  }

  const AttentionDualArgs& d_;
  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Scores<S, T> scores_;
  const Dropout dropout_;
  const int64_t group_heads_, value_columns_, left_stride_;
  const int threads_;
  const bool moves_products_, moves_scores_;  // whether these have tangents
  int64_t most_keys_ = 0;
  std::atomic<int64_t> next_unit_{0};
  Arena arena_;
  Group<O>* groups_;
  Thread* thread_;
};

}  // namespace

bool attention_dual_forward(const AttentionDualArgs& args, const AttentionPlan& plan) {
  return with_types(args.primal.dtype, [&](auto storage, auto operand) {
    return DualForward<decltype(storage), decltype(operand)>(args, plan).run();
  });
}

}  // namespace fastseq::FASTSEQ_ISA
