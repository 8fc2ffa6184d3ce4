"""Measures what docs/benchmarks.md shows of `kvik race` and `kvik bench`, and docs/scaling.md of routing.

python bench/write_benchmarks.py [--only race|long|bench|deep|routing]; bench/against_peers.py compares with others
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from document import replace_part

DOCUMENT, ROUTING_DOCUMENT = Path("docs/benchmarks.md"), Path("docs/scaling.md")
PARTS = {
    "race": ["race", "--plot", "docs/race.svg"],
    "long": ["race", "--raw", "--max-tokens", "512", "--lengths", "none", "Once upon a time"],
    "bench": [
        "bench", "--prompt", "128,512,2048", "--batch", "1,4,16", "--depth", "0,2048", "--kv", "f16,int8",
        "--markdown", "--save", "build/bench.json",
    ],
    "deep": ["bench", "--depth", "8000", "--gen", "32", "--kv", "f16,f32,int8", "--markdown"],
}  # fmt: skip


def main() -> int:
    """Run each command as a user would, and put what it prints into its part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=[*PARTS, "routing"], help="this part; may be repeated")
    args = parser.parse_args()
    Path("build").mkdir(exist_ok=True)
    for name in args.only or [*PARTS, "routing"]:
        if name == "routing":
            done = subprocess.run([sys.executable, "bench/routing.py"], stdout=subprocess.PIPE, text=True)
            if done.returncode:
                print("routing: its part stays as it was", file=sys.stderr)
                return done.returncode
            replace_part(ROUTING_DOCUMENT, name, done.stdout)
            continue
        arguments = PARTS[name]
        shown = "kvik " + " ".join(f'"{one}"' if " " in one else one for one in arguments)
        print(f"{name}: {shown}", file=sys.stderr)
        done = subprocess.run([sys.executable, "-m", "kvik", *arguments], stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"{name}: kvik ended with {done.returncode}; its part stays as it was", file=sys.stderr)
            return done.returncode
        output = done.stdout if "--markdown" in arguments else f"```\n{done.stdout.rstrip()}\n```"
        replace_part(DOCUMENT, name, f"`{shown}`:\n\n{output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
