// Attention, forward: online softmax (Milakov & Gimelshein 2018) over tiles of keys.
//
// For a tile of rows and each tile of keys that one of them sees:
//
//   S = Q K^T      register tiles, into the second-level cache
//   m' = max(m, row maxima of S),  P = exp(S - m'),  l = l exp(m - m') + row sums of P,  O = O exp(m - m')
//   O = O + P V
//
// and at the end O / l and lse = m + log l. Keys are packed once for each unit of work (see attention_plan.h). Few rows
// read keys and values where they lie instead.
//
// Cost of a vector of scores: 2 * (D + Dv) / 2 multiply-adds, and some 14 operations of the softmax.
#include <atomic>
#include <new>

#include "attention_direct.h"
#include "attention_softmax.h"
#include "attention_tiles.h"
#include "attention_weights.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

// What a group of threads shares. Packed are the keys and values of its unit: of each tile of keys its panels of keys,
// its values, and its special rows of values.
template <class O>
struct Group {
  Group(int threads, Barrier::Flag* flags) : barrier(threads, flags) {}

  Barrier barrier;
  int64_t unit = 0;
  std::atomic<int64_t> next_tile{0};
  O* keys = nullptr;
  O* values = nullptr;
  SpecialRows* special = nullptr;
  int32_t* special_rows = nullptr;
};

template <class S, class O>
class Forward {
 public:
  using K = Tiles<O>;
  using T = typename K::T;
  using V = Vec<T>;
  static constexpr int64_t kWidth = K::kWidth, kKeyTile = K::kKeyTile;

  Forward(const AttentionArgs& a, const AttentionPlan& plan)
      : a_(a),
        plan_(plan),
        scores_(a),
        dropout_(a.dropout_p, a.seed),
        group_heads_(a.heads / a.kv_heads),
        value_columns_(round_up(a.value_size, kWidth)),
        left_stride_(pairs<O>(a.head_size) * K::kPair),
        threads_(plan.head_parts * plan.row_parts) {
    for (int64_t b = 0; b < a.batch; ++b) {
      const AttentionLengths s(a, b);
      most_keys_ = std::max(most_keys_, most_keys_of_unit(s));
    }
    lay_out();
    arena_.allocate();
    lay_out();
  }

  bool run() {
    const auto attend = [](void* self, int thread) { static_cast<Forward*>(self)->attend_units(thread); };
    if (!run_team(threads_, attend, this)) return false;
    if (plan_.split) {
      next_unit_ = 0;
      const auto join = [](void* self, int thread) { static_cast<Forward*>(self)->join_parts(thread); };
      share_work(threads_, join, this);
    }
    if (a_.weights.data) Weights<S, O>(a_).run(threads_);
    return true;
  }

 private:
  struct Thread {
    TileState<T> tile;
    O* left;  // [kQueryTile][left_stride]  queries
    T* direct_left;
  };

  // ---- units ----

  int64_t parts_of(const AttentionLengths& s) const {
    return plan_.split ? forward_key_parts(group_heads_ * s.queries, s.keys) : 1;
  }
  int64_t part_size(int64_t keys, int64_t parts) const {
    return round_up(group_count(keys, parts), kKeyTile);
  }
  // Where a backward pass follows, or weights are shown, their scores have to be made in the same way.
  bool is_direct(int64_t queries) const { return !a_.highest.data && group_heads_ * queries <= kDirectRows; }
  int64_t most_keys_of_unit(const AttentionLengths& s) const {
    if (is_direct(s.queries)) return 0;
    return part_size(s.keys, parts_of(s));
  }

