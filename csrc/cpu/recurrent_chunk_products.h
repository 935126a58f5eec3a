// What the backward pass makes of a chunk's gradients of pre-activations, all steps at once: dx, and the gradients of
// weights and biases.
#pragma once

#include "recurrent_backward_layout.h"

namespace fastseq::FASTSEQ_ISA {

// One thread's part of one direction.
template <class S, class O, int kPlanes>
struct ChunkProducts {
  using Layout = BackwardLayout<S, O, kPlanes>;
  using DirectionState = typename Layout::DirectionState;
  using Scalar = typename Operand<O>::Scalar;
  using V = Vec<Scalar>;
  static constexpr int kWidth = V::kWidth;

  Layout& pass;
  const RecurrentArgs& args;
  const CellOps<S, O, kPlanes>& cell;
  const Steps& steps;
  const int d;
  DirectionState& state;
  const Seat seat;
  const int rank, ranks;  // among the threads of this direction
  typename Layout::Element* const left;
  bool first_chunk = true;

  ChunkProducts(Layout& pass, int d, const Seat& seat, int thread)
      : pass(pass),
        args(pass.args),
        cell(pass.cell),
        steps(pass.steps),
        d(d),
        state(pass.direction[d]),
        seat(seat),
        rank(seat.rank),
        ranks(pass.plan.batch_parts * pass.plan.unit_parts),
        left(pass.left + thread * pass.left_size) {}

  const RecurrentDirection& tensors_of(int p) const { return pass.plane(p).direction[d]; }
  void meet_direction() const { pass.meetings.of_direction(seat); }

  void multiply_segments(const Panels<O>& panels, const int* block, int64_t j, int64_t rows, const O* from,
                         int64_t from_stride, Scalar* sums, int64_t sums_stride, bool add) {
    for (int64_t g = 0, end; g < panels.segments; g = end) {
      // Segments that follow one another without padding are one product.
      end = g + 1;
      while (pass.hidden_stride == panels.depth && end < panels.segments &&
             block[end] == block[g] + end - g) {
        ++end;
      }
      multiply<O>(panels.cut(j), rows,
                  {pairs<O>(panels.depth) * (end - g), elements(from + block[g] * pass.hidden_stride),
                   row_elements<O>(from_stride), 1, panels.at(j, g), sums, sums_stride,
                   add || g > 0 ? sums : nullptr, sums_stride});
    }
  }

