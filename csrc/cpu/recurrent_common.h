// What the forward and the backward pass share: where rows lie, how units are cut into blocks, packed
// weights.
#pragma once

#include <new>
#include <utility>

#include "engine.h"
#include "recurrent_cells.h"
#include "team.h"

namespace fastseq::FASTSEQ_ISA {

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

struct Range {
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
// Part `part` of `parts` of n things, as equal as can be.
inline Range share(int64_t n, int64_t parts, int64_t part) {
  return {group_begin(n, parts, part), group_begin(n, parts, part + 1)};
}

// Row blocks: tall enough to reuse a panel that comes from L3, short enough for the tile of sums to stay in
// L1.
constexpr int64_t kBlockRows = 16 * tile_rows(kPanelVectors);

// `planes`: rows of the tile for each row.
template <class Body>
inline void for_each_row_block(Range rows, int planes, Body body) {
  const int64_t blocks = group_count(rows.size(), kBlockRows / planes);
  for (int64_t i = 0; i < blocks; ++i) {
    const Range block = share(rows.size(), blocks, i);
    body(Range{rows.begin + block.begin, rows.begin + block.end});
  }
}

inline int64_t rows_of(const SequenceShape& shape) {
  if (!shape.batch_sizes) return shape.steps * shape.batch;
  int64_t rows = 0;
  for (int64_t t = 0; t < shape.steps; ++t) rows += shape.batch_sizes[t];
  return rows;
}

// Which rows each step has, and which of them each batch part owns.
struct Steps {
  int64_t steps, batch;
  const int64_t* batch_sizes;
  const uint8_t* all_resets;  // or null
  int64_t* offsets;           // [T + 1], packed only: rows before step t
  int64_t* boundaries;        // [batch_parts + 1]: first row of each part

  void take(Arena& arena, const RecurrentArgs& args, int batch_parts) {
    const SequenceShape& shape = args.shape;
    steps = shape.steps, batch = shape.batch, batch_sizes = shape.batch_sizes, all_resets = args.resets;
    offsets = arena.take<int64_t>(batch_sizes ? steps + 1 : 0);
    boundaries = arena.take<int64_t>(batch_parts + 1);
  }

  void fill(int batch_parts) {
    if (!batch_sizes) {
      for (int part = 0; part <= batch_parts; ++part)
        boundaries[part] = group_begin(batch, batch_parts, part);
      return;
    }
    offsets[0] = 0;
    for (int64_t t = 0; t < steps; ++t) offsets[t + 1] = offsets[t] + batch_sizes[t];
    // Rows get shorter, so parts of equal work have unequal numbers of rows: row b is active while
    // batch_sizes[t] > b, and `length` falls from T as b grows.
    int64_t length = steps, work = 0, row = 0;
    for (int part = 0; part <= batch_parts; ++part) {
      while (row < batch && work < offsets[steps] * part / batch_parts) {
        while (length > 0 && batch_sizes[length - 1] <= row) --length;
        work += length, ++row;
      }
      boundaries[part] = part == batch_parts ? batch : row;
    }
  }

  int64_t rows(int64_t t) const { return batch_sizes ? batch_sizes[t] : batch; }
  int64_t all_rows() const { return offset(steps); }
  int64_t offset(int64_t t) const { return batch_sizes ? offsets[t] : t * batch; }
  // Rows of step t that `part` owns.
  Range rows(int64_t t, int part) const {
    const int64_t n = rows(t);
    return {least(boundaries[part], n), least(boundaries[part + 1], n)};
  }
  // For each row of step t whether no state comes from the step before; null if all do.
  const uint8_t* resets(int64_t t) const { return all_resets ? all_resets + offset(t) : nullptr; }
  // Address of row 0 of step t; rows are stride[1] apart.
  template <class S, class Pointer>
  S* at(const SequenceTensor<Pointer>& tensor, int64_t t) const {
    return static_cast<S*>(tensor.data) +
           (batch_sizes ? offsets[t] * tensor.stride[1] : t * tensor.stride[0]);
  }
};

// n columns in blocks of `width` (a multiple of the vector), the last one as wide as it needs to be.
struct Blocks {
  int64_t n, width;
  int64_t count() const { return (n + width - 1) / width; }
  int64_t begin(int64_t j) const { return j * width; }
  int64_t size(int64_t j) const { return least(width, n - j * width); }
};

// Blocks are visited back and forth, so that a step begins with the weights that the one before left in the
// cache.
template <class Body>
inline void for_each_block(Range blocks, bool backwards, Body body) {
  for (int64_t i = 0; i < blocks.size(); ++i) body(backwards ? blocks.end - 1 - i : blocks.begin + i);
}

// Vectors of all gates of a block, at most. A block may have several panels where they are narrow.
constexpr int kBlockVectors = 8;
constexpr int block_vectors(int64_t rows) { return kFewRegisters ? kBlockVectors : panel_vectors(rows); }

// How many vectors of hidden units a block has, if each takes `gates` vectors, up to `most` in all, and panels
// have up to panel_vectors(rows): wide panels run faster, but all parts should get the same number of units.
template <class Scalar>
int64_t unit_vectors(int64_t hidden, int gates, int parts, int64_t rows, int most) {
  constexpr int kWidth = Vec<Scalar>::kWidth;
  constexpr double kEfficiency[] = {0, 0.8, 0.94, 1};
  const int64_t vectors = (hidden + kWidth - 1) / kWidth;
  int64_t best = 1;
  double best_time = 1e300;
  for (int n = 1; n * gates <= most && n <= vectors; ++n) {
    const PanelCut cut{n * gates, panel_vectors(rows)};
    double block = 0;
    for (int p = 0; p < cut.count(); ++p) block += cut.size(p) / kEfficiency[least(cut.size(p), 3)];
    const double time = double(((vectors + n - 1) / n + parts - 1) / parts) * block;
    if (time <= best_time) best_time = time, best = n;
  }
  return best;
}

// A matrix packed as the right side of products: `depth` of k in `segments` pieces (gates), `blocks` of
// columns.
template <class O>
struct Panels {
  using Scalar = typename Operand<O>::Scalar;
  static constexpr int kWidth = Vec<Scalar>::kWidth;
  O* data;
  Scalar* bias;  // a row for each block, or null
  Blocks blocks;
  int gates;      // column groups of a block, each blocks.width wide
  int64_t depth;  // of one segment
  int64_t segments;
  int widest = kPanelVectors;  // panel, in vectors
  bool one_slot = false;       // only one block is there at a time