  Unit unit_at(int64_t index) const {
    const int64_t most_parts = parts();
    const int64_t head = index / most_parts, b = head / a_.kv_heads;
    const AttentionLengths lengths(a_, b);
    const int64_t parts = parts_of(lengths), part = index % most_parts;
    Unit u{Sequence(a_, b), b, head % a_.kv_heads, part, parts, {0, 0}};
    const int64_t size = part_size(u.s.keys, parts);
    if (u.s.queries > 0) {
      const int64_t begin = round_down(u.s.visible(0).begin, kKeyTile),
                    end = u.s.visible(u.s.queries - 1).end;
      u.keys = {std::max(begin, part * size), std::min({end, (part + 1) * size, u.s.keys})};
      u.keys.end = std::max(u.keys.begin, u.keys.end);
    }
    return u;
  }
  int64_t parts() const { return plan_.split ? plan_.key_parts : 1; }  // at most, of a unit
  int64_t heads() const { return a_.batch * a_.kv_heads; }

  void lay_out() {
    groups_ = arena_.take<Group<O>>(plan_.head_parts);
    thread_ = arena_.take<Thread>(threads_);
    Barrier::Flag* const flags = arena_.take<Barrier::Flag>(threads_);
    const int64_t key_tiles = group_count(most_keys_, kKeyTile);
    for (int g = 0; g < plan_.head_parts; ++g) {
      O* const keys = arena_.take<O>(key_tiles * kKeyTile * left_stride_);
      O* const values = arena_.take<O>(key_tiles * kKeyTile * value_columns_);
      SpecialRows* const special = arena_.take<SpecialRows>(key_tiles);
      int32_t* const rows = arena_.take<int32_t>(key_tiles * kKeyTile);
      if (!groups_) continue;
      Barrier::Flag* const first = flags + g * plan_.row_parts;
      for (int i = 0; i < plan_.row_parts; ++i) new (first + i) Barrier::Flag;
      Group<O>& group = *new (groups_ + g) Group<O>(plan_.row_parts, first);
      group.keys = keys, group.values = values, group.special = special, group.special_rows = rows;
    }
    for (int i = 0; i < threads_; ++i) {
      T* const products = arena_.take<T>(kQueryTile * kKeyTile);
      T* const output = arena_.take<T>(kQueryTile * value_columns_);
      T* const keep = arena_.take<T>(kKeyTile);
      O* const left = arena_.take<O>(kQueryTile * left_stride_);
      T* const direct_left = arena_.take<T>(kDirectRows * a_.head_size);
      if (!thread_) continue;
      Thread& t = thread_[i];
      t.left = left, t.direct_left = direct_left;
      t.tile.products = products, t.tile.output = output, t.tile.output_stride = value_columns_,
      t.tile.keep = keep;
    }
    if (plan_.split) {
      const int64_t rows = a_.batch * a_.kv_heads * plan_.part_rows * plan_.key_parts;
      part_output_ = arena_.take<T>(rows * value_columns_);
      part_highest_ = arena_.take<T>(rows);
      part_sum_ = arena_.take<T>(rows);
    }
  }

  // ---- passes ----

  // All units that this thread's group gets.
  void attend_units(int thread) {
    Group<O>& group = groups_[thread / plan_.row_parts];
    const int member = thread % plan_.row_parts;
    for (;;) {
      if (member == 0) {
        group.unit = next_unit_.fetch_add(1);
        group.next_tile = 0;
      }
      group.barrier.wait(member);
      if (group.unit >= heads() * parts()) return;
      const Unit u = unit_at(group.unit);
      if (u.part < u.parts) {
        if (!is_direct(u.s.queries)) pack(u, group, member);
        group.barrier.wait(member);
        attend_tiles(u, group, thread_[thread]);
      }
      group.barrier.wait(member);
    }
  }

