#!/usr/bin/env bash
# The GPU's tests of some files, each file in a process of its own: a kernel that hangs, or breaks the GPU's context,
# costs the rest of its file and no other.
#
#   scripts/gpu_tests.sh SECONDS TALLY FILE...
#
# Four at a time, since their references are made on the CPU; what each printed comes when all have ended, the latest
# after SECONDS. TALLY is told how many tests of how many ran. The exit status is 0 if all passed, 124 if some did not
# end and none failed, else 1. PYTHON names another interpreter than python3.
set -u
limit=$1 tally=$2
shift 2
at_once=4
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
SECONDS=0 # bash counts it up

# tests FILE: what is left of it in $work, under the file's name.
tests() {
  local left=$((limit - SECONDS)) to=$work/${1##*/}
  ((left > 0)) || left=1
  timeout -k 2 "$left" "${PYTHON:-python3}" -m pytest -v --tb=short --tally "$to.tally" -m gpu "$1" >"$to.log" 2>&1
  echo $? >"$to.status"
}

for file; do
  while (($(jobs -rp | wc -l) >= at_once)); do wait -n; done
  tests "$file" &
done
wait

failed=0 cut=0
for file; do
  cat "$work/${file##*/}.log"
  case $(<"$work/${file##*/}.status") in
    0 | 5) ;; # 5: none of its tests is for a GPU
    124 | 137) cut=1 && echo "$file: cut" ;;
    *) failed=1 ;;
  esac
done
cat "$work"/*.tally 2>/dev/null | awk '{ ran += $1; all += $3; failed += $6; skipped += $8 }
  END { printf "%d of %d tests ran, %d failed, %d skipped\n", ran, all, failed, skipped }' >"$tally"
((failed)) && exit 1
((cut)) && exit 124
exit 0
