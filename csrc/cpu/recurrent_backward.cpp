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

#include "recurrent_chunk_products.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class S, class O, int kPlanes>
class Backward : BackwardLayout<S, O, kPlanes> {
  using Layout = BackwardLayout<S, O, kPlanes>;
  using Layout::args, Layout::plan, Layout::steps, Layout::meetings, Layout::direction, Layout::team_size;
  using Layout::plane;
  using typename Layout::DirectionState, typename Layout::Element, typename Layout::Scalar;
  using V = Vec<Scalar>;
  using P = Planes<kPlanes, V>;
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
    bool beside = false;
    for (const Scalar* sum : direction[args.directions - 1].input_sum) beside = beside || sum;
    if (beside) {
      meetings.of_all(thread);
      for (int p = 0; p < kPlanes; ++p) {
        if (direction[1].input_sum[p]) add_second_direction(thread, p);
      }
    }
  }

  // dx of the first direction += dx of the second.
  void add_second_direction(int thread, int p) {
    const Scalar* const second = direction[1].input_sum[p];
    const auto& first = plane(p).grad_input;
    for (int64_t t = thread; t < steps.steps; t += team_size()) {
      S* const to = steps.template at<S>(first, t);
      for (int64_t b = 0; b < steps.rows(t); ++b) {
        S* const row = to + b * first.stride[1];
        const Scalar* const add = second + (steps.offset(t) + b) * args.input_size;
        for_each_vector<kWidth>(1, args.input_size, [&](int64_t, int64_t i, int64_t n) FS_BODY {
          store_upto(row + i, load_upto<V>(row + i, n) + load_upto<V>(add + i, n), n);
        });
      }
    }
  }

  using Products = ChunkProducts<S, O, kPlanes>;
  struct Worker : Products {
    using Products::args, Products::cell, Products::d, Products::first_chunk, Products::pass, Products::rank;
    using Products::meet_direction, Products::multiply_segments, Products::tensors_of;
    using Products::ranks, Products::seat, Products::state, Products::steps;
    const RecurrentDirection& tensors;
    const bool reverse;                  // runs from the last step to the first
    const Range own_units, own_outputs;  // blocks
    bool backwards = false;              // of the order of blocks

    Worker(Backward& backward, int d, const Seat& seat, int thread)
        : Products(backward, d, seat, thread),
          tensors(args.direction[d]),
          reverse(args.reversed || d == 1),
          own_units(share(pass.units.count(), pass.plan.unit_parts, seat.unit_part)),
          own_outputs(share(pass.outputs.count(), pass.plan.unit_parts, seat.unit_part)) {}

    void meet() const { pass.meetings.of_units(seat); }
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
        for (int p = 0; p < kPlanes; ++p) {
          if (pass.plane(p).grad_input.data) this->input_gradient(first, rows, p);
        }
        for (int64_t k = 0; k < rows; k += pass.depth) {
          this->weight_gradients(k, least(pass.depth, rows - k));
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
      for (int p = 0; p < kPlanes; ++p) {
        const RecurrentDirection& t = tensors_of(p);
        if (t.weight_hh) deal(state.recurrent_first[p], t.weight_hh, 0);
        if (t.weight_hh && pass.two_products()) deal(state.recurrent_rest[p], t.weight_hh, cell.first_gates);
        if (t.weight_ih) deal(state.input[p], t.weight_ih, 0);
        if (t.weight_hr) deal(state.projection[p], t.weight_hr, 0);
      }
    }

    void start_gradients() {
      const int64_t hidden = args.hidden_size, width = pass.width();
      for (int64_t b = rank; b < args.shape.batch; b += ranks) {
        const auto start = [&](Scalar* to, int64_t stride, const void* from, int64_t n, int p) {
          const S* const row = from ? static_cast<const S*>(from) + b * n : nullptr;
          for (int64_t i = 0; i < stride; i += kWidth) {
            store(to + (b * kPlanes + p) * stride + i, load_strided<V>(row ? row + i : nullptr, 1, n - i));
          }
        };
        for (int p = 0; p < kPlanes; ++p) {
          start(state.dh, pass.width_stride, tensors_of(p).grad_h_n, width, p);
          if (cell.cell_state) start(state.dc, pass.hidden_stride, tensors_of(p).grad_c_n, hidden, p);
        }
      }
      if (Operand<O>::kPair == 2) {  // odd rows are read in pairs
        for (int64_t row = rank; row < kPlanes * pass.chunk_rows; row += ranks) {
          std::memset(static_cast<void*>(state.d + row * pass.d_stride), 0,
                      size_t(pass.d_stride) * sizeof(O));
          if (args.proj_size) {
            std::memset(static_cast<void*>(state.d_output + row * pass.width_stride), 0,
                        size_t(pass.width_stride) * sizeof(O));
          }
        }
      }
      for (int p = 0; p < kPlanes && rank == 0; ++p) {
        std::memset(static_cast<void*>(state.bias_sum[p]), 0,
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
        for (int p = 0; p < kPlanes; ++p) {
          const RecurrentDirection& of_plane = tensors_of(p);
          const auto& output = pass.plane(p).output;
          const auto& input = pass.plane(p).input;
          for (int64_t b = 0; b < steps.rows(t); ++b) {
            const S *h, *c = nullptr;
            if (crossing.resets(b)) {
              h = nullptr;
            } else if (p == 1 && crossing.cuts(b)) {
              h = nullptr;
            } else if (b < continued) {
              h = steps.template at<const S>(output, before) + b * output.stride[1] + d * width;
              if (cell.cell_state) {
                c = static_cast<const S*>(of_plane.saved) + (steps.offset(before) + b) * saved_stride +
                    cell.saved * hidden;
              }
            } else {
              h = of_plane.h0 ? static_cast<const S*>(of_plane.h0) + b * width : nullptr;
              c = of_plane.c0 ? static_cast<const S*>(of_plane.c0) + b * hidden : nullptr;
            }
            const S* const x = steps.template at<const S>(input, t) + b * input.stride[1];
            state.h_rows.set(row + b, p, h);
            state.c_rows.set(row + b, p, c);
            state.x_rows.set(row + b, p, p == 0 || input.data ? x : nullptr);
          }
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
        product(state.projection, kOnly, own_units, rows,
                state.d_output + chunk_row * kPlanes * pass.width_stride, pass.width_stride, state.dm,
                pass.hidden_stride, false, true);
      }
      run_cell(t, rows, chunk_row);
      meet();
      O* const gradients = state.d + chunk_row * kPlanes * pass.d_stride;
      if (pass.two_products()) {
        run_first(t, rows, chunk_row);
        meet();
      }
      // Before the first step there is only h0.
      const bool none_cross = crossing.truncated && rows.end <= crossing.rows;
      const bool of_h0 = tensors.grad_h0 || tensors_of(kPlanes - 1).grad_h0;
      if ((time(t) > 0 || of_h0) && !none_cross) {
        product(state.recurrent_first, cell.recurrent_grad, own_outputs, rows, gradients, pass.d_stride,
                state.dh, pass.width_stride, cell.direct, !args.known);
      }
      if (crossing.truncated || crossing.reset) cut_states(crossing, rows);
      backwards = !backwards;
    }

    // The own columns of the gradients of states that end here become zero.
    void cut_states(const Crossing& crossing, Range rows) {
      const auto clear = [&](Scalar* to, int64_t stride, const Blocks& blocks, Range own, int64_t b) {
        const int64_t begin = least(blocks.begin(own.begin), stride),
                      end = least(blocks.begin(own.end), stride);
        for (int64_t row = b * kPlanes; row < (b + 1) * kPlanes; ++row) {
          std::memset(to + row * stride + begin, 0, size_t(end - begin) * sizeof(Scalar));
        }
      };
      for (int64_t b = rows.begin; b < rows.end; ++b) {
        if (!crossing.cuts(b)) continue;
        clear(state.dh, pass.width_stride, pass.outputs, own_outputs, b);
        if (cell.cell_state) clear(state.dc, pass.hidden_stride, pass.units, own_units, b);
      }
    }

    static constexpr int kOnly[] = {0};  // of a weight of one segment

    // to = (to +) sum over the panels' segments of d[segment] * U, for own columns; block[segment] is where the
    // segment's gradient lies in d. `numbers`: whether they are wanted, or tangents alone.
    void product(const Panels<O> (&panels)[kPlanes], const int* block, Range own, Range rows, const O* from,
                 int64_t from_stride, Scalar* to, int64_t to_stride, bool add, bool numbers) {
      for_each_block(own, backwards, [&](int64_t j) {
        multiply_both(panels, block, j, rows, from, from_stride,
                      to + rows.begin * kPlanes * to_stride + panels[0].blocks.begin(j), to_stride, add,
                      numbers);
      });
    }

    // Of `rows`, each with its planes.
    void multiply_both(const Panels<O> (&panels)[kPlanes], const int* block, int64_t j, Range r,
                       const O* from, int64_t from_stride, Scalar* sums, int64_t sums_stride, bool add,
                       bool numbers) {
      const O* const a = from + r.begin * kPlanes * from_stride;
      if (numbers) {
        multiply_segments(panels[0], block, j, kPlanes * r.size(), a, from_stride, sums, sums_stride, add);
      }
      if constexpr (kPlanes == 2) {  // d' U + d U'
        if (!numbers) {
          multiply_segments(panels[0], block, j, r.size(), a + from_stride, 2 * from_stride,
                            sums + sums_stride, 2 * sums_stride, add);
        }
        if (!panels[1].data) return;
        multiply_segments(panels[1], block, j, r.size(), a, 2 * from_stride, sums + sums_stride,
                          2 * sums_stride, true);
      }
    }

    // Of row 0 of step t; see RecurrentDirection.
    Scalar* kept_at(int64_t t) const {
      return tensors.grad_hidden ? static_cast<Scalar*>(tensors.grad_hidden) + steps.offset(t) * pass.width()
                                 : nullptr;
    }

    const S* grad_output_at(int64_t t, int p) const {
      const auto& grad_output = pass.plane(p).grad_output;
      if (!grad_output.data) return nullptr;
      return steps.template at<const S>(grad_output, t) + d * pass.width() * grad_output.stride[2];
    }

    // With a projection: the whole gradient of h_t, own columns.
    void sum_output_gradient(int64_t t, Range rows, int64_t chunk_row) {
      const bool clips = args.grad_clip >= 0;
      const Clip<V> clip{V(Scalar(args.grad_clip))};
      Scalar* const kept = kept_at(t);
      for (int64_t j = own_outputs.begin; j < own_outputs.end; ++j) {
        const int64_t column = pass.outputs.begin(j);
        for (int64_t b = rows.begin; b < rows.end; ++b) {
          for_each_vector<kWidth>(1, pass.outputs.size(j), [&](int64_t, int64_t i, int64_t n) FS_BODY {
            auto sum = P::of([&](int p) FS_BODY {
              Scalar* const kept_row = kept ? kept + b * pass.width() + column + i : nullptr;
              if (kPlanes == 2 && p == 0 && kept) return load_upto<V>(kept_row, n);
              V sum = load<V>(state.dh + (b * kPlanes + p) * pass.width_stride + column + i);
              if (const S* const grad_output = grad_output_at(t, p)) {
                const int64_t* const stride = pass.plane(p).grad_output.stride;
                sum = sum +
                      load_strided<V>(grad_output + b * stride[1] + (column + i) * stride[2], stride[2], n);
              }
              if (kPlanes == 1 && kept) store_upto(kept_row, sum, n);
              return sum;
            });
            if (clips) sum = clip(sum);
            P::each(sum, [&](int p, V v) FS_BODY {
              const int64_t row = (chunk_row + b) * kPlanes + p;
              store_upto(state.d_output + row * pass.width_stride + column + i, v, n);
            });
          });
        }
      }
    }

    StepGradTile<S, O, kPlanes> tile(int64_t t, Range r, int64_t chunk_row, int64_t j) const {
      const int64_t hidden = args.hidden_size, saved_stride = pass.slots() * hidden,
                    unit = pass.units.begin(j);
      const bool projected = args.proj_size != 0;
      const int64_t row = (chunk_row + r.begin) * kPlanes;
      StepGradTile<S, O, kPlanes> tile;
      tile.rows = r.size(), tile.units = pass.units.size(j), tile.hidden = hidden, tile.unit = unit;
      tile.h = state.h_rows.from(chunk_row + r.begin), tile.c = state.c_rows.from(chunk_row + r.begin);
      tile.saved_stride = saved_stride;
      for (int p = 0; p < kPlanes; ++p) {
        const RecurrentTensors& of_plane = pass.plane(p);
        const S* const saved = static_cast<const S*>(of_plane.direction[d].saved);
        tile.h_next_stride[p] = of_plane.output.stride[1];
        tile.h_next[p] = steps.template at<const S>(of_plane.output, t) + r.begin * tile.h_next_stride[p] +
                         d * pass.width() + (projected ? 0 : unit);
        tile.saved[p] = saved ? saved + (steps.offset(t) + r.begin) * saved_stride + unit : nullptr;
        const int64_t* const stride = of_plane.grad_output.stride;
        const S* const grad_output = projected ? nullptr : grad_output_at(t, p);
        tile.grad_output[p] = grad_output ? grad_output + r.begin * stride[1] + unit * stride[2] : nullptr;
        tile.grad_output_stride[p][0] = stride[1], tile.grad_output_stride[p][1] = stride[2];
      }
      tile.dh_stride = projected ? pass.hidden_stride : pass.width_stride;
      tile.dh = (projected ? state.dm : state.dh) + r.begin * kPlanes * tile.dh_stride + unit;
      tile.dc = cell.cell_state ? state.dc + r.begin * kPlanes * pass.hidden_stride + unit : nullptr;
      tile.dc_stride = pass.hidden_stride;
      tile.d = state.d + row * pass.d_stride + unit;
      tile.d_stride = pass.d_stride, tile.d_gate = pass.hidden_stride;
      tile.operand = state.operand ? state.operand + row * pass.hidden_stride + unit : nullptr;
      tile.operand_stride = pass.hidden_stride;
      tile.d_operand = nullptr, tile.d_operand_stride = 0;
      Scalar* const kept = projected ? nullptr : kept_at(t);
      tile.kept = kept ? kept + r.begin * pass.width() + unit : nullptr, tile.kept_stride = pass.width();
      tile.clips = args.grad_clip >= 0;
      tile.dc_bound = Scalar(args.grad_clip);
      // That of a projected state is bounded before it goes through the projection.
      tile.dh_bound = projected ? std::numeric_limits<Scalar>::infinity() : tile.dc_bound;
      return tile;
    }

    void run_cell(int64_t t, Range rows, int64_t chunk_row) {
      for (int64_t j = own_units.begin; j < own_units.end; ++j) {
        for_each_row_block(rows, kPlanes, [&](Range r) { cell.step_grad(tile(t, r, chunk_row, j)); });
      }
    }

    void run_first(int64_t t, Range rows, int64_t chunk_row) {
      TileBuffer<Scalar> sums;
      const O* const gradients = state.d + chunk_row * kPlanes * pass.d_stride;
      for (int64_t j = own_units.begin; j < own_units.end; ++j) {
        for_each_row_block(rows, kPlanes, [&](Range r) {
          StepGradTile<S, O, kPlanes> first = tile(t, r, chunk_row, j);
          first.d_operand = sums.data, first.d_operand_stride = state.recurrent_rest[0].columns(j);
          multiply_both(state.recurrent_rest, cell.recurrent_grad + cell.first_gates, j, r, gradients,
                        pass.d_stride, sums.data, first.d_operand_stride, false, true);
          cell.first_grad(first);
        });
      }
    }

    // ---- after the last step ----

    void finish() {
      meet_direction();
      const int64_t hidden = args.hidden_size, width = pass.width();
      for (int p = 0; p < kPlanes; ++p) {
        const RecurrentDirection& t = tensors_of(p);
        for (int64_t b = rank; b < args.shape.batch; b += ranks) {
          const int64_t row = b * kPlanes + p;
          if (t.grad_h0)
            put(state.dh + row * pass.width_stride, width, static_cast<S*>(t.grad_h0) + b * width);
          if (t.grad_c0) {
            put(state.dc + row * pass.hidden_stride, hidden, static_cast<S*>(t.grad_c0) + b * hidden);
          }
        }
        for (int g = rank; g < cell.gates; g += ranks) {
          put_bias(state.bias_sum[p] + cell.input_grad[g] * pass.hidden_stride, t.grad_bias_ih, g * hidden);
          put_bias(state.bias_sum[p] + cell.recurrent_grad[g] * pass.hidden_stride, t.grad_bias_hh,
                   g * hidden);
        }
        put_weight(state.weight_ih_sum[p], cell.gates * hidden * args.input_size, t.grad_weight_ih);
        put_weight(state.weight_hh_sum[p], cell.gates * hidden * width, t.grad_weight_hh);
        put_weight(state.weight_hr_sum[p], width * hidden, t.grad_weight_hr);
      }
    }

    static void put(const Scalar* from, int64_t n, S* to) {
      for (int64_t i = 0; i < n; i += kWidth) store_upto(to + i, load_upto<V>(from + i, n - i), n - i);
    }

    void put_bias(const double* sum, void* gradient, int64_t at) {
      if (!gradient) return;
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
    done = args.tangents ? Backward<decltype(storage), decltype(operand), 2>(args, plan).run()
                         : Backward<decltype(storage), decltype(operand), 1>(args, plan).run();
  });
  return done;
}

}  // namespace fastseq::FASTSEQ_ISA
