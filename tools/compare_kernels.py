"""Whether a change of csrc/ changes the machine code of any kernel.

Compiles the CUDA files of two revisions with the flags of the build and compares each kernel's machine code byte by
byte, with its registers, stack and spills. Where all bytes match, a change of names, comments or structure is proved to
leave results and speed as they were, without a GPU. It needs nvcc, and the CUTLASS headers of `nvidia-cutlass`.

    python tools/compare_kernels.py                        # the last commit and the working tree, all files
    python tools/compare_kernels.py HEAD~3 --match bf16    # files with that in their path alone
    python tools/compare_kernels.py v0.1.0 v0.2.0

Exits with 0 where all kernels are the same, else with 1.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).resolve().parent.parent
WORKING_TREE = "the working tree"
FLAGS = ["-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "-Xptxas=-v"]  # as setup.py has them
_ENTRY = re.compile(r"Compiling entry function '(\w+)'")
_SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_REGISTERS = re.compile(r"Used (\d+) registers")


class Kernel(NamedTuple):
    """What ptxas made of a kernel."""

    code: bytes
    registers: int
    stack: int
    spills: int  # bytes stored and loaded

    def __str__(self) -> str:
        return f"{len(self.code)} bytes, {self.registers} registers, {self.stack} stack, {self.spills} spilled"


def cutlass_headers() -> Path:
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        sys.exit("the CUTLASS headers are not here: pip install --no-deps 'nvidia-cutlass==4.2.*'")
    return Path(spec.origin).parent / "source" / "include"


def checkout(revision: str, folder: Path, repository: Path) -> Path:
    """A revision's csrc/, in a folder of its own; the working tree's where it lies."""
    if revision == WORKING_TREE:
        return repository / "csrc"
    archive = subprocess.run(["git", "archive", revision, "csrc"], cwd=repository, capture_output=True)
    if archive.returncode != 0:
        sys.exit(f"git has no csrc/ at {revision}: {archive.stderr.decode().strip()}")
    folder.mkdir()
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder / "csrc"


def compile_kernels(csrc: Path, source: Path, arch: str, includes: list[Path]) -> dict[str, Kernel]:
    """The kernels of one file, by their mangled names."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = ["nvcc", *FLAGS, "-cubin", f"-arch=sm_{arch}", f"-I{csrc}", *(f"-isystem={i}" for i in includes)]
        result = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if result.returncode != 0:
            sys.exit(f"nvcc failed on {source}:\n{result.stderr}")
        with cubin.open("rb") as file:
            sections = [s for s in ELFFile(file).iter_sections() if s.name.startswith(".text.")]
            code = {s.name.removeprefix(".text."): s.data() for s in sections}
    kernels = {}
    for part in _ENTRY.split(result.stderr + result.stdout)[1:]:
        if part in code:
            name = part
            continue
        spills, registers = _SPILLS.search(part), _REGISTERS.search(part)
        assert spills is not None and registers is not None, part
        stack, stored, loaded = map(int, spills.groups())
        kernels[name] = Kernel(code[name], int(registers[1]), stack, stored + loaded)
    return kernels


def readable(names: list[str]) -> dict[str, str]:
    """The names as C++ has them, where there is a c++filt."""
    if not names or shutil.which("c++filt") is None:
        return {name: name for name in names}
    output = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return dict(zip(names, output.splitlines(), strict=True))


def differences(before: dict[str, Kernel], after: dict[str, Kernel]) -> list[str]:
    """A line for each kernel that is not the same in both, whatever it is called."""
    gone = {name: k for name, k in before.items() if after.get(name) != k}
    new = {name: k for name, k in after.items() if before.get(name) != k}
    for name, kernel in list(new.items()):
        renamed = next((old for old, k in gone.items() if k == kernel and old not in new), None)
        if renamed is not None:
            del gone[renamed], new[name]
    names = readable(sorted({*gone, *new}))
    lines = []
    for name, text in names.items():
        was, now = gone.get(name, "not there"), new.get(name, "not there")
        lines.append(f"  {text}\n    before: {was}\n    after:  {now}")
    return lines


def main(arguments: list[str] | None = None, repository: Path = ROOT) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", nargs="?", default="HEAD", help="a revision (default: HEAD)")
    parser.add_argument("after", nargs="?", default=WORKING_TREE, help="a revision (default: the working tree)")
    parser.add_argument("--match", default="", help="compare files with this in their path alone")
    parser.add_argument("--arch", default="90a", help="the architecture to compile for (default: 90a)")
    parser.add_argument("--jobs", type=int, default=2, help="compilers that run at once (default: 2)")
    parser.add_argument("--include", type=Path, action="append", help="headers in place of CUTLASS's")
    a = parser.parse_args(arguments)
    includes = a.include if a.include is not None else [cutlass_headers()]
    total = changed = 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(a.jobs) as pool:
        trees = [checkout(r, Path(folder, str(i)), repository) for i, r in enumerate((a.before, a.after))]
        files = sorted({f.relative_to(tree) for tree in trees for f in tree.rglob("*.cu") if a.match in str(f)})
        if not files:
            sys.exit(f"no CUDA file has {a.match} in its path")

        def kernels_of(file: Path) -> list[dict[str, Kernel]]:
            return [compile_kernels(t, t / file, a.arch, includes) if (t / file).exists() else {} for t in trees]

        for file, (before, after) in zip(files, pool.map(kernels_of, files), strict=True):
            lines = differences(before, after)
            total, changed = total + len(after), changed + len(lines)
            print(f"{file}: {len(after)} kernels, {len(lines)} differ", *lines, sep="\n", flush=True)
    print(f"{total} kernels, {changed} differ between {a.before} and {a.after}")
    return int(changed > 0)


if __name__ == "__main__":
    sys.exit(main())
