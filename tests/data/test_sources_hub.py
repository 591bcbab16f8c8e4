"""Data sets of the hub, read in place from a local server with its API."""

from __future__ import annotations

import io
import json
import os
import pickle
import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tests.data.formats.test_converters import shown
from tests.data.hub_server import TOKEN, HubServer, Repo, texts
from tests.factories import png, tar_bytes

from solo_vlm.data.encode import load_encoder
from solo_vlm.data.mixture import Mixture, make_loader
from solo_vlm.data.sources import is_same_data, open_source
from solo_vlm.data.sources.files import read_url
from solo_vlm.data.sources.hub import HubPath
from solo_vlm.data.sources.retries import retried
from solo_vlm.utils.errors import SoloError

_FILE_PATH = "{repo_id}/resolve/{revision}/{filename}"
README = """\
---
configs:
- config_name: cats
  data_files:
  - {split: train, path: cats/train-*.parquet}
  - {split: test, path: cats/test-*.parquet}
- config_name: dogs
  default: true
  data_files: dogs/*.parquet
---
# Pets
"""


def parquet(name: str, rows: int = 40, group: int = 10) -> bytes:
    """Return a file with random bytes beside the text, so that row groups are much larger than the footer."""
    table = pa.Table.from_pylist(
        [{"text": f"{name} {n}", "noise": os.urandom(4000), "stars": n % 5} for n in range(rows)]
    )
    buffer = io.BytesIO()
    pq.write_table(table, buffer, row_group_size=group)
    return buffer.getvalue()


