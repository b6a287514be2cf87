"""Latents and embeddings through both loaders, against tarfile and safetensors alone; what can be wrong with them."""

from __future__ import annotations

import io
import itertools
import json
import random
import tarfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
from data_oracle import Settings, write_tar
from test_data_order import oracle_indices

from dmd2_fast.data import Batch, dali_installed, make_loader
from dmd2_fast.data.latents import LatentDataset
from dmd2_fast.data.tensors import parse_header
from dmd2_fast.errors import DataError

pytestmark = pytest.mark.timeout(60)
NEEDS_DALI = pytest.mark.skipif(not dali_installed(), reason="NVIDIA DALI is not installed")
BOTH = ("plain", pytest.param("dali", marks=NEEDS_DALI))
SHAPES = {"latents": (4, 3, 5), "prompt_embeds": (7, 6), "pooled_prompt_embeds": (5,), "time_ids": (6,)}


def random_sample(
    index: int, dtype: torch.dtype = torch.float16, leave: tuple[str, ...] = ()
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(index)
    kept = {name: shape for name, shape in SHAPES.items() if name not in leave}
    values = {name: torch.randn(shape, generator=generator) for name, shape in kept.items()}
    return {name: value.to(torch.float32 if name == "time_ids" else dtype) for name, value in values.items()}


def write_folder(folder: Path, samples: list, shape: tuple[int, ...] = (4, 3, 5), per_shard: int = 4) -> Path:
    """Shards of tensors (or of bytes as they are), dataset.json and the unconditional embeddings."""
    members = []
    for key, sample in enumerate(samples):
        content = sample if isinstance(sample, bytes) else safetensors.torch.save(sample)
        members.append([(f"{key:08d}.safetensors", content), (f"{key:08d}.txt", b"a caption")])
    for shard, first in enumerate(range(0, len(members), per_shard)):
        write_tar(folder / f"train-{shard:06d}.tar", itertools.chain(*members[first : first + per_shard]))
    first = samples[0] if isinstance(samples[0], dict) else {}
    fields = {name: {"shape": list(value.shape)} for name, value in first.items()}
    (folder / "dataset.json").write_text(json.dumps({"sample_shape": shape, "fields": fields}))
    safetensors.torch.save_file({"prompt_embeds": torch.full((7, 6), 0.5)}, folder / "unconditional.safetensors")
    return folder


def by_hand(folder: Path) -> list[dict[str, torch.Tensor]]:
    samples = []
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            samples += [
                safetensors.torch.load(tar.extractfile(member).read())
                for member in tar.getmembers() if member.name.endswith(".safetensors")
            ]  # fmt: skip
    return samples


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_batches_equal_reading_by_hand(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    """Two ranks, two accumulation steps, over the end of an epoch: every bit of every field."""
    samples = [
        random_sample(index, dtype) | {"noise": torch.randn(4, 3, 5), "number": torch.tensor(index)}
        for index in range(11)
    ]
    samples = by_hand(write_folder(tmp_path, samples))
    for rank in (0, 1):
        loader = make_loader(
            Settings(str(tmp_path), name, "latents"), seed=5, rank=rank, world_size=2, micro_batch_size=1 + rank,
            gradient_accumulation_steps=2, start_iteration=1,
        )  # fmt: skip
        size = 1 + rank
        assert (loader.name, loader.num_samples, loader.sample_shape) == (name, 11, (4, 3, 5))
        for iteration, micro_batches in enumerate(itertools.islice(loader, 4), 1):
            assert len(micro_batches) == 2
            for step, batch in enumerate(micro_batches):
                ids = [(rank * 2 + step) * size + i for i in range(size)]
                positions = [iteration * 4 * size + i for i in ids]
                chosen = [samples[index] for index in oracle_indices(positions, 11, 5)]
                expected = {field: torch.stack([sample[field] for sample in chosen]) for field in samples[0]}
                assert torch.equal(batch.x0, expected.pop("latents").float()) and batch.x0.dtype == torch.float32
                assert set(batch.condition) == {"prompt_embeds", "pooled_prompt_embeds", "time_ids"}
                assert set(batch.extra) == {"noise", "number"}
                for field, value in expected.items():
                    found = batch.condition.get(field, batch.extra.get(field))
                    assert torch.equal(found, value.float() if field != "number" else value)
                    assert found.dtype == (torch.int64 if field == "number" else torch.float32)
                assert batch.sample_ids.tolist() == ids and batch.sample_shape == (4, 3, 5)
        loader.close()


@NEEDS_DALI
@pytest.mark.parametrize(("size", "dtype"), [(4, torch.float16), (1, torch.float32)])
def test_dali_equals_plain_bit_for_bit(tmp_path: Path, size: int, dtype: torch.dtype) -> None:
    """Also one sample alone, behind a field of three bytes: nothing to convert or to gather, and not aligned."""
    odd = {"a": torch.tensor([1, 2, 3], dtype=torch.uint8)}
    samples = by_hand(write_folder(tmp_path, [odd | random_sample(index, dtype) for index in range(9)]))
    loaders = [
        make_loader(Settings(str(tmp_path), name, "latents"), seed=1, micro_batch_size=size)
        for name in ("dali", "plain")
    ]
    kept = [pair for pair, _ in zip(zip(*loaders, strict=True), range(6), strict=False)]
    for iteration, ((dali,), (plain,)) in enumerate(kept):  # only now: later batches overwrite DALI's own buffer
        first = samples[int(oracle_indices([iteration * size], 9, 1)[0])]
        assert torch.equal(plain.x0[0], first["latents"].float()) and torch.equal(plain.extra["a"][0], first["a"])
        assert torch.equal(dali.x0, plain.x0) and torch.equal(dali.sample_ids, plain.sample_ids)
        assert set(dali.condition) == set(plain.condition) and len(plain.condition) == 3
        for field in plain.condition:
            assert torch.equal(dali.condition[field], plain.condition[field])
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("name", BOTH)
def test_prompts_alone_have_no_x0(tmp_path: Path, name: str) -> None:
    write_folder(tmp_path, [random_sample(index, leave=("latents",)) for index in range(3)])
    loader = make_loader(Settings(str(tmp_path), name, "latents"), seed=0, micro_batch_size=2)
    (batch,) = next(iter(loader))
    assert batch.x0 is None and batch.sample_shape == (4, 3, 5) and len(batch) == 2
    assert batch.condition["prompt_embeds"].shape == (2, 7, 6)
    loader.close()


def test_only_the_fields_asked_for_are_read(tmp_path: Path) -> None:
    write_folder(tmp_path, [random_sample(index) for index in range(3)])
    loader = make_loader(
        Settings(str(tmp_path), "plain", "latents"), seed=0, micro_batch_size=2, fields=("prompt_embeds",)
    )
    assert loader.dataset.shapes == {"prompt_embeds": (7, 6)}
    (batch,) = next(iter(loader))
    assert batch.x0 is None and set(batch.condition) == {"prompt_embeds"}
    assert torch.equal(loader.dataset.unconditional["prompt_embeds"], torch.full((7, 6), 0.5))
    loader.close()
    with pytest.raises(DataError, match="no tensor 'noise', which this run reads"):
        LatentDataset(tmp_path, "train", fields=("latents", "noise"))


def test_samples_of_another_order_of_tensors_are_read_alike(tmp_path: Path) -> None:
    """safetensors sorts by dtype and name; another writer may not."""
    sample = {"latents": torch.randn(4, 3, 5), "prompt_embeds": torch.randn(7, 6)}
    header = {
        "prompt_embeds": {"dtype": "F32", "shape": [7, 6], "data_offsets": [0, 168]},
        "latents": {"dtype": "F32", "shape": [4, 3, 5], "data_offsets": [168, 408]},
    }
    content = sample["prompt_embeds"].numpy().tobytes() + sample["latents"].numpy().tobytes()
    write_folder(tmp_path, [sample, made_by_hand(header, content)])
    dataset = LatentDataset(tmp_path, "train")
    assert dataset.encoded(0) == dataset.encoded(1)
    dataset.close()


def test_a_batch_moves_and_splits_with_everything_it_has() -> None:
    batch = Batch(torch.randn(5, 2), {"c": torch.randn(5)}, torch.arange(5), None, {"noise": torch.randn(5, 2)})
    parts = batch.split(2)
    assert [len(part) for part in parts] == [2, 2, 1]
    assert torch.equal(torch.cat([part.extra["noise"] for part in parts]), batch.extra["noise"])
    moved = Batch(None, batch.condition, batch.sample_ids, (1, 2, 3), batch.extra).to("cpu", torch.float64)
    assert moved.extra["noise"].dtype == moved.condition["c"].dtype == torch.float64
    assert moved.x0 is None and moved.sample_shape == (1, 2, 3) and moved.sample_ids.dtype == torch.int64


# --- what can be wrong -----------------------------------------------------------------------------------------------


def made_by_hand(header: object, content: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + content


def entry(shape: object = (2,), dtype: object = "F32", offsets: object = (0, 8)) -> dict:
    return {"a": {"dtype": dtype, "shape": shape, "data_offsets": offsets}}


WRONG = {
    "nothing": (b"", "too few"),
    "no safetensors": (b"\x89PNG\r\n\x1a\n" + bytes(50), "not a safetensors file"),
    "a header beyond the end": (made_by_hand({}, length=1000), "claims 1000 bytes"),
    "a header without end": (made_by_hand({}, bytes(100), length=2**63), "claims"),
    "a header of 100,000 bytes": (made_by_hand(b" " * 100_000), "claims 100000 bytes, expected at most 65536"),
    "no JSON": (made_by_hand(b"{'a': 1}"), "no JSON"),
    "deep JSON": (made_by_hand(b"[" * 60_000), "no JSON"),
    "not UTF-8": (made_by_hand(b'{"\xff": 1}'), "no JSON"),
    "a list": (made_by_hand([1]), "no JSON object"),
    "no tensors": (made_by_hand({"__metadata__": {}}), "0 tensors"),
    "a name twice": (made_by_hand(b'{"a": 1, "a": 2}'), "occurs twice"),
    "not an entry": (made_by_hand({"a": [1]}), "no dtype, shape"),
    "an unknown dtype": (made_by_hand(entry(dtype="F4"), bytes(8)), "dtype 'F4'"),
    "a dtype that is a list": (made_by_hand(entry(dtype=["F32"]), bytes(8)), "dtype"),
    "a negative side": (made_by_hand(entry(shape=[-2]), bytes(8)), "has the shape"),
    "a boolean side": (made_by_hand(entry(shape=[True, 2]), bytes(8)), "has the shape"),
    "an absurd side": (made_by_hand(entry(shape=[2**70]), bytes(8)), "has the shape"),
    "an absurd product": (made_by_hand(entry(shape=[2**30] * 8), bytes(8)), "takes"),
    "many dimensions": (made_by_hand(entry(shape=[1] * 9 + [2]), bytes(8)), "has the shape"),
    "offsets backwards": (made_by_hand(entry(offsets=[8, 0]), bytes(8)), "takes -8 bytes"),
    "offsets that are text": (made_by_hand(entry(offsets=["0", "8"]), bytes(8)), "data_offsets"),
    "a gap": (made_by_hand(entry(offsets=[4, 12]), bytes(12)), "begins at byte 4"),
    "cut off": (made_by_hand(entry(), bytes(7)), "take 8 bytes, the file has 7"),
    "something behind the end": (made_by_hand(entry(), bytes(9)), "take 8 bytes, the file has 9"),
    "overlapping tensors": (
        made_by_hand({**entry(), "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        "begins at byte 4, expected 8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_members_are_named_at_opening(tmp_path: Path, case: str) -> None:
    content, reason = WRONG[case]
    write_folder(tmp_path, [random_sample(0), content])
    with pytest.raises(DataError) as raised:
        LatentDataset(tmp_path, "train")
    message = str(raised.value)
    assert reason in message and "train-000000.tar: member '00000001.safetensors'" in message and len(message) < 600


def replaced(**fields: torch.Tensor) -> dict[str, torch.Tensor]:
    return {**random_sample(1), **fields}


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        (replaced(prompt_embeds=torch.zeros(8, 6, dtype=torch.float16)), r"'prompt_embeds' is float16 \(8, 6\), but"),
        (replaced(latents=torch.zeros(4, 3, 5)), r"'latents' is float32 \(4, 3, 5\), but"),
        (random_sample(1, leave=("time_ids",)), "no tensor 'time_ids', which other samples have"),
        (replaced(noise=torch.zeros(4, 3, 5)), "no tensor 'noise', which other samples have"),
        (replaced(time_ids=torch.tensor([1, 2, 3, 4, 5, float("nan")])), "'time_ids' holds values that are not finite"),
        (replaced(latents=torch.full((4, 3, 5), float("inf"), dtype=torch.float16)), "not finite"),
    ],
)  # fmt: skip
def test_samples_that_do_not_fit_the_others(tmp_path: Path, sample: dict, reason: str) -> None:
    write_folder(tmp_path, [random_sample(0), sample])
    with pytest.raises(DataError, match=reason) as raised:
        LatentDataset(tmp_path, "train")
    assert "train-000000.tar: member '0000000" in str(raised.value)


@pytest.mark.parametrize("name", BOTH)
def test_a_value_that_is_not_finite_is_named_when_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dmd2_fast.data.latents.CHECK_ALL_BYTES", 0)  # as for a large data set
    bad = torch.zeros(7, 6, dtype=torch.bfloat16)
    bad[3, 4] = float("-inf")
    samples = [random_sample(index, torch.bfloat16) for index in range(6)]
    samples[4]["prompt_embeds"] = bad
    write_folder(tmp_path, samples)
    loader = make_loader(Settings(str(tmp_path), name, "latents"), seed=0, micro_batch_size=6)
    with pytest.raises(DataError, match=r"train-000001.tar: member '00000004\.safetensors'.*not finite"):
        next(iter(loader))
    loader.close()


@pytest.mark.parametrize(
    ("description", "reason"),
    [
        (None, "no dataset.json, which `dmd2-fast prepare` writes when everything else is there"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"sample_shape": [4, 3], "fields": {}}', "cannot be read"),
        ('{"sample_shape": [4, -3, 5], "fields": {}}', "cannot be read"),
        ('{"sample_shape": [4, 3, 1e3], "fields": {}}', "cannot be read"),
        ('{"sample_shape": [4, 3, 5], "fields": 1}', "cannot be read"),
        ('{"sample_shape": [4, 6, 10], "fields": {}}', r"latents of \(channels, height, width\) \(4, 3, 5\), but"),
    ],
)
def test_descriptions(tmp_path: Path, description: str | None, reason: str) -> None:
    write_folder(tmp_path, [random_sample(0)])
    (tmp_path / "dataset.json").unlink() if description is None else (tmp_path / "dataset.json").write_text(description)
    with pytest.raises(DataError, match=reason):
        LatentDataset(tmp_path, "train")


def test_a_sample_without_tensors_and_a_folder_without_samples(tmp_path: Path) -> None:
    write_folder(tmp_path, [random_sample(0)])
    write_tar(tmp_path / "train-000001.tar", [("00000001.txt", b"a caption")])
    with pytest.raises(DataError, match=r"'00000001\.txt': the sample has no KEY\.safetensors"):
        LatentDataset(tmp_path, "train")
    write_tar(tmp_path / "train-000001.tar", [])
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(DataError, match="hold 0 samples"):
        LatentDataset(tmp_path, "train")
    write_folder(tmp_path, [random_sample(0)])
    for value in (torch.zeros(7, 5), torch.full((7, 6), float("nan"))):
        safetensors.torch.save_file({"prompt_embeds": value}, tmp_path / "unconditional.safetensors")
        with pytest.raises(DataError, match=r"unconditional\.safetensors: tensor 'prompt_embeds' of shape"):
            LatentDataset(tmp_path, "train")
    (tmp_path / "unconditional.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match=r"unconditional\.safetensors: cannot be read"):
        LatentDataset(tmp_path, "train")


def test_damaged_headers_end_in_a_data_error_or_leave_the_values(tmp_path: Path) -> None:
    """2,000 headers with some random bytes changed: parsed alike, or a ValueError, and no other end."""
    whole = safetensors.torch.save(random_sample(0))
    length, rng, refused = 8 + int.from_bytes(whole[:8], "little"), random.Random(0), 0
    expected = parse_header(whole[:length], len(whole))
    for _ in range(2000):
        damaged = bytearray(whole[:length])
        for _ in range(rng.randint(1, 3)):
            damaged[rng.randrange(8, length)] = rng.randrange(256)
        try:
            found = parse_header(bytes(damaged), len(whole))
        except ValueError:
            refused += 1
            continue
        assert sum(info.end - info.begin for info in found.values()) == sum(i.end - i.begin for i in expected.values())
    assert refused > 1000


def test_headers_are_safetensors_own(tmp_path: Path) -> None:
    """Against the package, tensor by tensor."""
    tensors = {
        **random_sample(3),
        "n": torch.arange(3),
        "empty": torch.zeros(0, 4),
        "u": torch.zeros(2, dtype=torch.uint8),
    }
    content = safetensors.torch.save(tensors, {"format": "pt"})
    length = 8 + int.from_bytes(content[:8], "little")
    found = parse_header(content[:length], len(content))
    for name, value in safetensors.torch.load(content).items():
        part = io.BytesIO(content[length + found[name].begin : length + found[name].end]).read()
        assert found[name].shape == tuple(value.shape) and found[name].dtype == value.dtype
        assert part == value.view(torch.uint8).numpy().tobytes() if value.numel() else part == b""
