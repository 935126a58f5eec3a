// The forward pass of one recurrent layer, all its directions, in one parallel region.
//
// What it computes, for each direction and step t, over the rows b that are active at t:
//   x = W x_t + b_ih          for a chunk of steps at a time, as one product with many rows
//   u = U h_{t-1} + b_hh      tile by tile; the cell turns each tile into h_t while it is in L1
//   (reset-before GRU: r and z first, then u_n = U_n (r * h);  projection: h_t = W_hr of the cell's output)
//
// Who holds what: a thread owns a range of rows (its batch part) and of unit blocks (its unit part). Weights
// are packed once, each block by a thread that uses it. The state lives twice, h_{t-1} and h_t, as product
// operands [B, R]; the cell state in c_n, in place. Threads that share rows meet once a step (twice with a
// second product).
//
// A single step packs each block of weights just before its only use; a cell's call uses them where they lie.
//
// What it costs, a row and step: 2 G H (I + R) operations; the packed U is read once a step from L2 or L3
// (rows of a block share it), G H values of x written and read in L2, H values of output (and G H of saved)
// to memory.
#include "in_place.h"
#include "recurrent_forward_layout.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class S, class O, int kPlanes>
class Forward : ForwardLayout<S, O, kPlanes> {
  using Layout = ForwardLayout<S, O, kPlanes>;
  using Layout::args, Layout::plan, Layout::steps, Layout::meetings, Layout::plane, Layout::team_size;
  using Layout::kWidth;
  using typename Layout::DirectionState, typename Layout::Phase, typename Layout::Scalar;

 public:
  using Layout::Layout;

  bool run() {
    return run_team(
        team_size(), [](void* self, int thread) { static_cast<Forward*>(self)->run_thread(thread); }, this);
  }

 private:
  void run_thread(int thread) {
    const Seat seat = seat_of(plan, thread);
    for (int d = seat.direction_part; d < args.directions; d += plan.direction_parts) {
      Worker(*this, d, seat, thread).run();
    }
  }

  // One thread's way through one direction.
  struct Worker {
    Forward& pass;
    const RecurrentArgs& args;
    const RecurrentDirection& tensors;
    DirectionState& state;
    const Steps& steps;
    const int d;
    const bool reverse;  // runs from the last step to the first
    const Seat seat;
    const Range own_rows, own_units, own_projected;  // rows; blocks of units and of projected columns
    Scalar* const projected_input;
    O* const staged;
    O* const slot_memory;
    Scalar* const slot_bias;
    int now = 0;  // state[now] holds h_{t-1}

    Worker(Forward& pass, int d, const Seat& seat, int thread)
        : pass(pass),
          args(pass.args),
          tensors(args.direction[d]),
          state(pass.direction[d]),
          steps(pass.steps),
          d(d),
          reverse(pass.args.reversed || d == 1),
          seat(seat),
          own_rows{steps.boundaries[seat.batch_part], steps.boundaries[seat.batch_part + 1]},
          own_units(share(pass.units.count(), pass.plan.unit_parts, seat.unit_part)),
          own_projected(share(pass.projected.count(), pass.plan.unit_parts, seat.unit_part)),
          projected_input(pass.projected_input + part() * pass.chunk_rows * pass.sum_planes *
                                                     pass.cell.gates * pass.units.count() * pass.units.width),
          staged(pass.staged + part() * pass.chunk_rows * kPlanes * pass.input_stride),
          slot_memory(pass.slot_memory + thread * pass.slot_size),
          slot_bias(pass.slot_bias + thread * pass.slot.gates * pass.units.width) {}

    const RecurrentDirection& tensors_of(int p) const { return pass.plane(p).direction[d]; }
    int part() const { return seat.direction_part * pass.plan.batch_parts + seat.batch_part; }
    void meet() const { pass.meetings.of_units(seat); }
    int64_t time(int64_t step) const { return reverse ? args.shape.steps - 1 - step : step; }
    int64_t rows_at(int64_t step) const { return steps.rows(time(step), seat.batch_part).size(); }