PETS = {
    "README.md": README.encode(),
    "cats/train-0.parquet": parquet("train 0"),
    "cats/train-1.parquet": parquet("train 1"),
    "cats/test-0.parquet": parquet("test 0"),
    "dogs/0.parquet": parquet("dog"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    server = HubServer()
    yield server
    server.close()


@pytest.fixture
def waits(monkeypatch) -> list[float]:
    """Return the list of waits between attempts, also those of huggingface_hub, which are skipped."""
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    return slept


@pytest.fixture
def hub(server, monkeypatch, tmp_path, waits) -> HubServer:
    """Return the server with the data set owner/pets, as the hub of this process and of those it starts."""
    for module, name, value in (
        ("huggingface_hub.constants", "ENDPOINT", server.url),
        ("huggingface_hub.constants", "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{_FILE_PATH}"),
        ("huggingface_hub.constants", "HF_HUB_OFFLINE", False),
        ("huggingface_hub.constants", "HF_HUB_CACHE", str(tmp_path / "hub")),
        ("datasets.config", "HF_ENDPOINT", server.url),
        ("datasets.config", "HF_HUB_OFFLINE", False),
        ("datasets.config", "HF_DATASETS_CACHE", tmp_path / "datasets"),
    ):
        monkeypatch.setattr(f"{module}.{name}", value)
    for name, text in environment(server, tmp_path).items():
        monkeypatch.setenv(name, text)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    huggingface_hub.HfFileSystem.clear_instance_cache()
    server.repos = {"owner/pets": Repo()}
    server.repos["owner/pets"].commit(PETS)
    server.requests.clear()
    server.faults.clear()
    server.api_faults.clear()
    server.tokens.clear()
    server.retry_after = 0
    yield server
    huggingface_hub.HfFileSystem.clear_instance_cache()


def environment(server: HubServer, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home)}


def rows_of(*names: str) -> list[str]:
    return [f"{name} {n}" for name in names for n in range(40)]


@pytest.mark.parametrize(
    ("place", "rows"),
    [
        ("", rows_of("dog")),
        (":cats/train", rows_of("train 0", "train 1")),
        (":cats/test", rows_of("test 0")),
        (":cats", rows_of("train 0", "train 1")),
        (":dogs/train", rows_of("dog")),
        ("@main:dogs", rows_of("dog")),
        ("/cats/test-0.parquet", rows_of("test 0")),
        ("@main/cats/train-*.parquet", rows_of("train 0", "train 1")),
        ("/dogs", rows_of("dog")),
        ("/**/*-0.parquet", rows_of("test 0", "train 0")),
    ],
)
def test_files_and_splits_are_read_at_a_commit(hub, place, rows):
    commit = hub.repos["owner/pets"].refs["main"]
    source = open_source(f"hf://datasets/owner/pets{place}", format="auto")
    assert texts(source) == rows
    assert source.name == f"hf://datasets/owner/pets@{commit}{place.removeprefix('@main')}"
    assert source.where(0, 3).startswith(f"hf://datasets/owner/pets@{commit}/")


def test_other_revisions_are_read(hub):
    pets = hub.repos["owner/pets"]
    first = pets.refs["main"]
    pets.commit({"default/train/0000.parquet": parquet("converted")}, ref="refs/convert/parquet")
    pets.commit({**PETS, "dogs/0.parquet": parquet("new dog")})
    base = "hf://datasets/owner/pets"
    assert texts(open_source(f"{base}@refs/convert/parquet/default/train", format="auto")) == rows_of(
        "converted"
    )
    assert texts(open_source(f"{base}@{first}:dogs", format="auto")) == rows_of("dog")
    assert texts(open_source(f"{base}:dogs", format="auto")) == rows_of("new dog")


def test_only_footers_and_read_row_groups_are_transferred(hub):
    source = open_source("hf://datasets/owner/pets:cats/train", format="auto")
    opened, footers = len(hub.requests), hub.data_size()
    files = [PETS["cats/train-0.parquet"], PETS["cats/train-1.parquet"]]
    group = len(files[0]) / 4
    # Footers are read by 64 KB from the end; the format is recognized from the first rows.
    assert footers < 2 * 70_000 + 2 * group
    texts(open_source("hf://datasets/owner/pets:cats/train", format="text")) and hub.requests.clear()
    [shown(row) for row in source.read(5)]
    assert group * 0.9 < hub.data_size() < group + 70_000
    assert len(hub.requests) <= 2 * 6  # a redirect each: footer, columns
    assert opened < 60
    assert {request.path.split("?")[0] for request in hub.requests if not request.size} <= {
        f"/datasets/owner/pets/resolve/{hub.repos['owner/pets'].refs['main']}/cats/train-1.parquet"
    }


def test_branch_that_moves_keeps_its_commit_while_it_is_read(hub):
    source = open_source("hf://datasets/owner/pets:dogs", format="auto")
    hub.repos["owner/pets"].commit({**PETS, "dogs/0.parquet": parquet("other dog")})
    assert texts(source) == rows_of("dog")
    assert texts(pickle.loads(pickle.dumps(source))) == rows_of("dog")
    assert texts(open_source("hf://datasets/owner/pets:dogs", format="auto")) == rows_of("other dog")


def test_fingerprint_is_of_the_contents_not_of_the_commit(hub):
    pets = hub.repos["owner/pets"]
    before = open_source("hf://datasets/owner/pets:dogs", format="auto")
    pets.commit({**PETS, "README.md": README.encode() + b"\nMore about pets.\n"})
    described = open_source("hf://datasets/owner/pets:dogs", format="auto")
    assert before.name != described.name
    assert is_same_data(before.fingerprint(), described.fingerprint())
    data = bytearray(PETS["dogs/0.parquet"])
    data[1000] ^= 1
    pets.commit({**PETS, "dogs/0.parquet": bytes(data)})
    changed = open_source("hf://datasets/owner/pets:dogs", format="auto")
    assert not is_same_data(before.fingerprint(), changed.fingerprint())


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("owner/pets:birds/train", "owner/pets has no configuration birds: it has cats, dogs"),
        ("owner/pets:cat", "it has cats, dogs; did you mean cats?"),
        ("owner/pets:cats/dev", "owner/pets:cats has no split dev: it has train, test"),
        ("owner/pets@v2", "owner/pets has no revision v2: it has main"),
        ("owner/pets/birds/*.parquet", "owner/pets has README.md, cats, dogs"),
        ("owner/pet", "no data set owner/pet on http://127.0.0.1"),
        ("owner/shut", "owner/shut is gated: accept its terms at http://127.0.0.1"),
        ("owner/empty", "owner/empty"),
        ("pets", "expected hf://datasets/OWNER/NAME"),
    ],
)
def test_what_is_missing_is_named_with_what_exists(hub, run_data, path, message):
    hub.repos["owner/shut"] = Repo(gated=True)
    hub.repos["owner/shut"].commit(PETS)
    hub.repos["owner/empty"] = Repo()
    hub.repos["owner/empty"].commit({"notes.bin": b"1"})
    code, out, error = run_data("preview", f"hf://datasets/{path}")
    assert (code, out) == (2, "")
    (line,) = error.splitlines()
    assert message in line