  void input_gradient(int64_t first, int64_t rows, int p) {
    const Panels<O>& panels = state.input[0];
    const auto& grad_input = pass.plane(p).grad_input;
    TileBuffer<Scalar> sums;
    const Range own = share(rows, ranks, rank);
    for (int64_t j = 0; j < panels.blocks.count(); ++j) {
      const int64_t column = panels.blocks.begin(j), n = panels.blocks.size(j), columns = panels.columns(j);
      int64_t t = first;
      for_each_row_block(own, 1, [&](Range r) {
        const auto multiply_rows = [&](const Panels<O>& weight, int plane, bool add) {
          multiply_segments(weight, cell.input_grad, j, r.size(),
                            state.d + (r.begin * kPlanes + plane) * pass.d_stride, kPlanes * pass.d_stride,
                            sums.data, columns, add);
        };
        multiply_rows(panels, p, false);
        if (p == 1 && state.input[p].data) multiply_rows(state.input[p], 0, true);
        for (int64_t row = r.begin; row < r.end; ++row) {
          while (row - (steps.offset(t) - steps.offset(first)) >= steps.rows(t)) ++t;
          const int64_t b = row - (steps.offset(t) - steps.offset(first));
          const Scalar* const from = sums.data + (row - r.begin) * columns;
          if (state.input_sum[p]) {
            Scalar* const to = state.input_sum[p] + (steps.offset(t) + b) * args.input_size + column;
            for_each_vector<kWidth>(1, n, [&](int64_t, int64_t i, int64_t valid) FS_BODY {
              store_upto(to + i, load<V>(from + i), valid);
            });
          } else {
            S* const to = steps.template at<S>(grad_input, t) + b * grad_input.stride[1] + column;
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
    const O* const d_rows = state.d + k * kPlanes * pass.d_stride;
    for (int p = 0; p < kPlanes; ++p) {
      const RecurrentDirection& t = tensors_of(p);
      deal_rows(state.h_right[p], state.h_rows.rows[p] + (p + 1) * k, 1, (p + 1) * depth);
      deal_rows(state.x_right[p], state.x_rows.rows[p] + (p + 1) * k, x_stride, (p + 1) * depth);
      deal_operand(state.operand_right[p], k, depth, p);
      if (t.grad_bias_ih || t.grad_bias_hh) {
        add_column_sums(d_rows + p * pass.d_stride, kPlanes * pass.d_stride, depth,
                        cell.grads * pass.hidden_stride, rank, ranks, state.bias_sum[p]);
      }
    }
    meet_direction();
    for (int p = 0; p < kPlanes; ++p) add_products(k, depth, p);
    meet_direction();
  }

  // Gradients of weights; of plane 1 their tangents, d'^T h + d^T h' as one product over twice the rows.
  void add_products(int64_t k, int64_t depth, int p) {
    const int64_t hidden = args.hidden_size, width = pass.width();
    const RecurrentDirection& t = tensors_of(p);
    const auto add = [&](const O* a, int64_t a_stride, int64_t m, const Panels<O>& right, Scalar* sum) {
      const int64_t rows = p == 0 ? depth : 2 * depth;
      if (p == 0) a_stride *= kPlanes;
      add_transposed_product<O>({a, a_stride, m, &right, sum, !first_chunk}, rows, rank, ranks, left);
    };
    const O* const d_rows = state.d + k * kPlanes * pass.d_stride;
    for (int g = 0; g < cell.gates; ++g) {
      const O* const of_input = d_rows + cell.input_grad[g] * pass.hidden_stride;
      Scalar* const sum = state.weight_ih_sum[p] + g * hidden * args.input_size;
      if (t.grad_weight_ih && p == 1 && !pass.plane(p).input.data) {
        add_transposed_product<O>(
            {of_input + pass.d_stride, kPlanes * pass.d_stride, hidden, &state.x_right[0], sum, !first_chunk},
            depth, rank, ranks, left);
      } else if (t.grad_weight_ih) {
        add(of_input, pass.d_stride, hidden, state.x_right[p], sum);
      }
      if (t.grad_weight_hh) {
        add(d_rows + cell.recurrent_grad[g] * pass.hidden_stride, pass.d_stride, hidden,
            g < cell.first_gates ? state.h_right[p] : state.operand_right[p],
            state.weight_hh_sum[p] + g * hidden * width);
      }
    }
    if (t.grad_weight_hr) {
      add(state.d_output + k * kPlanes * pass.width_stride, pass.width_stride, width, state.operand_right[p],
          state.weight_hr_sum[p]);
    }
  }

  void deal_rows(Panels<O>& right, const S* const* rows, int64_t stride, int64_t depth) {
    for (int64_t j = rank; j < right.blocks.count(); j += ranks) {
      pack_rows<O>(rows, right.blocks.begin(j) * stride, stride, right.blocks.size(j), depth,
                   right.vectors(j), right.at(j));
    }
  }

  // Rows of the operand in the order of RowsOf.
  void deal_operand(Panels<O>& right, int64_t k, int64_t depth, int p) {
    const O* rows[kChunkDepth];
    const int64_t count = (p + 1) * depth;
    for (int64_t i = 0; i < count && right.blocks.n; ++i) {
      const int64_t row = p == 0 ? (k + i) * kPlanes : k * kPlanes + (i ^ 1);
      rows[i] = state.operand + row * pass.hidden_stride;
    }
    for (int64_t j = rank; j < right.blocks.count(); j += ranks) {
      pack_rows<O>(rows, right.blocks.begin(j), 1, right.blocks.size(j), count, right.vectors(j),
                   right.at(j));
    }
  }
};

}  // namespace fastseq::FASTSEQ_ISA
