"""Copy the figures of ``results/*.json``, and the usage examples, into the README and the docs.

A table stands between ``<!-- results: NAME -->`` and ``<!-- end -->``, where NAME is a function below; a file of
``examples/`` between ``<!-- example: NAME -->`` and ``<!-- end -->``.

    python benchmarks/tables.py [--check]
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
MARKER = re.compile(r"(<!-- (results|example): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def source(record: dict[str, Any]) -> str:
    where = record.get("gpu") or f"{record['cpu']}, {record['threads']} threads"
    earlier = sorted({row["commit"] for row in record["rows"] if "commit" in row})
    note = f"; with a star, of an earlier run, {', '.join(earlier)}" if earlier else ""
    return f"\n{where}, torch {record['torch']}, {record['date']}, commit {record['commit']}{note}.\n"


def decode() -> str:
    """One token a sequence, fp32 states."""
    record = load("decode-h100")
    cells: dict[tuple[int, int], dict[str, Any]] = {}
    for row in record["rows"]:
        if (row["form"], row["pool"]) == ("decode", "float32"):
            cells.setdefault((row["heads"], row["sequences"]), {})[row["impl"]] = row
    rows = []
    for (heads, sequences), impls in cells.items():
        ours, fla = impls["flashkda_ops"], impls["fla"]
        times = [f"{us:.1f}" for us in (ours["floor_us"], ours["graph_us"], fla["graph_us"])]
        ratios = [f"{ours['graph_us'] / ours['floor_us']:.2f}", f"{fla['graph_us'] / ours['graph_us']:.2f}"]
        errors = [f"{impl['error']:.1e}" for impl in (ours, fla)]
        rows.append([str(heads), str(sequences), *times, *ratios, *errors])
    header = ["heads", "sequences", "floor, us", "flashkda_ops, us", f"fla {record['peers']['fla']}, us"]
    header += ["over the floor", "times fla's speed", "error", "fla's error"]
    return table(header, rows) + source(record)


def decode_forms() -> str:
    """What else a decode call does, at 32 heads: a form a row."""
    record = load("decode-h100")
    cells: dict[tuple[str, int, str], dict[tuple[int, str], Any]] = {}
    for row in record["rows"]:
        if row["heads"] == 32:
            cells.setdefault((row["form"], row["tokens"], row["pool"]), {})[row["sequences"], row["impl"]] = row
    rows = []
    for (form, tokens, pool), at in cells.items():
        line = [form, str(tokens), pool]
        for sequences in (1, 64):
            ours, fla = at.get((sequences, "flashkda_ops")), at.get((sequences, "fla"))
            over_the_floor = f"{ours['graph_us'] / ours['floor_us']:.2f}" if ours else ""
            line += [f"{ours['graph_us']:.1f}" if ours else "", over_the_floor, f"{fla['graph_us']:.1f}" if fla else ""]
        rows.append(line)
    header = ["form", "tokens", "pool"]
    header += [f"{column}N = {n}" for n in (1, 64) for column in ("us, ", "over the floor, ", "fla, us, ")]
    return table(header, rows) + source(record)


def prefill() -> str:
    """A shape a row: in each regime this project, and the fastest peer."""
    record = load("prefill-h100")
    cells: dict[str, dict[str, dict[str, dict[str, Any]]]] = {}
    for row in record["rows"]:
        if "eager_us" in row:
            cells.setdefault(row["shape"], {}).setdefault(row["regime"], {})[row["impl"]] = row
    rows, header = [], ["shape", "floor, us"]
    for regime in next(iter(cells.values())):
        header += [f"{regime} gates, us", "over the floor", "fastest peer, us"]
    for shape, regimes in cells.items():
        first = next(iter(regimes.values()))["flashkda_ops"]
        line = [shape + "*" * ("commit" in first), f"{first['floor_us']:.1f}"]
        for impls in regimes.values():
            us = {impl: row.get("graph_us", row["eager_us"]) for impl, row in impls.items()}
            ours, peers = us["flashkda_ops"], [impl for impl in us if not impl.startswith("flashkda_ops")]
            peer = min(peers, key=lambda impl: us[impl])
            line += [f"{ours:.1f}", f"{ours / impls['flashkda_ops']['floor_us']:.2f}"]
            line += [f"{us[peer]:.1f} ({peer}, {us[peer] / ours:.2f}x)"]
        rows.append(line)
    return table(header, rows) + source(record)


def paged() -> str:
    """A batch a row: the kernel on rows of the pool, and rows gathered and scattered around the kernel."""
    record = load("paged-h100")
    cells: dict[tuple[str, int, str, int], dict[str, Any]] = {}
    for row in record["rows"]:
        case = (row["batch"], row["heads"], row["pool"], row["checkpoint_every"])
        cells.setdefault(case, {})[row["impl"]] = row
    rows = []
    for (batch, heads, pool, every), impls in cells.items():
        floor, us, other = (
            impls["flashkda_ops"]["floor_us"],
            *(impls[x]["graph_us"] for x in ("flashkda_ops", "gathered")),
        )
        line = [batch, str(heads), pool, str(every or ""), f"{floor:.1f}", f"{us:.1f}", f"{us / floor:.2f}"]
        rows.append([*line, f"{other:.1f}", f"{other / us:.2f}"])
    header = ["sequences x tokens", "heads", "pool", "checkpoint every", "floor, us", "us", "over the floor"]
    return table([*header, "gathered, us", "times as long"], rows) + source(record)


def accuracy() -> str:
    """A case a row: errors of the output and of the final state, over all and of the worst head."""
    record = load("accuracy-h100")
    keys = ("error", "error_worst_head", "state_error", "state_error_worst_head")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        cells.setdefault(row["shape"], {})[row["impl"]] = row
    rows = [
        [case, *(f"{impls['flashkda_ops'][key]:.1e} / {impls['fla'][key]:.1e}" for key in keys)]
        for case, impls in cells.items()
    ]
    header = ["ours / fla's", "o", "o, worst head", "state", "state, worst head"]
    return table(header, rows) + source(record)


def gradients() -> str:
    """A case a row: the error of each gradient."""
    record = load("accuracy-h100")
    keys = ("dq", "dk", "dv", "dg", "dbeta", "dA_log", "ddt_bias", "dinitial_state")
    cells: dict[str, dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if keys[0] in row:
            cells.setdefault(row["shape"], {})[row["impl"]] = row
    rows = [
        [case, *(f"{impls['flashkda_ops'][key]:.1e} / {impls['fla'][key]:.1e}" for key in keys)]
        for case, impls in cells.items()
    ]
    return table(["ours / fla's", *keys], rows) + source(record)


def training() -> str:
    """A shape and regime a row: times on the GPU, of this project and of each peer that was measured."""
    record = load("training-h100")
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        if "failed" not in row:
            cells.setdefault((row["shape"], row["regime"]), {})[row["impl"]] = row
    with_fla = any("fla" in impls for impls in cells.values())
    rows = []
    for (shape, regime), impls in cells.items():
        ours, plain, cudnn, fla = (impls.get(x) for x in ("flashkda_ops", "flashkda_ops (plain)", "cudnn", "fla"))
        line = [shape, regime]
        if ours:
            line += [f"{ours[key]:.0f}" for key in ("fwd_gpu_us", "bwd_gpu_us", "fwd_bwd_gpu_us")]
            line += [f"{ours['bwd_gpu_us'] / ours['bwd_floor_us']:.1f}", f"{ours['fwd_bwd_us']:.0f}"]
            line.append(f"{ours['peak_gib']:.2f}")
        if with_fla:
            for key, digits in (("bwd_gpu_us", 0), ("fwd_bwd_gpu_us", 0), ("fwd_bwd_us", 0), ("peak_gib", 2)):
                measured = fla and ours and key in fla
                star = "*" if fla and "commit" in fla else ""
                line.append(f"{fla[key]:.{digits}f}{star} ({fla[key] / ours[key]:.1f}x)" if measured else "")
        if plain and cudnn:
            for key in ("bwd_gpu_us", "fwd_bwd_gpu_us"):
                ratio = f"{cudnn[key]:.0f} ({cudnn[key] / plain[key]:.2f}x)" if key in cudnn else ""
                line.append(f"{plain[key]:.0f} / {ratio}")
            line.append(f"{plain['peak_gib']:.2f} / {cudnn['peak_gib']:.2f}")
        rows.append(line)
    header = ["shape", "gates", "forward, us", "backward, us", "both, us", "backward over the floor", "both, eager, us"]
    header.append("peak, GiB")
    if with_fla:
        header += [f"fla {record['peers']['fla']}: {what}" for what in ("backward", "both", "both, eager", "peak")]
    cudnn_name = f"ours / cuDNN {record['peers']['cudnn']}"
    header += [f"no fusions, backward, us: {cudnn_name}", f"both, us: {cudnn_name}", f"peak, GiB: {cudnn_name}"]
    return table(header, rows) + source(record)


def train_step() -> str:
    """A variant a row; how far its loss curve is from the eager one by learning rates."""
    record = load("train_step-h100")
    rates = record["rows"][0]["lr"]
    rows = [
        [row["impl"] + "*" * ("commit" in row)]
        + ([f"{row['step_us']:.0f}", f"{row['tokens_s']:,}"] if "step_us" in row else ["", ""])
        + ([f"{x:.1e}" for x in row["loss_difference"]] if "loss_difference" in row else [""] * len(rates))
        for row in record["rows"]
    ]
    header = ["the demo's train step", "us", "tokens/s", *(f"loss from eager's, learning rate {x:.0e}" for x in rates)]
    return table(header, rows) + source(record)


def serving() -> str:
    """A load and a form a row, for each machine that it was measured on."""
    names = {"first_token": "first token", "token": "next token", "latency": "request"}
    text = ""
    for path in sorted((ROOT / "benchmarks" / "results").glob("serving-*.json")):
        record = load(path.stem)
        rows = []
        for row in record["rows"]:
            times = [
                f"{row[f'{name}_p50_ms']:.1f} / {row[f'{name}_p99_ms']:.1f}" if f"{name}_p50_ms" in row else ""
                for name in names
            ]
            rate = f", {row['rate']:.1f} requests/s" if "rate" in row else ""
            rows.append([row["regime"] + rate, row["impl"], f"{row['tokens_per_s']:,.0f}", *times])
        text += "\n" * bool(text) + table(
            ["load", "functions", "tokens/s", *(f"{n}, ms" for n in names.values())], rows
        )
        text += source(record) + f"Model: {record['model']}."
        if "capture_s" in record:
            graphs, seconds, mib = record["graphs"], record["capture_s"], record["capture_mib"]
            text += f" {graphs} graphs captured in {seconds:.1f} s, {mib:.0f} MiB."
        text += "\n"
    return text


def portable() -> str:
    record = load("portable-cpu")
    rows = [
        [row["impl"], row["regime"], f"{row['eager_us'] / 1e3:.1f}", f"{row['error']:.1e}" if "error" in row else ""]
        for row in record["rows"]
    ]
    return table([record["rows"][0]["shape"], "gates", "ms", "error"], rows) + source(record)


def host() -> str:
    """A call a row, a machine a column."""
    results = sorted((ROOT / "benchmarks" / "results").glob("host-*.json"))
    records = [load(path.stem) for path in results]
    cells = [{row["impl"]: f"{row['host_us']:.0f}" for row in record["rows"]} for record in records]
    impls = dict.fromkeys(impl for cell in cells for impl in cell)
    rows = [[impl, *(cell.get(impl, "") for cell in cells)] for impl in impls]
    header = ["one eager call, us", *("launches on a GPU" if "gpu" in record else "no kernels" for record in records)]
    return table(header, rows) + "".join(source(record) for record in records)


def model() -> str:
    """A case a row: tokens a second of each implementation, and for those that are compiled the graph breaks."""
    record = load("model-h100")
    cells: dict[tuple[str, int, int], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        cells.setdefault((row["phase"], row["sequences"], row["tokens"]), {})[row["impl"]] = row
    impls = list(dict.fromkeys(row["impl"] for row in record["rows"]))
    rows = []
    for (phase, sequences, tokens), by_impl in cells.items():
        line = [phase, f"{sequences} x {tokens}"]
        for impl in impls:
            row = by_impl.get(impl)
            breaks = f" ({row['graph_breaks']} breaks)" if row and row["graph_breaks"] else ""
            line.append(f"{row['tokens_per_s']:.0f}{breaks}" if row else "fails")
        rows.append(line)
    return table(["tokens/s", "sequences x tokens", *impls], rows) + source(record)


def transformers() -> str:
    """A phase and mode a row: tokens a second, and breaks of the graph."""
    record = load("transformers-h100")
    cells: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        cells.setdefault((row["phase"], row["mode"]), {})[row["impl"]] = row
    rows = []
    for phase_and_mode, impls in cells.items():
        line = list(phase_and_mode)
        for impl in ("flashkda_ops", "fla"):
            row = impls[impl]
            line += [f"{row['tokens_s']:.0f}", str(row["graph_breaks"])] if "us" in row else ["fails", ""]
        rows.append(line)
    fla, release = record["peers"]["fla"], record["peers"]["transformers"]
    header = [f"transformers {release}", "", "flashkda_ops, tokens/s", "breaks", f"fla {fla}, tokens/s", "breaks"]
    return table(header, rows) + source(record)


def distributed() -> str:
    """A regime and direction a row: one GPU, then both ways to use all of them."""
    record = load("distributed-h100")
    cells: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in record["rows"]:
        cells.setdefault((row["shape"], row["regime"], row["direction"]), {})[row["mode"]] = row
    rows = []
    for (shape, regime, direction), modes in cells.items():
        line = [shape, regime, direction.replace("_", " + ")]
        one = modes["one"].get("graph_us", modes["one"]["eager_us"])
        line += [f"{one / 1e3:.2f}"]
        for mode in ("context_parallel", "tensor_parallel"):
            us = modes[mode].get("graph_us", modes[mode]["eager_us"])
            line += [f"{us / 1e3:.2f} ({one / us:.2f}x)", f"{modes[mode]['error']:.1e}"]
        rows.append(line)
    header = [
        "shape",
        "gates",
        "direction",
        "one GPU, ms",
        f"context parallel over {record['ranks']}, ms",
        "difference",
    ]
    return table([*header, "tensor parallel, ms", "difference"], rows) + source(record)


def example(name: str) -> str:
    return f"```python\n{(ROOT / 'examples' / f'{name}.py').read_text()}```\n"


TABLES = {
    table.__name__: table
    for table in (
        prefill,
        paged,
        training,
        train_step,
        decode,
        decode_forms,
        serving,
        model,
        transformers,
        accuracy,
        gradients,
        portable,
        host,
        distributed,
    )
}


def fill(match: re.Match[str]) -> str:
    start, kind, name, end = match.groups()
    return start + (TABLES[name]() if kind == "results" else example(name)) + end


def main() -> int:
    stale = []
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = path.read_text()
        filled = MARKER.sub(fill, text)
        if filled != text:
            stale.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv:
                path.write_text(filled)
    if stale:
        print("differs from what it copies:" if "--check" in sys.argv else "updated:", *stale)
    return int("--check" in sys.argv and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