@pytest.mark.parametrize("kind", ["gated", "private"])
def test_token_opens_what_is_gated_or_private(hub, monkeypatch, kind):
    setattr(hub.repos["owner/pets"], kind, True)
    with pytest.raises(SoloError, match="HF_TOKEN"):
        open_source("hf://datasets/owner/pets:dogs", format="auto")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert texts(open_source("hf://datasets/owner/pets:dogs", format="auto")) == rows_of("dog")


def test_offline_is_one_line(hub, monkeypatch, run_data):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    code, _, error = run_data("preview", "hf://datasets/owner/pets")
    assert (code, len(error.splitlines())) == (2, 1)
    assert "HF_HUB_OFFLINE is set" in error
    assert not hub.requests


def test_faults_of_the_network_are_retried(hub):
    source = open_source("hf://datasets/owner/pets:dogs", format="auto")
    hub.faults.extend([429, "drop", 503, "drop"])
    assert texts(source) == rows_of("dog")
    assert not hub.faults


def test_lost_access_stops_without_retries(hub):
    source = open_source("hf://datasets/owner/pets:dogs", format="auto")
    hub.repos["owner/pets"].gated = True
    hub.requests.clear()
    with pytest.raises(OSError, match="401"):
        source.read(0)
    assert len(hub.requests) == 1


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("fault", "message"), [("gated", "401 Client Error"), ("down", "503 Service")])
def test_hub_that_fails_for_good_stops_training_in_one_line(hub, solo_folder, workers, fault, message):
    data = {"sources": [{"path": "hf://datasets/owner/pets:dogs"}], "streams": 2, "workers": workers}
    mixture = Mixture.parse({"model": str(solo_folder), "data": {**data, "sequence_length": 64}})
    loader = make_loader(mixture, load_encoder(solo_folder).processor, mixture.open_sources())
    hub.repos["owner/pets"].gated = fault == "gated"
    hub.faults.extend([503] * 1000)
    with pytest.raises(SoloError, match=rf"^cannot read the data: .*{message}.*; run .* again to resume$"):
        loader.take(1)


@pytest.mark.parametrize(
    ("endpoint", "problem"),
    [("http://127.0.0.1:9", "refused"), ("http://hub.invalid", "not known|resolution")],
)
def test_hub_that_cannot_be_reached_ends_a_command_at_once(
    hub, waits, monkeypatch, run_data, endpoint, problem
):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    code, out, error = run_data("preview", "hf://datasets/owner/pets:dogs")
    assert (code, out, len(waits)) == (2, "", 1)
    line = error.splitlines()[-1]
    assert re.search(rf"cannot read hf://datasets/owner/pets:dogs: .*({problem})", line)
    assert line.endswith("; check its address and the network, or name local files")


def waits_said(caplog, place: str) -> list[str]:
    """Return the numbers of the attempts that lines about waits for a place announce."""
    lines = [line for line in caplog.messages if line.startswith(f"waiting for {place}")]
    return [re.search(r"attempt (\d of \d)", line)[1] for line in lines]


def test_hub_that_does_not_answer_is_asked_five_times_and_every_wait_is_said(hub, monkeypatch, caplog):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.1)
    hub.api_faults.extend(["stall"] * 100)
    with pytest.raises(SoloError, match=r"cannot read hf://datasets/owner/pets:dogs: .*timed out"):
        open_source("hf://datasets/owner/pets:dogs", format="auto")
    assert waits_said(caplog, "hf://datasets/owner/pets:dogs (") == ["2 of 5", "3 of 5", "4 of 5", "5 of 5"]


