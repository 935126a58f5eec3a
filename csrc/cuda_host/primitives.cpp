#include "primitives.h"

#include <launch.h>
#include <prim.h>

#include <stdexcept>

namespace fastseq::FASTSEQ_ISA {
namespace {

template <class T>
struct Mma {
  struct Args {
    const uint32_t *a, *b;
    float* d;
  };
  static constexpr int kThreads = kWarp;
  static FS_DEVICE void run(const Args& args) {
    const int lane = thread_index();
    Vector16 a;
    float d[4];
    for (int i = 0; i < 4; ++i) a.word[i] = args.a[4 * lane + i], d[i] = args.d[4 * lane + i];
    mma(d, a, args.b[2 * lane], args.b[2 * lane + 1], T{});
    for (int i = 0; i < 4; ++i) args.d[4 * lane + i] = d[i];
  }
};

struct MmaDouble {
  struct Args {
    const double *a, *b;
    double* d;
  };
  static constexpr int kThreads = kWarp;
  static FS_DEVICE void run(const Args& args) {
    const int lane = thread_index();
    double a[4], d[4];
    for (int i = 0; i < 4; ++i) a[i] = args.a[4 * lane + i], d[i] = args.d[4 * lane + i];
    mma(d, a, args.b[2 * lane], args.b[2 * lane + 1]);
    for (int i = 0; i < 4; ++i) args.d[4 * lane + i] = d[i];
  }
};

template <bool kTransposed>
struct LoadMatrices {
  struct Args {
    const uint32_t* rows;
    uint32_t* r;
  };
  static constexpr int kThreads = kWarp;
  static FS_DEVICE void run(const Args& args) {
    auto* const own = reinterpret_cast<uint32_t*>(shared_memory()) + 4 * thread_index();
    copy_async(own, args.rows + 4 * thread_index());
    copy_async_commit();
    copy_async_wait<0>();
    uint32_t r[4];
    if constexpr (kTransposed) {
      load_matrices_transposed(r, own);
    } else {
      load_matrices(r, own);
    }
    for (int i = 0; i < 4; ++i) args.r[4 * thread_index() + i] = r[i];
  }
};

struct CopyOrZero {
  struct Args {
    const unsigned char* from;
    unsigned char* to;
  };
  static constexpr int kThreads = kWarp;
  static FS_DEVICE void run(const Args& args) {
    unsigned char* const own = shared_memory() + 16 * thread_index();
    const int bytes = thread_index() % 17;
    copy_async_or_zero(own, bytes ? args.from + 16 * thread_index() : nullptr, bytes);
    copy_async_commit();
    copy_async_wait<0>();
    for (int i = 0; i < 16; ++i) args.to[16 * thread_index() + i] = own[i];
  }
};

// Each thread in turn is the one for which it is so, then none is; result [rounds][threads] of bits: in the warp, in
// the block.
struct Any {
  struct Args {
    int rounds;
    uint8_t* result;
  };
  static constexpr int kThreads = 3 * kWarp;
  static FS_DEVICE void run(const Args& args) {
    for (int round = 0; round < args.rounds; ++round) {
      const bool mine = round == thread_index();
      const bool in_warp = any_in_warp(mine), in_block = any_in_block(mine);
      args.result[round * kThreads + thread_index()] = uint8_t(in_warp | in_block << 1);
    }
  }
};

template <class T>
struct ShuffleXor {
  struct Args {
    int mask;
    const void* value;
    void* result;
  };
  static constexpr int kThreads = kWarp;
  static FS_DEVICE void run(const Args& args) {
    const T value = static_cast<const T*>(args.value)[thread_index()];
    static_cast<T*>(args.result)[thread_index()] = shuffle_xor(value, args.mask);
  }
};

template <class F, class From, class To>
struct Numbers {
  struct Args {
    int64_t count;
    const void* from;
    void* to;
  };
  static constexpr int kThreads = 128;
  static FS_DEVICE void run(const Args& args) {
    const int64_t step = int64_t(block_count()) * thread_count();
    for (int64_t i = int64_t(block_index()) * thread_count() + thread_index(); i < args.count; i += step) {
      static_cast<To*>(args.to)[i] = F::of(static_cast<const From*>(args.from)[i]);
    }
  }
};

struct Widen {
  template <class T>
  static float of(T x) {
    return widen(x);
  }
};
template <class T>
struct Narrow {
  static T of(float x) {
    T y;
    return narrow(x, y), y;
  }
};
struct RoundToTf32 {
  static float of(float x) { return round_to_tf32(x); }
};
struct Sigmoid {
  static float of(float x) { return sigmoid(x); }
};
struct Exp2 {
  static float of(float x) { return exp2(x); }
};
struct Tanh {
  static float of(float x) { return tanh(x); }
};
struct Relu {
  static float of(float x) { return relu(x); }
};

template <class F, class From, class To>
const char* numbers(int64_t count, const void* from, void* to) {
  return launch<Numbers<F, From, To>>({4, 128}, {count, from, to});
}

enum class Collective { sync_warp, shuffle, load, mma_bfloat16, mma_float16, mma_tf32, sync_block, cluster };

struct Repeat {
  struct Args {
    Collective what;
    int count;
  };
  static constexpr int kThreads = 1024;
  static FS_DEVICE void run(const Args& args) {
    const Vector16 a{{0x3f803f80, 0x3f803f80, 0x3f803f80, 0x3f803f80}};
    const uint32_t b = a.word[0];
    auto* const row = reinterpret_cast<Vector16*>(shared_memory()) + thread_index();
    *row = a;
    float d[4] = {};
    uint32_t r[4];
    sync_block();
    for (int i = 0; i < args.count; ++i) {
      switch (args.what) {
        case Collective::sync_warp:
          sync_warp();
          break;
        case Collective::shuffle:
          d[0] = shuffle_xor(d[0], 1);
          break;
        case Collective::load:
          load_matrices(r, row);
          break;
        case Collective::mma_bfloat16:
          mma(d, a, b, b, bfloat16{});
          break;
        case Collective::mma_float16:
          mma(d, a, b, b, float16{});
          break;
        case Collective::mma_tf32:
          mma(d, a, b, b, 0.0f);
          break;
        case Collective::sync_block:
          sync_block();
          break;
        case Collective::cluster:
          cluster_arrive();
          cluster_wait();
          break;
      }
    }
  }
};

struct Nothing {
  struct Args {};
  static constexpr int kThreads = 256;
  static FS_DEVICE void run(const Args&) {}
};

[[noreturn]] void unknown(const std::string& name) { throw std::invalid_argument("unknown: " + name); }

}  // namespace

const char* run_mma(const std::string& type, const uint32_t* a, const uint32_t* b, float* d) {
  if (type == "bfloat16") return launch<Mma<bfloat16>>({1, kWarp}, {a, b, d});
  if (type == "float16") return launch<Mma<float16>>({1, kWarp}, {a, b, d});
  if (type == "tf32") return launch<Mma<float>>({1, kWarp}, {a, b, d});
  unknown(type);
}

const char* run_mma_double(const double* a, const double* b, double* d) {
  return launch<MmaDouble>({1, kWarp}, {a, b, d});
}

const char* run_load_matrices(const uint32_t* rows, uint32_t* r, bool transposed) {
  if (transposed) return launch<LoadMatrices<true>>({1, kWarp, kWarp * 16}, {rows, r});
  return launch<LoadMatrices<false>>({1, kWarp, kWarp * 16}, {rows, r});
}

const char* run_copy_or_zero(const unsigned char* from, unsigned char* to) {
  return launch<CopyOrZero>({1, kWarp, kWarp * 16}, {from, to});
}

const char* run_any(int rounds, uint8_t* result) { return launch<Any>({1, Any::kThreads}, {rounds, result}); }

const char* run_shuffle_xor(int bytes, int mask, const void* value, void* result) {
  if (bytes == 4) return launch<ShuffleXor<float>>({1, kWarp}, {mask, value, result});
  return launch<ShuffleXor<double>>({1, kWarp}, {mask, value, result});
}

const char* run_numbers(const std::string& function, int64_t count, const void* from, void* to) {
  if (function == "widen_bfloat16") return numbers<Widen, bfloat16, float>(count, from, to);
  if (function == "widen_float16") return numbers<Widen, float16, float>(count, from, to);
  if (function == "narrow_bfloat16") return numbers<Narrow<bfloat16>, float, bfloat16>(count, from, to);
  if (function == "narrow_float16") return numbers<Narrow<float16>, float, float16>(count, from, to);
  if (function == "round_to_tf32") return numbers<RoundToTf32, float, float>(count, from, to);
  if (function == "sigmoid") return numbers<Sigmoid, float, float>(count, from, to);
  if (function == "exp2") return numbers<Exp2, float, float>(count, from, to);
  if (function == "tanh") return numbers<Tanh, float, float>(count, from, to);
  if (function == "relu") return numbers<Relu, float, float>(count, from, to);
  unknown(function);
}

const char* run_collective(const std::string& name, int count, int64_t blocks, int threads, bool together) {
  constexpr const char* kNames[] = {"sync_warp",   "shuffle_xor", "load_matrices", "mma_bfloat16",
                                    "mma_float16", "mma_tf32",    "sync_block",    "cluster"};
  for (int i = 0; i < int(std::size(kNames)); ++i) {
    if (name != kNames[i]) continue;
    LaunchShape shape{blocks, threads, size_t(threads) * 16};
    if (name == "cluster") shape.cluster = int(blocks);
    shape.together = together;
    return launch<Repeat>(shape, {Collective(i), count});
  }
  unknown(name);
}

const char* run_nothing(int64_t blocks, int threads, size_t shared_bytes, int cluster, bool together) {
  return launch<Nothing>({blocks, threads, shared_bytes, cluster, together}, {});
}

}  // namespace fastseq::FASTSEQ_ISA