    void run() {
      pack_weights();
      start_states();
      pass.meetings.of_direction(seat);
      for (int64_t begin = 0; begin < args.shape.steps;) {
        int64_t end = begin, rows = 0;
        do {
          rows += rows_at(end++);
        } while (end < args.shape.steps && rows + rows_at(end) <= pass.chunk_rows);
        project_input(begin, end, rows);
        int64_t row = reverse ? rows : 0;  // of the chunk; chunks lie in the order of time
        for (int64_t step = begin; step < end; ++step) {
          if (reverse) row -= rows_at(step);
          take_step(time(step), row, rows);
          if (!reverse) row += rows_at(step);
        }
        begin = end;
      }
      if (args.shape.steps == 0) {
        for (int p = 0; p < kPlanes; ++p) {
          for (int64_t b = own_rows.begin; b < own_rows.end; ++b) finish_row(b, p, nullptr);
        }
      }
    }

    void pack_weights() {
      const auto mine = [&](int64_t i) { return i % pass.plan.batch_parts == seat.batch_part; };
      for (int p = 0; p < pass.phases(); ++p) {
        Phase& phase = state.phase[p];
        for (int64_t j = own_units.begin; j < own_units.end; ++j) {
          if (!pass.packs_ahead() || !mine(j)) continue;
          for (int i = 0; i < kPlanes; ++i) {
            const RecurrentDirection& t = tensors_of(i);
            phase.input[i].pack_transposed_rows(j, static_cast<const S*>(t.weight_ih),
                                                static_cast<const S*>(t.bias_ih), phase.first_gate);
            phase.recurrent[i].pack_transposed_rows(j, static_cast<const S*>(t.weight_hh),
                                                    static_cast<const S*>(t.bias_hh), phase.first_gate);
          }
        }
      }
      for (int64_t j = own_projected.begin; j < own_projected.end; ++j) {
        for (int i = 0; i < kPlanes && mine(j); ++i) {
          state.projection[i].pack_transposed_rows(j, static_cast<const S*>(tensors_of(i).weight_hr),
                                                   static_cast<const S*>(nullptr), 0);
        }
      }
    }

    void start_states() {
      // Rows are dealt out among the threads that share them; everybody meets before the first step.
      const int64_t hidden = args.hidden_size, width = pass.width();
      for (int64_t b = own_rows.begin + seat.unit_part; b < own_rows.end; b += pass.plan.unit_parts) {
        const bool reset = !reverse && args.resets && args.resets[b];
        for (int p = 0; p < kPlanes; ++p) {
          const RecurrentDirection& t = tensors_of(p);
          const S* const h0 = t.h0 && !reset ? static_cast<const S*>(t.h0) + b * width : nullptr;
          for (O* buffer : state.state) {
            O* const row = buffer + (b * kPlanes + p) * pass.state_stride;
            std::memset(static_cast<void*>(row), 0, size_t(pass.state_stride) * sizeof(O));
            stage_row(h0, 1, width, row);
          }
          if (state.middle) {
            std::memset(static_cast<void*>(state.middle + (b * kPlanes + p) * pass.middle_stride), 0,
                        size_t(pass.middle_stride) * sizeof(O));
          }
          if (pass.cell.cell_state) {
            S* const c = static_cast<S*>(t.c_n) + b * hidden;
            if (t.c0 && !reset) {
              std::memcpy(static_cast<void*>(c), static_cast<const S*>(t.c0) + b * hidden,
                          size_t(hidden) * sizeof(S));
            } else {
              std::memset(static_cast<void*>(c), 0, size_t(hidden) * sizeof(S));
            }
          }
        }
      }
    }