@pytest.mark.parametrize("stalls", [1, 2, 3])
def test_stalled_requests_of_every_kind_are_repeated(hub, monkeypatch, stalls):
    """Access, the listing, and facts of files beside rows: none waits for ever."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.3)
    repo = hub.repos["owner/photos"] = Repo()
    repo.commit({"rows/x.jsonl": b'{"text": "a"}\n', "photos/a.txt": b"A caption."})
    hub.api_faults.extend(["stall"] * stalls)
    assert texts(open_source("hf://datasets/owner/photos/rows", format="auto")) == ["a"]
    assert not hub.api_faults
    hub.api_faults.extend(["stall"] * stalls)
    assert retried(read_url)("hf://datasets/owner/photos/photos/a.txt") == b"A caption."
    assert not hub.api_faults


def test_hub_that_dies_during_a_run_is_asked_longer(hub, caplog):
    source = open_source("hf://datasets/owner/pets:dogs", format="auto")
    hub.faults.extend([503] * 1000)
    with pytest.raises(OSError, match="503"):
        source.read(0)
    assert waits_said(caplog, "hf://datasets/owner/pets@") == ["2 of 5", "3 of 5", "4 of 5", "5 of 5"]
    assert len(hub.faults) <= 1000 - 5 * 5  # huggingface_hub repeats requests, too


@pytest.mark.parametrize("status", [429, 503])
def test_wait_that_the_hub_asks_for_is_kept(hub, waits, status):
    hub.retry_after = 7
    hub.api_faults.extend([status, status])
    assert texts(open_source("hf://datasets/owner/pets:dogs", format="auto")) == rows_of("dog")
    assert waits[:2] == [7, 7]


def test_token_is_not_sent_to_the_host_that_stores_files(hub, monkeypatch):
    hub.repos["owner/pets"].private = True
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert texts(open_source("hf://datasets/owner/pets:dogs", format="auto")) == rows_of("dog")
    assert {*hub.tokens} == {None}


def test_threads_read_at_the_same_time(hub):
    source = open_source("hf://datasets/owner/pets:cats/train", format="auto")
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(texts, [source] * 4)) == [rows_of("train 0", "train 1")] * 4


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_processes_read_what_this_one_opened(hub, method):
    source = open_source("hf://datasets/owner/pets:cats/train", format="auto")
    texts(source)  # connections are open when the process forks
    with ProcessPoolExecutor(2, get_context(method)) as pool:
        assert list(pool.map(texts, [source, source])) == [rows_of("train 0", "train 1")] * 2


def test_filter_and_images_inside_rows_and_beside_them(hub, picture):
    photo = png(picture())
    rows = [{"image": {"bytes": photo, "path": None}, "text": f"pet {n}", "stars": n} for n in range(4)]
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    lines = "\n".join(json.dumps({"image": "a.png", "text": f"pet {n}"}) for n in range(2))
    repo = hub.repos["owner/photos"] = Repo()
    commit = repo.commit(
        {"data/train-0.parquet": buffer.getvalue(), "rows/x.jsonl": lines.encode(), "photos/a.png": photo}
    )
    inside = open_source("hf://datasets/owner/photos/data", format="auto", filter="stars >= 2")
    assert shown(inside.read(0)[2]) == f"a:<{photo!s}>pet 2"
    folder = "hf://datasets/owner/photos/photos"
    beside = open_source("hf://datasets/owner/photos/rows/x.jsonl", format="auto", images=folder)
    url = f"hf://datasets/owner/photos@{commit}/photos/a.png"
    assert shown(beside.read(0)[1]) == f"a:<{url}>pet 1"
    captions = open_source(folder, format="auto")
    assert captions.where(0, 0) == url


def test_tars_are_read_in_place_or_through_the_cache(hub, picture):
    photo = png(picture())
    members = {f"{n:03}.{end}": data for n in range(9) for end, data in (("png", photo), ("txt", b"pet"))}
    hub.repos["owner/tars"] = Repo()
    hub.repos["owner/tars"].commit({"x.tar": tar_bytes(members)})
    for cache in (False, True):
        source = open_source("hf://datasets/owner/tars/x.tar", format="auto", cache=cache)
        rows = source.read(0)
        hub.requests.clear()
        assert shown(rows[4]) == f"a:<{photo!s}>pet"
        assert len(hub.requests) == (0 if cache else 2)  # the members of a row at once, after a redirect
    assert list(Path(os.environ["HF_HOME"], "hub").rglob("x.tar"))
    with pytest.raises(SoloError, match="cache is for data of the hub"):
        open_source("x.parquet", cache=True)


RECIPE = """\
model: {model}
out: {out}
steps: 4
global_batch: 2
checkpoint: {{save_interval: 2}}
data:
  sequence_length: 64
  streams: 2
  sources: [{{path: "hf://datasets/owner/pets{place}", filter: "stars >= 2"}}]
