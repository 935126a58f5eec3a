// Backpropagation through time for one recurrent layer, all its directions, in one parallel region.
//
// What it computes, for each direction, from the last step to the first:
//   d_t = gradients of the gate pre-activations (the cell's step_grad, from dh_t + grad_output_t and dc_t)
//   dh_{t-1} = d_t U (+ what reaches h_{t-1} past U);  dc_{t-1} from the cell
// and for a chunk of steps at a time, while its d is in the cache:
//   dW_ih += d^T x,  dW_hh += d^T h,  db += sum of d,  dx = d W_ih
//
// Who holds what: as in the forward pass a thread owns rows and unit blocks; of the unit blocks it owns the
// matching columns of dh, so one meeting a step is enough. The chunk's products are dealt out over the rows
// of the weights (each element of dW is one thread's, added up in the order of the chunks: the same bits
// every run) and over the rows of dx. d, dh and dc are never rounded to 16 bits unless the CPU multiplies
// bfloat16.
//
// What it costs, a row and step: 4 G H (I + R) operations; packed U^T read once a step from L2 or L3; d
// written and read in the cache; saved values, h and x read from memory once, dW read and written once a
// chunk.
#include <limits>

#include "recurrent_backward_layout.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class S, class O>
class Backward : BackwardLayout<S, O> {
  using Layout = BackwardLayout<S, O>;
  using Layout::args, Layout::plan, Layout::steps, Layout::meetings, Layout::direction, Layout::team_size;
  using typename Layout::DirectionState, typename Layout::Element, typename Layout::Scalar;
  using V = Vec<Scalar>;
  static constexpr int kWidth = V::kWidth;

 public:
  using Layout::Layout;

  bool run() {
    return run_team(
        team_size(), [](void* self, int thread) { static_cast<Backward*>(self)->run_thread(thread); }, this);
  }

 private:
  void run_thread(int thread) {
    const Seat seat = seat_of(plan, thread);
    for (int d = seat.direction_part; d < args.directions; d += plan.direction_parts) {
      Worker(*this, d, seat, thread).run();
    }
    if (direction[args.directions - 1].input_sum) {
      meetings.of_all(thread);
      add_second_direction(thread);
    }
  }

  // dx of the first direction += dx of the second.
  void add_second_direction(int thread) {
    const Scalar* const second = direction[1].input_sum;
    for (int64_t t = thread; t < steps.steps; t += team_size()) {
      S* const to = steps.template at<S>(args.grad_input, t);
      for (int64_t b = 0; b < steps.rows(t); ++b) {
        S* const row = to + b * args.grad_input.stride[1];
        const Scalar* const add = second + (steps.offset(t) + b) * args.input_size;
        for_each_vector<kWidth>(1, args.input_size, [&](int64_t, int64_t i, int64_t n) FS_BODY {
          store_upto(row + i, load_upto<V>(row + i, n) + load_upto<V>(add + i, n), n);
        });
      }
    }
  }

  struct Worker {
    Backward& pass;
    const RecurrentArgs& args;
    const RecurrentDirection& tensors;
    DirectionState& state;
    const CellOps<S, O>& cell;
    const Steps& steps;
    const int d;
    const bool reverse;  // runs from the last step to the first
    const Seat seat;
    const int rank, ranks;               // among the threads of this direction
    bool backwards = false;              // of the order of blocks
    const Range own_units, own_outputs;  // blocks
    Element* const left;
    bool first_chunk = true;

    Worker(Backward& pass, int d, const Seat& seat, int thread)
        : pass(pass),
          args(pass.args),
          tensors(args.direction[d]),
          state(pass.direction[d]),
          cell(pass.cell),
          steps(pass.steps),
          d(d),
          reverse(pass.args.reversed || d == 1),
          seat(seat),
          rank(seat.rank),
          ranks(pass.plan.batch_parts * pass.plan.unit_parts),
          own_units(share(pass.units.count(), pass.plan.unit_parts, seat.unit_part)),
          own_outputs(share(pass.outputs.count(), pass.plan.unit_parts, seat.unit_part)),
          left(pass.left + thread * pass.left_size) {}

