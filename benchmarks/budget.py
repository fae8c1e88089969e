"""How often mode "budget" keeps its budget on samples that fit and plan have not seen.

The digits transformer of the examples, over seeds of the split. Usage: python benchmarks/budget.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import dyt_compile

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "digits"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--max-error", type=float, default=0.05)
    options = parser.parse_args()
    from model import calibration, load

    model, _ = load()
    kept = 0
    for seed in range(options.seeds):
        try:
            report = dyt_compile.convert(
                model, list(calibration()), budget=options.max_error, seed=seed
            ).report
        except dyt_compile.DytCompileError as error:
            print(f"seed {seed}: {error}", flush=True)
            continue
        kept += report.error is not None and report.error <= options.max_error
        print(f"seed {seed}: {report.converted} converted, error {report.error:.4f}", flush=True)
    print(f"budget {options.max_error:g} kept in {kept} of {options.seeds}")


if __name__ == "__main__":
    main()
