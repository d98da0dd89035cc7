"""Functions and classes of `__main__` in the process that they travel to: what they share,
and what stays as it was.
"""

from __future__ import annotations

import gc
import itertools
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

from achilles.runtime import arrivals, by_value, context
from achilles.runtime.by_value import dumps
from achilles.runtime.serialize import LARGE, loads

CLIENTS = itertools.count(1000)


@pytest.fixture
def client(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """This process is the runner of that client's tasks, too."""
    number = next(CLIENTS)
    monkeypatch.setattr(context, "client", number)
    yield number
    arrivals.forget(number)
    arrivals.switch_to(0)


def program(text: str) -> dict[str, Any]:
    scope: dict[str, Any] = {"__name__": "__main__", "__file__": "program.py"}
    exec(compile(text, "<string>", "exec", dont_inherit=True), scope)
    return scope


def arrive(value: Any, **options: Any) -> Any:
    return loads(dumps(value, **options))


COUNTER = """
calls, items = 0, []
def count():
    global calls
    calls += 1
    items.append(calls)
    return calls
def seen():
    return calls, items
"""


def test_functions_that_travel_apart_share_their_globals(client: int) -> None:
    scope = program(COUNTER)
    count, seen = arrive(scope["count"]), arrive(scope["seen"])
    assert [count(), count()] == [1, 2]
    assert seen() == arrive(scope["seen"])() == (2, [1, 2])
    assert scope["calls"] == 0
    assert scope["items"] == []


def test_a_function_that_comes_again_is_the_same(client: int) -> None:
    scope = program("def f(seen=[]): seen.append(1); return len(seen)")
    assert arrive(scope["f"]) is arrive(scope["f"])
    assert [arrive(scope["f"])() for _ in range(3)] == [1, 2, 3]


def test_what_the_program_changed_is_seen_and_the_rest_stays(client: int) -> None:
    scope = program("a, b = 1, 1\ndef f(): return a, b\ndef set_b(n):\n    global b\n    b = n")
    first = dumps(scope["f"])
    loads(first)
    arrive(scope["set_b"])(7)
    assert loads(first)() == (1, 7)
    scope["a"] = 2
    assert arrive(scope["f"])() == (2, 7)
    assert loads(first)() == (1, 7), "a task that was submitted before the change"
    assert arrive(scope["f"])() == (2, 7)
    scope["a"] = 1
    assert arrive(scope["f"])() == (1, 7)
    scope["b"] = 3
    assert arrive(scope["f"])() == (1, 3)
    scope["b"] = 1
    assert arrive(scope["f"])() == (1, 1), "the program has set it, after a task had"


USERS = """
scale, table = 1, {}
def helper(): return scale
def deep(): return helper()
def both(): return scale, helper()
def decorate(fn):
    def wrapper(): return fn()
    return wrapper
decorated = decorate(helper)
table["helper"] = helper
def by_table(): return table["helper"]()
def by_default(h=helper): return h()
"""


@pytest.mark.parametrize("how", ["deep", "both", "decorated", "by_table", "by_default"])
def test_what_the_program_changed_is_seen_through_other_functions(client: int, how: str) -> None:
    scope = program(USERS)
    old = None
    for scope["scale"] in (1, 2, 3, 2, 1):
        one = scope["scale"]
        wanted = (one, one) if how == "both" else one
        old = old or dumps(scope[how])
        assert arrive(scope[how])() == wanted
        assert arrive(scope["helper"])() == one
        assert loads(old)() in (1, (1, 1))


ENUMERATIONS = """
import enum
class Planet(enum.Enum):
    EARTH = (1, 2)
    TERRA = (1, 2)
    MARS = (3, 4)
    def __init__(self, mass, radius): self.mass, self.radius = mass, radius
class Label(str, enum.Enum):
    def __new__(cls, value, label):
        one = str.__new__(cls, value)
        one._value_, one.label = value, label
        return one
    A = "a", "Label A"
class Bits(enum.Flag):
    READ = 1
    WRITE = 2
    BOTH = 3
"""


def test_members_of_an_enumeration_keep_what_it_gave_them(client: int) -> None:
    scope = program(ENUMERATIONS)
    datas = [dumps(scope[name]) for name in ("Planet", "Label", "Bits")]
    results = [dumps(scope[name], is_result=True) for name in ("Planet", "Label", "Bits")]
    forget(scope)
    for planet, label, bits in (map(loads, datas), map(loads, results)):
        assert (planet.EARTH.mass, planet.MARS.radius) == (1, 4)
        assert planet["TERRA"] is planet.EARTH
        assert list(planet.__members__) == ["EARTH", "TERRA", "MARS"]
        assert (label.A.label, label.A + "x", label("a")) == ("Label A", "ax", label.A)
        assert bits.READ | bits.WRITE is bits.BOTH


def test_other_bases_are_seen(client: int) -> None:
    scope = program(
        "class A:\n    def who(self): return 'a'\n"
        "class B:\n    def who(self): return 'b'\n"
        "class C(A): pass"
    )
    before = dumps(scope["C"])
    scope["C"].__bases__ = (scope["B"],)
    after = dumps(scope["C"])
    forget(scope)
    kind = loads(before)
    assert kind().who() == "a"
    assert loads(after) is kind
    assert kind().who() == "b"


def test_what_is_deleted_from_a_class_is_gone(client: int) -> None:
    scope = program("class C:\n    old = [1]\n    def m(self): return 1")
    before = dumps(scope["C"])
    del scope["C"].old, scope["C"].m
    after = dumps(scope["C"])
    forget(scope)
    kind = loads(before)
    kind.own = 5
    assert loads(after) is kind
    assert not hasattr(kind, "old")
    assert not hasattr(kind, "m")
    assert kind.own == 5, "what a task has set"


def test_a_helper_that_was_defined_anew_is_seen(client: int) -> None:
    scope = program("def h(): return 1\ndef f(): return h()")
    old = dumps(scope["f"])
    exec("def h(): return 2", scope)
    assert [loads(old)(), arrive(scope["f"])(), loads(old)()] == [1, 2, 1]
    scope["h"].__defaults__ = ()
    assert arrive(scope["f"])() == 2


def test_a_decorated_helper_keeps_its_state(client: int) -> None:
    text = """
def counting(fn):
    calls = []
    def wrapper():
        calls.append(fn())
        return len(calls)
    return wrapper
@counting
def h(): return 1
def f(): return h()
def g(): return h()
"""
    scope = program(text)
    assert [arrive(scope["f"])(), arrive(scope["g"])(), arrive(scope["f"])()] == [1, 2, 3]


def test_what_cannot_travel_on_is_the_other_runners_own(client: int) -> None:
    """A task that submits: what an initializer made on its runner, another makes on the next."""
    scope = program(
        "lock = None\ndef start(l):\n    global lock\n    lock = l\ndef f(): return lock"
    )
    arrive(scope["start"])(threading.Lock())
    here = arrive(scope["f"])
    assert here() is not None
    assert arrive(here) is here


def test_large_values_come_anew(client: int) -> None:
    scope = program(f"data = bytearray({LARGE})\ndef f(): return data")
    scope["data"] = b"x" * LARGE
    assert arrive(scope["f"])() == b"x" * LARGE
    scope["data"] = b"y" * LARGE
    assert arrive(scope["f"])() == b"y" * LARGE


def test_clients_and_programs_are_apart(client: int, monkeypatch: pytest.MonkeyPatch) -> None:
    scope = program(COUNTER)
    arrive(scope["count"])()
    assert arrive(program(COUNTER)["seen"])() == (0, [])
    mine = sys.modules["__main__"]
    other = next(CLIENTS)
    monkeypatch.setattr(context, "client", other)
    assert arrive(scope["seen"])() == (0, [])
    assert sys.modules["__main__"] is not mine
    arrivals.switch_to(client)
    assert sys.modules["__main__"] is mine
    arrivals.forget(other)


def test_a_client_that_is_gone_leaves_nothing(client: int) -> None:
    arrive(program(COUNTER)["count"])
    assert client in arrivals._namespaces
    arrivals.forget(client)
    assert client not in arrivals._namespaces
    assert client not in arrivals._mains


def test_another_module_of_the_program_is_a_module_there_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module: Any = ModuleType("module_of_a_program")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec("import threading\nN, lock = 1, threading.Lock()\ndef f(): return N", vars(module))
    module.module = module
    plain = loads(dumps(module))
    assert plain is plain.module is not module
    assert (plain.f(), hasattr(plain, "lock")) == (1, False)
    one, other = dumps((module, module.f)), dumps(module.f)
    monkeypatch.delitem(sys.modules, module.__name__)
    number = next(CLIENTS)
    monkeypatch.setattr(context, "client", number)
    main = sys.modules["__main__"]
    arrived, function = loads(one)
    arrived.N = 2
    assert (function(), loads(other)(), arrived.f()) == (2, 2, 2)
    assert sys.modules["__main__"] is main
    again = dumps(arrived)  # a task submits what it got
    assert loads(again) is arrived
    arrivals.forget(number)


def test_the_programs_of_a_client_are_bounded(client: int) -> None:
    programs = [program("def f(): return 1") for _ in range(3 * arrivals.NAMESPACES_MAX)]
    for scope in programs:
        assert arrive(scope["f"])() == 1
    assert len(arrivals._namespaces[client]) == arrivals.NAMESPACES_MAX
    assert len(arrivals.records) == sum(map(len, arrivals._namespaces.values()))


def test_outside_of_a_runner_each_pickle_is_by_itself() -> None:
    scope = program(COUNTER)
    before = sys.modules["__main__"]
    assert [arrive(scope["count"])() for _ in range(2)] == [1, 1]
    assert sys.modules["__main__"] is before


def test_the_same_is_the_same_bytes() -> None:
    scope = program(COUNTER)
    assert dumps(scope["count"]) == dumps(scope["count"])
    scope["items"].append(1)
    assert dumps(scope["count"]) != dumps(program(COUNTER)["count"])


def test_a_function_says_in_which_file_it_is() -> None:
    """Tracebacks show the line then; cloudpickle 3.1.3 leaves the name out."""
    scope: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("def outer(): return lambda: 1", "program.py", "exec"), scope)
    there = arrive(scope["outer"])
    assert there.__code__.co_filename == there().__code__.co_filename == "program.py"