    // Operand rows of the chunk's inputs: in place where they lie evenly and have the right type.
    std::pair<const O*, int64_t> input_rows(int64_t begin, int64_t end, int64_t rows) {
      const int64_t first = reverse ? time(end - 1) : begin, last = reverse ? time(begin) + 1 : end;
      const auto& input = args.input;
      if constexpr (kPlanes == 1 && sizeof(S) == sizeof(O) && Operand<O>::kPair == 1) {
        const int64_t between = steps.batch_sizes || steps.batch > 1 ? input.stride[1] : input.stride[0];
        const bool all_rows = pass.plan.batch_parts == 1;
        const bool even =
            last - first == 1 || (all_rows && (steps.batch_sizes || steps.batch == 1 ||
                                               input.stride[0] == steps.batch * input.stride[1]));
        if (input.stride[2] == 1 && even) {
          const Range at = steps.rows(first, seat.batch_part);
          return {steps.template at<const S>(input, first) + at.begin * input.stride[1], between};
        }
      }
      const Range mine = share(rows, pass.plan.unit_parts, seat.unit_part);
      for (int p = 0; p < kPlanes; ++p) {
        const auto& of_plane = pass.plane(p).input;
        const bool used = p == 1 ? of_plane.data != nullptr : !args.known || tensors_of(1).weight_ih;
        if (!used) continue;
        int64_t row = 0;
        for (int64_t t = first; t < last && row < mine.end; ++t) {
          const Range at = steps.rows(t, seat.batch_part);
          const S* const from = steps.template at<const S>(of_plane, t);
          for (int64_t b = at.begin; b < at.end; ++b, ++row) {
            if (row < mine.begin || row >= mine.end) continue;
            O* const to = staged + (row * kPlanes + p) * pass.input_stride;
            if (Operand<O>::kPair == 2 && args.input_size % 2) {
              std::memset(static_cast<void*>(to + args.input_size), 0, sizeof(O));
            }
            stage_row(from + b * of_plane.stride[1], of_plane.stride[2], args.input_size, to);
          }
        }
      }
      meet();
      return {staged, pass.input_stride};
    }

    // Sums of block j of phase p for the chunk: [row][plane][gate][unit], blocks and phases one after another.
    Scalar* projected_at(int p, int64_t j, int64_t rows) const {
      const Phase& phase = state.phase[p];
      return projected_input + pass.sum_planes * rows * pass.units.width *
                                   (phase.first_gate * pass.units.count() + j * phase.gates);
    }

    void project_input(int64_t begin, int64_t end, int64_t rows) {
      const auto [input, stride] = input_rows(begin, end, rows);
      const bool tangents = pass.plane(kPlanes - 1).input.data;
      for (int p = 0; p < pass.phases(); ++p) {
        const Phase& phase = state.phase[p];
        for (int64_t j = own_units.begin; j < own_units.end; ++j) {
          const Panels<O> panels =
              ready(phase.input[0], j, tensors.weight_ih, tensors.bias_ih, phase.first_gate);
          Scalar* const to = projected_at(p, j, rows);
          for_each_row_block({0, rows}, pass.sum_planes, [&, input = input, stride = stride](Range r) {
            const O* const from = input + r.begin * kPlanes * stride;
            Scalar* const sums = to + r.begin * pass.sum_planes * panels.columns(j);
            if constexpr (kPlanes == 1) {
              fill_tile(panels, j, r.size(), from, stride, phase.first_gate, tensors.weight_ih,
                        tensors.bias_ih, sums);
            } else {
              fill_both(phase.input, j, r.size(), from, stride, tangents, sums);
            }
          });
        }
      }
    }

    // The panels to use for block j: those packed before the first step, or in a single step this one, packed
    // now.
    Panels<O> ready(const Panels<O>& panels, int64_t j, const void* weight, const void* bias,
                    int first_gate) const {
      if (!pass.single_step) return panels;
      Panels<O> slot = panels;
      slot.one_slot = true, slot.data = slot_memory, slot.bias = bias ? slot_bias : nullptr;
      slot.pack_transposed_rows(j, static_cast<const S*>(weight), static_cast<const S*>(bias), first_gate);
      return slot;
    }

