"""The format: any cut in, any cut out, to the last bit; files that the safetensors library reads."""

from __future__ import annotations

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from test_slices import SIDES, boxes
from torch import Tensor

from genpipe.storage import LocalStorage
from genpipe.training import checkpoint
from genpipe.training.checkpoint import DTYPES, Checkpoint, Snapshot
from genpipe.training.slices import Box, Piece, share_of, within

CPU = torch.device("cpu")


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, *, seed: int) -> Tensor:
    """Any bit pattern, NaNs and subnormals among them."""
    count = int(np.prod(shape))
    if dtype == torch.bool:
        return torch.from_numpy(np.random.default_rng(seed).integers(0, 2, shape).astype(bool))
    raw = np.random.default_rng(seed).integers(0, 256, count * dtype.itemsize, dtype=np.uint8)
    return torch.from_numpy(raw).view(dtype).view(shape)


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def piece(tensor: Tensor, box: Box) -> Piece:
    whole = tuple(tensor.shape)
    return Piece(tensor[within(Box((0,) * len(whole), whole), box)], box, whole)


@st.composite
def cuts(draw: st.DrawFn, box: Box) -> list[Box]:
    """The box in pieces, cut at random along random axes."""
    axes = [axis for axis, n in enumerate(box.shape) if n > 1]
    if not axes or draw(st.booleans()):
        return [box]
    axis = draw(st.sampled_from(axes))
    at = draw(st.integers(1, box.shape[axis] - 1))
    start, shape = list(box.start), list(box.shape)
    shape[axis] = at
    first = Box(box.start, tuple(shape))
    start[axis] += at
    shape[axis] = box.shape[axis] - at
    return draw(cuts(first)) + draw(cuts(Box(tuple(start), tuple(shape))))


@given(st.data())
def test_any_cut_written_is_read_as_any_box_to_the_last_bit(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(sorted(DTYPES.values(), key=str)))
    memory = data.draw(st.sampled_from([1, 64, checkpoint.MEMORY]))
    shapes = data.draw(st.dictionaries(st.sampled_from("abcd"), SIDES, min_size=1))
    tensors = {name: random_bits(shape, dtype, seed=len(name)) for name, shape in shapes.items()}
    files: list[dict[str, Piece]] = [{}]
    for name, tensor in tensors.items():
        for i, box in enumerate(data.draw(cuts(Box((0,) * tensor.ndim, tuple(tensor.shape))))):
            files += [{}] * (i >= len(files))
            files[i] = files[i] | {name: piece(tensor, box)}
    with tempfile.TemporaryDirectory() as folder:
        for i, pieces in enumerate(files):
            snapshot = Snapshot()
            with mock.patch.object(checkpoint, "MEMORY", memory):
                snapshot.copy(pieces, {}, device=CPU)
            snapshot.write(Path(folder, str(i)))
        found = Checkpoint(LocalStorage(folder), [str(i) for i in range(len(files))])
        assert found.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert set(found.dtypes.values()) == {dtype}
        for name, tensor in tensors.items():
            assert bits(found.tensor(name)) == bits(tensor)
            wanted = piece(tensor, data.draw(boxes(of=tuple(tensor.shape))))
            target = wanted._replace(local=torch.zeros_like(wanted.local))
            found.load({name: target})
            assert bits(target.local) == bits(wanted.local)


def state() -> dict[str, Tensor]:
    return {
        "half": random_bits((5,), torch.bfloat16, seed=0),
        "weight": torch.randn(7, 3),
        "strided": torch.randn(4, 6).T,
        "image": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "count": torch.tensor([1, 2], dtype=torch.int64),
        "odd": torch.tensor([True, False, True]),
    }


def test_the_safetensors_library_reads_a_part(tmp_path: Path) -> None:
    tensors = state()
    snapshot = Snapshot()
    snapshot.copy(share_of(tensors, rank=0, world_size=1), {"step": 3, "rate": 0.1}, device=CPU)
    size, _ = snapshot.write(tmp_path / "part")
    assert size == (tmp_path / "part").stat().st_size
    found = load_file(tmp_path / "part")
    assert found.keys() == tensors.keys()
    assert all(bits(found[name]) == bits(tensor) for name, tensor in tensors.items())
    with safe_open(tmp_path / "part", "pt") as file:
        assert file.metadata()["format"] == "genpipe-checkpoint-1"
    assert Checkpoint(LocalStorage(str(tmp_path)), ["part"]).record == {"step": 3, "rate": 0.1}


def test_what_is_written_is_what_was_copied(tmp_path: Path) -> None:
    """However the state goes on meanwhile; and the memory is used again."""
    tensors, snapshot = state(), Snapshot()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    places = set()
    for turn in range(2):
        snapshot.copy(share_of(tensors, rank=0, world_size=1), {}, device=CPU)
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        places.add(snapshot._memory[0].data_ptr())
        tensors["weight"].zero_()
        tensors["count"].add_(1)
        snapshot.write(tmp_path / str(turn))
        found = load_file(tmp_path / str(turn))
        assert all(bits(found[name]) == bits(tensor) for name, tensor in expected.items())
    assert len(places) == 1 and not torch.equal(before["weight"], tensors["weight"])


def test_a_tensor_that_is_not_the_models_is_named(tmp_path: Path) -> None:
    tensors, snapshot = {"weight": torch.zeros(4, 2)}, Snapshot()
    snapshot.copy(share_of(tensors, rank=1, world_size=2), {}, device=CPU)
    snapshot.write(tmp_path / "rank-1")
    found = Checkpoint(LocalStorage(str(tmp_path)), ["rank-1"])
    for name, tensor, told in (
        ("weight", torch.zeros(4, 2), "does not hold all of weight"),
        ("weight", torch.zeros(2, 4), r"weight has shape \[4, 2\], where the model's has \[2, 4\]"),
        ("bias", torch.zeros(2), r"bias is not in it, where the model's has \[2\]"),
    ):
        with pytest.raises(ValueError, match=told):
            found.load(share_of({name: tensor}, rank=0, world_size=1))
