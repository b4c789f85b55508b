"""Shared by all Python tests: where the conformance vectors lie, and the table of their errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest

import conformance

if TYPE_CHECKING:
    from variants import Zoo

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEFAULT_CONFORMANCE = SHARED / "conformance"
DEFAULT_CHECKPOINTS = SHARED / "checkpoints"
DEFAULT_DATA = SHARED / "data"

# A test that takes one of these arguments runs once for every item found.
FINDERS: dict[str, Callable[[Path], Sequence[Any]]] = {
    "conformance_case": conformance.find_cases,
    "generation_case": lambda path: [c for c in conformance.find_cases(path) if c.generates],
    "trace_case": lambda path: [c for c in conformance.find_cases(path) if c.trace is not None],
    "hf_case": lambda path: [
        c for c in conformance.find_cases(path) if "folder" in c.config["weights"]
    ],
    "unit_step": conformance.find_unit_steps,
    "feature_map_case": conformance.find_feature_maps,
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--conformance",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder with conformance vectors (default: ../shared/conformance if it exists)",
    )
    parser.addoption(
        "--checkpoints",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder with trained checkpoints (default: ../shared/checkpoints if it exists)",
    )
    parser.addoption(
        "--data",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder with the folders babi and books (default: ../shared/data if it exists)",
    )
    parser.addoption(
        "--long-run",
        action="store_true",
        help="the full counts of kills, splits and neighbours (minutes)",
    )


def pytest_configure(config: pytest.Config) -> None:
    asked: Path | None = config.getoption("--conformance")
    if asked is not None and not asked.is_dir():
        raise pytest.UsageError(f"--conformance: {asked} is not a folder")


def conformance_directory(config: pytest.Config) -> Path | None:
    """The folder that was asked for, or the default one; None if the latter is absent."""
    asked: Path | None = config.getoption("--conformance")
    if asked is not None:
        return asked.resolve()
    return DEFAULT_CONFORMANCE if DEFAULT_CONFORMANCE.is_dir() else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    for argument, find in FINDERS.items():
        if argument not in metafunc.fixturenames:
            continue
        directory = conformance_directory(metafunc.config)
        items = find(directory) if directory is not None else []
        if items:
            metafunc.parametrize(argument, items, ids=[item.name for item in items])
        else:
            place = directory if directory is not None else DEFAULT_CONFORMANCE
            why = f"no conformance vectors: {place} holds none for {argument} (use --conformance)"
            metafunc.parametrize(
                argument, [pytest.param(None, marks=pytest.mark.skip(reason=why))], ids=["absent"]
            )


CaseReport: TypeAlias = Callable[[str, str, Mapping[str, float]], None]


def finder(config: pytest.Config, option: str, default: Path, what: str) -> Callable[[str], Path]:
    """Finds folders by name where ``option`` says; the test is skipped where there is none."""
    asked: Path | None = config.getoption(option)
    directory = default if asked is None else asked.resolve()

    def find(name: str) -> Path:
        if not (directory / name).is_dir():
            pytest.skip(f"no {what} {directory / name} (use {option})")
        return directory / name

    return find


@pytest.fixture(scope="session")
def trained(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """The folder of a trained checkpoint by name; the test is skipped where there is none."""
    return finder(pytestconfig, "--checkpoints", DEFAULT_CHECKPOINTS, "trained checkpoint")


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> Callable[[str], Path]:
    """A folder of published data by name; the test is skipped where there is none."""
    return finder(pytestconfig, "--data", DEFAULT_DATA, "data")


@pytest.fixture
def invoke(capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs one command line in this process: exit code, standard output, standard error."""
    from armt.cli.app import run

    def call(*arguments: object) -> tuple[int, str, str]:
        code = run([str(a) for a in arguments])
        out, err = capfd.readouterr()
        return code, out, err

    return call


@pytest.fixture(scope="session")
def long_run(pytestconfig: pytest.Config) -> bool:
    """Whether the full counts were asked for."""
    return bool(pytestconfig.getoption("--long-run"))


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Zoo:
    """Small random models of every kind, and engines over them."""
    from variants import Zoo

    return Zoo(tmp_path_factory.mktemp("zoo"))


_REPORTED = pytest.StashKey[list[str]]()


@pytest.fixture
def case_report(request: pytest.FixtureRequest) -> CaseReport:
    """Notes a case's worst errors for the table at the end of the run."""
    lines = request.config.stash.setdefault(_REPORTED, [])

    def note(case: str, what: str, errors: Mapping[str, float]) -> None:
        shown = "  ".join(f"{name} {value:.2e}" for name, value in errors.items())
        lines.append(f"{case:<40} {what:<11} {shown}")

    return note


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    lines = config.stash.get(_REPORTED, [])
    if lines:
        terminalreporter.section("worst errors (logits absolute, state relative to its largest)")
        for line in sorted(lines):
            terminalreporter.write_line(line)