  void attend_tiles(const Unit& u, Group<O>& group, Thread& t) {
    const RowTiles tiles(u.s, group_heads_);
    const int64_t count = tiles.count();
    for (int64_t i; (i = group.next_tile.fetch_add(1)) < count;) {
      const Range of_unit = tiles.rows(count - 1 - i);  // under causality the last tiles take longest
      if (is_direct(u.s.queries)) {
        const RowTile<T> rows(u.s, u.kv_head * group_heads_, of_unit);
        attend_directly(u, rows, t);
        finish(u, rows, of_unit.begin, t.tile);
      } else {
        const RowTile<O> rows(u.s, u.kv_head * group_heads_, of_unit);
        attend(u, group, rows, t);
        finish(u, rows, of_unit.begin, t.tile);
      }
    }
  }

  void pack(const Unit& u, const Group<O>& group, int member) {
    const int64_t tiles = group_count(u.keys.end - u.keys.begin, kKeyTile);
    for (int64_t t = member; t < tiles; t += plan_.row_parts) {
      const int64_t first = u.keys.begin + t * kKeyTile, keys = std::min(kKeyTile, u.keys.end - first);
      pack_keys<O>(u.s.template key_row<const S>(a_.key, u.kv_head, first), a_.key.stride[2], keys,
                   a_.head_size, group.keys + t * kKeyTile * left_stride_);
      group.special[t].row = group.special_rows + t * kKeyTile;
      pack_right<O>(u.s.template key_row<const S>(a_.value, u.kv_head, first), a_.value.stride[2], keys,
                    round_up(keys, kWidth), a_.value_size, group.values + t * kKeyTile * value_columns_,
                    group.special[t]);
    }
  }

  // ---- one tile of rows ----

  template <class P>
  void start(const Unit& u, const RowTile<P>& rows, TileState<T>& state) const {
    for (int64_t r = 0; r < rows.rows; ++r) {
      const bool sink = a_.sinks && u.part == 0;
      state.highest[r] =
          sink ? T(double(static_cast<const T*>(a_.sinks)[rows.head[r]]) / scores_.unit()) : -INFINITY;
      state.sum[r] = V(0);
      state.sum[r].v[0] = sink && state.highest[r] > -INFINITY ? 1 : 0;
    }
    std::fill_n(state.touched, rows.groups, false);
  }

  // Output that nothing was added to is zero.
  template <class P>
  static void clear_untouched(const RowTile<P>& rows, TileState<T>& state) {
    for (int64_t g = 0; g < rows.groups; ++g) {
      if (state.touched[g]) continue;
      const int64_t first = rows.first_row[g], count = rows.first_row[g + 1] - first;
      std::fill_n(state.output + first * state.output_stride, count * state.output_stride, T(0));
      state.touched[g] = true;
    }
  }

  void attend(const Unit& u, const Group<O>& group, const RowTile<O>& rows, Thread& t) {
    start(u, rows, t.tile);
    copy_rows<S>(a_.query, a_.head_size, u.s, rows, t.left, left_stride_);
    const Range keys{std::max(rows.all.begin, u.keys.begin), std::min(rows.all.end, u.keys.end)};
    if (keys.empty()) return;
    for (int64_t tile = (keys.begin - u.keys.begin) / kKeyTile; u.keys.begin + tile * kKeyTile < keys.end;
         ++tile) {
      const int64_t first_key = u.keys.begin + tile * kKeyTile;
      Range columns[K::kMostGroups];
      bool hidden[kKeyTile / K::kPanelKeys] = {};
      const int64_t count = std::min(kKeyTile, u.keys.end - first_key);
      if (!look<O>(a_, scores_, u.s, rows, first_key, count, columns, hidden, t.tile.row)) continue;
      const auto row_of = [&](int64_t r) -> const ScoreRow<T>& { return t.tile.row[r]; };
      multiply_keys<O>(rows, columns, hidden, t.left, left_stride_, a_.head_size,
                       group.keys + tile * kKeyTile * left_stride_, t.tile.products,
                       prefetch_masks<O>(scores_, rows, row_of));
      softmax_tile<O>(scores_, dropout_, u.b * a_.heads, rows, columns, first_key, t.tile);
      rescale_output(rows, t.tile, t.tile.output);
      add_weighted<S, O>(
          rows, columns, count, reinterpret_cast<const O*>(t.tile.products),
          kKeyTile * int64_t(sizeof(T) / sizeof(O)),
          {group.values + tile * kKeyTile * value_columns_, value_columns_, group.special[tile],
           u.s.template key_row<const S>(a_.value, u.kv_head, first_key), a_.value.stride[2], a_.value_size},
          t.tile.output, t.tile.touched);
      for (int64_t g = 0; g < rows.groups; ++g) t.tile.touched[g] |= !columns[g].empty();
    }
  }

