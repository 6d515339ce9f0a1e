"""The tensors that a site keeps: the right bits or none, within the limit, after any crash."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedspan.site.contents import ContentStore
from fedspan.wire import contents
from fedspan.wire.contents import Lacking, digest, filled
from fedspan.wire.framing import Malformed

KINDS: dict[str, Tensor] = {
    "matrix": torch.randn(7, 5),
    "transposed": torch.randn(7, 5).mT,
    "three dimensions": torch.randn(2, 3, 4).permute(2, 0, 1),
    "bfloat16": torch.randn(4, 4).to(torch.bfloat16),
    "words": torch.arange(9),
    "vector": torch.randn(3),
    "number": torch.tensor(1.5),
    "empty": torch.empty(0, 4),
    "not a number": torch.tensor([[float("nan"), -0.0], [0.0, float("inf")]]),
}


def bits(tensor: Tensor) -> bytes:
    return contents.in_memory_order(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_comes_back_with_its_bits_and_strides(tmp_path: Path, kind: str) -> None:
    """After a restart too."""
    tensor = KINDS[kind]
    assert ContentStore(tmp_path / "contents", 10**6).put(tensor)
    again = ContentStore(tmp_path / "contents", 10**6)
    assert again.digests() == [digest(tensor)]
    found = again.get(digest(tensor))
    assert found is not None
    assert (found.dtype, found.shape, found.stride()) == (tensor.dtype, tensor.shape, contents.dense_strides(tensor))
    assert bits(found) == bits(tensor)
    assert found.data_ptr() % 64 == 0 or not found.numel()


def test_the_digest_tells_apart_what_computes_otherwise() -> None:
    x = torch.randn(4, 4)
    others = [x, x.mT, x.reshape(2, 8), x.double(), -x, x.to(torch.bfloat16), torch.zeros(4), -torch.zeros(4)]
    assert len({digest(t) for t in others}) == len(others)
    assert digest(x) == digest(x.clone()) == digest(torch.cat([x, x])[:4])
    assert digest(x, "bfloat16") == digest(x.to(torch.bfloat16).float())


def test_a_damaged_file_is_not_used_and_a_file_that_was_cut_off_is_removed(tmp_path: Path) -> None:
    """As after kill -9, or a disk that lies."""
    folder = tmp_path / "contents"
    store, tensors = ContentStore(folder, 10**6), [torch.randn(8, 8) for _ in range(4)]
    names = [digest(t) for t in tensors]
    assert all(store.put(t) for t in tensors)
    flipped, short, gone = (folder / name for name in names[:3])
    content = bytearray(flipped.read_bytes())
    content[-1] ^= 1
    flipped.write_bytes(content)
    short.write_bytes(short.read_bytes()[:-9])
    gone.unlink()
    (folder / f"{names[0]}.123.partial").write_bytes(b"half")
    assert [store.get(name) is not None for name in names] == [False, False, False, True]
    assert ContentStore(folder, 10**6).digests() == names[3:]
    assert sorted(path.name for path in folder.iterdir()) == names[3:]


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    """Also by the times of the files, after a restart."""
    folder, tensors = tmp_path / "contents", [torch.randn(100, 10) for _ in range(4)]
    names = [digest(t) for t in tensors]
    limit = 3 * 4200
    store = ContentStore(folder, limit)
    assert all(store.put(t) for t in tensors[:3])
    assert store.get(names[0]) is not None
    assert store.put(tensors[3])
    assert store.digests() == [names[3], names[0], names[2]]
    for age, name in enumerate([names[3], names[0], names[2]]):
        os.utime(folder / name, (1000 - age, 1000 - age))
    assert ContentStore(folder, limit // 3).digests() == [names[3]]
    assert not store.put(torch.randn(1000, 10))
    assert sum(path.stat().st_size for path in folder.iterdir()) <= limit


def test_nothing_is_kept_where_the_settings_say_so(tmp_path: Path) -> None:
    store = ContentStore(tmp_path / "contents", 0)
    assert not store.put(torch.randn(2))
    assert not (tmp_path / "contents").exists()


def test_a_message_is_filled_from_what_is_kept_and_what_is_completed() -> None:
    kept, made, empty = torch.randn(3, 3), torch.randn(2, 3), torch.empty(0)
    named = [(0, digest(kept)), (2, digest(made))]
    sent = [empty, torch.ones(1), empty]
    full = filled(sent, named, {digest(kept): kept}.get, lambda known: [known[0] * 2, made])
    assert full[0] is kept
    assert full[2] is made
    assert sent[0] is empty
    with pytest.raises(Lacking) as lacking:
        filled(sent, named, {}.get, lambda known: [])
    assert lacking.value.digests == sorted([digest(kept), digest(made)])
    with pytest.raises(Malformed, match="of 3 tensors that names tensor 7"):
        filled(sent, [(7, digest(kept))], {}.get, lambda known: [])


def test_what_had_to_go_is_said_once(tmp_path: Path) -> None:
    """Neither what is held again, nor what was gone before a greeting said what is held."""
    tensors = [torch.randn(100, 10) for _ in range(4)]
    names = [digest(t) for t in tensors]
    store = ContentStore(tmp_path / "contents", 2 * 4200)
    assert all(store.put(t) for t in tensors[:3])
    assert store.gone() == names[:1]
    assert store.gone() == []
    store.put(tensors[3])
    store.put(tensors[1])
    assert store.gone() == [names[2]]
    (tmp_path / "contents" / names[3]).write_bytes(b"damaged")
    assert store.get(names[3]) is None
    assert store.gone() == [names[3]]
    assert ContentStore(tmp_path / "contents", 4200).gone() == []
