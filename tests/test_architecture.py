"""The budgets and rules of the house, over every module of src/kvkeep; the checkers are tested as well."""

from __future__ import annotations

import ast
import builtins
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from kvkeep.core.allocator import Extent, FreeList
from kvkeep.testing.suites.allocators import AllocatorCase, check_fill

SRC = Path(__file__).parents[1] / "src"
MODULE_LINES, FUNCTION_LINES, ARGUMENTS, PROTOCOL_METHODS = 400, 50, 6, 6
FOLDER_FILES = 13
POSITIONS = 4  # arguments of a call without their names
VAGUE_NAMES = {"one", "ones"}
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
BAD_NAME = re.compile(r".+(Manager|Handler|Helper|Util|Utils|Base|Impl)")
FORBIDDEN_MODULES = ("pickle", "_pickle", "cPickle", "cloudpickle", "dill", "multiprocessing.shared_memory")

NO_PRODUCT = ("kvkeep.testing", "kvkeep.bench")
PLAIN_DECORATORS = {"dataclass", "lru_cache"}
# What nothing in the product names -> who calls it. A reason that nothing needs fails the test.
CALLED_FROM_OUTSIDE: dict[str, str] = {
    "kvkeep.cli.bench:bench": "the command group finds it by the command's name",
    "kvkeep.cli.doctor:doctor": "the command group finds it by the command's name",
    "kvkeep.core.segment:segments": "users split prompts with it: docs/reference/cache-engine.md",
    "kvkeep.doors.library.cache_engine:CacheEngine": "the library's users call its verbs",
    "kvkeep.doors.library.open:open_cache": "the library's users begin with it",
    "kvkeep.doors.vllm.connector:KVKeepConnector": "vLLM finds it by its name",
    "kvkeep.telemetry:Figures.misses": "users of CacheEngine ask its figures why lookups missed",
    "kvkeep.tiers.record_tier:open_record_tier": "whoever writes a Place makes a tier of it",
    "kvkeep.tiers.disk.directory:Directory.wait_for_scan": "tests and benchmarks wait for the start-up scan; nothing else may",
    "kvkeep.tiers.disk.disk:DiskTier.wait_for_scan": "tests and benchmarks wait for the start-up scan; nothing else may",
}

# "module: fault" as the test prints it -> why it may stay. An exemption that nothing needs fails the test.
EXEMPT: dict[str, str] = {}

Checker = Callable[[str, ast.Module, str], Iterator[str]]


def modules() -> dict[str, str]:
    """Every module's name and source."""
    found = {}
    for file in sorted((SRC / "kvkeep").rglob("*.py")):
        name = ".".join(file.relative_to(SRC).with_suffix("").parts).removesuffix(".__init__")
        found[name] = file.read_text(encoding="utf-8")
    return found


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, bool]]:
    """Every function, and whether its first argument is self or cls."""
    methods = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            methods |= {
                item
                for item in node.body
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)
                and not any(dotted(decorator) == "staticmethod" for decorator in item.decorator_list)
            }
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, node in methods


