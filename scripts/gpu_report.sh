#!/usr/bin/env bash
# Everything there is to know from a machine with a GPU, in one go and under nine minutes, without a network.
#
#   scripts/gpu_report.sh [OUTDIR [STAGE...]]     default: out/gpu-report, and the stages of recurrent
#
# Recurrent networks and attention fill nine minutes each, so the whole is two calls:
#
#   scripts/gpu_report.sh out/recurrent
#   scripts/gpu_report.sh out/attention attention
#
# A name of stages, recurrent or attention, stands for all of its stages; others are `build attention-grid`, say.
#
# Python 3.10 to 3.13 with torch >= 2.6, setuptools, pybind11, pytest, hypothesis and matplotlib, and cmake, ninja
# and nvcc are taken as they are installed; PYTHON names another interpreter than python3. Nothing is written outside
# the checkout and OUTDIR, and no setting of the GPU is touched.
#
# The stages, most valuable first, given what each needs of the one before:
#   build     the compiled module, in place; registers and spills of the kernels go to registers.txt
# of recurrent
#   smoke     small cases of every cell and dtype against float64: half a minute that tells a broken build
#   gpu       what only a GPU can show, in one process, since a fast kernel that is wrong is worth nothing
#   grid      fastseq against torch.nn on cuDNN, goals first, see benchmarks/gpu_run.py; most of the time is its
#   compile   torch.compile beside the kernels as they come; compiling takes long
#   ladder    the kernels' tests, which the host twin passes, on the GPU: as many as there is time for
#   suite     the tests that need none, the host twin's among them: other machines can run those too, and
#             beside the grid they would take the CPU from whoever launches the kernels
#   memcheck, racecheck     compute-sanitizer on a few small cases: the slowest per line, and seldom news
# of attention
#   attention-primitives  what the kernels for Hopper GPUs are made of: where one of these is wrong, all of them are
#   attention-smoke       small cases of every dtype, head size and option against float64
#   attention-gpu         the tests of attention on the GPU, see scripts/gpu_tests.sh
#   attention-hopper      those of the kernels for Hopper GPUs, after the others, since these are likeliest to hang
#   attention-grid        fastseq against each backend of torch's, goals first, see benchmarks/gpu_attention_run.py
#   attention-memcheck    compute-sanitizer on a few small cases
# of neither
#   derivatives  second derivatives and forward mode of recurrent networks, against a loop of torch's operations
#
# Each stage has a share of the time, in seconds; together the stages of a call have 526. What those that are not
# called would have had goes to the grids; if more are called than there is time for, all but the build have less.
# So each has a mark on the clock by which it ends or is ended; what a stage does not use, the next ones have. A
# stage that fails does not stop those after it. The exit status is 0 if all went well. compile, ladder, suite,
# attention-gpu and attention-hopper may have more tests than time, which is no failure; the summary tells how many of
# how many ran. Nor is it one if compute-sanitizer has too little time, or does not support the device.
#
# OUTDIR gets log.txt (everything printed; tail -f it to watch), registers.txt, results.json and attention.json
# (written after every case of a grid) and the figures. The last lines on stdout are the summary.
set -u

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
root=$PWD
mkdir -p "${1:-out/gpu-report}" || exit 1
out=$(cd "${1:-out/gpu-report}" && pwd) || exit 1
shift $(($# > 0))
limit=526
order=(build smoke gpu grid compile ladder suite memcheck racecheck
  attention-primitives attention-smoke attention-gpu attention-hopper attention-grid attention-memcheck derivatives)
declare -A share=([build]=140 [smoke]=25 [gpu]=55 [grid]=205 [compile]=23 [ladder]=20 [suite]=22 [memcheck]=18
  [racecheck]=18 [attention-primitives]=20 [attention-smoke]=30 [attention-gpu]=40 [attention-hopper]=25
  [attention-grid]=239 [attention-memcheck]=32 [derivatives]=60)
named=" ${*:-recurrent} "
named=${named/ recurrent / build smoke gpu grid compile ladder suite memcheck racecheck }
stages=${named/ attention / build attention-primitives attention-smoke attention-gpu attention-hopper attention-grid \
attention-memcheck }
log=$out/log.txt
: >"$log" || exit 1

wanted() { [[ $stages == *" $1 "* ]]; }

# When each stage ends, from the start.
declare -A mark
total=0 grids=0 at=0
for name in "${order[@]}"; do
  wanted "$name" && total=$((total + ${share[$name]}))
  [[ $name == *grid ]] && wanted "$name" && grids=$((grids + 1))
done
built=0
wanted build && built=${share[build]}
for name in "${order[@]}"; do
  wanted "$name" || continue
  seconds=${share[$name]}
  if ((total > limit)) && [ "$name" != build ]; then
    seconds=$((seconds * (limit - built) / (total - built)))
  elif ((total < limit)) && [[ $name == *grid ]]; then
    seconds=$((seconds + (limit - total) / grids))
  fi
  at=$((at + seconds))
  mark[$name]=$at
done

# What an earlier call left of these stages would look like theirs.
wanted build && rm -f "$out"/registers.txt
wanted grid && rm -f "$out"/results.{json,partial} "$out"/{ratio,step}_{inference,training}.png
wanted attention-grid && rm -f "$out"/attention.{json,partial} "$out"/attention_{inference,training}.png

rows=() failures=0 status=0
SECONDS=0 # bash counts it up

say() { printf '%s\n' "$*" | tee -a "$log"; }

note() { rows+=("$(printf '%-18s %4d s  %s' "$1" "$3" "$2")"); }

# stage NAME COMMAND...: run it until its mark at the latest, log it, and keep its exit status in `status`.
stage() {
  local name=$1 started=$SECONDS result=ok lines tally=$work/$1.tally
  local left=$((mark[$name] - started))
  shift
  lines=$(wc -l <"$log")
  rm -f "$tally"
  if ((left < 5)); then
    say "== $name: no time is left"
    status=124 failures=$((failures + 1))
    note "$name" "no time was left" 0
    return
  fi
  say "== $name, for $left s at most, at $started s"
  timeout -k 5 "$left" "$@" </dev/null >>"$log" 2>&1
  status=$?
  if ((status == 124 || status == 137)); then
    result="cut after its $left s"
    # A stage that may be cut has not failed if some of its tests ran, and none of them failed.
    if [[ " compile ladder suite attention-gpu attention-hopper " == *" $name "* ]] &&
      grep -q '^[1-9].* 0 failed' "$tally" 2>/dev/null || [[ $name == *memcheck || $name == racecheck ]]; then
      status=0
    fi
  elif ((status)) && tail -n "+$((lines + 1))" "$log" | grep -q "Device not supported"; then
    result="compute-sanitizer does not support this device" status=0
  elif ((status)); then
    result="failed, status $status"
  fi
  if [ -s "$tally" ]; then
    result+=": $(<"$tally")"
    say "== $name $result"
  fi
  if ((status)); then
    failures=$((failures + 1))
    tail -n "+$((lines + 2))" "$log" | tail -n 25 | cut -c 1-200 # what is in the log already, so not by say
  fi
  note "$name" "$result" $((SECONDS - started))
}

versions() {
  "$python" - <<'END'
import importlib.metadata as metadata, platform, sys

print("python", platform.python_version(), sys.executable)
for name in ("torch", "setuptools", "pybind11", "numpy", "pytest", "pytest-xdist", "hypothesis", "matplotlib"):
    try:
        print(name, metadata.version(name))
    except metadata.PackageNotFoundError:
        print(name, "is not installed")
END
  local tool
  for tool in cmake ninja nvcc compute-sanitizer nvidia-smi; do
    command -v "$tool" || echo "$tool: not found"
  done
  nvcc --version | tail -n 2
  timeout 20 nvidia-smi
}

# An environment that has all the packages of the installed Python and, through one .pth file, the checkout: so
# child processes find fastseq too, and the installed Python is left as it is. That may itself be a virtual
# environment, whose packages --system-site-packages alone would not show.
environment() {
  local installed=${PYTHON:-python3} venv=$work/venv path
  path=$(command -v "$installed") || return 1
  PATH=$(dirname "$path"):$PATH # its cmake and ninja
  "$installed" -m venv --clear --without-pip "$venv" || return 1
  "$installed" - "$root" "$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" <<'END'
import pathlib, site, sys, sysconfig

root, target = sys.argv[1:]
folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()]
folders += [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
lines = [root] + [f"import site; site.addsitedir({folder!r})" for folder in dict.fromkeys(folders)]
pathlib.Path(target, "fastseq_checkout.pth").write_text("\n".join(lines) + "\n")
END
  [ -x "$venv/bin/python" ] && python=$venv/bin/python
}

work=$root/build/gpu-report
mkdir -p "$work"
export PYTHONUNBUFFERED=1 MPLCONFIGDIR=$work/matplotlib CUDA_CACHE_PATH=$work/cuda
export TORCHINDUCTOR_CACHE_DIR=$work/inductor TRITON_CACHE_DIR=$work/triton
python=${PYTHON:-python3}
if ! environment >>"$log" 2>&1; then
  say "no virtual environment could be made in $work; going on with $python and PYTHONPATH"
  export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
fi
versions >>"$log" 2>&1

if wanted build; then
  # Without pip: it may be missing, or refuse an environment that a system manages. egg_info tells the version.
  stage build env FASTSEQ_CUDA=on "$python" setup.py build_ext --inplace egg_info
  "$python" benchmarks/registers.py "$log" >"$out/registers.txt"
fi

if wanted smoke; then
  stage smoke "$python" benchmarks/gpu_run.py --smoke
fi

if wanted gpu; then
  # By name, so that the log ends with the test that hung or took the process down.
  stage gpu "$python" -m pytest -v --tb=short --tally "$work/gpu.tally" -m "gpu and not slow" tests/test_cuda_gpu.py
fi

# timed STAGE RUNNER FILE: a grid, and its figures where it did not come to them.
timed() {
  local name=$1 runner=$2 file=$3 again=
  # Status 75: a case hung or broke the GPU's context; a new process goes on with the others, if there is time.
  for ((attempt = 0; attempt < 12; attempt++)); do
    stage "$name" "$python" "$runner" --out "$out" --hang 8 --seconds $((mark[$name] - SECONDS)) $again
    ((status == 75 && mark[$name] - SECONDS > 30)) || break
    again=--resume
  done
  if ((status > 1)) && [ -s "$out/$file" ]; then
    timeout 20 "$python" "$runner" --from-results "$out" >>"$log" 2>&1
  fi
}

if wanted grid; then
  timed grid benchmarks/gpu_run.py results.json
fi

if wanted compile; then
  stage compile "$python" -m pytest -v --tb=short --tally "$work/compile.tally" -m "gpu and slow" tests/test_cuda_gpu.py
fi

if wanted ladder; then
  stage ladder "$python" -m pytest -q --tb=short --tally "$work/ladder.tally" -m "gpu and not slow" \
    --ignore=tests/test_cuda_gpu.py --ignore-glob="tests/test_*attention*"
fi

if wanted suite; then
  # Half as many processes as cores, with two threads each, which is what the tests of threads count on.
  workers=$((($(nproc) + 1) / 2)) parallel=()
  "$python" -c "import xdist" 2>>"$log" && parallel=(-n "$workers")
  stage suite env OMP_NUM_THREADS=2 "$python" -m pytest -q --tb=short --tally "$work/suite.tally" \
    -m "not slow and not gpu" "${parallel[@]}"
fi

for tool in memcheck racecheck; do
  if wanted "$tool"; then
    # Without torch's cache of memory, or a write past a tensor's end would meet another tensor's memory.
    stage "$tool" env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      "$python" benchmarks/gpu_run.py --smoke --case "(LSTM|GRU) training (float32|bfloat16) T4 B8"
  fi
done

if wanted attention-primitives; then
  stage attention-primitives "$python" -m pytest -v --tb=short --tally "$work/attention-primitives.tally" -m gpu \
    tests/test_cuda_hopper.py
fi

if wanted attention-smoke; then
  stage attention-smoke "$python" benchmarks/gpu_attention_run.py --smoke
fi

# apart STAGE FILE...: tests of which no file can spoil another's.
apart() {
  local name=$1
  shift # ends before the stage does, so that it can tell what ran
  stage "$name" env PYTHON="$python" scripts/gpu_tests.sh $((mark[$name] - SECONDS - 4)) "$work/$name.tally" "$@"
}

if wanted attention-gpu; then
  files=()
  for file in tests/test_cuda_attention*.py tests/test_attention*.py; do
    [[ $file == *hopper* ]] || files+=("$file")
  done
  apart attention-gpu "${files[@]}"
fi

if wanted attention-hopper; then
  apart attention-hopper tests/test_cuda_attention_hopper*.py
fi

if wanted attention-grid; then
  timed attention-grid benchmarks/gpu_attention_run.py attention.json
fi

if wanted attention-memcheck; then
  stage attention-memcheck env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck \
    --error-exitcode 9 "$python" benchmarks/gpu_attention_run.py --smoke \
    --case "(float32|bfloat16) .*(S200 D128|S1x300|S70x100)"
fi

if wanted derivatives; then
  stage derivatives "$python" benchmarks/derivatives.py --device cuda --seconds 1
fi

summary() {
  echo "== summary"
  [ -f "$out/registers.txt" ] && head -n 8 "$out/registers.txt" | cut -c 1-160
  echo
  # What each runner of a grid printed last between its two marks.
  awk '/^-- (attention )?grid$/ { on = $0; text[on] = ""; next } /^-- end of / { on = "" }
       on { text[on] = text[on] $0 "\n" } END { printf "%s%s", text["-- grid"], text["-- attention grid"] }' "$log"
  echo
  printf '%s\n' "${rows[@]}"
  echo "$failures failed, $SECONDS s, everything in $out"
}

summary >"$work/summary.txt"
tail -c 11000 "$work/summary.txt" | tee -a "$log"
((failures == 0))
