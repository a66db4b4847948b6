"""Does a fast test fail where the code is wrong? One small change at a time, each tried in a process of its own.

    python benchmarks/mutations.py breaker --count 50
    python benchmarks/mutations.py trends --tests tests/unit/metrics/test_trends.py tests/unit/live/test_monitor.py

A change swaps an operator or a function, moves a number, drops a clip or a statement, turns a condition round. The
fast tests of the module's folder run until the first fails. What none of them sees is printed: either it changes no
result, or a test is missing. A change takes a second or two, one that nobody sees as long as the tests.
"""

import argparse
import ast
import gc
import os
import signal
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path

import hypothesis
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

OPERATORS = "Lt LtE|Gt GtE|Eq NotEq|Is IsNot|In NotIn|And Or|Add Sub|Mult Div|BitAnd BitOr|FloorDiv Mult|Pow Mult"
NAMES = "min max|amin amax|argmin argmax|minimum maximum|floor ceil|any all|mean sum|exp expm1"
SWAPPED = {a: b for pair in f"{OPERATORS}|{NAMES}".split("|") for a, b in (pair.split()[::-1], pair.split())}
DROPPED = {"abs", "clamp", "clamp_", "clip", "clone", "copy", "masked_fill", "nan_to_num", "nan_to_num_", "neg"}


def instead(node: ast.AST) -> list[ast.AST]:
    """What may stand in a node's place."""
    if (name := SWAPPED.get(type(node).__name__)) is not None:
        return [getattr(ast, name)()]
    match node:
        case ast.Constant(value=bool(x)):
            return [ast.Constant(not x)]
        case ast.Constant(value=int(x)):
            return [ast.Constant(x + 1), ast.Constant(x - 1)]
        case ast.Constant(value=float(x)):
            return [ast.Constant(x * 1.1 or 1.0)]
        case ast.UnaryOp(operand=x):
            return [x]
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=[_, _, *_] as args):
            twin = ast.Call(ast.Name(SWAPPED[name], ast.Load()), args, node.keywords)
            return [twin, *(x for x in args if not isinstance(x, ast.Constant | ast.Starred))]
        case ast.Call(func=ast.Attribute(value=x, attr=name)) if name in DROPPED:
            return [x]
        case ast.Attribute(value=x, attr=name, ctx=ctx) if name in SWAPPED:
            return [ast.Attribute(x, SWAPPED[name], ctx)]
        case ast.AugAssign() | ast.Expr(value=ast.Call()) | ast.Break() | ast.Continue():
            return [ast.Pass()]
    return []


def changes(tree: ast.AST, line: int = 0) -> list[tuple]:
    """(line, words, node, field, the field's value instead), by place. What is said of errors and types stays."""
    found = []
    for field, value in ast.iter_fields(tree):
        items = value if isinstance(value, list) else [value]
        for i, item in enumerate(items):
            said = isinstance(item, ast.Raise | ast.Assert | ast.JoinedStr) or field in ("annotation", "returns")
            if said or not isinstance(item, ast.AST):
                continue
            at = getattr(item, "lineno", line)
            for x in instead(item) + [ast.UnaryOp(ast.Not(), item)] * (field == "test"):
                words = " -> ".join(ast.unparse(n) or type(n).__name__ for n in (item, x))
                found.append((at, words, tree, field, [*items[:i], x, *items[i + 1 :]] if items is value else x))
            found += changes(item, at)
    return found


def passes(path: Path, tree: ast.AST, tests: list[str]) -> bool:
    """Whether all tests pass with this tree in place of what the file holds."""
    with open(os.devnull, "wb") as out:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1), os.dup2(out.fileno(), 2)
            signal.alarm(120)  # found out, too: it may make an endless loop
            code, read = compile(ast.fix_missing_locations(tree), path, "exec"), SourceFileLoader.get_code
            SourceFileLoader.get_code = lambda self, name: code if Path(self.path) == path else read(self, name)
            os._exit(pytest.main(["-xq", "-p", "no:cacheprovider", "-m", "not slow and not slow_unit", *tests]))
        return os.waitpid(child, 0)[1] == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="+", help="files of trl_parity: breaker, metrics/sums, ...")
    parser.add_argument("--count", type=int, default=10**6, help="changes a module, evenly over its lines")
    parser.add_argument("--tests", nargs="+", help="instead of tests/unit/<folder of the module>")
    args = parser.parse_args()

    for library in ("support", "scipy.stats", "torch.distributed.tensor"):  # once; the package anew each time
        import_module(library)
    gc.freeze()  # a child that collects garbage need not look at all this
    hypothesis.settings.register_profile("mutations", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutations")
    for name in args.modules:
        paths = list(ROOT.glob(f"trl_parity/**/{name}.py"))
        assert len(paths) == 1, f"{name} names {len(paths)} files of trl_parity. Expected one, as metrics/sums does."
        path, tree = paths[0], ast.parse(paths[0].read_text())
        files = [str(file) for file in (ROOT / "tests/unit" / path.parent.name).glob("test_*.py")]
        tests = args.tests or sorted(files, key=lambda file: (path.stem not in file, file))
        assert passes(path, tree, tests), f"a test fails with {path.name} as it is"
        every, survived = changes(tree), 0
        count = min(args.count, len(every))
        for line, words, node, field, new in (every[i * len(every) // count] for i in range(count)):
            old = getattr(node, field)
            setattr(node, field, new)
            if passes(path, tree, tests):
                survived += 1
                print(f"{path.relative_to(ROOT)}:{line}: {words}", flush=True)
            setattr(node, field, old)
        print(f"{name}: {count} of {len(every)} changes tried, {survived} survived", flush=True)


if __name__ == "__main__":
    main()
