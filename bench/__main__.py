"""Run benchmarks by name: ``python -m bench claim --quick``. Without a name, list them.

A benchmark is a module of this package with a docstring that states its method and a
``main(*, quick: bool)``, which prints the result.
"""

import argparse
import importlib
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import cast


def present() -> list[str]:
    """The benchmarks there are, by name."""
    return sorted(
        module.name
        for module in pkgutil.iter_modules([str(Path(__file__).parent)])
        if not module.name.startswith("_")
    )


def first_line(name: str) -> str:
    """What a benchmark says it measures."""
    module = importlib.import_module(f"bench.{name}")
    return (module.__doc__ or "").strip().partition("\n")[0]


def main() -> None:
    """Run what the arguments name, or list what there is."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="name", help="a benchmark; 'all' for each")
    parser.add_argument("--quick", action="store_true", help="a smaller run: does it work at all?")
    wanted = parser.parse_args()
    names = cast("list[str]", wanted.names)
    there = present()
    if not names:
        for name in there:
            print(f"  {name:<14} {first_line(name)}")
        return
    chosen = there if names == ["all"] else names
    unknown = [name for name in chosen if name not in there]
    if unknown:
        sys.exit(f"There is no benchmark {', '.join(unknown)}. There are: {', '.join(there)}.")
    for name in chosen:
        run = cast("Callable[..., None]", importlib.import_module(f"bench.{name}").main)
        run(quick=cast("bool", wanted.quick))


if __name__ == "__main__":
    main()
