"""Checkpoints on object stores: a real S3 server, and fsspec's file system in memory."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest
import torch
from tests.factories import read_steps, run_recipe, run_settings
from tests.s3_server import s3_server
from typer.testing import CliRunner

from solo_vlm.cli import app
from solo_vlm.models.load import load_model
from solo_vlm.train import Recipe, checkpoint, train, trainer
from solo_vlm.train.checkpoint import load_checkpoint
from solo_vlm.train.model import load_base_model
from solo_vlm.train.storage import CheckpointStore, Folder, step_of
from solo_vlm.utils.errors import SoloError


@pytest.fixture(scope="module")
def s3():
    with s3_server() as server:
        yield server


@pytest.fixture
def bucket(s3, request):
    """Return a URL in the bucket, for one test."""
    yield f"s3://bucket/{request.node.name.partition('[')[0]}-{uuid4().hex[:4]}"
    s3.answer = lambda method, path: 0


@pytest.fixture
def waits(monkeypatch):
    """Skip waits between retries."""
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)


def settings(runs, out, folder, **changes):
    plain = run_settings(runs, out, **{"steps": 7, **changes})
    plain["checkpoint"] = {"save_interval": 2, "keep": 2, "folder": folder}
    return plain


def losses(out):
    return {line["step"]: line["loss"] for line in read_steps(out)}


def steps(folder):
    return [step_of(path) for path in CheckpointStore(folder).checkpoints()]


def interrupted(plain, monkeypatch, step):
    """Train, and lose the machine before the step after `step`."""
    optimizer_step = trainer.optimizer_step
    taken = iter(range(step))

    def take(*arguments):
        if next(taken, None) is None:
            raise KeyboardInterrupt
        return optimizer_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "optimizer_step", take)
        with pytest.raises(KeyboardInterrupt):
            train(Recipe.parse(plain))


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    """Return the output directory of an uninterrupted run with local checkpoints."""
    out = tmp_path_factory.mktemp("whole") / "out"
    train(Recipe.parse(run_settings(runs, out, steps=7)))
    return out


@pytest.mark.parametrize("place", ["disk", "memory", "s3"])
def test_folder_is_read_and_written_alike_everywhere(place, tmp_path, bucket):
    folder = Folder({"disk": tmp_path / "a", "memory": "memory://a", "s3": bucket}[place]) / "b[1]*"
    assert folder.entries() == {}
    assert folder.find("text") is None
    folder.remove()
    folder.write("text", "some")
    (folder / "c").write("other", "")
    assert folder.entries() == {"text": 4, "c": None}
    assert folder.read("text") == "some"
    assert folder.checksum("text") == (4, "f6cedc4e")
    folder.remove("text")
    assert folder.entries() == {"c": None}
    folder.remove()
    assert folder.parent.entries().keys() <= {"b[1]*"}


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_run_with_checkpoints_on_s3_learns_the_same(runs, tmp_path, whole, bucket, is_asynchronous):
    plain = settings(runs, tmp_path / "out", bucket)
    plain["checkpoint"]["asynchronous"] = is_asynchronous
    train(Recipe.parse(plain))
    assert losses(tmp_path / "out") == losses(whole)
    assert steps(bucket) == [6, 7]
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert {"recipe.yaml", "inputs.json", "first_start"} <= Folder(bucket).entries().keys()
    assert not any(name.startswith(".probe") for name in Folder(bucket).entries())


@pytest.mark.parametrize("store", ["s3", "disk"])
def test_new_machine_resumes_with_the_losses_of_an_uninterrupted_run(
    runs, tmp_path, whole, bucket, monkeypatch, store
):
    folder = {"s3": bucket, "disk": str(tmp_path / "shared")}[store]
    interrupted(settings(runs, tmp_path / "first", folder), monkeypatch, 5)
    shutil.rmtree(tmp_path / "first")
    train(Recipe.parse(settings(runs, tmp_path / "second", folder)), resume=True)
    assert losses(tmp_path / "second") == {s: x for s, x in losses(whole).items() if s > 4}
    assert 0 < read_steps(tmp_path / "second")[-1]["goodput"] < 1
    ours, theirs = (
        dict(load_model(out / "model").named_parameters()) for out in (tmp_path / "second", whole)
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_finished_run_whose_machine_is_lost_exports_the_same_model_again(runs, tmp_path, whole, bucket):
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    shutil.rmtree(tmp_path / "out")
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    ours, theirs = (dict(load_model(out / "model").named_parameters()) for out in (tmp_path / "out", whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_best_checkpoint_stays_on_s3(runs, tmp_path, bucket, monkeypatch):
    measured = iter([1.0, 2.0, 3.0])
    monkeypatch.setattr("solo_vlm.train.validation.LossValidator.loss", lambda self, model: next(measured))
    validation = {"sources": [{"path": "text.parquet"}], "interval": 3, "best": "validation_loss"}
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket, validation=validation)))
    assert steps(bucket) == [3, 6, 7]


def flip_bit(url):
    content = bytearray(fsspec.filesystem("s3").cat_file(url))
    content[len(content) // 2] ^= 1
    fsspec.filesystem("s3").pipe_file(url, bytes(content))


def test_damaged_object_is_refused_by_name(runs, tmp_path, bucket, monkeypatch):
    plain = settings(runs, tmp_path / "out", bucket)
    interrupted(plain, monkeypatch, 6)
    flip_bit(f"{bucket}/step-00000006/__0_0.distcp")
    with pytest.raises(
        SoloError, match=r"__0_0\.distcp is damaged.*step-00000004 is intact: move step-00000006"
    ):
        train(Recipe.parse(plain))
    fsspec.filesystem("s3").rm(f"{bucket}/step-00000006", recursive=True)
    train(Recipe.parse(plain))
    assert len(losses(tmp_path / "out")) == 7


def test_lost_object_is_refused_by_name(runs, bucket, tmp_path):
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    fsspec.filesystem("s3").rm(f"{bucket}/step-00000007/__0_0.distcp")
    with pytest.raises(SoloError, match=r"step-00000007: __0_0\.distcp is missing"):
        load_checkpoint(Folder(f"{bucket}/step-00000007"), load_base_model(runs / "llama")[0])


def test_checkpoint_on_s3_is_converted_by_its_url_and_by_its_run(runs, tmp_path, bucket):
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    for source in (bucket, str(tmp_path / "out")):
        done = CliRunner().invoke(app, ["convert", "checkpoint", source, str(tmp_path / "exported")])
        assert done.exit_code == 0, done.exception
        ours, trained = (
            dict(load_model(folder).named_parameters())
            for folder in (tmp_path / "exported", tmp_path / "out" / "model")
        )
        assert all(torch.equal(ours[name], trained[name]) for name in trained)
        shutil.rmtree(tmp_path / "exported")
    with pytest.raises(SoloError, match=r"it has no recipe\.yaml"):
        train_nothing = ["convert", "checkpoint", f"{bucket}/nothing", str(tmp_path / "exported")]
        CliRunner().invoke(app, train_nothing, catch_exceptions=False)


# ------------------------------------------------------------------------------- refused at the start


def no_bucket(s3, patch):
    return "s3://missing/run", "bucket does not exist"


def no_credentials(s3, patch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        patch.delenv(name)
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    return "s3://bucket/run", "credentials"


def no_permission(s3, patch):
    s3.answer = lambda method, path: 403 if method == "PUT" else 0
    return "s3://bucket/run", "Forbidden"


def no_permission_to_delete(s3, patch):
    s3.answer = lambda method, path: 403 if method in ("DELETE", "POST") else 0
    return "s3://bucket/run", "Forbidden"


def no_network(s3, patch):
    patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    return "s3://bucket/run", "connect"


def no_package(s3, patch):
    patch.delitem(sys.modules["fsspec.registry"]._registry, "s3", raising=False)
    patch.setitem(sys.modules, "s3fs", None)
    return "s3://bucket/run", r"pip install 'solo-vlm\[s3\]'"


def no_protocol(s3, patch):
    return "s4://bucket/run", "Protocol not known: s4"


def no_writing(s3, patch):
    return "http://127.0.0.1:1/run", "cannot access http://127.0.0.1:1/run"


@pytest.mark.parametrize(
    "cause",
    [
        no_bucket,
        no_credentials,
        no_permission,
        no_permission_to_delete,
        no_network,
        no_package,
        no_protocol,
        no_writing,
    ],
)
def test_unusable_store_is_refused_before_training(runs, tmp_path, s3, bucket, monkeypatch, waits, cause):
    folder, reason = cause(s3, monkeypatch)
    fsspec.filesystem("s3").clear_instance_cache() if cause is not no_package else None
    with pytest.raises(SoloError, match=reason) as refused:
        train(Recipe.parse(settings(runs, tmp_path / "out", folder)))
    assert "\n" not in str(refused.value)
    assert folder in str(refused.value)
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- refused on resume


def test_run_of_another_recipe_in_the_same_folder_is_refused(runs, tmp_path, bucket):
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    with pytest.raises(
        SoloError, match=f"{bucket} holds a run of another recipe .seed was 0, now 1.*checkpoint.folder"
    ):
        train(Recipe.parse(settings(runs, tmp_path / "other", bucket, seed=1)))


def test_checkpoints_without_a_recipe_are_refused(runs, tmp_path, bucket):
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    shutil.rmtree(tmp_path / "out")
    Folder(bucket).remove("recipe.yaml")
    with pytest.raises(
        SoloError, match=r"step-00000007: its folder has no recipe\.yaml to compare with: copy it"
    ):
        train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))


def test_changed_model_is_refused_on_a_new_machine(runs, tmp_path, bucket, monkeypatch):
    shutil.copytree(runs, tmp_path / "root")
    interrupted(settings(tmp_path / "root", tmp_path / "out", bucket), monkeypatch, 3)
    shutil.rmtree(tmp_path / "out")
    config = tmp_path / "root" / "llama" / "generation_config.json"
    config.write_text(config.read_text() + " ")
    with pytest.raises(
        SoloError, match=f"llama/generation_config.json changed since the run in {bucket} started"
    ):
        train(Recipe.parse(settings(tmp_path / "root", tmp_path / "out", bucket)))


@pytest.mark.parametrize("is_local_first", [True, False])
def test_run_does_not_start_again_where_its_checkpoints_are_not(
    runs, tmp_path, whole, bucket, monkeypatch, is_local_first
):
    places = [None, bucket] if is_local_first else [bucket, None]
    before, after = (settings(runs, tmp_path / "out", place) for place in places)
    interrupted(before, monkeypatch, 5)
    with pytest.raises(SoloError, match=r"the newest checkpoint of this run is .*step-00000004, not in"):
        train(Recipe.parse(after))
    own = tmp_path / "out" / "checkpoints"
    source, target = (str(own), bucket) if is_local_first else (bucket, str(own))
    system = fsspec.filesystem("s3")
    (system.put if is_local_first else system.get)(f"{source}/", f"{target}/", recursive=True)
    train(Recipe.parse(after))
    assert losses(tmp_path / "out") == losses(whole)


def test_nothing_to_resume_names_the_store(runs, tmp_path, bucket):
    with pytest.raises(SoloError, match=f"nothing to resume: {bucket} has no checkpoint"):
        train(Recipe.parse(settings(runs, tmp_path / "out", bucket)), resume=True)


# ------------------------------------------------------------------------------------ during the run


FILES = [
    "__0_0.distcp",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in ("training_state.json", ".metadata", "checksums.json")
    ),
]


def refuse(s3, text, method="PUT", status=503, times=10**9):
    """Refuse the next requests whose path contains a text."""
    left = iter(range(times))
    s3.answer = lambda asked, path: (
        status if asked == method and text in path and next(left, None) is not None else 0
    )


@pytest.mark.parametrize("file", FILES)
def test_failing_uploads_are_retried(runs, tmp_path, whole, s3, bucket, waits, file):
    refuse(s3, f"step-00000004/{file}", times=2)
    train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    assert losses(tmp_path / "out") == losses(whole)
    assert steps(bucket) == [6, 7]


@pytest.mark.parametrize("file", FILES)
def test_store_that_fails_ends_the_run_and_keeps_the_last_whole_checkpoint(
    runs, tmp_path, whole, s3, bucket, waits, file
):
    plain = settings(runs, tmp_path / "out", bucket)
    refuse(s3, f"step-00000004/{file}")
    with pytest.raises(SoloError, match=f"cannot access {bucket}.*: .*then run the same command") as failed:
        train(Recipe.parse(plain))
    assert "\n" not in str(failed.value)
    assert steps(bucket) == [2]
    s3.answer = lambda method, path: 0
    train(Recipe.parse(plain))
    assert losses(tmp_path / "out") == losses(whole)
    assert steps(bucket) == [6, 7]


def test_run_that_lost_its_folder_to_another_one_ends(runs, tmp_path, bucket, monkeypatch):
    optimizer_step = trainer.optimizer_step

    def other_starts(*arguments):
        CheckpointStore(bucket, is_separate=True).claim()
        return optimizer_step(*arguments)

    monkeypatch.setattr(trainer, "optimizer_step", other_starts)
    with pytest.raises(SoloError, match=f"another run .* saves in {bucket}: this one ends"):
        train(Recipe.parse(settings(runs, tmp_path / "out", bucket)))
    assert steps(bucket) == []


# --------------------------------------------------------------------------------------- processes


def run_with(environment, plain):
    os.environ.update(environment)
    run_recipe(plain)


@pytest.fixture
def stalled(s3, bucket):
    """Stall the upload of a file of step 4 of the test; return the event that it has begun."""

    def stall(file):
        begun, released = threading.Event(), threading.Event()
        releases.append(released)

        def answer(method, path):
            if method == "PUT" and f"{bucket.removeprefix('s3:/')}/step-00000004/{file}" == path:
                begun.set()
                released.wait()
            return 0

        s3.answer = answer
        return begun

    releases: list[threading.Event] = []
    yield stall
    for released in releases:
        released.set()


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after", "file", "is_asynchronous"),
    [
        (1, 1, "__0_0.distcp", True),
        (1, 1, "checksums.json", False),
        (2, 2, "__1_0.distcp", True),
        (2, 2, ".metadata.tmp", False),
        (2, 1, "__0_0.distcp", True),
        (1, 2, "checksums.json", True),
    ],
)
def test_resume_after_sigkill_during_an_upload_matches_uninterrupted_run(
    runs, tmp_path, s3, bucket, start, stalled, before, after, file, is_asynchronous
):
    plain = run_settings(runs, tmp_path / "whole", steps=7)
    assert start(before, run_recipe, plain).wait() == [0] * before
    plain = settings(runs, tmp_path / "out", bucket)
    plain["checkpoint"]["asynchronous"] = is_asynchronous
    begun = stalled(file)
    group = start(before, run_with, s3.environment, plain)
    assert begun.wait(120)
    group.kill()
    assert group.wait() == [-signal.SIGKILL] * before
    s3.answer = lambda method, path: 0
    assert steps(bucket) == [2]
    assert "step-00000004" in Folder(bucket).entries()
    shutil.rmtree(tmp_path / "out")
    assert start(after, run_with, s3.environment, plain).wait() == [0] * after
    expected = {step: loss for step, loss in losses(tmp_path / "whole").items() if step > 2}
    assert losses(tmp_path / "out") == (expected if before == after else pytest.approx(expected, rel=1e-4))
    assert steps(bucket) == [6, 7]


def run_and_note_the_error(environment, plain, folder):
    try:
        run_with(environment, plain)
    except SoloError as error:
        (folder / f"error-{os.environ['RANK']}").write_text(str(error))
        raise


@pytest.mark.distributed
def test_failing_upload_of_one_process_ends_all_with_one_line(runs, tmp_path, s3, bucket, start):
    refuse(s3, "step-00000004/__1_0.distcp")
    plain = settings(runs, tmp_path / "out", bucket)
    group = start(2, run_and_note_the_error, s3.environment, plain, tmp_path)
    assert 0 not in group.wait(120)
    errors = {path.read_text() for path in tmp_path.glob("error-*")}
    assert [error.partition(": ")[0] for error in errors] == [f"cannot access {bucket}"]
    assert steps(bucket) == [2]


def run_at_own_root(environment, plain, roots):
    """Train as on one of several machines, whose disk the other processes do not see, with a large model."""
    os.environ.update(environment)
    own = roots[int(os.environ["RANK"])]
    is_dir = Path.is_dir
    Path.is_dir = lambda path: is_dir(path) and (not path.name.startswith(".shared") or own in path.parents)
    checkpoint._GATHERED_SIZE = 0
    run_recipe({**plain, "root": str(own)})


@pytest.mark.distributed
def test_machines_need_no_shared_disk(runs, tmp_path, s3, bucket, start):
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        shutil.copytree(runs, root)
    plain = settings(runs, "out", bucket)
    assert start(2, run_at_own_root, s3.environment, plain, roots).wait() == [0, 0]
    assert start(2, run_recipe, run_settings(runs, tmp_path / "whole", steps=7)).wait() == [0, 0]
    assert losses(roots[0] / "out") == losses(tmp_path / "whole")
    shutil.rmtree(roots[0] / "out")
    assert start(2, run_at_own_root, s3.environment, plain, roots).wait() == [0, 0]
    assert (roots[0] / "out" / "model" / "model.safetensors").is_file()
    assert not (roots[1] / "out").exists()