    void meet() const { pass.meetings.of_units(seat); }
    void meet_direction() const { pass.meetings.of_direction(seat); }
    int64_t time(int64_t step) const { return reverse ? args.shape.steps - 1 - step : step; }

    void run() {
      pack_weights();
      start_gradients();
      for (int64_t end = args.shape.steps; end > 0;) {
        int64_t begin = end, rows = 0;
        do {
          rows += steps.rows(time(--begin));
        } while (begin > 0 && rows + steps.rows(time(begin - 1)) <= pass.chunk_rows);
        const int64_t first = reverse ? time(end - 1) : begin, last = reverse ? time(begin) + 1 : end;
        find_rows(first, last);
        meet_direction();
        for (int64_t step = end - 1; step >= begin; --step) {
          take_step(time(step), steps.offset(time(step)) - steps.offset(first));
        }
        meet_direction();
        if (args.grad_input.data) input_gradient(first, rows);
        for (int64_t k = 0; k < rows; k += pass.depth) {
          weight_gradients(k, least(pass.depth, rows - k));
          first_chunk = false;
        }
        end = begin;
      }
      finish();
    }

    // ---- before the first step ----

    void pack_weights() {
      const auto deal = [&](Panels<O>& panels, const void* weight, int64_t first_segment) {
        for (int64_t j = rank; j < panels.blocks.count(); j += ranks) {
          panels.pack_columns(j, static_cast<const S*>(weight), first_segment);
        }
      };
      deal(state.recurrent_first, tensors.weight_hh, 0);
      if (pass.two_products()) deal(state.recurrent_rest, tensors.weight_hh, cell.first_gates);
      deal(state.input, tensors.weight_ih, 0);
      deal(state.projection, tensors.weight_hr, 0);
    }

    void start_gradients() {
      const int64_t hidden = args.hidden_size, width = pass.width();
      for (int64_t b = rank; b < args.shape.batch; b += ranks) {
        const auto start = [&](Scalar* to, int64_t stride, const void* from, int64_t n) {
          const S* const row = from ? static_cast<const S*>(from) + b * n : nullptr;
          for (int64_t i = 0; i < stride; i += kWidth) {
            store(to + b * stride + i, load_strided<V>(row ? row + i : nullptr, 1, n - i));
          }
        };
        start(state.dh, pass.width_stride, tensors.grad_h_n, width);
        if (cell.cell_state) start(state.dc, pass.hidden_stride, tensors.grad_c_n, hidden);
      }
      if (Operand<O>::kPair == 2) {  // odd rows are read in pairs
        for (int64_t row = rank; row < pass.chunk_rows; row += ranks) {
          std::memset(static_cast<void*>(state.d + row * pass.d_stride), 0,
                      size_t(pass.d_stride) * sizeof(O));
          if (args.proj_size) {
            std::memset(static_cast<void*>(state.d_output + row * pass.width_stride), 0,
                        size_t(pass.width_stride) * sizeof(O));
          }
        }
      }
      if (rank == 0) {
        std::memset(static_cast<void*>(state.bias_sum), 0,
                    size_t(cell.grads * pass.hidden_stride) * sizeof(double));
      }
    }

    // ---- a chunk's steps ----

    void find_rows(int64_t first, int64_t last) {
      const int64_t width = pass.width(), hidden = args.hidden_size, T = args.shape.steps;
      const int64_t saved_stride = pass.slots() * hidden;
      for (int64_t t = first + rank; t < last; t += ranks) {
        const int64_t before = reverse ? t + 1 : t - 1;
        const int64_t continued = before >= 0 && before < T ? least(steps.rows(before), steps.rows(t)) : 0;
        const int64_t row = steps.offset(t) - steps.offset(first);
        const Crossing crossing = crossing_before(t);
        for (int64_t b = 0; b < steps.rows(t); ++b) {
          const S *h, *c = nullptr;
          if (crossing.resets(b)) {
            h = nullptr;
          } else if (b < continued) {
            h = steps.template at<const S>(args.output, before) + b * args.output.stride[1] + d * width;
            if (cell.cell_state) {
              c = static_cast<const S*>(tensors.saved) + (steps.offset(before) + b) * saved_stride +
                  cell.saved * hidden;
            }
          } else {
            h = tensors.h0 ? static_cast<const S*>(tensors.h0) + b * width : nullptr;
            c = tensors.c0 ? static_cast<const S*>(tensors.c0) + b * hidden : nullptr;
          }
          state.h_rows[row + b] = h;
          state.c_rows[row + b] = c;
          state.x_rows[row + b] = steps.template at<const S>(args.input, t) + b * args.input.stride[1];
        }
      }
    }

