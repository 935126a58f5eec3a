// Which engine this CPU gets, decided once by cpuid or by FASTSEQ_ISA.
#include <atomic>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "engine.h"
#include "team.h"

// FASTSEQ_ISA_LIST, from the build: X(portable) X(avx2) ..., slowest first.
#define X(name)                                                                 \
  namespace fastseq::name {                                                     \
  bool recurrent_forward(const RecurrentArgs&, const RecurrentPlan&);           \
  bool recurrent_backward(const RecurrentArgs&, const RecurrentPlan&);          \
  bool attention_forward(const AttentionArgs&, const AttentionPlan&);           \
  bool attention_backward(const AttentionArgs&, const AttentionPlan&);          \
  bool attention_dual_forward(const AttentionDualArgs&, const AttentionPlan&);  \
  bool attention_dual_backward(const AttentionDualArgs&, const AttentionPlan&); \
  double fma_peak(DType, double);                                               \
  }
FASTSEQ_ISA_LIST
#undef X

namespace fastseq {
namespace {

#define X(name)                   \
  {#name,                         \
   name::recurrent_forward,       \
   name::recurrent_backward,      \
   name::attention_forward,       \
   name::attention_backward,      \
   name::attention_dual_forward,  \
   name::attention_dual_backward, \
   name::fma_peak},
const Engine kEngines[] = {FASTSEQ_ISA_LIST};
#undef X

bool runs_here(const std::string& isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (isa == "avx2") return avx2;
  if (isa == "avx512") return avx512;
  if (isa == "avx512bf16") return avx512 && __builtin_cpu_supports("avx512bf16");
#endif
  return isa == "portable";
}

std::string names(bool available) {
  std::string all;
  for (const Engine& e : kEngines) {
    if (!available || runs_here(e.isa)) all += (all.empty() ? "" : ",") + std::string(e.isa);
  }
  return all;
}

const Engine& choose() {
  const char* const forced = std::getenv("FASTSEQ_ISA");
  const Engine* best = nullptr;
  for (const Engine& e : kEngines) {
    if (runs_here(e.isa) && (!forced || !*forced || std::string(forced) == e.isa)) best = &e;
  }
  if (!best) {
    throw std::runtime_error("FASTSEQ_ISA is \"" + std::string(forced) + "\".\nThis CPU and build accept: " +
                             names(true) + ".\nSet it to one of these, or unset it to use the best.");
  }
  return *best;
}

using Run = bool(const RecurrentArgs&, const RecurrentPlan&);

void run_planned(Run* run, const RecurrentArgs& a, bool backward) {
  RecurrentProblem problem{a.cell,
                           a.dtype,
                           available_threads(a.threads),
                           a.shape.steps,
                           a.shape.batch,
                           a.input_size,
                           a.hidden_size,
                           a.proj_size,
                           a.directions,
                           backward,
                           a.tangents && !(a.known && !backward) ? 2 : 1,
                           a.forced_plan};
  if (run(a, recurrent_plan(problem))) return;
  problem.threads = 1;
  run(a, recurrent_plan(problem));
}

using Attend = bool(const AttentionArgs&, const AttentionPlan&);

void attend_planned(Attend* attend, const AttentionArgs& a, bool backward) {
  if (a.batch == 0 || a.heads == 0) return;
  if (attend(a, attention_plan(a, available_threads(a.threads), backward))) return;
  attend(a, attention_plan(a, 1, backward));
}

template <class Attend>
void attend_planned(Attend* attend, const AttentionDualArgs& args, bool backward) {
  const AttentionArgs& a = args.primal;
  if (a.batch == 0 || a.heads == 0) return;
  if (attend(args, attention_plan(a, available_threads(a.threads), backward))) return;
  attend(args, attention_plan(a, 1, backward));
}

}  // namespace

const Engine& engine() {
  static const Engine& chosen = choose();
  return chosen;
}

const char* compiled_isas() {
  static const std::string all = names(false);
  return all.c_str();
}
const char* available_isas() {
  static const std::string all = names(true);
  return all.c_str();
}

void recurrent_forward(const RecurrentArgs& args) { run_planned(engine().recurrent_forward, args, false); }
void recurrent_backward(const RecurrentArgs& args) { run_planned(engine().recurrent_backward, args, true); }
void attention_forward(const AttentionArgs& args) { attend_planned(engine().attention_forward, args, false); }
void attention_backward(const AttentionArgs& args) {
  attend_planned(engine().attention_backward, args, true);
}

void attention_dual_forward(const AttentionDualArgs& args) {
  attend_planned(engine().attention_dual_forward, args, false);
}
void attention_dual_backward(const AttentionDualArgs& args) {
  attend_planned(engine().attention_dual_backward, args, true);
}

double fma_peak(DType dtype, int threads, double seconds) {
  struct Context {
    DType dtype;
    double seconds, rates[1024];
  } context{dtype, seconds, {}};
  const int n = available_threads(threads < 1024 ? threads : 1024);
  run_team(
      n,
      [](void* c, int thread) {
        Context& at = *static_cast<Context*>(c);
        at.rates[thread] = engine().fma_peak(at.dtype, at.seconds);
      },
      &context);
  double sum = 0;
  for (int i = 0; i < n; ++i) sum += context.rates[i];
  return sum;
}

}  // namespace fastseq
