"""Time of a new process that imports the package, and of one that prints the help, including the start of Python."""

import statistics
import subprocess
import sys
from functools import partial

from measure import interval, save, seconds

ROUNDS = 21
CASES = (
    ("python -c pass", ["-c", "pass"], None),
    ("import sightline", ["-c", "import sightline"], 0.2),
    ("sightline --help", ["-m", "sightline", "--help"], 0.6),
)


def main() -> None:
    rows = []
    for what, arguments, bar in CASES:
        call = partial(subprocess.run, [sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
        call()
        rounds = [(seconds(call), seconds(call)) for _ in range(ROUNDS)]
        values = [value for pair in rounds for value in pair]
        median, (low, high) = statistics.median(values), interval(values)
        aa = statistics.median(second / first for first, second in rounds)
        print(f"{what:18} {median:.3f} s [{low:.3f}, {high:.3f}]  A/A {aa:.3f}  bar {bar}")
        rows.append({"what": what, "seconds": median, "low": low, "high": high, "aa": aa, "n": len(values), "bar": bar})
    print(save("startup", rows))


if __name__ == "__main__":
    main()