  int vectors(int64_t j) const {
    return gates * int((gates > 1 ? blocks.width : round_up(blocks.size(j), kWidth)) / kWidth);
  }
  PanelCut cut(int64_t j) const { return {vectors(j), widest}; }
  int64_t block_size() const { return segments * pairs<O>(depth) * Operand<O>::kPair * gates * blocks.width; }
  int64_t columns(int64_t j) const { return int64_t(vectors(j)) * kWidth; }
  // Panel [k][n] of a block's first vector, or of a segment's; only blocks of one panel have segments.
  O* at(int64_t j, int64_t segment = 0) const {
    return data + slot(j) * block_size() + segment * pairs<O>(depth) * Operand<O>::kPair * columns(j);
  }
  Scalar* bias_at(int64_t j) const { return bias ? bias + slot(j) * gates * blocks.width : nullptr; }
  int64_t slot(int64_t j) const { return one_slot ? 0 : j; }

  void take(Arena& arena, bool with_bias, bool with_data = true) {
    const int64_t slots = one_slot ? 1 : blocks.count();
    data = with_data ? arena.take<O>(slots * block_size()) : nullptr;
    bias = with_bias ? arena.take<Scalar>(slots * gates * blocks.width) : nullptr;
  }

  // Block j from the rows of `weight` [.., depth] that belong to gates [first_gate, first_gate + gates): the
  // product is with the transposed weight.
  template <class S>
  void pack_transposed_rows(int64_t j, const S* weight, const S* bias_source, int first_gate) {
    for (int g = 0; g < gates; ++g) {
      const int64_t row = (first_gate + g) * blocks.n + blocks.begin(j);
      const int group = vectors(j) / gates;
      for (int i = 0; i < group; ++i) {
        const int64_t unit = i * kWidth, count = most(0, least(kWidth, blocks.size(j) - unit));
        if (data) pack_vector(j, g * group + i, weight + (row + unit) * depth, count);
        if (bias) {
          store(bias_at(j) + g * group * kWidth + unit,
                load_strided<Vec<Scalar>>(bias_source + row + unit, 1, count));
        }
      }
    }
  }

  // Vector v of block j from `count` rows of a weight, transposed.
  template <class S>
  void pack_vector(int64_t j, int v, const S* rows, int64_t count) {
    constexpr int kLane = kWidth * Operand<O>::kPair;
    const PanelCut panels = cut(j);
    int p = 0;
    while (panels.begin(p + 1) <= v) ++p;
    O* const to = at(j) + (panels.begin(p) * pairs<O>(depth) + v - panels.begin(p)) * kLane;
    pack_transposed<O>(rows, depth, count, depth, to, panels.size(p) * kWidth);
  }

