#!/bin/sh
# Runs the compiler, and fails where ptxas says that a kernel loses what it was written for: products of warpgroups
# (wgmma) that wait for one another, or registers (setmaxnreg) that are not handed over. ptxas calls this information,
# which -Werror lets pass.
printed=$("$@" 2>&1)
status=$?
[ -z "$printed" ] || printf '%s\n' "$printed"
case $status$printed in
0*'Potential Performance Loss'*) echo "error: see 'Potential Performance Loss' above" && exit 1 ;;
esac
exit $status
