"""python -m train.bench cifar10 | language_model | images | update | ..."""

import importlib
import sys

BENCHES = {
    "cifar10": "networks",
    "language_model": "networks",
    "images": "images",
    "update": "update",
    "packing": "packing",
    "accumulation": "accumulation",
}

if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in BENCHES:
        name = sys.argv[1]
        module = importlib.import_module(f"train.bench.{BENCHES[name]}")
        module.command(name, sys.argv[2:])
    else:
        sys.exit(f"python -m train.bench {' | '.join(BENCHES)} [--help]")