    // to [row][gate][unit] = bias + rows of a * weight^T, for the gates and units of block j.
    void fill_tile(const Panels<O>& panels, int64_t j, int64_t rows, const O* a, int64_t stride,
                   int first_gate, const void* weight, const void* bias, Scalar* to) {
      const int64_t columns = panels.columns(j);
      if (!pass.in_place) {
        multiply<O>(panels.cut(j), rows,
                    {pairs<O>(panels.depth), elements(a), row_elements<O>(stride), 1, panels.at(j), to,
                     columns, panels.bias_at(j), 0});
        return;
      }
      // The cell reads whole vectors: lanes beyond the last unit hold zeros, as packed panels give them.
      if (panels.blocks.size(j) < panels.blocks.width) {
        std::memset(to, 0, size_t(rows * columns) * sizeof(Scalar));
      }
      for (int g = 0; g < panels.gates; ++g) {
        const int64_t row = (first_gate + g) * args.hidden_size + panels.blocks.begin(j);
        multiply_in_place<S, O>(
            {panels.depth, a, stride, static_cast<const S*>(weight) + row * panels.depth, panels.depth,
             bias ? static_cast<const S*>(bias) + row : nullptr, to + g * columns / panels.gates, columns},
            rows, panels.blocks.size(j));
      }
    }

    // The same of `rows` rows and their tangents, which follow each its row: by the product's rule, with the tangents
    // of weights and biases where there are any. `tangents`: whether a has any. Of known numbers the rows are left out.
    void fill_both(const Panels<O> (&panels)[kPlanes], int64_t j, int64_t rows, const O* a, int64_t stride,
                   bool tangents, Scalar* to) {
      const int64_t columns = panels[0].columns(j);
      const int planes = pass.sum_planes;
      for (int64_t row = 0; row < planes * rows; ++row) {
        const Scalar* const bias = panels[planes == 1 ? 1 : row % planes].bias_at(j);
        if (bias) {
          std::memcpy(to + row * columns, bias, size_t(columns) * sizeof(Scalar));
        } else {
          std::memset(to + row * columns, 0, size_t(columns) * sizeof(Scalar));
        }
      }
      const auto add = [&](const Panels<O>& weight, int64_t count, const O* from, int every, Scalar* sums,
                           int sums_every) {
        multiply<O>(weight.cut(j), count,
                    {pairs<O>(weight.depth), elements(from), row_elements<O>(every * stride), 1, weight.at(j),
                     sums, sums_every * columns, sums, sums_every * columns});
      };
      if (args.known && tangents) {
        add(panels[0], rows, a + stride, kPlanes, to, planes);
      } else if (!args.known && tangents) {
        add(panels[0], kPlanes * rows, a, 1, to, 1);
      } else if (!args.known) {
        add(panels[0], rows, a, kPlanes, to, planes);
      }
      if (const Panels<O>& weight = panels[kPlanes - 1]; weight.data) {
        add(weight, rows, a, kPlanes, to + (planes - 1) * columns, planes);
      }
    }

    void take_step(int64_t t, int64_t chunk_row, int64_t chunk_rows) {
      const Range rows = steps.rows(t, seat.batch_part);
      O* const h = state.state[now];
      O* const h_next = state.state[1 - now];
      const bool two = pass.phases() == 2;
      run_phase(0, t, rows, chunk_row, chunk_rows, h, pass.state_stride, state.middle ? state.middle : h_next,
                state.middle ? pass.middle_stride : pass.state_stride);
      if (two) {
        meet();
        run_phase(1, t, rows, chunk_row, chunk_rows, state.middle, pass.middle_stride, h_next,
                  pass.state_stride);
      }
      if (args.proj_size) {
        meet();
        project_output(t, rows, h_next);
      }
      finish_rows(t, rows);
      if (args.resets || (kPlanes == 2 && args.truncate)) reset_states(t, rows, h_next);
      meet();
      now = 1 - now;
    }