def dotted(node: ast.expr) -> str:
    """ "a.b.c" of a name or an attribute, whatever it is subscripted with or called with; else ""."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        front = dotted(node.value)
        return f"{front}.{node.attr}" if front else ""
    if isinstance(node, ast.Subscript):
        return dotted(node.value)
    if isinstance(node, ast.Call):
        return dotted(node.func)
    return ""


def imports(name: str, tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(name bound here, what it is in full) of every import at any depth; relative ones are kvkeep's."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for item in node.names:
                yield item.asname or item.name.split(".")[0], item.name
        elif isinstance(node, ast.ImportFrom):
            source = node.module or "" if node.level == 0 else f"kvkeep.{node.module or name}"
            for item in node.names:
                yield item.asname or item.name, f"{source}.{item.name}"


def check_size(_name: str, tree: ast.Module, source: str) -> Iterator[str]:
    if (lines := len(source.splitlines())) > MODULE_LINES:
        yield f"module has {lines} lines"
    for function, _ in functions(tree):
        lines = (function.end_lineno or 0) - function.lineno + 1
        if lines > FUNCTION_LINES:
            yield f"{function.name} has {lines} lines"


def check_arguments(_name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    for function, is_method in functions(tree):
        given = function.args
        count = len(given.posonlyargs) + len(given.args) + len(given.kwonlyargs) - is_method
        count += (given.vararg is not None) + (given.kwarg is not None)
        if count > ARGUMENTS:
            yield f"{function.name} takes {count} arguments"


def check_classes(_name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        if BAD_NAME.fullmatch(node.name):
            yield f"class {node.name} has a name that says nothing"
        methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
        is_protocol = any(dotted(base).split(".")[-1] == "Protocol" for base in node.bases)
        if is_protocol and len(methods) > PROTOCOL_METHODS:
            yield f"Protocol {node.name} has {len(methods)} methods"


def check_inheritance(name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    """Bases come from outside kvkeep; exceptions are a tree, in errors.py alone."""
    if name == "kvkeep.errors":
        return
    bound = dict(imports(name, tree))
    for node in ast.walk(tree):
        if not isinstance(node, ast.ClassDef):
            continue
        for base in map(dotted, node.bases):
            origin = bound.get(base.split(".")[0], "")
            kind = getattr(builtins, base, None)
            if isinstance(kind, type) and issubclass(kind, BaseException):
                yield f"class {node.name} is an exception outside errors.py"
            elif kind is None and (origin == "" or origin.split(".")[0] == "kvkeep"):
                yield f"class {node.name} inherits from {base or 'an expression'}, which is ours"


def check_exceptions(_name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    for node in ast.walk(tree):
        caught: list[ast.expr | None] = []
        if isinstance(node, ast.ExceptHandler):
            caught = list(node.type.elts) if isinstance(node.type, ast.Tuple) else [node.type]
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] == "suppress":
            caught = list(node.args)
        for kind in caught:
            if kind is None or dotted(kind).split(".")[-1] in {"Exception", "BaseException"}:
                yield f"line {node.lineno} catches everything"


def check_forbidden(name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    for _, full in imports(name, tree):
        for module in FORBIDDEN_MODULES:
            if full == module or full.startswith(f"{module}."):
                yield f"imports {module}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and dotted(node.func) in {
            "eval",
            "exec",
            "builtins.eval",
            "builtins.exec",
        }:
            yield f"line {node.lineno} calls {dotted(node.func)}"
        elif isinstance(node, ast.Attribute) and dotted(node) == "multiprocessing.shared_memory":
            yield "uses multiprocessing.shared_memory"
        elif isinstance(node, ast.Global):
            yield f"line {node.lineno} has a global statement"


def check_engines(name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    """Torch under transfer/, engine/, doors/ and bench/ only; vllm under doors/vllm/ only.

    The fake engine may have torch too: it plays an engine's part, and transfers take an engine's tensors.
    """
    packages = {full.split(".")[0] for _, full in imports(name, tree)}
    if "torch" in packages and not re.match(
        r"kvkeep\.((transfer|engine|doors|bench)(\.|$)|testing\.fake_engine\.)", name
    ):
        yield "imports torch"
    if "vllm" in packages and not re.fullmatch(r"kvkeep\.doors\.vllm\.\w+", name):
        yield "imports vllm"


def check_vague_names(_name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    """`one` says nothing: a variable, a parameter or an attribute is called by its noun."""
    for node in ast.walk(tree):
        bound = ""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound = node.id
        elif isinstance(node, ast.arg):
            bound = node.arg
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            bound = node.attr
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs):
            bound = node.name or ""
        elif isinstance(node, ast.alias):
            bound = node.asname or ""
        if bound in VAGUE_NAMES:
            yield f"line {node.lineno} calls something {bound!r}"


def check_asserts(name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    """An assert is about our own invariant; what a caller passes in is checked by an exception, which -O keeps.

    So no assert reads a parameter of its function, or what a loop takes out of one. Tests' own kit may.
    """
    if name.startswith("kvkeep.testing"):
        return
    for function, is_method in functions(tree):
        given = function.args
        passed = {arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)[is_method:]}
        passed |= {arg.arg for arg in (given.vararg, given.kwarg) if arg is not None}
        for node in ast.walk(function):
            if isinstance(node, ast.For | ast.AsyncFor | ast.comprehension) and names_in(node.iter) & passed:
                passed |= names_in(node.target)
        for node in ast.walk(function):
            if isinstance(node, ast.Assert) and (read := names_in(node.test) & passed):
                yield f"line {node.lineno} asserts what a caller passes in: {', '.join(sorted(read))}"


def names_in(node: ast.AST) -> set[str]:
    return {item.id for item in ast.walk(node) if isinstance(item, ast.Name)}


def check_positions(name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    """A call of something of ours says the names of its arguments from the fifth on: nobody counts to nine."""
    bound = dict(imports(name, tree))
    here = {node.name for node in ast.walk(tree) if isinstance(node, DEFINITIONS)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call) or len(node.args) <= POSITIONS:
            continue
        root, _, rest = dotted(node.func).partition(".")
        if root in bound:
            ours = bound[root].split(".")[0] == "kvkeep"
        else:
            ours = root in here if not rest else rest.split(".")[-1] in method_names()
        if ours:
            yield f"line {node.lineno} passes {len(node.args)} arguments by position to {dotted(node.func)}"


@cache
def method_names() -> frozenset[str]:
    """The names of all methods of ours."""
    classes = (
        node for source in modules().values() for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ClassDef)
    )
    return frozenset(item.name for node in classes for item in node.body if isinstance(item, FUNCTIONS))


def check_docstring(_name: str, tree: ast.Module, _source: str) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "has no docstring"


CHECKERS: tuple[Checker, ...] = (
    check_size,
    check_arguments,
    check_classes,
    check_inheritance,
    check_exceptions,
    check_forbidden,
    check_engines,
    check_docstring,
    check_vague_names,
    check_asserts,
    check_positions,
)


def faults(name: str, source: str) -> list[str]:
    """All faults of one module, as "module: fault"."""
    tree = ast.parse(source)
    return [f"{name}: {fault}" for checker in CHECKERS for fault in checker(name, tree, source)]


class Definition(NamedTuple):
    """A function, a class, a method or a module's constant, and where it is, as "module:Class.name"."""

    place: str
    name: str