def test_main_has_a_file_where_it_is_there(client: int) -> None:
    scope = program("def f(): return __file__")
    assert arrive(scope["f"])() == "program.py"
    assert not hasattr(sys.modules["__main__"], "__file__")
    scope["__file__"] = __file__
    assert arrive(scope["f"])() == __file__
    assert sys.modules["__main__"].__file__ == __file__


# --- Results --------------------------------------------------------------------------------------


def test_a_result_names_the_programs_own() -> None:
    def closure() -> int:
        return five

    five = 5
    found = arrive(test_the_same_is_the_same_bytes, is_result=True)
    assert found is test_the_same_is_the_same_bytes
    assert arrive(closure, is_result=True)() == 5
    scope = program("def f(): return 1\ndef g(): return f() + 1")
    made = arrive(scope["g"], is_result=True)
    assert made is not scope["g"]
    assert made() == 2


def test_a_class_that_is_there_stays_as_it_is() -> None:
    scope = program("class C:\n    n = 0\n    def get(self): return self.n")
    kind = scope["C"]
    get = kind.get
    for is_result in (False, True):
        data = dumps(kind(), is_result=is_result)
        kind.n = 5
        assert type(loads(data)) is kind
        assert (kind.n, kind.get) == (5, get)
        kind.n = 0