    // What goes back from step t to the one before it, in the order of this direction.
    struct Crossing {
      int64_t rows;          // those that have such a step, or begin with a reset
      const uint8_t* reset;  // for each of them, or null
      bool truncated;        // no gradient of them crosses
      bool resets(int64_t b) const { return reset && b < rows && reset[b]; }
      bool cuts(int64_t b) const { return b < rows && (truncated || (reset && reset[b])); }
    };
    Crossing crossing_before(int64_t t) const {
      const int64_t later = reverse ? t + 1 : t;  // of the two steps
      if (later == args.shape.steps) return {0, nullptr, false};
      const bool truncated = args.truncate && later > 0 && later % args.truncate == 0;
      return {steps.rows(later), steps.resets(later), truncated};
    }

    void take_step(int64_t t, int64_t chunk_row) {
      const Range rows = steps.rows(t, seat.batch_part);
      const Crossing crossing = crossing_before(t);
      if (args.proj_size) {
        sum_output_gradient(t, rows, chunk_row);
        meet();
        product(state.projection, own_units, rows, state.d_output + chunk_row * pass.width_stride,
                pass.width_stride, 0, state.dm, pass.hidden_stride, false);
      }
      run_cell(t, rows, chunk_row);
      meet();
      O* const gradients = state.d + chunk_row * pass.d_stride;
      if (pass.two_products()) {
        run_first(t, rows, chunk_row);
        meet();
      }
      // Before the first step there is only h0.
      const bool none_cross = crossing.truncated && rows.end <= crossing.rows;
      if ((time(t) > 0 || tensors.grad_h0) && !none_cross) {
        product(state.recurrent_first, own_outputs, rows, gradients, pass.d_stride, 0, state.dh,
                pass.width_stride, cell.direct);
      }
      if (crossing.truncated || crossing.reset) cut_states(crossing, rows);
      backwards = !backwards;
    }

    // The own columns of the gradients of states that end here become zero.
    void cut_states(const Crossing& crossing, Range rows) {
      const auto clear = [&](Scalar* to, int64_t stride, const Blocks& blocks, Range own, int64_t b) {
        const int64_t begin = least(blocks.begin(own.begin), stride),
                      end = least(blocks.begin(own.end), stride);
        std::memset(to + b * stride + begin, 0, size_t(end - begin) * sizeof(Scalar));
      };
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        if (!crossing.cuts(b)) continue;
        clear(state.dh, pass.width_stride, pass.outputs, own_outputs, b);
        if (cell.cell_state) clear(state.dc, pass.hidden_stride, pass.units, own_units, b);
      }
    }

    // to = (to +) sum over the panels' segments of d[segment] * U, for own columns.
    void product(const Panels<O>& panels, Range own, Range rows, const O* from, int64_t from_stride,
                 int first_gate, Scalar* to, int64_t to_stride, bool add) {
      for_each_block(own, backwards, [&](int64_t j) {
        multiply_segments(panels, j, rows, from, from_stride, first_gate,
                          to + rows.begin * to_stride + panels.blocks.begin(j), to_stride, add);
      });
    }

    void multiply_segments(const Panels<O>& panels, int64_t j, Range r, const O* from, int64_t from_stride,
                           int first_gate, Scalar* sums, int64_t sums_stride, bool add) {
      for (int64_t g = 0, end; g < panels.segments; g = end) {
        // Segments that follow one another without padding are one product.
        const int64_t block = grad_block(panels, first_gate + int(g));
        end = g + 1;
        while (pass.hidden_stride == panels.depth && end < panels.segments &&
               grad_block(panels, first_gate + int(end)) == block + end - g) {
          ++end;
        }
        const O* const a = from + r.begin * from_stride + block * pass.hidden_stride;
        multiply<O>(panels.cut(j), r.size(),
                    {pairs<O>(panels.depth) * (end - g), elements(a), row_elements<O>(from_stride), 1,
                     panels.at(j, g), sums, sums_stride, add || g > 0 ? sums : nullptr, sums_stride});
      }
    }