def definitions(module: str, tree: ast.Module) -> Iterator[Definition]:
    """What a module defines and somebody must call by its name.

    Dunders are Python's to call; what a call as its decorator registers, the registry's; a method of a class with a
    foreign base, the foreign framework's.
    """
    bound = dict(imports(module, tree))
    for node in tree.body:
        for name in defined_names(node):
            yield Definition(f"{module}:{name}", name)
        if isinstance(node, ast.ClassDef) and not any(is_framework(base, bound) for base in node.bases):
            for item in node.body:
                for name in defined_names(item) if isinstance(item, FUNCTIONS) else ():
                    yield Definition(f"{module}:{node.name}.{name}", name)


def defined_names(node: ast.stmt) -> list[str]:
    found: list[str] = []
    if isinstance(node, DEFINITIONS):
        calls = [decorator for decorator in node.decorator_list if isinstance(decorator, ast.Call)]
        found = [] if any(dotted(call) not in PLAIN_DECORATORS for call in calls) else [node.name]
    elif isinstance(node, ast.Assign):
        found = [item.id for target in node.targets for item in ast.walk(target) if isinstance(item, ast.Name)]
    elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
        found = [node.target.id]
    return [name for name in found if not name.startswith("__")]


def is_framework(base: ast.expr, bound: Mapping[str, str]) -> bool:
    """Whether a base class is one whose methods others call: neither ours nor one that only gives a class its form."""
    origin = bound.get(dotted(base).split(".")[0], "kvkeep")
    return origin.split(".")[0] not in {"kvkeep", "typing", "msgspec", "enum"}