  // Block j, of one panel, from the rows of `weight` [segments * depth, blocks.n] as they lie.
  template <class S>
  void pack_columns(int64_t j, const S* weight, int64_t first_segment) {
    const S* rows[kDepth];
    for (int64_t segment = 0; segment < segments; ++segment) {
      for (int64_t k = 0; k < depth; k += kDepth) {
        const int64_t n = least(kDepth, depth - k);
        for (int64_t i = 0; i < n; ++i) {
          rows[i] = weight + ((first_segment + segment) * depth + k + i) * blocks.n;
        }
        pack_rows<O>(rows, blocks.begin(j), 1, blocks.size(j), n, vectors(j),
                     at(j, segment) + k * columns(j));
      }
    }
  }
};

// One tile of sums, on the stack of the thread that makes it. Only few rows have the widest blocks.
template <class Scalar>
struct alignas(64) TileBuffer {
  Scalar data[kBlockRows * kBlockVectors * Vec<Scalar>::kWidth];
};

// n elements of a row from storage to operand type; pads an odd pair with zero.
template <class O, class S>
void stage_row(const S* from, int64_t stride, int64_t n, O* to) {
  using V = Vec<typename Operand<O>::Scalar>;
  for (int64_t i = 0; i < n; i += V::kWidth) {
    store_upto(to + i, load_strided<V>(from ? from + i * stride : nullptr, stride, n - i), n - i);
  }
}

// Operand rows are read in pairs where the operand type has them.
template <class O>
const typename Operand<O>::Element* elements(const O* p) {
  return reinterpret_cast<const typename Operand<O>::Element*>(p);
}
template <class O>
int64_t row_elements(int64_t stride) {
  return stride / Operand<O>::kPair;
}

// Which part of the team a thread is, and its rank among the threads of its direction.
struct Seat {
  int direction_part, batch_part, unit_part, rank;
};
inline Seat seat_of(const RecurrentPlan& plan, int thread) {
  const int units = plan.unit_parts, batches = plan.batch_parts;
  return {thread / (units * batches), thread / units % batches, thread % units, thread % (units * batches)};
}

// Where threads meet: those that share rows, those that share a direction, and all.
class Meetings {
 public:
  void take(Arena& arena, const RecurrentPlan& plan) {
    plan_ = &plan;
    barriers_ = arena.take<Barrier>(groups() + plan.direction_parts + 1);
    flags_ = arena.take<Barrier::Flag>(3 * threads());
  }
  void fill() {
    Barrier::Flag* flag = flags_;
    for (int i = 0; i < 3 * threads(); ++i) new (flags_ + i) Barrier::Flag;
    const auto start = [&](Barrier* barrier, int threads) {
      new (barrier) Barrier(threads, flag);
      flag += threads;
    };
    for (int i = 0; i < groups(); ++i) start(barriers_ + i, plan_->unit_parts);
    for (int i = 0; i < plan_->direction_parts; ++i)
      start(barriers_ + groups() + i, threads() / plan_->direction_parts);
    start(barriers_ + groups() + plan_->direction_parts, threads());
  }
  void of_units(const Seat& seat) const {
    barriers_[seat.direction_part * plan_->batch_parts + seat.batch_part].wait(seat.unit_part);
  }
  void of_direction(const Seat& seat) const { barriers_[groups() + seat.direction_part].wait(seat.rank); }
  void of_all(int thread) const { barriers_[groups() + plan_->direction_parts].wait(thread); }

 private:
  int groups() const { return plan_->direction_parts * plan_->batch_parts; }
  int threads() const { return groups() * plan_->unit_parts; }

  const RecurrentPlan* plan_;
  Barrier* barriers_;
  Barrier::Flag* flags_;
};

// What the forward and the backward pass of a layer begin with.
//
// kPlanes 1: numbers. kPlanes 2: also their tangents, the derivatives along args.tangents. Rows of the pass's own
// buffers are then twice as many, so that both go through a packed weight while it is in the cache; where the weight
// has a tangent, that is packed too, and its product with the numbers is added to the rows of tangents.
template <class S, class O, int kPlanes>
struct RecurrentPass {
  const RecurrentArgs& args;
  const RecurrentPlan& plan;
  const CellOps<S, O, kPlanes>& cell;
  Arena arena;
  Steps steps;
  Meetings meetings;

  RecurrentPass(const RecurrentArgs& args, const RecurrentPlan& plan)
      : args(args), plan(plan), cell(cell_ops<S, O, kPlanes>(args.cell)) {}

  const RecurrentTensors& plane(int p) const {
    if constexpr (kPlanes == 2) {
      if (p == 1) return *args.tangents;
    }
    return args;
  }

  int team_size() const { return plan.direction_parts * plan.batch_parts * plan.unit_parts; }
  bool two_products() const { return cell.first_gates < cell.gates; }
  int64_t width() const { return args.proj_size ? args.proj_size : args.hidden_size; }  // R
  // Of what is kept of a unit and step; without a c, gates have them even where only states are kept.
  int slots() const {
    return args.saves_states && cell.cell_state ? 1 : cell.saved + (cell.cell_state ? 1 : 0);
  }
  // Rows of a step that a batch part owns, at most. Parts of a packed sequence are cut by length, not by rows.
  int64_t most_rows() const {
    return args.shape.batch_sizes ? args.shape.batch : group_count(args.shape.batch, plan.batch_parts);
  }

  // lay_out() takes the buffers: once to learn their size, once more to place them.
  template <class LayOut>
  void allocate(LayOut lay_out) {
    lay_out(arena);
    arena.allocate();
    lay_out(arena);
    steps.fill(plan.batch_parts);
    meetings.fill();
  }

 protected:
  void take_shared() {
    meetings.take(arena, plan);
    steps.take(arena, args, plan.batch_parts);
  }
};

}  // namespace fastseq::FASTSEQ_ISA