"""


def test_run_resumes_at_its_commit_after_the_branch_moved(hub, run, solo_folder, tmp_path):
    """Worker processes read; a run resumes on the same contents, and else says how to name its commit."""
    out, pets = tmp_path / "run", hub.repos["owner/pets"]

    def train(place: str, *overrides: str) -> tuple[int, str, str]:
        (tmp_path / "train.yaml").write_text(RECIPE.format(model=solo_folder, out=out, place=place))
        return run("train", tmp_path / "train.yaml", *overrides)

    code, _, error = train(":dogs", "data.workers=2")
    assert code == 0, error
    first, counts = pets.refs["main"], json.loads((out / "manifest.json").read_text())
    assert list(counts["data"]) == [f"hf://datasets/owner/pets@{first}:dogs"]
    assert counts["outcome"]["data"]["filtered"] > 0
    weights = (out / "model/model.safetensors").read_bytes()

    def resume(place: str) -> tuple[int, str]:
        (out / "model").rename(tmp_path / f"model-{len(hub.requests)}")
        for checkpoint in sorted((out / "checkpoints").iterdir())[1:]:
            checkpoint.rename(tmp_path / f"{checkpoint.name}-{len(hub.requests)}")
        code, _, error = train(place)
        return code, error

    pets.commit({**PETS, "README.md": README.encode() + b"More about pets."})
    code, error = resume(":dogs")
    assert code == 0, error
    assert (out / "model/model.safetensors").read_bytes() == weights
    second = pets.commit({**PETS, "dogs/0.parquet": parquet("other dog")})
    code, error = resume(":dogs")
    line = error.splitlines()[-1]
    assert code == 2
    assert f"owner/pets@{second}:dogs (then hf://datasets/owner/pets@" in line
    (out / "model").mkdir()
    code, error = resume(f"@{first}:dogs")
    assert code == 0, error
    assert (out / "model/model.safetensors").read_bytes() == weights


def test_commands_about_data_read_the_hub(hub, run_data, solo_folder, tmp_path):
    mixture = tmp_path / "mixture.yaml"
    mixture.write_text(RECIPE.format(model=solo_folder, out="run", place=":cats/train"))
    code, out, error = run_data("verify", mixture, "--json")
    assert code == 0, error
    assert json.loads(out)["sources"][0]["samples"] == 48
    code, out, error = run_data("stats", mixture, "--exact", "--json")
    assert json.loads(out)["sources"][0]["source"] == "hf://datasets/owner/pets:cats/train"
    assert run_data("view", mixture, "--out", tmp_path / "x.html", "--samples", 4)[0] == 0
    code, out, error = run_data("preview", "hf://datasets/owner/pets:cats", "--filter", "stars >= 3")
    assert code == 0, error
    assert "assistant (supervised): train 0 3" in out


@pytest.mark.parametrize(
    "url",
    [
        "hf://datasets/o/n",
        "hf://datasets/o/n@v1",
        "hf://datasets/o/n@refs%2Fconvert%2Fparquet:a/train",
        "hf://datasets/o/n:a b (c)/train",
        "hf://datasets/o/n@0123/a/b*.parquet",
        "hf://datasets/o/n:a",
    ],
)
def test_url_is_parsed_and_written(url):
    assert str(HubPath.parse(url)) == url


def test_revisions_with_slashes():
    assert HubPath.parse("hf://datasets/o/n@refs/convert/parquet/default/train") == HubPath(
        "o/n", "refs/convert/parquet", "default/train"
    )
    assert HubPath.parse("hf://datasets/o/n@a%2Fb:c") == HubPath("o/n", "a/b", config="c")
    assert HubPath.parse("hf://buckets/o/n/x.parquet") is None