def uses_of(node: ast.AST) -> Counter[str]:
    """How often each name is read in here, as a name or as an attribute."""
    read = (item for item in ast.walk(node) if isinstance(item, ast.Name | ast.Attribute))
    return Counter(
        item.id if isinstance(item, ast.Name) else item.attr for item in read if isinstance(item.ctx, ast.Load)
    )


def unused(sources: Mapping[str, str]) -> list[str]:
    """What nothing in the product names: neither `testing` nor `bench` counts, nor what a definition says of itself."""
    product = {name: ast.parse(text) for name, text in sources.items() if not name.startswith(NO_PRODUCT)}
    uses: Counter[str] = Counter()
    for tree in product.values():
        uses += uses_of(tree)
        for node in ast.walk(tree):
            if isinstance(node, DEFINITIONS):
                uses[node.name] -= sum(uses_of(item)[node.name] for item in node.body)
    found = (one for name, tree in product.items() for one in definitions(name, tree))
    return [definition.place for definition in found if uses[definition.name] <= 0]


def called_from_outside(place: str) -> str:
    """Why nothing in the product needs to name this; empty where there is no reason."""
    return next(
        (reason for start, reason in CALLED_FROM_OUTSIDE.items() if place == start or place.startswith(f"{start}.")), ""
    )


def test_the_house_is_in_order() -> None:
    found = [fault for name, source in modules().items() for fault in faults(name, source)]
    assert [fault for fault in found if fault not in EXEMPT] == []
    assert [fault for fault in EXEMPT if fault not in found] == [], "an exemption that nothing needs"
    assert all(reason.strip() for reason in EXEMPT.values())


def test_everything_has_a_caller_in_the_product() -> None:
    found = unused(modules())
    assert [place for place in found if not called_from_outside(place)] == []
    needless = [
        start
        for start in CALLED_FROM_OUTSIDE
        if not any(place == start or place.startswith(f"{start}.") for place in found)
    ]
    assert needless == [], "a reason that nothing needs"


def test_no_folder_holds_more_files_than_a_reader_can_keep_in_mind() -> None:
    folders = Counter(file.parent for file in (SRC / "kvkeep").rglob("*.py"))
    assert {str(folder): count for folder, count in folders.items() if count > FOLDER_FILES} == {}


def test_no_class_name_stands_for_two_things() -> None:
    places: dict[str, list[str]] = {}
    for name, source in modules().items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.ClassDef):
                places.setdefault(node.name, []).append(name)
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


def test_the_whole_house_is_looked_at() -> None:
    assert {"kvkeep", "kvkeep.errors", "kvkeep.config", "kvkeep.memory", "kvkeep.memory.region"} <= set(modules())


def body(lines: int) -> str:
    return "def f():\n" + "    x = 1\n" * (lines - 1)


def signature(count: int, first: str = "") -> str:
    return f"def f({first}{', '.join(f'a{i}' for i in range(count))}): ...\n"


def in_class(text: str, head: str = "class A:") -> str:
    return f"{head}\n" + "".join(f"    {line}\n" for line in text.splitlines())