def forgotten(text: str) -> tuple[bytes, bytes]:
    """Two pickles of a class C, between which n was changed to 1; then nobody knows it any more."""
    scope = program(text)
    kind = scope["C"]
    first = dumps(kind)
    kind.n = 1
    second = dumps(kind)
    del kind
    scope.clear()
    gc.collect()
    return first, second


def test_a_class_comes_once_and_again_when_it_changed() -> None:
    first, second = forgotten("class C:\n    n = 0\n    def get(self): return self.n")
    kind = loads(first)
    kind.n = 7
    assert loads(first) is kind
    assert kind.n == 7
    assert loads(second) is kind
    assert kind.n == 1


def test_slots_are_slots() -> None:
    first, _ = forgotten(
        "class B:\n    __slots__ = ()\n"
        "class C(B):\n    __slots__ = ('__x', 'y')\n    n = 0\n    def __init__(self): self.__x = 3"
    )
    kind = loads(first)
    assert vars(kind)["_C__x"].__get__(kind()) == 3
    assert not hasattr(kind(), "__dict__")
    assert kind().__reduce_ex__(5)[2] == (None, {"_C__x": 3})


def test_a_class_within_a_class_keeps_its_name() -> None:
    first, _ = forgotten("class O:\n    class I: pass\nC = O.I")
    assert loads(first).__qualname__ == "O.I"