    // Where in d the gradient that multiplies a gate's rows of this weight lies.
    int64_t grad_block(const Panels<O>& panels, int gate) const {
      if (&panels == &state.projection) return 0;
      return &panels == &state.input ? cell.input_grad[gate] : cell.recurrent_grad[gate];
    }

    const S* grad_output_at(int64_t t) const {
      if (!args.grad_output.data) return nullptr;
      return steps.template at<const S>(args.grad_output, t) + d * pass.width() * args.grad_output.stride[2];
    }

    // With a projection: the whole gradient of h_t, own columns.
    void sum_output_gradient(int64_t t, Range rows, int64_t chunk_row) {
      const S* const grad_output = grad_output_at(t);
      const int64_t stride = args.grad_output.stride[2];
      const bool clips = args.grad_clip >= 0;
      const Clip<V> clip{V(Scalar(args.grad_clip))};
      for (int64_t j = own_outputs.begin; j < own_outputs.end; ++j) {
        const int64_t column = pass.outputs.begin(j);
        for (int64_t b = rows.begin; b < rows.end; ++b) {
          for_each_vector<kWidth>(1, pass.outputs.size(j), [&](int64_t, int64_t i, int64_t n) FS_BODY {
            V sum = load<V>(state.dh + b * pass.width_stride + column + i);
            if (grad_output) {
              const S* const row = grad_output + b * args.grad_output.stride[1] + (column + i) * stride;
              sum = sum + load_strided<V>(row, stride, n);
            }
            if (clips) sum = clip(sum);
            store_upto(state.d_output + (chunk_row + b) * pass.width_stride + column + i, sum, n);
          });
        }
      }
    }

    StepGradTile<S, O> tile(int64_t t, Range r, int64_t chunk_row, int64_t j) const {
      const int64_t hidden = args.hidden_size, saved_stride = pass.slots() * hidden,
                    unit = pass.units.begin(j);
      const bool projected = args.proj_size != 0;
      StepGradTile<S, O> tile;
      tile.rows = r.size(), tile.units = pass.units.size(j), tile.hidden = hidden, tile.unit = unit;
      tile.h = state.h_rows + chunk_row + r.begin, tile.c = state.c_rows + chunk_row + r.begin;
      tile.h_next_stride = args.output.stride[1];
      tile.h_next = steps.template at<const S>(args.output, t) + r.begin * tile.h_next_stride +
                    d * pass.width() + (projected ? 0 : unit);
      tile.saved_stride = saved_stride;
      tile.saved = tensors.saved ? static_cast<const S*>(tensors.saved) +
                                       (steps.offset(t) + r.begin) * saved_stride + unit
                                 : nullptr;
      tile.grad_output = nullptr;
      tile.grad_output_stride[0] = args.grad_output.stride[1],
      tile.grad_output_stride[1] = args.grad_output.stride[2];
      if (const S* const grad_output = projected ? nullptr : grad_output_at(t)) {
        tile.grad_output =
            grad_output + r.begin * args.grad_output.stride[1] + unit * args.grad_output.stride[2];
      }
      tile.dh_stride = projected ? pass.hidden_stride : pass.width_stride;
      tile.dh = (projected ? state.dm : state.dh) + r.begin * tile.dh_stride + unit;
      tile.dc = cell.cell_state ? state.dc + r.begin * pass.hidden_stride + unit : nullptr;
      tile.dc_stride = pass.hidden_stride;
      tile.d = state.d + (chunk_row + r.begin) * pass.d_stride + unit;
      tile.d_stride = pass.d_stride, tile.d_gate = pass.hidden_stride;
      tile.operand =
          state.operand ? state.operand + (chunk_row + r.begin) * pass.hidden_stride + unit : nullptr;
      tile.operand_stride = pass.hidden_stride;
      tile.d_operand = nullptr, tile.d_operand_stride = 0;
      tile.clips = args.grad_clip >= 0;
      tile.dc_bound = Scalar(args.grad_clip);
      // That of a projected state is bounded before it goes through the projection.
      tile.dh_bound = projected ? std::numeric_limits<Scalar>::infinity() : tile.dc_bound;
      return tile;
    }

