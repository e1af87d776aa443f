"""The house stands: imports point down, run in no circle, and nobody takes a private name of another module."""

import ast
import graphlib
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = ("train", "benchmarks")
FLOORS = (  # from the ground up: a room imports from lower floors and from itself, not from beside it
    ("order",),
    ("hub.download", "hub.vae_weights", "hub.weight_files", "hub.files"),  # what models load with
    ("models",),
    ("data",),
    ("collapse",),
    ("timm_collapse",),  # the package itself: its public names
    ("evaluation", "lessons"),
    ("plots",),
    ("hub",),
    ("engine",),
    ("quickstart",),
    ("cli",),
    ("__main__", *SCRIPTS),
)


class Use(NamedTuple):
    """A module uses another one, or a name of it; `runs` is False under `if TYPE_CHECKING`."""

    user: str
    module: str
    name: str
    runs: bool
    line: int


def read_house(root):
    """Full name -> syntax tree of every module of the package and of the scripts."""
    house = {}
    for path in sorted(root.glob("*/**/*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] in ("timm_collapse", *SCRIPTS):
            name = ".".join(part for part in parts if part != "__init__")
            house[name] = ast.parse(path.read_text(encoding="utf-8"))
            house[name].is_package = parts[-1] == "__init__"
    return house


def uses_of(user, house):
    """What a module imports from the house, also inside functions, and the attributes that it reads of modules."""
    tree, bound = house[user], {}
    guards = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    idle = {id(node) for guard in guards for part in guard.body for node in ast.walk(part)}

    def resolve(name):
        beside = f"{user.split('.')[0]}.{name}"  # a script imports those in its own folder without their room
        return beside if user.split(".")[0] in SCRIPTS and beside in house else name

    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if (module := resolve(alias.name)) in house:
                    bound[alias.asname or alias.name] = module
                    yield Use(user, module, "", id(node) not in idle, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            above = user.split(".")[: None if house[user].is_package else -1] if node.level else []
            above = above[: len(above) - max(0, node.level - 1)]
            base = resolve(".".join([*above, *filter(None, [node.module])]))
            for alias in node.names:
                if (module := f"{base}.{alias.name}") in house:
                    bound[alias.asname or alias.name] = module
                    yield Use(user, module, alias.name, id(node) not in idle, node.lineno)
                elif base in house:
                    yield Use(user, base, alias.name, id(node) not in idle, node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (module := bound.get(ast.unparse(node.value))):
            yield Use(user, module, node.attr, False, node.lineno)


def floor(module):
    """Index in FLOORS, by the longest name that fits; -1 for a room that has no floor."""
    name, floors = module.removeprefix("timm_collapse."), {room: i for i, rooms in enumerate(FLOORS) for room in rooms}
    parts = name.split(".")
    found = [floors[part] for part in (".".join(parts[:n]) for n in range(len(parts), 0, -1)) if part in floors]
    return found[0] if found else -1


def room(module):
    return module.removeprefix("timm_collapse.").split(".")[0]


def faults(house):
    """One line for each import up, private name of another module, and circle."""
    lines, runs = [], {module: set() for module in house}
    for use in (use for user in house for use in uses_of(user, house)):
        where = f"{use.user}:{use.line} takes {use.name or 'all'} of {use.module}"
        if use.name.startswith("__") and use.name.endswith("__"):
            continue  # the package's version is for everybody
        if use.name.startswith("_"):
            lines.append(f"private: {where}")
        above, below = floor(use.user), floor(use.module)
        if min(above, below) < 0 or not (below < above or (below == above and room(use.user) == room(use.module))):
            lines.append(f"up: {where}")
        if use.runs:
            runs[use.user].add(use.module)
    try:
        graphlib.TopologicalSorter({module: sorted(used) for module, used in runs.items()}).prepare()
    except graphlib.CycleError as error:
        circle = error.args[1][1:]
        first = circle.index(min(circle))
        lines.append(f"circle: {' <- '.join([*circle[first:], *circle[: first + 1]])}")
    return sorted(set(lines))


def test_the_house_stands():
    house = read_house(ROOT)
    assert len(house) > 100 and sum(1 for user in house for _ in uses_of(user, house)) > 500
    assert faults(house) == []


# -- the test itself can fail


GOOD = {
    "timm_collapse/__init__.py": "from .order import Order\nfrom .models import Net",
    "timm_collapse/order/__init__.py": "from .order import Order",
    "timm_collapse/order/order.py": "from .errors import Wrong, __doc__\nclass Order: _own = 1\nOrder._own",
    "timm_collapse/order/errors.py": "class Wrong(Exception): pass\ndef _used_here(): pass\n_used_here()",
    "timm_collapse/models/__init__.py": "from ..hub.download import find\nfrom ..order import errors\nclass Net: pass",
    "timm_collapse/hub/download.py": "from ..order.errors import Wrong",
    "timm_collapse/hub/save.py": "from . import download\nfrom ..models import Net\ndownload.find",
    "train/net.py": "import timm_collapse.hub.save as save\nfrom timm_collapse import Net\nimport other\nsave.write",
    "train/other.py": "from timm_collapse.hub import save",
}


def built(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return faults(read_house(root))


def test_a_good_house_has_no_faults(tmp_path):
    assert built(tmp_path, GOOD) == []
    house = read_house(tmp_path)
    assert {use.module for use in uses_of("train.net", house)} == {
        "timm_collapse.hub.save", "timm_collapse", "train.other",
    }  # fmt: skip


@pytest.mark.parametrize("file, text, expected", [
    ("timm_collapse/order/errors.py", "from .order import Order",
     ["circle: timm_collapse.order.errors <- timm_collapse.order.order <- timm_collapse.order.errors"]),
    ("timm_collapse/order/errors.py", "def later():\n    import timm_collapse.order.order",
     ["circle: timm_collapse.order.errors <- timm_collapse.order.order <- timm_collapse.order.errors"]),
    ("timm_collapse/order/errors.py", "if TYPE_CHECKING:\n    from .order import Order",
     []),  # does not run
    ("timm_collapse/order/errors.py", "if TYPE_CHECKING:\n    from ..models import Net",
     ["up: timm_collapse.order.errors:2 takes Net of timm_collapse.models"]),
    ("timm_collapse/hub/save.py", "from .download import _secret",
     ["private: timm_collapse.hub.save:1 takes _secret of timm_collapse.hub.download"]),
    ("timm_collapse/hub/save.py", "if TYPE_CHECKING:\n    from .download import _T",
     ["private: timm_collapse.hub.save:2 takes _T of timm_collapse.hub.download"]),
    ("timm_collapse/hub/save.py", "def later():\n    from . import download as d\n    return d._secret()",
     ["private: timm_collapse.hub.save:3 takes _secret of timm_collapse.hub.download"]),
    ("train/net.py", "import timm_collapse.order.errors\ntimm_collapse.order.errors._used_here()",
     ["private: train.net:2 takes _used_here of timm_collapse.order.errors"]),
    ("train/net.py", "import other\nfrom other import _step", ["private: train.net:2 takes _step of train.other"]),
    ("timm_collapse/hub/_hidden.py", "", []),
    ("train/net.py", "from timm_collapse.hub import _hidden", []),  # there is no such module
    ("timm_collapse/models/__init__.py", "def load():\n    from ..hub.save import write\nclass Net: pass",
     ["circle: timm_collapse.hub.save <- timm_collapse.models <- timm_collapse.hub.save",
      "up: timm_collapse.models:2 takes write of timm_collapse.hub.save"]),
    ("timm_collapse/hub/save.py", "from ..engine import run", []),  # not in the house
    ("timm_collapse/attic/__init__.py", "from ..order import Order",
     ["up: timm_collapse.attic:1 takes Order of timm_collapse.order"]),  # a room without a floor
])  # fmt: skip
def test_a_fault_is_found(tmp_path, file, text, expected):
    assert built(tmp_path, {**GOOD, file: text}) == expected


def test_rooms_of_one_floor_do_not_import_each_other(tmp_path):
    rooms = {"timm_collapse/evaluation/a.py": "from ..lessons import b", "timm_collapse/lessons/b.py": ""}
    assert built(tmp_path, {**GOOD, **rooms}) == ["up: timm_collapse.evaluation.a:1 takes b of timm_collapse.lessons.b"]