    // The own units of the states that do not reach the next step become zero, and of tangents also where gradients
    // are truncated.
    void reset_states(int64_t t, Range rows, O* h_next) {
      const int64_t later = reverse ? t : t + 1;  // of the two steps
      if (later == 0 || later == args.shape.steps) return;
      const uint8_t* const resets = steps.resets(later);
      const bool truncated = args.truncate && later % args.truncate == 0;
      const Range h = own_state(), c = own_cell_state();
      for (int64_t b = rows.begin; b < least(rows.end, steps.rows(later)); ++b) {
        for (int p = 0; p < kPlanes; ++p) {
          if (!(resets && resets[b]) && !(p == 1 && truncated)) continue;
          std::memset(static_cast<void*>(h_next + (b * kPlanes + p) * pass.state_stride + h.begin), 0,
                      size_t(h.size()) * sizeof(O));
          if (!pass.cell.cell_state) continue;
          std::memset(static_cast<void*>(static_cast<S*>(tensors_of(p).c_n) + b * args.hidden_size + c.begin),
                      0, size_t(c.size()) * sizeof(S));
        }
      }
    }

    static Range columns_of(const Blocks& blocks, Range own) {
      return {least(own.begin * blocks.width, blocks.n), least(own.end * blocks.width, blocks.n)};
    }
    Range own_cell_state() const { return columns_of(pass.units, own_units); }
    Range own_state() const {
      return args.proj_size ? columns_of(pass.projected, own_projected) : own_cell_state();
    }

    S* output_at(int64_t t, int p) const {
      return steps.template at<S>(pass.plane(p).output, t) + d * pass.width();
    }

    void run_phase(int p, int64_t t, Range rows, int64_t chunk_row, int64_t chunk_rows, const O* from,
                   int64_t from_stride, O* to, int64_t to_stride) {
      const Phase& phase = state.phase[p];
      const bool last = p == pass.phases() - 1;
      const int64_t hidden = args.hidden_size, saved_stride = pass.slots() * hidden;
      TileBuffer<Scalar> sums;
      for_each_block(own_units, now == 1, [&](int64_t j) {
        const Panels<O> panels =
            ready(phase.recurrent[0], j, tensors.weight_hh, tensors.bias_hh, phase.first_gate);
        const int64_t unit = pass.units.begin(j), columns = panels.columns(j);
        const Scalar* const x = projected_at(p, j, chunk_rows) + chunk_row * pass.sum_planes * columns;
        for_each_row_block(rows, pass.sum_planes, [&](Range r) {
          const O* const operand = from + r.begin * kPlanes * from_stride;
          if constexpr (kPlanes == 1) {
            fill_tile(panels, j, r.size(), operand, from_stride, phase.first_gate, tensors.weight_hh,
                      tensors.bias_hh, sums.data);
          } else {
            fill_both(phase.recurrent, j, r.size(), operand, from_stride, true, sums.data);
          }
          StepTile<S, O, kPlanes> tile;
          tile.rows = r.size(), tile.units = pass.units.size(j);
          tile.block = columns / phase.gates, tile.hidden = hidden;
          tile.x = x + (r.begin - rows.begin) * pass.sum_planes * columns, tile.u = sums.data;
          tile.h = state.state[now] + r.begin * kPlanes * pass.state_stride + unit;
          tile.h_stride = pass.state_stride;
          tile.c_stride = hidden;
          tile.saved_stride = tile.kept_c_stride = saved_stride;
          tile.operand = to + r.begin * kPlanes * to_stride + unit, tile.operand_stride = to_stride;
          for (int i = 0; i < kPlanes; ++i) {
            const RecurrentDirection& of_plane = tensors_of(i);
            S* const kept =
                of_plane.saved ? static_cast<S*>(of_plane.saved) + steps.offset(t) * saved_stride : nullptr;
            S* const saved = kept && !args.saves_states ? kept : state.saved_step[i];
            const bool keeps_c = kept && pass.cell.cell_state;
            S* const kept_c = keeps_c ? kept + (args.saves_states ? 0 : pass.cell.saved * hidden) : nullptr;
            S* const output = last && !args.proj_size ? output_at(t, i) : nullptr;
            const int64_t output_stride = pass.plane(i).output.stride[1];
            tile.c[i] = of_plane.c_n ? static_cast<S*>(of_plane.c_n) + r.begin * hidden + unit : nullptr;
            tile.saved[i] = saved ? saved + r.begin * saved_stride + unit : nullptr;
            tile.kept_c[i] = kept_c ? kept_c + r.begin * saved_stride + unit : nullptr;
            tile.output[i] = output ? output + r.begin * output_stride + unit : nullptr;
            tile.output_stride[i] = output_stride;
          }
          phase.run(tile);
        });
      });
    }

