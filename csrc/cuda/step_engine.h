// What a block does in a step besides the cell: the exchange of operands, the product, the sums. It knows no cell.
//
// kCluster  The group is a thread-block cluster. gather: the operand lies whole in each block's shared memory, twice;
//           a block writes its own part in all of them. scatter: a block multiplies its own part of the operand and
//           writes the parts of sums into their owners' shared memory, twice. Both as messages, whose bytes the
//           receiver counts: a barrier of the cluster would also wait for every store to global memory.
// kGrid     The group is any blocks that run at the same time. The operand lies in global memory, twice; a block
//           writes its part there, sets its flag, waits for the flags of the others, and copies the operand,
//           chunk by chunk, into shared memory.
//
// Why that is enough. Let i count the exchanges of one product; in the forward pass 0 is the product of the initial
// state, which needs none. Exchange i writes half i % 2 of the buffer, of which a block has a part: put() writes it
// before the exchange (in its own copy, or in global memory), messages write it in the other blocks' copies. All of it
// has been cleared: by the launch, or by the blocks of the cluster before start().
//   gather    The half was last read by the multiplication after exchange i - 2, in each block ended by a block
//             barrier. Only after it does the block tell the others (sends, or sets its flag) of the exchange that
//             comes next: i - 1 of this product, or of two products the other one's in between. And a block writes
//             for i, by put() or message, after it has received that exchange from all of them.
//   scatter   The half of the sums was last read by sum() after exchange i - 2, before the block barrier that begins
//             the next exchange. After that barrier the block sends, and writes its own part of the sums; for i it
//             does so after it has received that exchange from all others. The operand is single, for it is nobody
//             else's: put() writes it after the block barrier that ends its multiplication.
//   arrivals  A message of i may come before the receiver expects it, but not before its phase of i - 2 has ended:
//             its sender has received the exchange before i, which the receiver sent after that.
//   exit      A block exits when it has received all messages that are sent to it. Its own need it no longer, and their
//             receivers are there until they have them.
#pragma once

#include "../fastseq.h"
#include "plan.h"
#include "product.h"

namespace fastseq::FASTSEQ_ISA {

struct LoopKernelArgs {
  RecurrentLoopArgs loop;
  LoopLayout layout;
  int64_t first_group;  // of this launch
};

// How a kernel is built: in_registers(p) units of a warp's weights in registers, kStreams if some may be in global
// memory.
template <class Math, LoopKernelKind kKind, Exchange kExchange, bool kBackwardPass, int kProductsOfStep,
          int kColumnTiles>
struct KernelTraits {
  using M = Math;
  static constexpr int kColumns = kColumnTiles, kProducts = kProductsOfStep;
  static constexpr bool kBackward = kBackwardPass, kStreams = may_stream(kKind);
  static constexpr bool kCluster = kKind == LoopKernelKind::kCluster, kScatter = kExchange == Exchange::kSums;
  static_assert(!kScatter || (kCluster && kBackward));
  static constexpr int in_registers(int p) {
    return register_units(M::kTensor, kProducts, kColumns, kKind, kExchange, kBackward, p);
  }
  static constexpr int kRows = kColumns * M::kRows;  // of a batch tile
};

template <class Traits>
class StepEngine {
  using M = typename Traits::M;
  using Element = typename M::Element;
  using Storage = typename M::Storage;
  using Scalar = typename M::Scalar;
  static constexpr bool kCluster = Traits::kCluster, kScatter = Traits::kScatter;

 public:
  static constexpr int kRows = Traits::kRows;

  const LoopKernelArgs& args;
  const int64_t group;  // of the whole grid of groups
  const int rank, direction;
  const int64_t first_row;  // of the batch tile

  FS_DEVICE explicit StepEngine(const LoopKernelArgs& a)
      : args(a),
        group(a.first_group + block_index() / a.layout.blocks),
        rank(block_index() % a.layout.blocks),
        direction(int(group % a.loop.directions)),
        first_row(group / a.loop.directions * kRows) {
    FS_UNROLL
    for (int p = 0; p < Traits::kProducts; ++p) {
      if constexpr (kCluster && !kScatter) senders_[p] = sender_of(product_layout(p));
      // ceil(2^32 / out_units): the high half of m times it is m / out_units, exactly while m * out_units < 2^32.
      if constexpr (kScatter) inverse_[p] = uint32_t(0xffffffffu / product_layout(p).out_units + 1);
    }
    if (kCluster && thread_index() == 0) {
      for (int i = 0; i < Traits::kProducts * 2; ++i) arrivals_begin(arrivals(0, 0) + i);
    }
    load_product<0>();
    if constexpr (Traits::kProducts == 2) load_product<1>();
  }