# --- Classes that are taken apart once ------------------------------------------------------------

POINT = """
import abc, dataclasses, functools, typing
FACTOR = 2
def helper(value): return value * FACTOR
class Base(abc.ABC):
    def scaled(self): return helper(self.x)
    @abc.abstractmethod
    def name(self): ...
class Point(Base):
    kind = "point"
    pair = (1, 2)
    def __init__(self, x):
        super().__init__()
        self.x = x
    def name(self): return "point"
    def __eq__(self, other): return isinstance(other, Point) and self.x == other.x
    @property
    def twice(self): return 2 * self.x
    @staticmethod
    def one(): return 1
    @classmethod
    def make(cls, x): return cls(x)
    @functools.cached_property
    def cached(self): return Other(self.x)
class Named:
    name = "one"
@dataclasses.dataclass(frozen=True, order=True)
class Other:
    a: int
    named: Named | None = None
    b: list = dataclasses.field(default_factory=list)
    def point(self): return Point(self.a)
class Pair(typing.NamedTuple):
    left: int
    right: int = 2
class Slotted:
    __slots__ = ("a",)
    class Inner: pass
"""
CHANGES = {
    "an attribute": "Point.kind = 'dot'",
    "another attribute": "Point.more = 1",
    "one less": "del Point.pair",
    "a method": "Point.name = lambda self: 'dot'",
    "a method's code": "Point.name.__code__ = (lambda self: 'dot').__code__",
    "a property": "Point.twice = property(lambda self: 3 * self.x)",
    "a class method": "Point.make = classmethod(lambda cls, x: cls(x + 1))",
    "its base's method": "Base.scaled = lambda self: 0",
    "what a method uses": "FACTOR = 3",
    "a function that it uses": "def helper(value): return 0",
    "a class that it uses": "class Other: pass",
    "the default of a dataclass": "Other.__init__.__defaults__ = (7,)",
    "what is registered for its base": "Base.register(int)",
    "a static method, twice": "Point.one = staticmethod(len)\nPoint.one = staticmethod(helper)",
    "the class of a field": "Named.name = 'another'",
}


def forget(scope: dict[str, Any]) -> None:
    """Let go of a program; of a base class only when the first round has found that nothing is
    derived from it.
    """
    scope.clear()
    gc.collect()
    gc.collect()


def kept(kind: type, is_result: bool = False) -> by_value._ClassPickle:
    found = by_value._pickle_of(kind, is_result)
    assert found is not None
    return found


@pytest.mark.parametrize("name", ["Base", "Point", "Other", "Pair", "Slotted"])
def test_a_class_is_taken_apart_once(name: str) -> None:
    """For all that is made of it, as an argument and as a result."""
    kind = program(POINT)[name]
    for is_result in (False, True):
        first = kept(kind, is_result)
        assert kept(kind, is_result) is first
        assert dumps([kind], is_result=is_result).count(first.data) == 1
        assert loads(dumps([kind], is_result=is_result)) == [kind]


def test_what_is_made_of_a_class_brings_it_as_it_was_taken_apart() -> None:
    """Also what is made later: the first instance that is pickled leaves a note in its class."""
    scope = program(POINT)
    for name, args in (("Point", (1,)), ("Other", (1,)), ("Pair", (1,))):
        for is_result in (False, True):
            pickles = [dumps(scope[name](*args), is_result=is_result) for _ in range(3)]
            data = kept(scope[name], is_result).data
            assert [one.count(data) for one in pickles] == [1, 1, 1]


