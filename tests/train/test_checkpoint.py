import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from marrow.core.errors import DiskFull
from marrow.train.checkpoint import load_latest, remove_checkpoints, save_checkpoint, write_state


def tensors_of(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {"a": torch.randn(5, 7, generator=generator), "b": torch.randn(3, 11, generator=generator).mT}


def save(work: Path, step: int) -> None:
    save_checkpoint(work, step, tensors_of(step), {"loader": {"position": 4 * step}})


def names(work: Path) -> list[str]:
    return sorted(path.name for path in work.iterdir())


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    save(tmp_path, 7)
    found, damaged = load_latest(tmp_path)
    assert found is not None and not damaged
    assert found.step == 7
    assert found.state["loader"] == {"position": 28}
    assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors_of(7).items())


def test_without_checkpoints_there_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) == (None, [])


def test_the_last_two_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 1000, 11_000):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-00001000", "checkpoint-00011000"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    save_checkpoint(tmp_path, 5, tensors_of(6), {})
    found, _ = load_latest(tmp_path)
    assert found is not None
    assert torch.equal(found.tensors["a"], tensors_of(6)["a"])


@settings(max_examples=25, deadline=None)
@given(
    file=st.sampled_from(["tensors.safetensors", "state.json", "manifest.json"]),
    where=st.floats(0, 1, exclude_max=True),
    how=st.sampled_from(["flip", "cut", "remove"]),
)
def test_any_damage_is_found_and_the_one_before_used(
    tmp_path_factory: pytest.TempPathFactory, file: str, where: float, how: str
) -> None:
    work = tmp_path_factory.mktemp("work")
    save(work, 1)
    save(work, 2)
    path = work / "checkpoint-00000002" / file
    data = bytearray(path.read_bytes())
    place = int(where * len(data))
    if how == "flip":
        data[place] ^= 0x10
        path.write_bytes(data)
    elif how == "cut":
        path.write_bytes(data[:place])
    else:
        path.unlink()
    found, damaged = load_latest(work)
    assert found is not None
    if found.step == 2:  # a flipped space or newline of the manifest changes nothing that it says
        assert file == "manifest.json" and how in ("flip", "cut") and not damaged
        return
    assert found.step == 1
    assert torch.equal(found.tensors["a"], tensors_of(1)["a"])
    assert len(damaged) == 1 and damaged[0].startswith("checkpoint-00000002: ")
    assert names(work) == ["checkpoint-00000001"]


def test_the_damage_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(tmp_path, 3)
    (tmp_path / "checkpoint-00000003" / "tensors.safetensors").write_bytes(b"torn")
    assert load_latest(tmp_path)[0] is None
    assert "checkpoint-00000003 is damaged" in caplog.text


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    save(tmp_path, 1)
    half = tmp_path / ".tmp-1-half"
    half.mkdir()
    (half / "state.json").write_text(json.dumps({"step": 2}))
    found, _ = load_latest(tmp_path)
    assert found is not None and found.step == 1


def test_remove_takes_checkpoints_only(tmp_path: Path) -> None:
    save(tmp_path, 1)
    (tmp_path / "run.json").write_text("{}")
    remove_checkpoints(tmp_path)
    assert names(tmp_path) == ["run.json"]


def test_equal_states_give_equal_bytes(tmp_path: Path) -> None:
    for name, order in (("one", ("a", "b")), ("two", ("b", "a"))):
        (tmp_path / name).mkdir()
        write_state(tmp_path / name, {k: tensors_of(1)[k] for k in order}, dict.fromkeys(order, 1))
    for file in ("tensors.safetensors", "state.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_full_disk_is_named_and_the_old_checkpoint_stays(small_disk: Callable[[str], Path]) -> None:
    disk = small_disk("256k")
    save(disk, 1)
    with pytest.raises(DiskFull, match="cannot write a checkpoint: no space left") as caught:
        save_checkpoint(disk, 2, {"a": torch.zeros(1 << 18)}, {})
    assert "hint: free some space" in str(caught.value)
    assert names(disk) == ["checkpoint-00000001"]
    found, damaged = load_latest(disk)
    assert found is not None and found.step == 1 and not damaged
