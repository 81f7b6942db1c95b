import os
from pathlib import Path

import pytest
from object_server import Fault, FaultProxy

from marrow.core.errors import Unreachable
from marrow.store.remote.backend import MULTIPART_BYTES
from marrow.store.remote.client import Remote
from marrow.store.remote.retry import Retry
from marrow.store.remote.upload import upload

QUICK = Retry(attempts=3, first_delay_s=0.002)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.arrow").write_bytes(b"a" * 1000)
    (folder / "deep" / "b.arrow").write_bytes(b"")
    (folder / "manifest.json").write_text("{}")
    (folder / "zzz.arrow").symlink_to(folder / "a.arrow")  # as in a view of the store
    return folder


def test_all_files_arrive_and_the_manifest_last(folder: Path, fault_proxy: FaultProxy, bucket: str) -> None:
    with Remote.open(f"{bucket}/data", QUICK) as remote:
        sent = upload(folder, remote)
        assert (sent.num_files, sent.num_bytes, sent.num_equal) == (4, 2002, 0)
        assert [file.name for file in remote.list()] == [
            "a.arrow",
            "deep/b.arrow",
            "manifest.json",
            "zzz.arrow",
        ]
        assert remote.read("zzz.arrow") == b"a" * 1000
    written = [seen.path for seen in fault_proxy.seen if seen.method == "PUT"]
    assert written[-1].endswith("manifest.json")


def test_what_is_there_already_is_not_sent_again(folder: Path, bucket: str) -> None:
    with Remote.open(bucket, QUICK) as remote:
        upload(folder, remote)
        assert upload(folder, remote).num_files == 0
        (folder / "deep" / "b.arrow").write_bytes(b"new")
        again = upload(folder, remote)
        assert (again.num_files, again.num_equal) == (1, 3)
        assert remote.read("deep/b.arrow") == b"new"


@pytest.mark.slow
def test_files_sent_in_parts_are_known_again(tmp_path: Path, bucket: str) -> None:
    folder = tmp_path / "large"
    folder.mkdir()
    (folder / "large").write_bytes(os.urandom(MULTIPART_BYTES + 1))
    (folder / "just").write_bytes(bytes(MULTIPART_BYTES))
    with Remote.open(bucket, QUICK) as remote:
        assert upload(folder, remote).num_files == 2
        assert upload(folder, remote).num_files == 0


def test_an_interrupted_upload_shows_no_manifest_and_goes_on(
    folder: Path, fault_proxy: FaultProxy, bucket: str
) -> None:
    remote = Remote.open(bucket, QUICK)
    upload(folder, remote)
    (folder / "manifest.json").write_text('{"new": 1}')
    (folder / "zzz.arrow").unlink()
    (folder / "zzz.arrow").write_bytes(b"z" * 500)

    def storm(request: object, n: int) -> Fault | None:
        seen = fault_proxy.seen[n]
        return Fault(status=503) if seen.method == "PUT" and "zzz" in seen.path else None

    fault_proxy.fault = storm
    with pytest.raises(Unreachable):
        upload(folder, remote)
    assert not remote.exists("manifest.json"), "the old manifest stands beside new files"
    fault_proxy.fault = lambda request, n: None
    assert upload(folder, remote).num_files == 2
    assert remote.read("manifest.json") == b'{"new": 1}'


def test_a_folder_is_a_place_too(folder: Path, tmp_path: Path) -> None:
    with Remote.open((tmp_path / "out").as_uri()) as remote:
        upload(folder, remote)
    assert (tmp_path / "out" / "deep" / "b.arrow").read_bytes() == b""
    assert (tmp_path / "out" / "manifest.json").read_text() == "{}"
