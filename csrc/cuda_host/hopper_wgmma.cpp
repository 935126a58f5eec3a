// Products of a warpgroup, warp by warp: each has 16 of the 64 rows, all of B, and a queue of what it has issued. They
// are done together, when the first warp waits for them and the last one has issued them.
#include <algorithm>

#include "hopper.h"

namespace fastseq::FASTSEQ_ISA {
namespace {

constexpr int kRows = 16, kDepth = 16;

struct Lane {
  const WgmmaCall* call;
  float* d;
  const uint32_t* a;
};

// ---- operands in shared memory ----

float number(uint16_t bits, bool is_bfloat16) {
  return is_bfloat16 ? widen(bfloat16{bits}) : widen(float16{bits});
}

// The operand that a descriptor tells: the rule is that of portable_hopper.h, from its bits.
class Descriptor {
 public:
  Descriptor(uint64_t bits, Major major, bool is_bfloat16)
      : major_(major),
        is_bfloat16_(is_bfloat16),
        start_(uint32_t(bits & 0x3fff) << 4),
        leading_(uint32_t(bits >> 16 & 0x3fff) << 4),
        stride_(uint32_t(bits >> 32 & 0x3fff) << 4) {
    if (bits >> 62 != 1 || (bits >> 49 & 7) != 0 || (start_ >> 7 & 7) != 0) {
      fail("wgmma is given a descriptor that the twin does not know\n" + place(current()) +
           "\naccepted is the 128-byte swizzle whose pattern begins at a multiple of 1024, base offset 0");
    }
  }

  // Elements (first + i, k) for `count` of i and 16 of k, to to[i * step + k * step_k].
  void read(int first, int count, float* to, int step, int step_k) const {
    if (major_ == Major::k) {
      for (int i = 0; i < count; ++i) {
        for (int k = 0; k < kDepth; k += 8) read_chunk(first + i, k, to + i * step + k * step_k, step_k);
      }
    } else {
      for (int k = 0; k < kDepth; ++k) {
        for (int i = 0; i < count; i += 8) read_chunk(first + i, k, to + i * step + k * step_k, step);
      }
    }
  }

 private:
  // Element (mn, k) and the seven that follow it, in the 16 bytes that the swizzle leaves together.
  void read_chunk(int mn, int k, float* to, int step) const {
    const uint32_t plain =
        start_ + (major_ == Major::k ? mn % 8 * 128 + mn / 8 * stride_ + k * 2
                                     : mn % 64 * 2 + mn / 64 * leading_ + k % 8 * 128 + k / 8 * stride_);
    const uint32_t address = (plain ^ (plain >> 7 & 7) << 4) & 0x3ffff;
    const int64_t offset = int64_t(address) - shared_address(who->shared);
    if (offset < 0 || offset + 16 > int64_t(machine.shape.shared_bytes)) {
      fail("wgmma reads what is not the block's own shared memory\n" + place(current()) + ": byte " +
           std::to_string(offset) + " of " + std::to_string(machine.shape.shared_bytes));
    }
    uint16_t elements[8];
    read_asynchronously(elements, who->shared + offset, 16);
    for (int i = 0; i < 8; ++i) to[i * step] = number(elements[i], is_bfloat16_);
  }