METHODS_6 = "".join(f"def m{i}(self): ...\n" for i in range(6))
PROTOCOL = "import typing\nclass P(typing.Protocol[T]):"
BAD: list[tuple[str, str]] = [
    ("x = 1\n" * 400, "401 lines"),
    (body(51), "f has 51 lines"),
    (in_class("async " + body(51)), "f has 51 lines"),
    (signature(7), "7 arguments"),
    (signature(6, "*rest, "), "7 arguments"),
    (in_class(signature(7, "self, ")), "7 arguments"),
    (in_class("@staticmethod\n" + signature(7)), "7 arguments"),
    (in_class(METHODS_6 + "async def m6(self): ...", PROTOCOL), "7 methods"),
    ("class PoolManager: ...", "says nothing"),
    ("class TierBase: ...", "says nothing"),
    ("class StringUtils: ...", "says nothing"),
    ("class A: ...\nclass B(A): ...", "inherits from A"),
    ("from kvkeep.core import A\nclass B(A): ...", "inherits from A"),
    ("import kvkeep.core\nclass B(kvkeep.core.A[int]): ...", "inherits from kvkeep.core.A"),
    ("from .core import A\nclass B(A): ...", "inherits from A"),
    ("from . import core\nclass B(core.A): ...", "inherits from core.A"),
    ("class B(make()): ...", "inherits from make"),
    ("class E(ValueError): ...", "exception outside errors.py"),
    ("from kvkeep.errors import WireError\nclass E(WireError): ...", "inherits from WireError"),
    ("try: ...\nexcept: ...", "catches everything"),
    ("try: ...\nexcept Exception: ...", "catches everything"),
    ("try: ...\nexcept (OSError, BaseException) as e: ...", "catches everything"),
    ("import builtins\ntry: ...\nexcept builtins.Exception: ...", "catches everything"),
    ("import contextlib\nwith contextlib.suppress(Exception): ...", "catches everything"),
    ("import pickle", "imports pickle"),
    ("def f():\n    from pickle import loads", "imports pickle"),
    ("import cloudpickle as c", "imports cloudpickle"),
    ("from multiprocessing import shared_memory", "imports multiprocessing.shared_memory"),
    ("import multiprocessing.shared_memory as m", "imports multiprocessing.shared_memory"),
    ("from multiprocessing.shared_memory import SharedMemory", "imports multiprocessing.shared_memory"),
    ("import multiprocessing\nx = multiprocessing.shared_memory.SharedMemory()", "uses multiprocessing"),
    ("eval('1')", "calls eval"),
    ("exec('1')", "calls exec"),
    ("def f():\n    global x", "global statement"),
    ("import torch", "imports torch"),
    ("def f():\n    from torch.cuda import Stream", "imports torch"),
    ("from vllm.config import VllmConfig", "imports vllm"),
    ("one = 1", "calls something 'one'"),
    ("ones: list[int] = []", "calls something 'ones'"),
    ("def f(one): ...", "calls something 'one'"),
    ("f = lambda *ones: 1", "calls something 'ones'"),
    ("x = [one.y for one in z]", "calls something 'one'"),
    ("self.one = 1", "calls something 'one'"),
    ("with f() as (a, one): ...", "calls something 'one'"),
    ("try: ...\nexcept OSError as one: ...", "calls something 'one'"),
    ("from a import b as one", "calls something 'one'"),
    ("def f(a):\n    assert a", "asserts what a caller passes in: a"),
    ("def f(a, *, b):\n    assert not (a.c or b), 'text'", "asserts what a caller passes in: a, b"),
    ("def f(*a):\n    for b in a:\n        assert b > 0", "asserts what a caller passes in: b"),
    ("def f(a):\n    def g():\n        assert a", "asserts what a caller passes in: a"),
    (in_class("async def f(self, a):\n    assert a in self.b"), "asserts what a caller passes in: a"),
    ("from kvkeep.core import f\nf(1, 2, 3, 4, 5)", "5 arguments by position to f"),
    ("import kvkeep.core as c\nc.f(1, 2, 3, 4, *x)", "5 arguments by position to c.f"),
    ("class A: ...\nA(1, 2, 3, 4, 5)", "5 arguments by position to A"),
    ("x.pin_prefix(1, 2, 3, 4, 5)", "5 arguments by position to x.pin_prefix"),
]
GOOD: list[str] = [
    "x = 1\n" * 399,
    body(50),
    signature(6),
    in_class(signature(6, "self, ")),
    in_class("@classmethod\n" + signature(6, "cls, ")),
    in_class(METHODS_6, PROTOCOL),
    "class Managed: ...\nclass Base64: ...",
    "from typing import NamedTuple, Protocol, Generic\nclass A(NamedTuple): ...\nclass B(Protocol): ...",
    "import msgspec\nimport enum as e\nclass A(msgspec.Struct, tag=True): ...\nclass B(e.Enum): ...",
    "class A(dict[str, int]): ...",
    "from torchvision import x",
    "import contextlib\nwith contextlib.suppress(OSError): ...",
    "try: ...\nexcept (OSError, ValueError): ...",
    "model.eval()\nx.exec()",
    "from kvkeep.doors.vllm.connector import Connector",
    "x = f(one, one.ones)\nimport one\nnone = once = 1",
    "def f(a):\n    b = g()\n    assert b is not None",
    in_class("def f(self, a):\n    assert self.b"),
    "def f(a):\n    if a: raise ValueError(a)\nassert a",
    "from kvkeep.core import f\nf(1, 2, 3, 4, a=5, b=6)",
    "import struct\nstruct.pack('4I', 1, 2, 3, 4)\nprint(1, 2, 3, 4, 5)\nlog.info('', 1, 2, 3, 4)",
]