  FS_DEVICE const ProductLayout& product_layout(int p) const { return args.layout.product[p]; }
  FS_DEVICE const LoopDirection& tensors() const { return args.loop.direction[direction]; }
  template <class T>
  FS_DEVICE T* shared(int at) const {
    return reinterpret_cast<T*>(shared_memory() + at);
  }

  // Ends the preparations: the other blocks' memory may be written, and this one's be read by all its threads.
  FS_DEVICE void start() {
    if (kCluster && args.layout.blocks > 1) {
      cluster_arrive();
      cluster_wait();
    } else {
      sync_block();
    }
  }

  // Writes an element of this block's part of the operand: of segment (gate) `segment`, own unit u, row n.
  FS_DEVICE void put(int p, int parity, int segment, int u, int n, Scalar value) {
    const ProductLayout& layout = product_layout(p);
    Element* const to = operand(layout, parity);
    to[M::index(n, own_k(layout, segment) + u, layout.line_stride)] = M::element(value);
  }

  // The first product, whose operand is `initial`, [batch, width] in global memory or null: zeros.
  FS_DEVICE void multiply_initial(const Storage* initial, int width) {
    const ProductLayout& layout = product_layout(0);
    multiply<0>(0, [&](int, int chunk) {
      const int64_t k0 = int64_t(chunk) * layout.chunk_pairs * layout.warps_k * M::kPair;
      const int64_t k = kCluster ? width : int64_t(layout.chunk_pairs) * layout.warps_k * M::kPair;
      Element* const to = kCluster ? operand(layout, 0) : shared<Element>(layout.operand_at);
      sync_block();
      for (int64_t i = thread_index(); i < kRows * k; i += thread_count()) {
        const int n = int(i / k);
        const int64_t at = k0 + i % k, row = first_row + n;
        const bool there = initial && at < width && row < args.loop.shape.batch;
        const Scalar value = there ? Scalar(widen(initial[row * width + at])) : Scalar(0);
        to[M::index(n, i % k, layout.chunk_line_stride)] = M::element(value);
      }
      sync_block();
      return static_cast<const Element*>(to);
    });
    sync_block();
  }

  // Exchanges operand p, as all threads of all blocks have put it, and multiplies. between() runs while the blocks
  // wait for each other. Afterwards sum() gives the results.
  template <int p, class Between>
  FS_DEVICE void transfer(int parity, Between between) {
    const ProductLayout& layout = product_layout(p);
    if constexpr (kScatter) {
      sync_block();
      multiply<p>(parity, [&](int, int) { return static_cast<const Element*>(operand(layout, parity)); });
      receive<p>(parity, layout.warps_k * kRows * layout.out_units * int(sizeof(Scalar)), between);
      sync_block();
    } else if constexpr (kCluster) {
      sync_block();
      push<p>(layout, parity);
      receive<p>(parity, own_vectors(layout) * 16, between);
      multiply<p>(parity, [&](int, int) { return static_cast<const Element*>(operand(layout, parity)); });
      sync_block();
    } else {
      sync_block();
      ++exchanges_;
      if (thread_index() < kFlagCopies) set_flag(flag(thread_index(), block_index()), exchanges_);
      between();
      const int* const flags = flag(block_index() % kFlagCopies, block_index() - rank);
      for (int i = thread_index(); i < args.layout.blocks; i += thread_count())
        wait_flag(flags + i, exchanges_);
      sync_block();
      multiply<p>(parity, [&](int pass, int chunk) { return acquire(layout, parity, pass, chunk); });
      sync_block();
    }
  }

  // Results m, m + stride, ... (gate * out_units + unit, or own unit if scatter) of row n, of the last exchange with
  // this parity. The gates' sums do not wait for each other.
  template <int kCount>
  FS_DEVICE void sum(int p, int parity, int m, int stride, int n, Scalar (&total)[kCount]) const {
    const ProductLayout& layout = product_layout(p);
    const Scalar* from = sums(layout, parity) + sum_index(layout, 0, m, n);
    FS_UNROLL
    for (int g = 0; g < kCount; ++g) total[g] = from[2 * g * stride];
    for (int slot = 1; slot < layout.slots; ++slot) {
      from += kRows * layout.sum_stride;
      FS_UNROLL
      for (int g = 0; g < kCount; ++g) total[g] += from[2 * g * stride];
    }
  }
  FS_DEVICE Scalar sum(int p, int parity, int m, int n) const {
    Scalar total[1];
    sum(p, parity, m, 0, n, total);
    return total[0];
  }

 private:
  template <int p>
  FS_DEVICE auto& product() {
    if constexpr (p == 0) {
      return first_;
    } else {
      return second_;
    }
  }

