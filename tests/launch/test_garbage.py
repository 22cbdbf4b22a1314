"""What a store keeps and what it lets go: real stages, a real registry, leases and runs, in a folder and on S3."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
import yaml
from conftest import Command
from mlflow import MlflowClient
from toybox import Toys

from genpipe import artifacts
from genpipe.launch import garbage, lease
from genpipe.launch.garbage import Folder, delete, survey
from genpipe.launch.lease import hold, new_attempt
from genpipe.launch.local import run_local
from genpipe.launch.run_stage import PartWorker
from genpipe.pipeline.graph import Pipeline, load_pipeline
from genpipe.pipeline.spec import StageSpec
from genpipe.storage import LocalStorage, join, open_storage
from genpipe.tracking.open_runs import all_open
from genpipe.tracking.recording import pipeline_run


@pytest.fixture
def toys(store_uri: str, recorded: Toys) -> Toys:
    recorded.store = store_uri
    return recorded


@pytest.fixture
def recorded(tmp_path: Path, mlflow_tables: Path) -> Toys:
    """Toys in a store with an MLflow of its own."""
    (tmp_path / "store").mkdir()
    shutil.copy(mlflow_tables, tmp_path / "store/mlflow.db")
    return Toys(tmp_path / "store")


def pipeline(toys: Toys, folder: Path, **data: object) -> Pipeline:
    """One of a stage `toy_data` with these settings."""
    path = folder / "toy.yaml"
    stages = {"toy_data": {"kind": "toys.toy_data", **data}}
    settings = {"name": "toy", "store": toys.store, "tracking": {"uri": toys.tracking_uri}, "stages": stages}
    path.write_text(yaml.safe_dump(settings))
    return load_pipeline(str(path))


def reasons(folders: list[Folder]) -> dict[str, str]:
    return {folder.path: folder.stays for folder in folders}


def made(spec: StageSpec) -> str:
    return f"artifacts/{spec.target.name}"


def worked(spec: StageSpec) -> str:
    return f"work/{spec.target.name}"


def test_what_is_planned_stays_and_the_rest_goes(toys: Toys, tmp_path: Path) -> None:
    kept, other, begun = (toys.spec("toy_data", parts=n) for n in (1, 2, 3))
    for spec in (kept, other):
        run_local(spec)
    begun.write()
    PartWorker(begun)("part-0")
    known = [pipeline(toys, tmp_path, parts=1)]
    assert set(reasons(survey(toys.store, known, days=1)).values()) == {
        f"in the plan of {tmp_path}/toy.yaml",
        "younger than 1 days",
    }
    found = survey(toys.store, known, days=0)
    assert reasons(found) == {
        made(kept): f"in the plan of {tmp_path}/toy.yaml",
        made(other): "",
        worked(begun): "",
    }
    size = sum(entry.size for entry in open_storage(begun.work).list())
    size += sum(entry.size for entry in open_storage(begun.target.uri).list())
    assert {folder.path: folder.size for folder in found}[worked(begun)] == size, "with the parts that are finished"
    assert {folder.path for folder, went in delete(toys.store, found) if went} == {made(other), worked(begun)}
    assert reasons(survey(toys.store, known, days=0)).keys() == {made(kept)}
    assert not [*open_storage(begun.target.uri).list(), *open_storage(join(toys.store, "work")).list()]
    artifacts.verify(kept.target.uri)


def test_what_a_run_or_an_attempt_holds_stays_with_its_inputs(toys: Toys, tmp_path: Path) -> None:
    data, other = toys.spec("toy_data", parts=1), toys.spec("toy_data", parts=2)
    line = toys.line(run_local(data))
    run_local(other)
    known = [pipeline(toys, tmp_path, parts=7)]
    line.write()
    attempt = new_attempt(line)
    with hold(line, attempt, lost=print):
        found = survey(toys.store, known, days=0)
        assert reasons(found) == {
            worked(line): f"held by {attempt}",
            made(data): f"input of {worked(line)}",
            made(other): "",
        }
        asked_before = [Folder(worked(line)), Folder(made(data), committed=True)]
        assert [went for _, went in delete(toys.store, asked_before[:1])] == [False], "it is held by now"
    assert not reasons(survey(toys.store, known, days=0))[worked(line)]
    there = {"uri": toys.tracking_uri, "store": toys.store, "experiment": "toys"}
    with pipeline_run(**there, name="p", tags={}, holds=[other.target.name]):
        assert all_open(toys.store)
        assert reasons(survey(toys.store, known, days=0)) == {
            made(other): "held by a run that is under way",
            made(data): "",
            worked(line): "",
        }
        assert [went for _, went in delete(toys.store, [Folder(made(other), committed=True)])] == [False]
    artifacts.verify(other.target.uri)


def test_an_attempt_elsewhere_that_fell_silent_long_ago_holds_nothing(
    toys: Toys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = toys.spec("toy_data")
    spec.write()
    monkeypatch.setattr(lease, "this_machine", lambda: "another machine")
    assert lease.take(open_storage(spec.work), 1, "theirs")
    monkeypatch.undo()
    known = [pipeline(toys, tmp_path, parts=7)]
    assert reasons(survey(toys.store, known, days=0)) == {worked(spec): "held by theirs"}
    monkeypatch.setattr(garbage, "SILENT_SECONDS", 0.0)
    time.sleep(1.1)  # S3 counts whole seconds
    found = survey(toys.store, known, days=0)
    assert [went for _, went in delete(toys.store, found)] == [True]


@pytest.fixture
def registry(recorded: Toys) -> Iterator[tuple[Toys, StageSpec, StageSpec]]:
    """A registered line on its data, and another line."""
    toys = recorded
    data = run_local(toys.spec("toy_data"))
    line, other = toys.line(data, samples=8), toys.line(data, samples=12)
    artifact = run_local(line)
    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(toys.tracking_uri)
    client = MlflowClient()
    experiment = client.get_experiment_by_name("toys")
    assert experiment is not None
    [model] = client.search_logged_models([experiment.experiment_id])
    client.create_registered_model("line")
    client.create_model_version("line", source=f"models:/{model.model_id}", model_id=model.model_id)
    client.create_registered_model("foreign")
    client.create_model_version("foreign", source=artifact.uri)
    run_local(other)
    yield toys, line, other
    mlflow.set_tracking_uri(before)


def test_a_registered_model_stays_with_all_that_it_was_made_from(
    registry: tuple[Toys, StageSpec, StageSpec], genpipe: Command
) -> None:
    toys, line, other = registry
    code, out, err = genpipe("gc", toys.store, "--days", "0")
    assert code == 0, err
    assert "registered as line/1" in out and f"input of {made(line)}" in out
    assert "would delete 1 of 3 folders" in out
    artifacts.verify(other.target.uri)
    code, out, _ = genpipe("gc", toys.store, "--days", "0", "--delete")
    assert code == 0 and "deleted 1 of 3 folders" in out
    assert artifacts.find(other.target.uri) is None
    for artifact in (line.target, *line.inputs.values()):
        artifacts.verify(artifact.uri)


def test_what_was_deployed_stays(recorded: Toys, tmp_path: Path) -> None:
    toys = recorded
    spec = toys.spec("toy_data", parts=1)
    run_local(spec)
    published = Path(toys.store, "deployments/0123/toy.yaml")
    published.parent.mkdir(parents=True)
    published.write_text(Path(pipeline(toys, tmp_path, parts=1).source).read_text())
    published.with_name("curves.json").write_text("{}")
    assert reasons(survey(toys.store, days=0)) == {made(spec): f"in the plan of {published}"}
    published.write_text("name: toy\nstors: x\n")
    with pytest.raises(ValueError, match=r"(?s)did you mean 'store'.*toy\.yaml was deployed; delete it if"):
        survey(toys.store, days=0)


def test_what_cannot_be_known_is_refused(recorded: Toys, tmp_path: Path, genpipe: Command) -> None:
    toys = recorded
    spec = toys.spec("toy_data")
    run_local(spec)
    Path(toys.store, "mlflow.db").rename(tmp_path / "elsewhere.db")
    with pytest.raises(ValueError, match="give the CONFIG"):
        survey(toys.store, days=0)
    Path(spec.target.uri, "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not a readable manifest"):
        survey(toys.store, days=0)
    code, _, err = genpipe("gc", str(tmp_path / "stor"))
    assert code == 2 and "no store is here" in err


class Killed(BaseException):
    """As if the process ended here."""


def test_whatever_interrupts_a_deletion_an_artifact_is_whole_or_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after every number of deleted files: nothing trusts what is left, and the next one finishes."""
    deleted = LocalStorage.delete
    toys = Toys(tmp_path / "store")
    toys.tracking_uri = "jsonl"
    whole, begun = toys.spec("toy_data", parts=2), toys.spec("toy_data", parts=3)
    line = toys.line(run_local(whole), samples=8)
    run_local(line)
    begun.write()
    PartWorker(begun)("part-0")
    shutil.copytree(toys.store, tmp_path / "before")
    steps = 0
    while True:
        shutil.rmtree(toys.store)
        shutil.copytree(tmp_path / "before", toys.store)
        left = steps

        def delete_or_die(self: LocalStorage, key: str) -> None:
            nonlocal left
            if not left:
                raise Killed
            left -= 1
            deleted(self, key)

        found = survey(toys.store, days=0)
        with monkeypatch.context() as patch:
            patch.setattr(LocalStorage, "delete", delete_or_die)
            patch.setattr(lease, "started", lambda pid: "of a process that is gone later")
            try:
                list(delete(toys.store, found))
            except Killed:
                ended = False
            else:
                ended = True
        for spec in (whole, line):
            if artifacts.find(spec.target.uri) is not None:  # which looks at every file's size
                artifacts.verify(spec.target.uri)
        assert artifacts.find(line.target.uri) is None or artifacts.find(whole.target.uri) is not None
        if steps % 3:  # the next deletion finishes, or somebody makes it again
            assert all(went for _, went in delete(toys.store, survey(toys.store, days=0)))
            assert not list(open_storage(join(toys.store, "artifacts")).list())
            assert not list(open_storage(join(toys.store, "work")).list())
        else:
            for spec in (begun, whole):
                run_local(spec)
                artifacts.verify(spec.target.uri)
        if ended:
            break
        steps += 1
    assert steps > 10