    void project_output(int64_t t, Range rows, O* h_next) {
      const Panels<O>& panels = state.projection[0];
      TileBuffer<Scalar> sums;
      for (int64_t j = own_projected.begin; j < own_projected.end; ++j) {
        const int64_t column = panels.blocks.begin(j), n = panels.blocks.size(j), columns = panels.columns(j);
        for_each_row_block(rows, pass.sum_planes, [&](Range r) {
          const O* const operand = state.middle + r.begin * kPlanes * pass.middle_stride;
          if constexpr (kPlanes == 1) {
            multiply<O>(panels.cut(j), r.size(),
                        {pairs<O>(panels.depth), elements(operand), row_elements<O>(pass.middle_stride), 1,
                         panels.at(j), sums.data, columns, nullptr, 0});
          } else {
            fill_both(state.projection, j, r.size(), operand, pass.middle_stride, true, sums.data);
          }
          for (int p = 0; p < kPlanes; ++p) {
            S* const output = output_at(t, p);
            const int64_t output_stride = pass.plane(p).output.stride[1];
            for_each_vector<kWidth>(r.size(), n, [&](int64_t row, int64_t i, int64_t valid) FS_BODY {
              S* const to = output + (r.begin + row) * output_stride + column + i;
              const bool known = args.known && p == 0;
              const auto h =
                  known ? load_upto<Vec<Scalar>>(to, valid)
                        : load<Vec<Scalar>>(sums.data + (args.known ? row : row * kPlanes + p) * columns + i);
              if (!known) store_upto(to, h, valid);
              store_upto(h_next + ((r.begin + row) * kPlanes + p) * pass.state_stride + column + i,
                         rounded<S>(h), valid);
            });
          }
        });
      }
    }

    // The own columns of h_n, for the rows whose last step this is.
    void finish_rows(int64_t t, Range rows) {
      if (reverse && t > 0) return;
      const int64_t left = !reverse && t + 1 < args.shape.steps ? steps.rows(t + 1) : 0;
      for (int p = 0; p < kPlanes; ++p) {
        for (int64_t b = most(rows.begin, left); b < rows.end; ++b) {
          finish_row(b, p, output_at(t, p) + b * pass.plane(p).output.stride[1]);
        }
      }
    }

    // Null stands for a row without steps.
    void finish_row(int64_t b, int p, const S* last) {
      const RecurrentDirection& t = tensors_of(p);
      if (!t.h_n) return;
      const int64_t width = pass.width();
      const auto [begin, end] = own_state();
      S* const to = static_cast<S*>(t.h_n) + b * width;
      if (!last && t.h0) last = static_cast<const S*>(t.h0) + b * width;
      if (last) {
        std::memcpy(static_cast<void*>(to + begin), last + begin, size_t(end - begin) * sizeof(S));
      } else {
        std::memset(static_cast<void*>(to + begin), 0, size_t(end - begin) * sizeof(S));
      }
    }
  };
};

}  // namespace

bool recurrent_forward(const RecurrentArgs& args, const RecurrentPlan& plan) {
  bool done = true;
  with_types(args.dtype, [&](auto storage, auto operand) {
    done = args.tangents ? Forward<decltype(storage), decltype(operand), 2>(args, plan).run()
                         : Forward<decltype(storage), decltype(operand), 1>(args, plan).run();
  });
  return done;
}

}  // namespace fastseq::FASTSEQ_ISA
