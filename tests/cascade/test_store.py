"""Files below a storage URI: whole or none, alike on local folders and on object stores."""

from __future__ import annotations

import errno
import os
import pickle
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cascade import modifiers, store
from cascade.artifacts import Run, open_run
from cascade.errors import ConfigError
from cascade.fingerprints import sha256_of_file
from cascade.store import StorageError, Store
from cascade.tasks import Verdict
from tests.helpers.gcs_server import gcs_server


def verdicts(*numbers, outcome="pass"):
    return [Verdict(f"t{n:03}", "base", "", outcome) for n in numbers]


def ids(run, table="verdicts"):
    return [v.task_id for v in run.read(table, Verdict)]


def test_files_are_replaced_whole(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("a/b.txt", b"old")
    store.write_bytes("a/b.txt", b"new")
    assert store.read_bytes("a/b.txt") == b"new"
    assert store.list("a") == ["b.txt"]
    assert store.list("nowhere") == []
    assert store.list(recursive=True) == ["a", "a/b.txt"]
    with pytest.raises(FileNotFoundError):
        store.read_bytes("a/c.txt")
    store.delete("a/b.txt")
    store.delete("a")
    store.delete("a")
    assert store.list() == []


def test_a_place_that_takes_no_file_is_named_and_nothing_half_written_stays(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"file/store/a/b\.txt cannot be written: Not a directory"):
        Store(str(tmp_path / "file/store")).write_bytes("a/b.txt", b"x")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    store = Store(str(tmp_path / "full"))
    with pytest.raises(StorageError, match="No space left on device"):
        store.write_bytes("b.txt", b"x")
    assert store.list() == []


@pytest.mark.parametrize(
    ("uri", "said"), [("foo://bar", "Unrecognized filesystem type"), ("s3://?region=x", "it names no bucket")]
)
def test_what_is_no_storage_is_refused_in_words(uri, said):
    with pytest.raises(ConfigError, match=rf"{re.escape(uri)} is no storage: .*{said}.* Give .*s3://bucket/prefix"):
        Store(uri).exists("x")


def test_a_relative_store_does_not_move_with_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("out/code")
    store.write_json("x.json", {"a": "ä"})
    monkeypatch.chdir("/")
    assert store.read_json("x.json") == {"a": "ä"}
    assert (tmp_path / "out/code/x.json").exists()
    assert store.child("deeper").path("y") == str(tmp_path / "out/code/deeper/y")
    assert store.is_local
    assert pickle.loads(pickle.dumps(store)) == store


def test_sha256_of_file(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_of_file(tmp_path / "x").startswith("ba7816bf8f01cfea")


@pytest.fixture
def bucket(monkeypatch):
    """A store in memory that behaves as object stores do: times, no folders to make, no rename, no local path."""
    memory = MemoryFileSystem()
    monkeypatch.setattr(memory, "store", {})
    monkeypatch.setattr(memory, "pseudo_dirs", [""])
    remote = pafs.PyFileSystem(pafs.FSSpecHandler(memory))
    ordinary = pafs.FSSpecHandler._create_file_info

    def timed(path, info):
        # Of the file itself: a listing has its time as a float, which is off by nanoseconds.
        file = memory.store.get(path)
        return ordinary(path, info | {"mtime": file and file.created})

    monkeypatch.setattr(pafs.FSSpecHandler, "_create_file_info", staticmethod(timed))
    monkeypatch.setattr(store, "_resolve", lambda uri: (remote, uri.removeprefix("s3:/")))
    return Store("s3://bucket/models")


def test_a_store_that_is_not_local(bucket):
    assert not bucket.is_local
    assert bucket.path("a/b") == "/bucket/models/a/b"
    run = Run(bucket, "code", "job", "1")
    run.start({})
    run.write_part("verdicts", verdicts(2))
    run.write_part("verdicts", verdicts(1))
    run.finish({"n": 2})
    assert ids(run) == ["t001", "t002"]
    assert run.done
    assert bucket.list("code/job@1") == ["manifest.json", "verdicts.parquet"]


def test_folders_go_up_to_and_come_down_from_a_store_that_is_not_local(bucket, tmp_path):
    (tmp_path / "local").mkdir()
    (tmp_path / "local/adapter.bin").write_bytes(b"weights")
    bucket.upload_folder(tmp_path / "local", "adapter")
    copy = bucket.local_copy("adapter", tmp_path / "cache")
    assert (copy / "adapter.bin").read_bytes() == b"weights"
    assert bucket.local_copy("adapter", tmp_path / "cache") == copy
    single = bucket.local_copy("adapter/adapter.bin", tmp_path / "cache")
    assert single.read_bytes() == b"weights"
    assert not [p for p in (tmp_path / "cache").iterdir() if p.name.endswith(".tmp")]
    with pytest.raises(FileNotFoundError):
        bucket.local_copy("nothing", tmp_path / "cache")


@pytest.mark.parametrize("path", ["adapter", "adapter/x.bin"])
@pytest.mark.parametrize("anew", [b"new weights", b"more of the new weights"])
def test_what_was_deleted_and_made_anew_is_copied_anew(bucket, tmp_path, path, anew):
    def copied():
        copy = bucket.local_copy(path, tmp_path / "cache")
        return (copy if copy.is_file() else copy / "x.bin").read_bytes()

    bucket.write_bytes("adapter/x.bin", b"old weights")
    assert copied() == b"old weights"
    bucket.delete("adapter")
    bucket.write_bytes("adapter/x.bin", anew)
    assert copied() == anew


def test_a_folder_goes_into_a_local_store(tmp_path):
    (tmp_path / "adapter/sub").mkdir(parents=True)
    (tmp_path / "adapter/sub/x").write_bytes(b"1")
    store = Store(str(tmp_path / "store"))
    store.upload_folder(tmp_path / "adapter", "deep/copy")
    assert store.list("deep/copy", recursive=True) == ["sub", "sub/x"]


def test_two_processes_may_make_the_same_local_copy(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    store._move(tmp_path / "mine", tmp_path / "theirs")
    assert (tmp_path / "theirs/file").read_text() == "theirs"
    assert not (tmp_path / "mine").exists()


def test_a_local_copy_of_a_local_store_is_the_file_itself(tmp_path):
    store = Store(str(tmp_path))
    store.write_bytes("x", b"1")
    assert store.local_copy("x", tmp_path / "cache") == tmp_path / "x"
    assert not (tmp_path / "cache").exists()


@pytest.fixture
def google():
    with gcs_server() as uri:
        yield Store(uri)


def test_folders_are_listed_on_google_cloud_storage(google):
    for name in ("modifiers/code/CURRENT", "modifiers/code/1f/manifest.json", "modifiers/reasoning/CURRENT", "notes"):
        google.write_bytes(name, b"x")
    assert google.list() == ["modifiers", "notes"]
    assert google.list("modifiers") == modifiers.list_domains(google) == ["code", "reasoning"]
    assert google.list("modifiers/code") == ["1f", "CURRENT"]
    assert google.list("modifiers/code", recursive=True) == ["1f/manifest.json", "CURRENT"]
    assert google.list("nothing") == []


def test_a_run_on_google_cloud_storage(google, tmp_path):
    run = open_run(google, "code", "job", seed=1)
    run.start({})
    run.write_part("verdicts", verdicts(2))
    run.write_part("verdicts", verdicts(1))
    run.finish({"n": 2})
    assert ids(run) == ["t001", "t002"]
    assert google.list("code") == [run.name]
    (tmp_path / "made/sub").mkdir(parents=True)
    (tmp_path / "made/sub/x").write_bytes(b"1")
    google.upload_folder(tmp_path / "made", f"{run.folder}/adapter")
    assert (google.local_copy(f"{run.folder}/adapter", tmp_path / "cache") / "sub/x").read_bytes() == b"1"
    google.delete(run.folder)
    google.delete(run.folder)
    assert google.list("code") == []


@contextmanager
def s3_server(handler, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "x")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"s3://bucket/x?endpoint_override=127.0.0.1%3A{server.server_port}&scheme=http&region=us-east-1"
        server.shutdown()


class Replaced(BaseHTTPRequestHandler):
    """An object of S3 that is replaced by a longer one between the question for its length and its content."""

    protocol_version = "HTTP/1.1"
    versions = (b'{"step": 99}', b'{"step": 100, "loss": 1.25}')
    asked = 0

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        version = self.versions[min(1, type(self).asked)]
        self.answer(200, b"", {"Content-Length": str(len(version))})

    def do_GET(self):
        type(self).asked += 1
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        part = self.versions[1][int(first) : int(last) + 1]
        span = f"bytes {first}-{last}/{len(self.versions[1])}"
        self.answer(206, part, {"Content-Length": str(len(part)), "Content-Range": span})

    def answer(self, status, body, headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Last-Modified", "Tue, 01 Dec 2026 10:00:00 GMT")
        self.end_headers()
        self.wfile.write(body)


def test_json_that_is_replaced_while_it_is_read_is_read_again(monkeypatch):
    with s3_server(Replaced, monkeypatch) as uri:
        assert Store(uri).read_json("progress.json") == {"step": 100, "loss": 1.25}


class Refusing(Replaced):
    """An S3 that knows nobody's credentials, for a while."""

    refuses = True

    def do_HEAD(self):
        if self.refuses:
            self.answer(403, b"", {"Content-Length": "0"})
        else:
            super().do_HEAD()


def test_a_storage_that_lets_nobody_in_is_said_and_asked_again(monkeypatch):
    with s3_server(Refusing, monkeypatch) as uri:
        reached = Store(uri)
        with pytest.raises(StorageError, match=rf"storage: {re.escape(uri)} cannot be reached: .*ACCESS_DENIED"):
            reached.exists("progress.json")
        monkeypatch.setattr(Refusing, "refuses", False)
        assert reached.exists("progress.json")


def test_what_is_no_json_is_said_at_once(tmp_path):
    (tmp_path / "x.json").write_bytes(b'{"step": ')
    with pytest.raises(ValueError, match="Expecting value"):
        Store(str(tmp_path)).read_json("x.json")