  // The same for few rows, from keys and values as they lie.
  void attend_directly(const Unit& u, const RowTile<T>& rows, Thread& t) {
    start(u, rows, t.tile);
    clear_untouched(rows, t.tile);
    copy_rows<S>(a_.query, a_.head_size, u.s, rows, t.direct_left, a_.head_size);
    const Range keys{std::max(rows.all.begin, u.keys.begin), std::min(rows.all.end, u.keys.end)};
    for (int64_t first_key = round_down(keys.begin, kKeyTile); first_key < keys.end; first_key += kKeyTile) {
      Range columns[Tiles<T>::kMostGroups];
      bool hidden[kKeyTile / K::kPanelKeys] = {};
      const int64_t count = std::min(kKeyTile, u.keys.end - first_key);
      if (!look<O>(a_, scores_, u.s, rows, first_key, count, columns, hidden, t.tile.row)) continue;
      Range all{0, 0};
      for (int64_t g = 0; g < rows.groups; ++g) all = join(all, columns[g]);
      for (int64_t g = 0; g < rows.groups; ++g) columns[g] = all;
      multiply_directly(t.direct_left, rows.rows, u.s.template key_row<const S>(a_.key, u.kv_head, first_key),
                        a_.key.stride[2], a_.head_size, all, count, t.tile.products, kKeyTile);
      softmax_tile<T>(scores_, dropout_, u.b * a_.heads, rows, columns, first_key, t.tile);
      rescale_output(rows, t.tile, t.tile.output);
      add_directly(t.tile.products, kKeyTile, rows.rows, {all.begin, std::min(all.end, count)},
                   u.s.template key_row<const S>(a_.value, u.kv_head, first_key), a_.value.stride[2],
                   a_.value_size, t.tile.output, value_columns_);
    }
  }

  // ---- results ----

  template <class P>
  void finish(const Unit& u, const RowTile<P>& rows, int64_t first_row, TileState<T>& state) {
    clear_untouched(rows, state);
    for (int64_t first = 0; first < rows.rows; first += kWidth) {
      const int64_t count = std::min(rows.rows - first, kWidth);
      V sums[kWidth];
      for (int64_t i = 0; i < kWidth; ++i) sums[i] = i < count ? state.sum[first + i] : V(1);
      const V sum = sums_of_rows(sums), highest = load_upto<V>(state.highest + first, count);
      if (u.parts == 1) {
        write_rows(u.s, rows.head + first, rows.query + first, count,
                   state.output + first * state.output_stride, highest, sum);
        continue;
      }
      const int64_t at = part_index(u, u.part, first_row + first);
      std::copy_n(state.output + first * state.output_stride, count * value_columns_,
                  part_output_ + at * value_columns_);
      store_upto(part_highest_ + at, highest, count);
      store_upto(part_sum_ + at, sum, count);
    }
  }
  int64_t part_index(const Unit& u, int64_t part, int64_t row) const {
    return ((u.b * a_.kv_heads + u.kv_head) * plan_.key_parts + part) * plan_.part_rows + row;
  }

