"""Run a benchmark: ``python -m bench claim --quick``. Without a name, list them.

A benchmark is a module of this package whose docstring begins with its question and states its
method, and whose ``main()`` reads ``sys.argv`` (``--quick``: a smaller run, to see that it works)
and prints the result.
"""

import importlib
import importlib.util
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


def question(name: str) -> str:
    """The first line of a benchmark's docstring, read without importing what it measures."""
    spec = importlib.util.find_spec(f"bench.{name}")
    assert spec is not None
    assert spec.origin is not None
    first = Path(spec.origin).read_text(encoding="utf-8").partition("\n")[0]
    return first.strip('"')


def main() -> None:
    """Run the benchmark that the arguments name with its own arguments, or list what there is."""
    there = present()
    if len(sys.argv) == 1:
        for name in there:
            print(f"  {name:<14} {question(name)}")
        return
    name, *arguments = sys.argv[1:]
    if name not in there:
        sys.exit(f"There is no benchmark {name!r}. There are: {', '.join(there)}.")
    sys.argv = [f"bench.{name}", *arguments]
    cast("Callable[[], None]", importlib.import_module(f"bench.{name}").main)()


if __name__ == "__main__":
    main()
