"""Builds fastseq._C with CMake; everything static is in pyproject.toml.

Environment: FASTSEQ_CUDA=auto|on|off, FASTSEQ_SANITIZE=1, and what CMake reads itself (CXX, CXXFLAGS,
CMAKE_BUILD_PARALLEL_LEVEL, ...). Build directories stay, so that a second build compiles only what changed.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext):
        sanitize = os.environ.get("FASTSEQ_SANITIZE", "0") == "1"
        editable = self.editable_mode or self.inplace
        kind = ("editable" if editable else "wheel") + ("-asan" if sanitize else "")
        build = ROOT / "build" / f"{sys.implementation.cache_tag}-{kind}"

        # cmake and ninja from the environment that builds, also when it is not activated.
        path = sysconfig.get_path("scripts") + os.pathsep + os.environ.get("PATH", os.defpath)
        cmake, ninja = (shutil.which(tool, path=path) for tool in ("cmake", "ninja"))
        if not cmake or not ninja:
            raise SystemExit("cmake or ninja is missing\nboth are needed\npip install cmake ninja")

        # The paths are given anew each time: a kept cache may name those of a build environment long gone.
        configure = [
            f"-DCMAKE_MAKE_PROGRAM={ninja}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DFASTSEQ_CUDA={os.environ.get('FASTSEQ_CUDA', 'auto')}",
            f"-DFASTSEQ_SANITIZE={'ON' if sanitize else 'OFF'}",
            # For the tests, which find it in the build directory: tests/cuda_host.py.
            f"-DFASTSEQ_CUDA_HOST={'ON' if editable or sanitize else 'OFF'}",
        ]
        subprocess.run([cmake, "-S", ROOT, "-B", build, "-G", "Ninja", *configure], check=True)
        subprocess.run([cmake, "--build", build], check=True)

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # never write into a file that a running process has mapped
        shutil.copy2(build / target.name, target)


setup(ext_modules=[Extension("fastseq._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
