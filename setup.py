"""Builds flashkda_ops._C from csrc/ where there is an nvcc; without one the package installs as pure Python.

The extension sees raw pointers only: it needs neither torch's headers nor its libraries, and holds the CUDA runtime
statically, so one binary serves every torch release.

Environment:
  FLASHKDA_BUILD_CUDA   auto (default: build if nvcc is found), 1 (fail if it is not), 0 (never)
  FLASHKDA_CUDA_ARCHS   architectures, separated by ; or , (default 90a); csrc/sm<NN> holds the kernels of sm_NN
  FLASHKDA_VERBOSE      1 prints each command and ptxas' report of registers and spills
  CUDA_HOME, CUDA_PATH  where to look for nvcc first
  MAX_JOBS              how many compilers run at once (default: ninja's choice)
"""

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
BUILD_REQUIRES = ["ninja", "pybind11>=2.13", "nvidia-cutlass==4.2.*"]


def find_nvcc() -> str | None:
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    candidates = [Path(home, "bin", "nvcc") for home in homes if home]
    candidates += [Path(nvcc) for nvcc in [shutil.which("nvcc")] if nvcc]
    candidates += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(nvcc) for nvcc in candidates if os.access(nvcc, os.X_OK)), None)


def nvcc_to_build_with() -> str | None:
    """The compiler, or None where the package is to be pure Python."""
    wanted = os.environ.get("FLASHKDA_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        sys.exit(f"FLASHKDA_BUILD_CUDA={wanted}: expected auto, 0 or 1")
    nvcc = None if wanted == "0" else find_nvcc()
    if wanted == "1" and nvcc is None:
        sys.exit("FLASHKDA_BUILD_CUDA=1, but no nvcc in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda")
    return nvcc


def archs() -> list[str]:
    chosen = [arch for arch in re.split(r"[;,\s]+", os.environ.get("FLASHKDA_CUDA_ARCHS", "90a")) if arch]
    have = sorted(path.name for path in (ROOT / "csrc").glob("sm*"))
    for arch in chosen:
        if "sm" + arch.rstrip("af") not in have:
            sys.exit(f"FLASHKDA_CUDA_ARCHS: no kernels for {arch}; csrc has {', '.join(have)}")
    if not chosen:
        sys.exit("FLASHKDA_CUDA_ARCHS is empty: set FLASHKDA_BUILD_CUDA=0 to build no kernels")
    return chosen


def sources() -> list[str]:
    """The bindings and every kernel of the chosen architectures, relative to the root as setuptools wants them."""
    kernels = {cu for arch in archs() for cu in (ROOT / "csrc" / ("sm" + arch.rstrip("af"))).rglob("*.cu")}
    bindings = (ROOT / "csrc").glob("*.cpp")
    return [str(source.relative_to(ROOT)) for source in (*sorted(bindings), *sorted(kernels))]


def installed(module: str) -> Path:
    """The folder of an installed package, which is not imported: cutlass_library takes a second and logs."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        sys.exit(f"building flashkda_ops' CUDA kernels needs {module}: pip install {shlex.join(BUILD_REQUIRES)}")
    return Path(spec.origin).parent


class NinjaBuild(build_ext):
    """Compiles with nvcc, in parallel, only what changed: ninja follows the headers through the compilers' depfiles."""

    def build_extension(self, ext: Extension) -> None:
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve()
        for folder in (output.parent, build_dir):
            folder.mkdir(parents=True, exist_ok=True)
        (build_dir / "build.ninja").write_text(self.ninja_file(ext, build_dir, output))

        verbose = os.environ.get("FLASHKDA_VERBOSE") == "1"
        jobs = ["-j", os.environ["MAX_JOBS"]] if os.environ.get("MAX_JOBS") else []
        ninja = shutil.which("ninja") or str(installed("ninja") / "data" / "bin" / "ninja")
        result = subprocess.run([ninja, "-C", str(build_dir), *jobs, *(["-v"] if verbose else [])])
        if result.returncode != 0:
            sys.exit(f"ninja failed in {build_dir}")

    def ninja_file(self, ext: Extension, build_dir: Path, output: Path) -> str:
        includes = [
            ROOT / "csrc",
            installed("cutlass_library") / "source" / "include",
            installed("pybind11") / "include",
            Path(sysconfig.get_path("include")),
        ]
        flags = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr"]
        flags += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs()]
        flags += ["-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]
        flags += [f'-DFLASHKDA_CUDA_ARCHS="{";".join(archs())}"']
        flags += [f"-isystem={path}" if path != ROOT / "csrc" else f"-I{path}" for path in includes]
        if os.environ.get("FLASHKDA_VERBOSE") == "1":
            flags += ["-Xptxas=-v"]
        # torch brings a CUDA runtime of its own: the symbols of this one stay inside.
        link = ["-shared", "-cudart=static", "-Xlinker=--exclude-libs,ALL"]

        objects = {source: build_dir / (source + ".o") for source in ext.sources}
        lines = [
            "ninja_required_version = 1.5",
            "rule compile",
            f"  command = {quoted([NVCC, *flags])} -MD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "  description = nvcc $in",
            "rule link",
            f"  command = {quoted([NVCC, *link])} $in -o $out",
            "  description = link $out",
            *(f"build {path(obj)}: compile {path(ROOT / source)}" for source, obj in objects.items()),
            f"build {path(output)}: link {' '.join(map(path, objects.values()))}",
            "",
        ]
        return "\n".join(lines)


def quoted(command: list[str | None]) -> str:
    return shlex.join(str(word) for word in command).replace("$", "$$")


def path(p: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(p))


NVCC = nvcc_to_build_with()
if NVCC is None:
    print("flashkda_ops: building no CUDA kernels: the package will run on its portable PyTorch path", file=sys.stderr)
    setup()
else:
    setup(
        ext_modules=[Extension("flashkda_ops._C", sources())],
        cmdclass={"build_ext": NinjaBuild},
        setup_requires=BUILD_REQUIRES,
    )
