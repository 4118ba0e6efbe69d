"""The style ratchet: bounds that hold for every file, and counts that may only go down."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from tests.tidy.repository import ROOT, project_files, python_files, read, shipped_python_files, text_files

FILE_LINES_MAX = 600
FUNCTION_LINES_MAX = 70
DOORS_LINES_MAX = 500

# Broad `except` clauses stand only at the edge of a thread, a process or an engine. A count here may go down; up needs a reason.
BROAD_EXCEPTS: dict[str, tuple[int, str]] = {
    "flexkv_core/transfer/engine.py": (1, "edge of the transfer thread: what a device raises becomes a miss"),
    "flexkv_core/transfer/pieces.py": (1, "edge of a helping thread: the owner of the copy raises it"),
    "flexkv_core/transfer/supervisor.py": (
        1,
        "edge of the supervisor's thread: other batches must still get their end",
    ),
}

ENVIRONMENT_READERS = ("flexkv_core/config.py",)
ATTIC_NAMES = ("utils.py", "common.py", "helpers.py", "misc.py")
SOURCE_ROOTS = ("adapters", "adapters/vllm", "adapters/sglang", "adapters/intree", "kernels")

UNFINISHED = re.compile(r"\b(?:TODO|FIXME|XXX|HACK|NotImplementedError)\b")
ENVIRONMENT = re.compile(r"\bos\.(?:environ|getenv|putenv)\b|\bfrom os import .*\b(?:environ|getenv)\b")
# Paths of one machine, and of the folder that lies beside some checkouts.
MACHINE = re.compile(
    r"(?<![\w.$}~])/(?:work|root|home|Users|opt)/\w|\bshared/(?:design|facts|hooks|tools|traces)\b|\bfile:///"
)


def _code_files() -> list[Path]:
    shipped = [path for path in project_files() if path.suffix in (".c", ".h")]
    return python_files() + shipped + [path for path in project_files() if path.parts[0] == "scripts"]


def _python_functions(path: Path) -> Iterator[tuple[str, int]]:
    for node in ast.walk(ast.parse(read(path))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path}:{node.lineno} {node.name}", node.end_lineno - node.lineno + 1


def _c_functions(path: Path) -> Iterator[tuple[str, int]]:
    """Blocks that open with a line in column 0 that ends in ``{`` and close with a lone ``}`` in column 0."""
    start = 0
    for number, line in enumerate(read(path).splitlines(), 1):
        if line.endswith("{") and line[0] not in " \t}":
            start = number
        elif line == "}" and start:
            yield f"{path}:{start}", number - start + 1
            start = 0


def _is_broad(handler: ast.ExceptHandler) -> bool:
    """Whether it swallows everything; one that ends in a bare ``raise`` only cleans up."""
    last = handler.body[-1]
    if isinstance(last, ast.Raise) and last.exc is None:
        return False
    names = handler.type.elts if isinstance(handler.type, ast.Tuple) else [handler.type]
    return any(
        name is None or (isinstance(name, ast.Name) and name.id in ("Exception", "BaseException"))
        for name in names
    )


def _lines_matching(pattern: re.Pattern[str], paths: list[Path]) -> list[str]:
    return [
        f"{path}:{number}: {line.strip()}"
        for path in paths
        for number, line in enumerate(read(path).splitlines(), 1)
        if pattern.search(line)
    ]


def test_names_that_engines_import_are_thin_doors() -> None:
    doors = [path for path in python_files() if path.is_relative_to("adapters/intree")]
    assert len(doors) > 10
    assert sum(len(read(path).splitlines()) for path in doors) <= DOORS_LINES_MAX


def test_files_are_short() -> None:
    long = {str(path): count for path in _code_files() if (count := read(path).count("\n")) > FILE_LINES_MAX}
    assert not long


def test_functions_are_short() -> None:
    functions = [item for path in python_files() for item in _python_functions(path)]
    functions += [item for path in project_files() if path.suffix == ".c" for item in _c_functions(path)]
    assert len(functions) > 100, "the scan found too little to mean anything"
    assert not [item for item in functions if item[1] > FUNCTION_LINES_MAX]


def test_only_the_configuration_reads_the_environment() -> None:
    paths = [path for path in shipped_python_files() if str(path) not in ENVIRONMENT_READERS]
    assert not _lines_matching(ENVIRONMENT, paths)


def test_nothing_shipped_is_unfinished() -> None:
    shipped = shipped_python_files() + [
        p for p in _code_files() if p.suffix in (".c", ".h") or p.parts[0] == "scripts"
    ]
    assert not _lines_matching(UNFINISHED, shipped)


def test_broad_excepts_only_decrease() -> None:
    found = Counter(
        str(path)
        for path in shipped_python_files()
        for node in ast.walk(ast.parse(read(path)))
        if isinstance(node, ast.ExceptHandler) and _is_broad(node)
    )
    assert dict(found) == {path: count for path, (count, _) in BROAD_EXCEPTS.items()}
    assert all(reason for _, reason in BROAD_EXCEPTS.values())


def test_nothing_shipped_unpickles() -> None:
    # Whoever can write to a socket, a store or a disk could run code. vLLM's own channels are vLLM's.
    paths = [path for path in shipped_python_files() if path.parts[0] == "flexkv_core"]
    assert len(paths) > 50
    assert not _lines_matching(
        re.compile(r"^\s*(?:import|from)\s+(?:pickle|marshal|shelve|dill|cloudpickle)\b"), paths
    )


def test_no_path_of_one_machine() -> None:
    assert not _lines_matching(MACHINE, text_files())


def test_no_attics() -> None:
    assert not [path for path in shipped_python_files() if path.name in ATTIC_NAMES]


def test_source_roots_are_no_packages() -> None:
    # As packages they would shadow the engine's `vllm` and Hugging Face's `kernels`.
    assert not [root for root in SOURCE_ROOTS if (ROOT / root / "__init__.py").exists()]


def test_scripts_can_be_run() -> None:
    scripts = [path for path in project_files() if path.parts[0] in ("scripts", ".ci") and not path.suffix]
    assert scripts
    assert not [path for path in scripts if not (ROOT / path).stat().st_mode & 0o100]
