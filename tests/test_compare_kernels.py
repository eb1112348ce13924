"""``tools/compare_kernels.py`` tells changes of machine code from changes of text."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).parent.parent / "tools" / "compare_kernels.py"
KERNEL = """
#include "factor.h"
template <int kFactor> __global__ void scale(float* x) { x[threadIdx.x] *= kFactor; }
__global__ void shift(float* x) { x[threadIdx.x] += 1.f; }
template __global__ void scale<FACTOR>(float* x);
"""


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    pytest.importorskip("elftools")
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc")
    spec = importlib.util.spec_from_file_location("compare_kernels", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """One commit of a kernel."""
    folder = tmp_path / "csrc" / "sm90"
    folder.mkdir(parents=True)
    (folder / "kernels.cu").write_text(KERNEL)
    (tmp_path / "csrc" / "factor.h").write_text("#define FACTOR 3\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "first"]):
        subprocess.run([*git, *command], cwd=tmp_path, check=True)
    return tmp_path


def compare(tool: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    status = tool.main(["--include", str(repository), "--match", "kernels"], repository)
    return status, capsys.readouterr().out


def test_a_change_of_text_alone_is_none(tool: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = repository / "csrc" / "sm90" / "kernels.cu"
    source.write_text(
        "// A comment.\n" + KERNEL.replace("shift", "move").replace("x[threadIdx.x] *=", "(*(x + threadIdx.x)) *=")
    )
    assert compare(tool, repository, capsys)[0] == 0


def test_a_change_of_a_header_names_the_kernel(
    tool: ModuleType, repository: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (repository / "csrc" / "factor.h").write_text("#define FACTOR 5\n")
    status, printed = compare(tool, repository, capsys)
    assert status == 1 and "scale<3>" in printed and "scale<5>" in printed and "shift" not in printed
    assert "2 kernels, 2 differ between HEAD and the working tree" in printed
