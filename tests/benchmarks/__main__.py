"""Run the benchmarks and print ratios: python -m tests.benchmarks [case ...]."""

import argparse
import json
import os
import platform
import re
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import torch

import fisherlab as fl
from tests.benchmarks import kronecker, metrics, peer_steps, ranks, real, reports, steps
from tests.benchmarks.cases import CASES, NEEDS_MNIST, Case, mnist_available
from tests.benchmarks.memory import of_case
from tests.benchmarks.timing import interleaved

TABLES = steps.TABLES | kronecker.TABLES | metrics.TABLES
TABLES |= reports.TABLES | real.TABLES | ranks.TABLES | peer_steps.TABLES
RESULTS = Path(__file__).parent / "results"


def measure(key: str, case: Case, rounds: int) -> dict[str, object]:
    """Time one case and take its memory, and hold both against its targets."""
    return measured(case, rounds, of_case(key))


def measured(case: Case, rounds: int, memory: int | None = None) -> dict[str, object]:
    """Time one case and hold it against its targets."""
    work = {"fisherlab": case.ours}
    if case.arithmetic is not None:
        work["GEMM"] = case.arithmetic
    seconds = interleaved(work | case.rivals, rounds)
    ours = seconds["fisherlab"]
    ratios = {name: best / ours for name, best in seconds.items() if name != "fisherlab"}
    held = {} if memory is None else {"peak_bytes_above_base": memory}
    return {
        "case": case.name,
        "note": case.note,
        "seconds": {name: round(best, 4) for name, best in seconds.items()},
        "times_ours": {name: round(ratio, 2) for name, ratio in ratios.items()},
        **held,
        "targets": _targets(case, seconds, memory),
    }


def _targets(
    case: Case, seconds: dict[str, float], memory: int | None
) -> dict[str, object]:
    ours, found = seconds["fisherlab"], {}
    rivals = {n: s for n, s in seconds.items() if n not in ("fisherlab", "GEMM")}
    for name, aim in case.targets.items():
        if name == "gemm":
            value, good = ours / seconds["GEMM"], ours / seconds["GEMM"] <= aim
        elif name == "seconds":
            value, good = ours, ours <= aim
        elif name == "bytes":
            if memory is None:
                continue
            value, good = float(memory), memory <= aim
        else:
            chosen = [s for n, s in rivals.items() if name == "peer" or n.startswith(name)]
            if not chosen:
                continue
            value = min(chosen) / ours
            good = value >= aim
        found[name] = {"measured": round(value, 3), "aim": aim, "met": bool(good)}
    return found


def show(row: dict[str, object]) -> None:
    """Print one case."""
    print(f"\n{row['case']}\n  {row['note']}")
    seconds, ratios = row["seconds"], row["times_ours"]
    for name, value in seconds.items():
        ratio = f"  {ratios[name]:8.2f} × ours" if name in ratios else ""
        print(f"  {name:28s} {value:10.4f} s{ratio}")
    if "peak_bytes_above_base" in row:
        peak = row["peak_bytes_above_base"] / 2**30
        print(f"  peak memory above base       {peak:10.3f} GiB")
    for name, target in row["targets"].items():
        mark = "met " if target["met"] else "MISSED"
        print(f"  {mark:6s} {name}: {target['measured']:g} (aim {target['aim']:g})")


def machine(device: str = "cpu") -> dict[str, object]:
    """Describe where the numbers come from."""
    cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else device,
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "fisherlab": fl.__version__,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return names[0] if names else platform.processor()


def main() -> int:
    """Parse, measure, print, save."""
    parser = argparse.ArgumentParser(description="Times of fisherlab, as ratios.")
    known = [*CASES, *TABLES]
    parser.add_argument("cases", nargs="*", help=f"among {', '.join(known)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--alone", action="store_true", help="leave the neighbours out")
    parser.add_argument("--save", metavar="NAME", help="write results/NAME.json")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.cases if name not in known]
    if unknown:
        parser.error(f"unknown cases {unknown}; known: {', '.join(known)}")
    rows = []
    default = [name for name in known if name not in reports.TABLES | real.TABLES]  # hours
    for name in arguments.cases or default:
        if name in TABLES:
            rows.append(TABLES[name](arguments.rounds))
            show(rows[-1])
            continue
        if name in NEEDS_MNIST and not mnist_available():
            print(f"\n{name}: left out, $FISHERLAB_DATA does not hold mnist/")
            continue
        case = CASES[name]()
        if arguments.alone:
            case = replace(case, rivals={})
        rows.append(measure(name, case, arguments.rounds))
        show(rows[-1])
    if arguments.save:
        save(machine(), rows, RESULTS / f"{arguments.save}.json")
    return 0


def save(
    where: dict[str, object], rows: list[dict[str, object]], file: Path | None
) -> None:
    """Put rows beside those of other cases, in the file of the device if none is named."""
    name = re.sub(r"\W+", "-", str(where["device"]).lower())
    file = file or RESULTS / f"{name}.json"
    file.parent.mkdir(exist_ok=True)
    old = json.loads(file.read_text())["cases"] if file.exists() else []
    kept = [r for r in old if r["case"] not in {row["case"] for row in rows}]
    text = json.dumps({"machine": where, "cases": kept + rows}, indent=1)
    partial_file = file.with_suffix(".part")
    partial_file.write_text(text + "\n")
    os.replace(partial_file, file)
    print(f"\nwritten: {file}")


if __name__ == "__main__":
    sys.exit(main())
