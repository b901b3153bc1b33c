"""Workloads by name, entry point or package.module:factory; what cannot work is one clear UserError."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from obsinfra.errors import UserError
from obsinfra.workloads import registry
from obsinfra.workloads.digits import Digits
from obsinfra.workloads.protocol import Workload
from obsinfra.workloads.registry import BUILT_IN, GROUP, available_workloads, create_workload

MODULE = '''
from obsinfra.workloads.digits import Digits

class Mine(Digits):
    name = "mine"

def create(*, data_path, model_size, seed):
    """Digits under another name.

    More about them.
    """
    workload = Mine(data_path, model_size)
    workload.seed = seed
    return workload

class Factories:
    create = staticmethod(create)

class Half:
    name = "half"
    def build_model(self): ...

def half(*, data_path, model_size, seed):
    return Half()

def nothing(*, data_path, model_size, seed):
    pass

def positional(path):
    return Half()

NUMBER = 3
'''


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An installed package of somebody else, with modules and metadata as pip leaves them."""
    folder = tmp_path / "their_package"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "models.py").write_text(MODULE)
    (folder / "broken.py").write_text("def create(:\n")
    (folder / "raising.py").write_text("raise RuntimeError('no licence')\n")
    (folder / "needy.py").write_text("import a_package_nobody_has\n")
    metadata = tmp_path / "their_package-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[{GROUP}]\n"
        "theirs = their_package.models:create\n"
        "dotted = their_package.models:Factories.create [extra]\n"
        "torn = their_package.raising:create\n"
        "digits = their_package.models:half\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "their_package"]:
        del sys.modules[name]


def create(name: str) -> Workload:
    return create_workload(name, data_path=None, model_size=None, seed=7)


def refused(name: str) -> UserError:
    with pytest.raises(UserError) as caught:
        create(name)
    assert caught.value.exit_code == 2 and caught.value.expected
    return caught.value


def test_the_built_in_names_are_those_of_the_installed_metadata() -> None:
    declared = {point.name: point.value for point in entry_points(group=GROUP) if point.name in BUILT_IN}
    assert declared == {name: built_in.target for name, built_in in BUILT_IN.items()}
    assert set(BUILT_IN) == {"tactical_mappo", "byte_gpt", "digits"}


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_workloads_keep_the_protocol(
    name: str, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    workload = create(name)
    assert isinstance(workload, Workload) and workload.name == name
    assert workload.defaults.mode in ("min", "max") and workload.defaults.epochs > 0


def test_size_and_data_path_reach_the_factory() -> None:
    medium = create_workload("digits", data_path=None, model_size="medium", seed=0)
    assert isinstance(medium, Digits) and medium.channels == 64
    with pytest.raises(UserError, match="does not read '/somewhere'"):
        create_workload("digits", data_path="/somewhere", model_size=None, seed=0)


@pytest.mark.parametrize(
    "name", ["their_package.models:create", "their_package.models:Factories.create", "theirs", "dotted"]
)
def test_ones_own_workload_by_path_and_by_entry_point(package: Path, name: str) -> None:
    workload = create(name)
    assert workload.name == "mine" and workload.seed == 7  # type: ignore[attr-defined]


def test_a_built_in_name_cannot_be_taken_over(package: Path) -> None:
    assert type(create("digits")) is Digits


def test_the_list_shows_every_workload_with_one_line(package: Path) -> None:
    """One whose package cannot be loaded stays in it, with the reason."""
    found = available_workloads()
    assert list(found)[:3] == list(BUILT_IN) and set(found) >= {"theirs", "dotted", "torn"}
    assert found["theirs"] == "Digits under another name."
    assert "RuntimeError: no licence" in found["torn"]
    assert all(line and "\n" not in line for line in found.values())


def test_an_unknown_name_lists_the_known_ones(package: Path) -> None:
    error = refused("tactical_mapo")
    assert "'tactical_mapo'" in error.wrong and "--model-name" in error.fix
    for name in (*BUILT_IN, "theirs", "package.module:factory"):
        assert name in error.expected


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("no_such_package.models:create", "No module named 'no_such_package'"),
        ("their_package.absent:create", "No module named 'their_package.absent'"),
        ("their_package.needy:create", "No module named 'a_package_nobody_has'"),
        ("their_package.broken:create", "SyntaxError"),
        ("their_package.raising:create", "RuntimeError: no licence"),
        ("torn", "RuntimeError: no licence"),
        (".models:create", "TypeError"),
    ],
)
def test_a_module_that_cannot_be_imported(package: Path, name: str, wrong: str) -> None:
    error = refused(name)
    assert f"of model {name!r} cannot be imported" in error.wrong and wrong in error.wrong
    assert "package.module:factory" in error.expected and "PYTHONPATH" in error.fix


@pytest.mark.parametrize("attribute", ["creat", "Factories.absent", "NUMBER.real.absent"])
def test_an_attribute_that_is_not_there(package: Path, attribute: str) -> None:
    error = refused(f"their_package.models:{attribute}")
    assert f"'their_package.models' has no {attribute!r}" in error.wrong and "--model-name" in error.fix


@pytest.mark.parametrize("name", [":", "their_package.models:", ":create"])
def test_half_a_path(name: str) -> None:
    error = refused(name)
    assert repr(name) in error.wrong and "package.module:factory" in error.expected


def test_something_that_cannot_be_called(package: Path) -> None:
    assert "'their_package.models:NUMBER' is a int" in refused("their_package.models:NUMBER").wrong


@pytest.mark.parametrize("name", ["their_package.models:positional", "builtins:dict", "builtins:len"])
def test_a_factory_with_other_arguments(package: Path, name: str) -> None:
    error = refused(name)
    assert name in error.wrong and "factory(*, data_path, model_size, seed)" in error.expected


def test_a_factory_that_returns_something_incomplete_names_what_is_missing(package: Path) -> None:
    error = refused("their_package.models:half")
    assert "made a Half without" in error.wrong and "Workload" in error.expected
    for part in (
        "defaults",
        "train_batches",
        "training_step",
        "validate",
        "flops_per_sample",
        "describe_data",
    ):
        assert part in error.wrong
    assert "build_model" not in error.wrong
    assert "made a NoneType without name" in refused("their_package.models:nothing").wrong


def test_what_is_required_is_the_protocol() -> None:
    members = {name for name in vars(Workload) if not name.startswith("_")} | set(Workload.__annotations__)
    assert members == set(registry.REQUIRED)


def test_looking_names_up_does_not_import_torch() -> None:
    """`obsinfra --help` and a mistyped name stay quick."""
    code = (
        "import sys; from obsinfra.workloads.registry import BUILT_IN, create_workload\n"
        "from obsinfra.errors import UserError\n"
        "try: create_workload('mistyped:', data_path=None, model_size=None, seed=0)\n"
        "except UserError: print('torch' in sys.modules)"
    )
    assert subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split() == ["False"]