  template <int p>
  FS_DEVICE void load_product() {
    const ProductLayout& layout = product_layout(p);
    const unsigned char* const tiles =
        workspace() + layout.tiles_at + (int64_t(direction) * args.layout.blocks + rank) * layout.tiles_bytes;
    product<p>().load_weights(layout, reinterpret_cast<const Vector16*>(tiles),
                              shared<Vector16>(layout.weights_at));
    if constexpr (kCluster) {
      const int64_t vectors = operand_elements(layout) * (kScatter ? 1 : 2) / M::kVector;
      auto* const memory = shared<Vector16>(layout.operand_at);
      for (int64_t i = thread_index(); i < vectors; i += thread_count()) memory[i] = Vector16{};
    }
  }

  FS_DEVICE unsigned char* workspace() const { return static_cast<unsigned char*>(args.loop.workspace); }

  FS_DEVICE static int64_t operand_elements(const ProductLayout& layout) {
    return int64_t(M::lines_of(kRows)) * layout.line_stride * M::kVector;
  }
  FS_DEVICE Element* operand(const ProductLayout& layout, int parity) const {
    if constexpr (kScatter) {
      return shared<Element>(layout.operand_at);
    } else if constexpr (kCluster) {
      return shared<Element>(layout.operand_at) + parity * operand_elements(layout);
    } else {
      return reinterpret_cast<Element*>(workspace() + layout.images_at +
                                        ((group - args.first_group) * 2 + parity) * layout.image_bytes);
    }
  }
  FS_DEVICE int own_k(const ProductLayout& layout, int segment) const {
    return kScatter ? segment * layout.in_units : (segment * args.layout.blocks + rank) * layout.in_units;
  }
  // [slot][n / 2][m][n % 2]
  FS_DEVICE static int sum_index(const ProductLayout& layout, int slot, int m, int n) {
    return ((slot * (kRows / 2) + n / 2) * layout.sum_stride + m) * 2 + n % 2;
  }
  FS_DEVICE Scalar* sums(const ProductLayout& layout, int parity) const {
    return shared<Scalar>(layout.sums_at) +
           (kScatter ? parity * layout.slots * kRows * layout.sum_stride : 0);
  }

  // In a copy, of a block of this launch. Of 32 bits and of few numbers that are kept, for the weights need registers.
  FS_DEVICE int* flag(int copy, int block) const {
    const uint32_t before = uint32_t(args.first_group) * uint32_t(args.layout.blocks);
    const uint32_t at = uint32_t(copy) * uint32_t(args.layout.flags_of_copy) + before + uint32_t(block);
    return reinterpret_cast<int*>(workspace() + args.layout.flags_at) + at;
  }

  FS_DEVICE Arrivals* arrivals(int p, int parity) const {
    return shared<Arrivals>(args.layout.arrivals_at) + p * 2 + parity;
  }

  // Waits for as many bytes from each other block; between() runs meanwhile.
  template <int p, class Between>
  FS_DEVICE void receive(int parity, int bytes, Between between) {
    const int others = args.layout.blocks - 1;
    if (others > 0 && thread_index() == 0) arrivals_expect(arrivals(p, parity), others * bytes);
    between();
    if (others > 0) arrivals_wait(arrivals(p, parity), phases_ >> (p * 2 + parity) & 1);
    sync_warp();
    phases_ ^= 1 << (p * 2 + parity);
  }

  // A thread's turn in push(): the same 16 bytes for every block that is its turn. Found once, by divisions that a
  // step should not wait for.
  struct Sender {
    uint32_t turn;  // vector, turn and turns, of 10 bits each; turn == turns: none
    int at;
  };
  FS_DEVICE Sender sender_of(const ProductLayout& layout) const {
    const int vectors = own_vectors(layout);
    const int turns = vectors < thread_count() ? thread_count() / vectors : 1;
    const int turn = turns > 1 ? thread_index() / vectors : 0;
    const int vector = thread_index() - turn * vectors;
    const uint32_t packed =
        uint32_t(turns) << 20 | uint32_t(turn < turns ? turn : turns) << 10 | uint32_t(vector);
    return {packed, own_vector(layout, vector)};
  }