  // Up to kWidth rows, each with its highest score and the sum of its weights in a lane.
  void write_rows(const Sequence& s, const int64_t* head, const int64_t* query, int64_t count,
                  const T* output, V highest, V sum) const {
    const auto nothing = sum.v == V(0).v;
    const T kept_scale = T(1 / (1 - a_.dropout_p));
    T inverse[kWidth], most[kWidth], whole[kWidth], fraction[kWidth];
    store(inverse, select<T>(nothing, V(0), V(1) / sum));
    V log_whole;
    store(fraction, log2(select<T>(nothing, V(1), sum), log_whole));
    store(whole, log_whole);
    store(most, select<T>(nothing, V(-INFINITY), highest));
    for (int64_t r = 0; r < count; ++r, output += value_columns_) {
      S* const to = s.template query_row<S>(a_.output, head[r], query[r]);
      S* const remainder =
          a_.remainder.data ? s.template query_row<S>(a_.remainder, head[r], query[r]) : nullptr;
      for (int64_t i = 0; i < a_.value_size; i += kWidth) {
        const V x = load<V>(output + i) * V(inverse[r] * kept_scale);
        const int64_t n = a_.value_size - i;
        store_upto(to + i, x, n);
        if (!remainder) continue;
        const V rest =
            x - load_upto<V>(to + i, n);  // NaN or infinite where output is; then the rest says nothing
        store_upto(remainder + i, select<T>((rest - rest).v == V(0).v, rest, V(0)), n);
      }
      if (a_.lse.data)
        *s.template of_query<T>(a_.lse, head[r], query[r]) =
            T(double(most[r]) * scores_.unit() + (double(whole[r]) + double(fraction[r])) * kLn2);
      if (!a_.highest.data) continue;
      *s.template of_query<T>(a_.highest, head[r], query[r]) = std::isfinite(most[r]) ? most[r] : T(0);
      *s.template of_query<T>(a_.inverse_sum, head[r], query[r]) = inverse[r];
    }
  }

  // The rows of sequences whose keys were in parts.
  void join_parts(int thread) {
    T* const output = thread_[thread].tile.output;
    for (int64_t i; (i = next_unit_.fetch_add(1)) < heads();) {
      const Unit u = unit_at(i * parts());
      if (u.parts == 1) continue;
      for (int64_t row = 0; row < group_heads_ * u.s.queries; ++row) {
        T highest = -INFINITY, sum = 0;
        for (int64_t p = 0; p < u.parts; ++p)
          highest = std::max(highest, part_highest_[part_index(u, p, row)]);
        std::fill_n(output, value_columns_, T(0));
        for (int64_t p = 0; p < u.parts; ++p) {
          const int64_t at = part_index(u, p, row);
          const T factor =
              highest == -INFINITY ? T(0) : T(std::exp2((part_highest_[at] - highest) * scores_.factor()));
          sum += factor * part_sum_[at];
          const T* const part = part_output_ + at * value_columns_;
          for (int64_t j = 0; j < value_columns_; j += kWidth) {
            store(output + j, fma(V(factor), load<V>(part + j), load<V>(output + j)));
          }
        }
        const int64_t head = u.kv_head * group_heads_ + row / u.s.queries, query = row % u.s.queries;
        write_rows(u.s, &head, &query, 1, output, V(highest), V(sum));
      }
    }
  }

  const AttentionArgs& a_;
  const AttentionPlan& plan_;
  const Scores<S, T> scores_;
  const Dropout dropout_;
  const int64_t group_heads_, value_columns_, left_stride_;
  const int threads_;
  int64_t most_keys_ = 0;
  std::atomic<int64_t> next_unit_{0};
  Arena arena_;
  Group<O>* groups_;
  Thread* thread_;
  T *part_output_ = nullptr, *part_highest_ = nullptr, *part_sum_ = nullptr;
};

}  // namespace

bool attention_forward(const AttentionArgs& args, const AttentionPlan& plan) {
  return with_types(args.dtype, [&](auto storage, auto operand) {
    return Forward<decltype(storage), decltype(operand)>(args, plan).run();
  });
}

}  // namespace fastseq::FASTSEQ_ISA