    void run_cell(int64_t t, Range rows, int64_t chunk_row) {
      for (int64_t j = own_units.begin; j < own_units.end; ++j) {
        for_each_row_block(rows, [&](Range r) { cell.step_grad(tile(t, r, chunk_row, j)); });
      }
    }

    void run_first(int64_t t, Range rows, int64_t chunk_row) {
      TileBuffer<Scalar> sums;
      const O* const gradients = state.d + chunk_row * pass.d_stride;
      for (int64_t j = own_units.begin; j < own_units.end; ++j) {
        for_each_row_block(rows, [&](Range r) {
          StepGradTile<S, O> first = tile(t, r, chunk_row, j);
          first.d_operand = sums.data, first.d_operand_stride = state.recurrent_rest.columns(j);
          multiply_segments(state.recurrent_rest, j, r, gradients, pass.d_stride, cell.first_gates, sums.data,
                            first.d_operand_stride, false);
          cell.first_grad(first);
        });
      }
    }

    // ---- a chunk's products ----

    void input_gradient(int64_t first, int64_t rows) {
      const Panels<O>& panels = state.input;
      TileBuffer<Scalar> sums;
      const Range own = share(rows, ranks, rank);
      for (int64_t j = 0; j < panels.blocks.count(); ++j) {
        const int64_t column = panels.blocks.begin(j), n = panels.blocks.size(j), columns = panels.columns(j);
        int64_t t = first;
        for_each_row_block(own, [&](Range r) {
          multiply_segments(panels, j, r, state.d, pass.d_stride, 0, sums.data, columns, false);
          for (int64_t row = r.begin; row < r.end; ++row) {
            while (row - (steps.offset(t) - steps.offset(first)) >= steps.rows(t)) ++t;
            const int64_t b = row - (steps.offset(t) - steps.offset(first));
            const Scalar* const from = sums.data + (row - r.begin) * columns;
            if (state.input_sum) {
              Scalar* const to = state.input_sum + (steps.offset(t) + b) * args.input_size + column;
              for_each_vector<kWidth>(1, n, [&](int64_t, int64_t i, int64_t valid) FS_BODY {
                store_upto(to + i, load<V>(from + i), valid);
              });
            } else {
              S* const to = steps.template at<S>(args.grad_input, t) + b * args.grad_input.stride[1] + column;
              for_each_vector<kWidth>(1, n, [&](int64_t, int64_t i, int64_t valid) FS_BODY {
                V sum = load<V>(from + i);
                if (d == 1) sum = sum + load_upto<V>(to + i, valid);
                store_upto(to + i, sum, valid);
              });
            }
          }
        });
      }
    }

    void weight_gradients(int64_t k, int64_t depth) {
      const int64_t x_stride = args.input.stride[2];
      deal_rows(state.h_right, state.h_rows + k, 1, depth);
      deal_rows(state.x_right, state.x_rows + k, x_stride, depth);
      deal_operand(k, depth);
      if (tensors.grad_bias_ih || tensors.grad_bias_hh) {
        add_column_sums(state.d + k * pass.d_stride, pass.d_stride, depth, cell.grads * pass.hidden_stride,
                        rank, ranks, state.bias_sum);
      }
      meet_direction();
      const int64_t hidden = args.hidden_size, width = pass.width();
      const auto add = [&](const O* a, int64_t a_stride, int64_t m, const Panels<O>& right, Scalar* sum) {
        add_transposed_product<O>({a, a_stride, m, &right, sum, !first_chunk}, depth, rank, ranks, left);
      };
      const O* const d_rows = state.d + k * pass.d_stride;
      for (int g = 0; g < cell.gates; ++g) {
        if (tensors.grad_weight_ih) {
          add(d_rows + cell.input_grad[g] * pass.hidden_stride, pass.d_stride, hidden, state.x_right,
              state.weight_ih_sum + g * hidden * args.input_size);
        }
        if (tensors.grad_weight_hh) {
          add(d_rows + cell.recurrent_grad[g] * pass.hidden_stride, pass.d_stride, hidden,
              g < cell.first_gates ? state.h_right : state.operand_right,
              state.weight_hh_sum + g * hidden * width);
        }
      }
      if (tensors.grad_weight_hr) {
        add(state.d_output + k * pass.width_stride, pass.width_stride, width, state.operand_right,
            state.weight_hr_sum);
      }
      meet_direction();
    }