  // Own part of the operand into the other blocks' shared memory. Blocks begin with different ones, so that they do
  // not all write to one at the same time.
  template <int p>
  FS_DEVICE void push(const ProductLayout& layout, int parity) {
    const Sender& sender = p == 0 ? senders_[0] : senders_[Traits::kProducts - 1];
    const uint32_t packed = as_new(sender.turn);
    const int first = int(packed & 0x3ff), turn = int(packed >> 10 & 0x3ff), turns = int(packed >> 20);
    if (turn == turns) return;
    const int vectors = own_vectors(layout), others = args.layout.blocks - 1;
    int at = sender.at;
    for (int v = first; v < vectors; v += thread_count()) {
      if (v != first) at = own_vector(layout, v);
      Vector16* const own = reinterpret_cast<Vector16*>(operand(layout, parity)) + at;
      const Vector16 value = *own;
      for (int i = turn; i < others; i += turns) {
        const int to = rank + 1 + i;
        send(own, value, arrivals(p, parity), to < args.layout.blocks ? to : to - args.layout.blocks);
      }
    }
  }
  FS_DEVICE static int own_vectors(const ProductLayout& layout) {
    return layout.segments * M::lines_of(kRows) * int(M::vectors_of(layout.in_units));
  }
  FS_DEVICE int own_vector(const ProductLayout& layout, int v) const {
    const int lines = M::lines_of(kRows), per_line = int(M::vectors_of(layout.in_units));
    const int line = v / per_line % lines, segment = v / (per_line * lines);
    return line * layout.line_stride + int(M::vectors_of(own_k(layout, segment))) + v % per_line;
  }

  // The chunk of the operand in shared memory. Where there are several, one is on its way while another is used.
  FS_DEVICE const Element* acquire(const ProductLayout& layout, int parity, int pass, int chunk) {
    if (layout.chunks == 1) {
      if (pass == 0) {
        fetch(layout, parity, 0, 0);
        copy_async_wait<0>();
        sync_block();
      }
      return stage(layout, 0);
    }
    const int turn = pass * layout.chunks + chunk;
    if (turn == 0) fetch(layout, parity, 0, 0);
    sync_block();  // the other stage is free
    if (turn + 1 < layout.passes * layout.chunks) {
      fetch(layout, parity, (turn + 1) % layout.chunks, (turn + 1) % 2);
      copy_async_wait<1>();
    } else {
      copy_async_wait<0>();
    }
    sync_block();
    return stage(layout, turn % 2);
  }
  FS_DEVICE Element* stage(const ProductLayout& layout, int i) const {
    return shared<Element>(layout.operand_at) +
           i * M::lines_of(kRows) * layout.chunk_line_stride * M::kVector;
  }
  FS_DEVICE void fetch(const ProductLayout& layout, int parity, int chunk, int to) {
    const int lines = M::lines_of(kRows), first = chunk * layout.chunk_pairs, left = layout.pairs - first;
    const int pairs = (left < layout.chunk_pairs ? left : layout.chunk_pairs) * layout.warps_k;
    const int per_line = int(M::vectors_of(int64_t(pairs) * M::kPair));
    const Vector16* const from = reinterpret_cast<const Vector16*>(operand(layout, parity)) +
                                 M::vectors_of(int64_t(first) * layout.warps_k * M::kPair);
    Vector16* const memory = reinterpret_cast<Vector16*>(stage(layout, to));
    for (int i = thread_index(); i < lines * per_line; i += thread_count()) {
      const int line = i / per_line, v = i % per_line;
      copy_async(memory + line * layout.chunk_line_stride + v, from + int64_t(line) * layout.line_stride + v);
    }
    copy_async_commit();
  }

  template <int p, class Acquire>
  FS_DEVICE void multiply(int parity, Acquire acquire) {
    const ProductLayout& layout = product_layout(p);
    Scalar* const own = sums(layout, parity);
    product<p>().run(layout, acquire, [&](int slot, int m, int n, Two<Scalar> two) {
      if constexpr (kScatter) {
        const int owner = int(uint64_t(uint32_t(m)) * inverse_[p] >> 32), u = m - owner * layout.out_units;
        if (owner >= args.layout.blocks) return;  // tiles end at multiples of 16
        auto* const to =
            reinterpret_cast<Two<Scalar>*>(own + sum_index(layout, rank * layout.warps_k + slot, u, n));
        if (owner == rank) {
          *to = two;
        } else {
          send(to, two, arrivals(p, parity), owner);
        }
      } else {
        *reinterpret_cast<Two<Scalar>*>(own + sum_index(layout, slot, m, n)) = two;
      }
    });
  }

  template <int p>
  using ProductOfStep = Product<M, Traits::kColumns, Traits::in_registers(p), Traits::kStreams>;
  struct None {};
  ProductOfStep<0> first_;
  std::conditional_t<Traits::kProducts == 2, ProductOfStep<1>, None> second_;
  Sender senders_[Traits::kProducts];
  uint32_t inverse_[Traits::kProducts];
  int exchanges_ = 0;    // grid: so far
  uint32_t phases_ = 0;  // cluster: a bit of each Arrivals
};

}  // namespace fastseq::FASTSEQ_ISA