@pytest.mark.parametrize(("source", "fault"), BAD)
def test_a_fault_is_seen(source: str, fault: str) -> None:
    found = faults("kvkeep.core.x", f'"""Doc."""\n{source}')
    assert len(found) == 1, found
    assert fault in found[0]


@pytest.mark.parametrize("source", GOOD)
def test_what_is_right_passes(source: str) -> None:
    assert faults("kvkeep.core.x", f'"""Doc."""\n{source}') == []


@pytest.mark.parametrize(
    ("name", "source", "right"),
    [
        ("kvkeep.transfer.cpu", "import torch", True),
        ("kvkeep.engine", "import torch", True),
        ("kvkeep.transferred", "import torch", False),
        ("kvkeep.testing.fake_engine.engine", "import torch", True),
        ("kvkeep.testing.fake_engines.engine", "import torch", False),
        ("kvkeep.testing.doubles.transfers", "import torch", False),
        ("kvkeep.doors.vllm.connector", "import vllm", True),
        ("kvkeep.doors.library.open", "import vllm", False),
        ("kvkeep.engine.scheduler.planner", "import vllm", False),
        ("kvkeep.errors", "class A(Exception): ...\nclass B(A): ...", True),
    ],
)
def test_where_an_import_is_right(name: str, source: str, right: bool) -> None:
    assert (faults(name, f'"""Doc."""\n{source}') == []) is right


PRODUCT = {
    "kvkeep.core.a": """
import enum
import typer
from kvkeep.core.b import used, Shape
LIMIT, OTHER = 1, 2
class Kept(Shape):
    x: int
    def verb(self): return self.spare()
    def spare(self): return LIMIT
    def alone(self): return self.alone()
    def __len__(self): return 0
    @property
    def seen(self): return used(Kept)
class Framework(typer.Group):
    def called_by_typer(self): ...
@app.command("x")
def command(): return Kept
def recursive(): return recursive()
""",
    "kvkeep.core.b": "def used(): ...\nclass Shape: ...\ndef helped(): ...\nFramework",
    "kvkeep.testing.c": "from kvkeep.core.b import helped\nhelped()\nOTHER\nverb\ndef kit(): ...",
}


def test_what_only_tests_and_benchmarks_name_is_seen() -> None:
    assert unused(PRODUCT) == [
        "kvkeep.core.a:OTHER",
        "kvkeep.core.a:Kept.verb",
        "kvkeep.core.a:Kept.alone",
        "kvkeep.core.a:Kept.seen",
        "kvkeep.core.a:recursive",
        "kvkeep.core.b:helped",
    ]


def test_a_module_without_a_docstring_is_seen() -> None:
    assert faults("kvkeep.x", "x = 1") == ["kvkeep.x: has no docstring"]


def test_asserts_of_tests_and_of_what_they_stand_on_hold_without_pythons_own() -> None:
    """`make fast-optimized` would prove nothing otherwise."""
    extent, allocator = Extent(0, 1), FreeList(4096)
    with pytest.raises(AssertionError):
        assert extent.nbytes == 2
    with pytest.raises(AssertionError):
        check_fill(AllocatorCase(lambda _: allocator, 4096, (1,), 4096))