    void deal_rows(Panels<O>& right, const S* const* rows, int64_t stride, int64_t depth) {
      for (int64_t j = rank; j < right.blocks.count(); j += ranks) {
        pack_rows<O>(rows, right.blocks.begin(j) * stride, stride, right.blocks.size(j), depth,
                     right.vectors(j), right.at(j));
      }
    }

    void deal_operand(int64_t k, int64_t depth) {
      Panels<O>& right = state.operand_right;
      const O* rows[kChunkDepth];
      for (int64_t i = 0; i < depth && right.blocks.n; ++i)
        rows[i] = state.operand + (k + i) * pass.hidden_stride;
      for (int64_t j = rank; j < right.blocks.count(); j += ranks) {
        pack_rows<O>(rows, right.blocks.begin(j), 1, right.blocks.size(j), depth, right.vectors(j),
                     right.at(j));
      }
    }

    // ---- after the last step ----

    void finish() {
      meet_direction();
      const int64_t hidden = args.hidden_size, width = pass.width();
      for (int64_t b = rank; b < args.shape.batch; b += ranks) {
        if (tensors.grad_h0) {
          put(state.dh + b * pass.width_stride, width, static_cast<S*>(tensors.grad_h0) + b * width);
        }
        if (tensors.grad_c0) {
          put(state.dc + b * pass.hidden_stride, hidden, static_cast<S*>(tensors.grad_c0) + b * hidden);
        }
      }
      for (int g = rank; g < cell.gates; g += ranks) {
        put_bias(cell.input_grad[g], tensors.grad_bias_ih, g * hidden);
        put_bias(cell.recurrent_grad[g], tensors.grad_bias_hh, g * hidden);
      }
      put_weight(state.weight_ih_sum, cell.gates * hidden * args.input_size, tensors.grad_weight_ih);
      put_weight(state.weight_hh_sum, cell.gates * hidden * width, tensors.grad_weight_hh);
      put_weight(state.weight_hr_sum, width * hidden, tensors.grad_weight_hr);
    }

    static void put(const Scalar* from, int64_t n, S* to) {
      for (int64_t i = 0; i < n; i += kWidth) store_upto(to + i, load_upto<V>(from + i, n - i), n - i);
    }

    void put_bias(int block, void* gradient, int64_t at) {
      if (!gradient) return;
      const double* const sum = state.bias_sum + block * pass.hidden_stride;
      for (int64_t i = 0; i < args.hidden_size; ++i)
        narrow(Scalar(sum[i]), static_cast<S*>(gradient)[at + i]);
    }

    void put_weight(const Scalar* sum, int64_t count, void* gradient) {
      if (!gradient) return;
      S* const to = static_cast<S*>(gradient);
      const Range own = share(count, ranks, rank);
      if (first_chunk) {  // no rows at all
        std::memset(static_cast<void*>(to + own.begin), 0, size_t(own.size()) * sizeof(S));
      } else if constexpr (sizeof(S) != sizeof(Scalar)) {
        put(sum + own.begin, own.size(), to + own.begin);
      }
    }
  };
};

}  // namespace

bool recurrent_backward(const RecurrentArgs& args, const RecurrentPlan& plan) {
  bool done = true;
  with_types(args.dtype, [&](auto storage, auto operand) {
    done = Backward<decltype(storage), decltype(operand)>(args, plan).run();
  });
  return done;
}

}  // namespace fastseq::FASTSEQ_ISA