@pytest.mark.parametrize("what", CHANGES)
def test_a_class_that_changed_is_taken_apart_again(what: str) -> None:
    scope = program(POINT)
    before = kept(scope["Point"])
    exec(CHANGES[what], scope)
    after = kept(scope["Point"])
    assert after.token != before.token
    assert kept(scope["Point"]) is after


@pytest.mark.parametrize(
    "text",
    [
        "class C:\n    seen = []",
        "TABLE = [1]\nclass C:\n    def get(self): return TABLE",
        "class B:\n    seen = {}\nclass C(B): pass",
        "import enum\nclass C(enum.Enum):\n    A = 1",
        "class C:\n    __config__ = {}",
        "class C:\n    a: iter([])",
        "def wrap(f):\n    f.calls = []\n    return f\nclass C:\n    @wrap\n    def get(self): pass",
    ],
    ids=["attribute", "global", "base", "metaclass", "dunder", "annotation", "function"],
)
def test_a_class_with_something_that_can_change_unseen_is_taken_apart_each_time(text: str) -> None:
    kind = program(text)["C"]
    assert by_value._pickle_of(kind, False) is None
    assert loads(dumps(kind)) is kind


def test_what_arrives_works_as_it_did_at_home(client: int) -> None:
    """Its methods find each other and the program's other classes;
    it comes again as the same class.
    """
    scope = program(POINT)
    data = dumps(scope["Point"](4))
    other = dumps((scope["Other"](5), scope["Pair"](1), scope["Slotted"]))
    forget(scope)
    point = loads(data)
    assert (point.scaled(), point.name(), point.twice, point.one()) == (8, "point", 8, 1)
    assert point.make(4) == point == loads(data)
    assert type(loads(data)) is type(point)
    assert point.cached.a == 4
    assert point.cached.point() == point
    arrived, pair, slotted = loads(other)
    assert repr(arrived) == "Other(a=5, named=None, b=[])"
    assert pair == (1, 2)
    assert not hasattr(slotted(), "__dict__")


def test_a_task_sees_a_class_as_it_was_when_it_was_submitted() -> None:
    """Also one that is run after a later one."""
    scope = program("class C:\n    n = 0")
    kind = scope["C"]
    old = dumps(kind)
    kind.n = 1
    new = dumps(kind)
    del kind
    forget(scope)
    arrived = loads(old)
    assert arrived.n == 0
    assert [loads(data).n for data in (new, old, old, new)] == [1, 0, 0, 1]
    assert loads(old) is arrived


def test_a_class_is_not_kept_alive_by_what_is_kept_of_it() -> None:
    scope = program(POINT)
    kinds = [weakref.ref(value) for value in scope.values() if isinstance(value, type)]
    for value in list(scope.values()):
        if isinstance(value, type):
            dumps(value)
            dumps(value, is_result=True)
    del value
    forget(scope)
    assert [kind() for kind in kinds] == [None] * 6


def test_a_class_that_is_there_brings_its_globals_to_a_new_state_of_the_program(
    client: int,
) -> None:
    """Functions that come later rely on what it says that it has brought."""
    scope = program(
        "x = y = 1\n"
        "class C:\n    def m(self): return x\n"
        "def k(c): return c.m(), y\n"
        "def f(): return x\n"
        "def h(): return x\n"
    )

    def sent(*names: str) -> list[Any]:
        return list(arrive([scope[name] for name in names]))

    def called() -> Any:
        k, c = sent("k", "C")
        return k(c())

    assert called() == (1, 1)
    scope["x"] = 2
    assert sent("f")[0]() == 2
    scope["x"], scope["y"] = 1, 2
    called()
    assert sent("h")[0]() == 1
    arrivals.forget(client)
    assert called()[1] == 2
    assert sent("h")[0]() == 1


def test_a_forks_tokens_are_its_own() -> None:
    """Parent and child may have tasks on one runner; each counts from where it was."""
    parent, child = (program(f"class C:\n    n = {n}")["C"] for n in (1, 2))
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        os.write(write_end, kept(child).token.encode())
        os._exit(0)
    os.close(write_end)
    with os.fdopen(read_end) as pipe:
        token = pipe.read()
    os.waitpid(pid, 0)
    assert len(token) > 20
    assert token != kept(parent).token