  Major major_;
  bool is_bfloat16_;
  uint32_t start_, leading_, stride_;
};

void read_a(Product& product) {
  const WgmmaCall& call = product.call;
  product.a.resize(kRows * kDepth);
  Descriptor(call.a, call.major_a, call.is_bfloat16)
      .read(product.first_row, kRows, product.a.data(), kDepth, 1);
}

void read_b(Product& product) {
  const WgmmaCall& call = product.call;
  product.b.resize(kDepth * call.n);
  Descriptor(call.b, call.major_b, call.is_bfloat16).read(0, call.n, product.b.data(), 1, call.n);
}

void read_registers(Product& product, void* const* operand) {
  product.a.resize(kRows * kDepth);
  for (int l = 0; l < kWarp; ++l) {
    const uint32_t* const a = static_cast<const Lane*>(operand[l])->a;
    for (int i = 0; i < 4; ++i) {
      float* const to = &product.a[(l / 4 + i % 2 * 8) * kDepth + l % 4 * 2 + i / 2 * 8];
      to[0] = number(uint16_t(a[i]), product.call.is_bfloat16);
      to[1] = number(uint16_t(a[i] >> 16), product.call.is_bfloat16);
    }
  }
}

// ---- accumulators ----

const uint32_t kNothing = 0xffffffff;  // what they hold while products are under way, a NaN

size_t place_of(int lane, int i, int n) {
  return size_t(row_of_accumulator(lane, i)) * n + column_of_accumulator(lane, i);
}

bool untouched(const float* d, int count) {
  return std::all_of(d, d + count, [](const float& x) { return std::memcmp(&x, &kNothing, 4) == 0; });
}

[[noreturn]] void fail_touched(int lane) {
  fail("accumulators were written between wgmma and its wait\n" + place(current().warp->thread[lane]));
}

// Those that the lanes hand in: still under way, or read from their registers now.
size_t accumulators_of(WarpState& warp, void* const* operand, const WgmmaCall& call) {
  auto& all = warp.accumulators;
  const auto own = [&](const auto& x) { return x->of_lane[0] == static_cast<Lane*>(operand[0])->d; };
  size_t index = std::find_if(all.begin(), all.end(), own) - all.begin();
  const int count = call.n / 2;
  const auto is_whole = [&](const Accumulators& x) {
    if (x.n != call.n) return false;
    for (int l = 0; l < kWarp; ++l) {
      if (x.of_lane[l] != static_cast<Lane*>(operand[l])->d || !untouched(x.of_lane[l], count)) return false;
    }
    return true;
  };
  if (index < all.size() && all[index]->pending > 0 && !is_whole(*all[index])) fail_touched(0);
  if (index < all.size() && is_whole(*all[index])) return index;
  // New ones, in the place of some that have been used, or old ones whose result nobody wanted.
  const auto free = [](const auto& x) {
    return std::all_of(x->of_lane, x->of_lane + kWarp, [](const float* d) { return !d; });
  };
  if (index == all.size()) index = std::find_if(all.begin(), all.end(), free) - all.begin();
  if (index == all.size()) all.push_back(std::make_unique<Accumulators>());
  Accumulators& x = *all[index];
  x.n = call.n, x.pending = 0, x.d.resize(size_t(kRows) * call.n);
  for (int l = 0; l < kWarp; ++l) {
    x.of_lane[l] = static_cast<Lane*>(operand[l])->d;
    for (int i = 0; i < count; ++i) x.d[place_of(l, i, call.n)] = x.of_lane[l][i];
    std::memset(x.of_lane[l], 0xff, count * sizeof(float));
  }
  return index;
}

// ---- what lanes meet for ----

void issue(void* const* operand) {
  const WgmmaCall call = *static_cast<Lane*>(operand[0])->call;
  check_group_call({Wait::wgmma, 0, call});
  for (int l = 1; l < kWarp; ++l) {
    const WgmmaCall& other = *static_cast<Lane*>(operand[l])->call;
    if (other.n != call.n || other.a != call.a || other.b != call.b || other.add != call.add ||
        other.a_in_registers != call.a_in_registers) {
      fail("the lanes of a warp give wgmma different operands\n" + place(current()));
    }
  }
  WarpState& warp = warp_state();
  if (!warp.fenced) {
    fail("wgmma without wgmma_fence\n" + place(current()) +
         ": before the first one, and again after a wait of any kind");
  }
  const int first_row = current().warp->index % 4 * kRows;
  Product product{call, warp.group, first_row, accumulators_of(warp, operand, call), {}, {}};
  ++warp.accumulators[product.accumulators]->pending;
  // What is not the block's own memory shows at once, whenever the operand is read.
  if (call.a_in_registers) {
    read_registers(product, operand);
  } else {
    read_a(product);
    if (!coin()) product.a.clear();
  }
  read_b(product);
  if (!coin()) product.b.clear();
  warp.products.push_back(std::move(product));
}

void finish(WarpState& warp, Product& product) {
  if (product.a.empty()) read_a(product);
  if (product.b.empty()) read_b(product);
  Accumulators& to = *warp.accumulators[product.accumulators];
  const int n = to.n;
  float sum[256];
  for (int row = 0; row < kRows; ++row) {
    float* const d = &to.d[size_t(row) * n];
    for (int i = 0; i < n; ++i) sum[i] = product.call.add ? d[i] : 0;
    for (int k = 0; k < kDepth; ++k) {
      const float a = product.a[row * kDepth + k];
      const float* const b = &product.b[k * n];
      for (int i = 0; i < n; ++i) sum[i] += a * b[i];
    }
    std::copy(sum, sum + n, d);
  }
  --to.pending;
}

void begin_wait(void* const* operand) {
  check_group_call({Wait::wgmma_wait, *static_cast<int*>(operand[0]), {}});
  warp_state().fenced = false;
}

// The warpgroup that the current thread belongs to.
Warpgroup& warpgroup() { return hopper().warpgroups[current().warp->index / 4]; }
WarpState* warps_of_group() { return &hopper().warps[current().warp->index / 4 * 4]; }

void fence(void* const*) {
  check_group_call({Wait::wgmma_fence, 0, {}});
  warp_state().fenced = true;
}

void commit(void* const*) {
  check_group_call({Wait::wgmma_commit, 0, {}});
  ++warp_state().group;
  for (Thread* thread : warpgroup().waiting) set_ready(*thread);
  warpgroup().waiting.clear();
}

}  // namespace

void wgmma_issue(const WgmmaCall& call, float* d, const uint32_t* a) {
  Lane lane{&call, d, a};
  meet(Wait::wgmma, &lane, issue);
}
void wgmma_fence_all() { meet(Wait::wgmma_fence, nullptr, fence); }
void wgmma_commit() { meet(Wait::wgmma_commit, nullptr, commit); }
void wgmma_wait_for(int pending) {
  if (leaves_out(Wait::wgmma_wait)) return;
  meet(Wait::wgmma_wait, &pending, begin_wait);
  const int first_not_done = warp_state().group - pending;
  WarpState* const warps = warps_of_group();
  const auto has_not_issued = [=](const WarpState& warp) { return warp.group < first_not_done; };
  while (std::any_of(warps, warps + 4, has_not_issued)) {
    warpgroup().waiting.push_back(&current());
    set_waiting(current(), Wait::wgmma_others);
    give_way();
  }
  for (int w = 0; w < 4; ++w) {
    auto& products = warps[w].products;
    size_t done = 0;
    while (done < products.size() && products[done].group < first_not_done) {
      finish(warps[w], products[done++]);
    }
    products.erase(products.begin(), products.begin() + done);
  }
}

// Lane by lane, so that one that does not name them has nothing.
void wgmma_use(float* d, int count) {
  WarpState& warp = warp_state();
  const int lane = who->thread % kWarp;
  for (const auto& accumulators : warp.accumulators) {
    Accumulators& x = *accumulators;
    if (x.of_lane[lane] != d) continue;
    if (x.pending > 0) {
      fail("wgmma_wait names accumulators that it does not cover\n" + place(current()) + ": " +
           std::to_string(x.pending) + " products of them are under way");
    }
    if (count != x.n / 2 || !untouched(d, count)) fail_touched(lane);
    for (int i = 0; i < count; ++i) d[i] = x.d[place_of(lane, i, x.n)];
    x.of_lane[lane] = nullptr;
    return;
  }
}

}  // namespace fastseq::FASTSEQ_ISA
