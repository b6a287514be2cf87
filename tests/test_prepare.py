"""`dmd2-fast prepare` on real files: values against diffusers' own classes, resuming, whatever a folder may hold."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from PIL import Image
from pipelines import CAPTIONS, make_pipeline, write_images
from tiny import ROOT, on_one_core

from dmd2_fast import prepare as module
from dmd2_fast import trainer
from dmd2_fast.cli import main
from dmd2_fast.config import load_config
from dmd2_fast.data import make_loader
from dmd2_fast.data.inputs import list_images, list_prompts, read_square
from dmd2_fast.distillation import Algorithm
from dmd2_fast.errors import ConfigError, DataError, UserError
from dmd2_fast.networks import load_denoiser
from dmd2_fast.pipeline import TextEncoders
from dmd2_fast.preflight import check_inputs
from dmd2_fast.prepare import Options, prepare
from dmd2_fast.ranks import Rank

CONFIGS = {"sdxl": str(ROOT / "ds_sdxl.json"), "sd15": str(ROOT / "configs" / "ds_sd15_stage1.json")}
QUIET = {"progress": False, "samples_per_shard": 4, "batch_size": 3}


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    return {kind: make_pipeline(tmp_path_factory.mktemp(kind), kind) for kind in CONFIGS}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"), 10)


def config(pipelines, folder: Path, kind: str = "sdxl", *overrides: str):
    sets = [f"model.path={pipelines[kind]}", f"data.path={folder}", "data.loader=plain", *overrides]
    return load_config(CONFIGS[kind], sets)


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def samples(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for path in sorted(folder.glob("train-*.tar")):
        with tarfile.open(path) as tar:
            for name in tar.getnames():
                if name.endswith(".safetensors"):
                    found[name[:8]] = safetensors.torch.load(tar.extractfile(name).read())
    return found


def square(path: Path, side: int = 32) -> tuple[torch.Tensor, tuple[int, ...]]:
    """The image in [-1, 1] as (1, 3, side, side), and (height, width, top, left)."""
    image = Image.open(path).convert("RGB")
    scale = side / min(image.size)
    size = tuple(max(side, round(length * scale)) for length in image.size)
    left, top = ((length - side) // 2 for length in size)
    cut = image.resize(size, Image.Resampling.LANCZOS).crop((left, top, left + side, top + side))
    values = torch.from_numpy(np.array(cut)).permute(2, 0, 1)[None].float() / 127.5 - 1
    return values, (image.height, image.width, top, left)


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm()) <= 2e-6 * float(expected.norm())  # a batch of three against one of one


@pytest.mark.parametrize("size_condition", ["target", "image"])
def test_sdxl_samples_are_what_diffusers_makes(pipelines, images, tmp_path, size_condition):
    from diffusers import StableDiffusionXLPipeline

    options = Options(**QUIET, dtype="float32", size_condition=size_condition)
    assert prepare(config(pipelines, tmp_path / "data"), images=images, options=options) == (10, 0)
    pipeline = StableDiffusionXLPipeline.from_pretrained(pipelines["sdxl"])
    found = samples(tmp_path / "data")
    assert list(found) == [f"{index:08d}" for index in range(10)]
    for path, sample in zip(sorted(images.glob("image*[pj][np]g")), found.values(), strict=True):
        pixels, (height, width, top, left) = square(path)
        with torch.no_grad():
            latents = pipeline.vae.encode(pixels).latent_dist.mean * 0.13025
            embeds, _, pooled, _ = pipeline.encode_prompt(path.with_suffix(".txt").read_text().strip())
        close(sample["latents"], latents[0])
        close(sample["prompt_embeds"], embeds[0])
        close(sample["pooled_prompt_embeds"], pooled[0])
        sizes = [32, 32, 0, 0, 32, 32] if size_condition == "target" else [height, width, top, left, 32, 32]
        assert sample["time_ids"].tolist() == sizes
    assert size_condition == "target" or any(sample["time_ids"][3] > 0 for sample in found.values())
    assert not (tmp_path / "data" / "left_out.jsonl").exists()
    empty = safetensors.torch.load_file(tmp_path / "data" / "unconditional.safetensors")
    assert {name: (tuple(value.shape), float(value.abs().max())) for name, value in empty.items()} == {
        "prompt_embeds": ((77, 32), 0.0), "pooled_prompt_embeds": ((16,), 0.0)
    }  # fmt: skip
    description = json.loads((tmp_path / "data" / "dataset.json").read_text())
    assert description["fields"] == {
        name: {"shape": list(value.shape), "dtype": "float32"} for name, value in sorted(found["00000000"].items())
    }


def test_sd15_prompts_alone(pipelines, tmp_path):
    from diffusers import StableDiffusionPipeline

    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "a red cat\n\n  the\tnight sky \r\nna\xefve 猫".encode())
    overrides = ("adversarial.generator_weight=0", "adversarial.discriminator_weight=0")
    settings = config(pipelines, tmp_path / "data", "sd15", *overrides)
    assert prepare(settings, prompts=tmp_path / "prompts.txt", options=Options(**QUIET, dtype="bfloat16")) == (3, 0)
    pipeline = StableDiffusionPipeline.from_pretrained(pipelines["sd15"])
    with torch.no_grad():
        embeds, no_embeds = pipeline.encode_prompt(["a red cat", "the night sky", "naïve 猫"], "cpu", 1, True)
    found = samples(tmp_path / "data")
    for sample, expected in zip(found.values(), embeds, strict=True):
        assert set(sample) == {"prompt_embeds"} and sample["prompt_embeds"].dtype == torch.bfloat16
        assert float((sample["prompt_embeds"].float() - expected).norm() / expected.norm()) < 2**-9
    close(safetensors.torch.load_file(tmp_path / "data" / "unconditional.safetensors")["prompt_embeds"], no_embeds[0])
    check_inputs(settings)
    loader = make_loader(settings.data, seed=0, micro_batch_size=2)
    (batch,) = next(iter(loader))
    assert batch.x0 is None and batch.sample_shape == (4, 16, 16) and set(batch.condition) == {"prompt_embeds"}
    loader.close()


def test_captions_beside_and_in_metadata_give_the_same_bytes(pipelines, images, tmp_path):
    folders = {"txt": images, "jsonl": write_images(tmp_path / "jsonl", 10, captions="jsonl")}
    for name, folder in folders.items():
        prepare(config(pipelines, tmp_path / f"{name}-data"), images=folder, options=Options(**QUIET))
    assert tree(tmp_path / "txt-data") == tree(tmp_path / "jsonl-data")
    with tarfile.open(tmp_path / "txt-data" / "train-000000.tar") as tar:
        texts = [tar.extractfile(name).read().decode() for name in tar.getnames() if name.endswith(".txt")]
    assert texts == list(CAPTIONS)


# --- going on --------------------------------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from dmd2_fast import prepare as module
from dmd2_fast import trainer
from dmd2_fast.cli import main
encode, calls = module._Job._encode, []
def dying(self, rows):
    calls.append(0)
    if len(calls) == 4:  # in the middle of the second shard
        os.kill(os.getpid(), signal.SIGKILL)
    return encode(self, rows)
module._Job._encode = dying
sys.exit(main(sys.argv[1:]))
"""


def test_killed_and_started_again_gives_the_same_bytes(pipelines, images, tmp_path, capsys):
    arguments = [
        "prepare", "--images", str(images), "--config", CONFIGS["sdxl"], "--set", f"model.path={pipelines['sdxl']}",
        "--samples-per-shard", "4", "--batch-size", "3", "--set",
    ]  # fmt: skip
    flags = {"env": {**os.environ, "OMP_NUM_THREADS": "1"}, "capture_output": True}
    killed = tmp_path / "killed"
    code = [sys.executable, "-c", KILLED, *arguments, f"data.path={killed}"]
    assert subprocess.run(on_one_core(code), **flags, timeout=200).returncode == -signal.SIGKILL
    names = {path.name for path in killed.iterdir()}
    assert "train-000000.tar" in names and "dataset.json" not in names
    assert any(name.startswith(".train-000001.tar.") for name in names)
    kept = (killed / "train-000000.tar").stat()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert main([*arguments, f"data.path={killed}"]) == 0
        assert main([*arguments, f"data.path={tmp_path / 'whole'}"]) == 0
    finally:
        torch.set_num_threads(threads)
    again = (killed / "train-000000.tar").stat()
    assert (again.st_ino, again.st_mtime_ns) == (kept.st_ino, kept.st_mtime_ns)
    assert tree(killed) == tree(tmp_path / "whole")
    assert "10 samples" in capsys.readouterr().out


def test_stopped_at_any_write_it_goes_on(pipelines, images, tmp_path, monkeypatch):
    """What is there after going on is the same, wherever the interruption was."""
    whole = tmp_path / "whole"
    prepare(config(pipelines, whole), images=images, options=Options(**QUIET))
    write_json, write_shard = module.write_json, module.write_shard
    for stop in (0, 1, 2, 4, 7):  # settings; then a shard and its record, three times; then dataset.json
        calls = []

        def counted(function, *arguments, calls=calls, stop=stop):
            if len(calls) == stop:
                raise KeyboardInterrupt
            calls.append(0)
            return function(*arguments)

        monkeypatch.setattr(module, "write_json", lambda *a, c=counted: c(write_json, *a))
        monkeypatch.setattr(module, "write_shard", lambda *a, c=counted: c(write_shard, *a))
        folder = tmp_path / f"stopped-{stop}"
        with pytest.raises(KeyboardInterrupt):
            prepare(config(pipelines, folder), images=images, options=Options(**QUIET))
        assert not (folder / "dataset.json").exists()
        monkeypatch.setattr(module, "write_json", write_json)
        monkeypatch.setattr(module, "write_shard", write_shard)
        if folder.exists():
            with pytest.raises(DataError, match=r"dataset\.json|there is no folder|no train shards"):
                check_inputs(config(pipelines, folder))
        prepare(config(pipelines, folder), images=images, options=Options(**QUIET))
        assert tree(folder) == tree(whole)


def test_other_inputs_or_settings_are_refused_with_what_differs(pipelines, images, tmp_path):
    folder = tmp_path / "data"
    settings = config(pipelines, folder)
    prepare(settings, images=images, options=Options(**QUIET))
    before = tree(folder)
    other = tmp_path / "images"
    shutil.copytree(images, other)
    assert prepare(settings, images=other, options=Options(**QUIET)) == (10, 0)  # elsewhere, but the same
    (other / "image-003.txt").write_text("another caption")
    (tmp_path / "prompts.txt").write_text("a cat")
    changes = [
        ({"images": images, "options": Options(**QUIET, dtype="bfloat16")}, r'dtype: "float16" -> "bfloat16"'),
        ({"images": images, "options": Options(**QUIET, size_condition="image")}, "size_condition"),
        ({"images": images, "options": Options(progress=False)}, "samples_per_shard: 4 -> 1000"),
        ({"images": other, "options": Options(**QUIET)}, r"inputs\.sha256"),
        ({"prompts": tmp_path / "prompts.txt", "options": Options(**QUIET)}, r'inputs\.from: "images" -> "prompts"'),
    ]
    for change, reason in changes:
        with pytest.raises(DataError, match=reason):
            prepare(settings, **change)
    with pytest.raises(DataError, match="kind"):
        prepare(config(pipelines, folder, "sd15"), images=images, options=Options(**QUIET))
    assert tree(folder) == before
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("not to be touched")
    with pytest.raises(DataError, match="is not empty and holds nothing"):
        prepare(config(pipelines, tmp_path / "full"), images=images, options=Options(**QUIET))
    assert list(tree(tmp_path / "full")) == ["mine.txt"]


def test_a_full_disk_is_one_message_and_leaves_no_half_shard(pipelines, images, tmp_path, monkeypatch, capsys):
    folder, fsync, calls = tmp_path / "data", os.fsync, []

    def full(descriptor):
        calls.append(0)
        if len(calls) == 5:  # settings, shard and record, then the next shard
            raise OSError(errno.ENOSPC, "No space left on device")
        return fsync(descriptor)

    arguments = [
        "prepare", "--images", str(images), "--config", CONFIGS["sdxl"], "--set", f"model.path={pipelines['sdxl']}",
        "--set", f"data.path={folder}", "--samples-per-shard", "4", "--batch-size", "3",
    ]  # fmt: skip
    monkeypatch.setattr(os, "fsync", full)
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message and "Is the disk full" in message and "Traceback" not in message
    assert {path.name for path in folder.iterdir()} <= {
        ".prepare",
        "unconditional.safetensors",
        "train-000000.tar",
        "train-000001.tar",
    }
    monkeypatch.setattr(os, "fsync", fsync)
    assert main(arguments) == 0
    prepare(config(pipelines, tmp_path / "whole"), images=images, options=Options(**QUIET))
    assert tree(folder) == tree(tmp_path / "whole")


# --- hostile folders -------------------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A small PNG whose header claims any size."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
BAD_IMAGES = {
    "a-text.png": (b"not an image at all", "does not decode"),
    "b-empty.jpg": (b"", "does not decode"),
    "c-cut.png": (encoded(NOISE)[:2000], "does not decode"),
    "d-cut.jpg": (encoded(NOISE, "JPEG")[:-300], "does not decode"),
    "e-bomb.png": (bomb(100_000, 100_000), "too large"),
    "f-large.png": (bomb(9_000, 9_000), "9000 x 9000 pixels, expected 1 to"),
    "g-nothing.png": (bomb(0, 10), "does not decode|pixels"),
    "h-gif.png": (encoded(NOISE.quantize(), "GIF"), "does not decode"),
    "i-thin.png": (encoded(NOISE.resize((1, 100_000))), "too long for its width"),
    "j-float.tiff": (encoded(Image.new("F", (40, 40)), "TIFF"), "mode F"),
}
GOOD_IMAGES = {
    "k-gray.png": encoded(NOISE.convert("L")),
    "l-alpha.png": encoded(NOISE.convert("RGBA")),
    "m-palette.png": encoded(NOISE.quantize()),
    "n-16bit.png": encoded(Image.fromarray(np.full((40, 40), 0x8000, np.uint16))),
    "o-cmyk.jpg": encoded(NOISE.convert("CMYK"), "JPEG"),
    "p-webp.webp": encoded(NOISE, "WEBP"),
    "q-UPPER.JPEG": encoded(NOISE, "JPEG"),
    "sub/r.png": encoded(NOISE),
    "s new\nline.png": encoded(NOISE),
    "t-ü😀'\".png": encoded(NOISE),
    "u.v.w.png": encoded(NOISE),
    "x" * 200 + ".png": encoded(NOISE),
}
BAD_CAPTIONS = {
    "1.txt": ("ein Gebäude".encode("latin-1"), "caption is not UTF-8"),
    "2.txt": (b" \n\t ", "caption is empty"),
    "3.txt": (b"a" * 70_000, "caption has 70000 bytes"),
    "4.txt": (None, "no caption: neither '4.txt'"),
}


def test_whatever_a_folder_holds_is_used_or_listed_and_never_fatal(pipelines, tmp_path):
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for name, content in {**{name: bad for name, (bad, _) in BAD_IMAGES.items()}, **GOOD_IMAGES}.items():
        (folder / name).write_bytes(content)
        (folder / name).with_suffix(".txt").write_text("a cat")
    for name, (caption, _) in BAD_CAPTIONS.items():
        (folder / name).with_suffix(".png").write_bytes(encoded(NOISE))
        if caption is not None:
            (folder / name).write_bytes(caption)
    odd = os.fsdecode(os.fsencode(folder) + b"/\xff\xfe.png")  # a name that is no UTF-8
    Path(odd).write_bytes(encoded(NOISE))
    Path(odd).with_suffix(".txt").write_text("a cat")
    os.mkfifo(folder / "fifo.png")
    (folder / "5.png").write_bytes(encoded(NOISE))
    os.mkfifo(folder / "5.txt")
    (folder / "loop").symlink_to(folder)
    (folder / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (folder / "itself.png").symlink_to(folder / "itself.png")
    (tmp_path / "outside.png").write_bytes(encoded(NOISE))
    (folder / "linked.png").symlink_to(tmp_path / "outside.png")
    (folder / "linked.txt").write_text("a cat")
    (folder / "folder.png").mkdir()
    (folder / ".hidden.png").write_bytes(b"")

    number, left_out = prepare(config(pipelines, tmp_path / "data"), images=folder, options=Options(**QUIET))
    listed = [json.loads(line) for line in (tmp_path / "data" / "left_out.jsonl").read_text().splitlines()]
    problems = {item["name"]: item["problem"] for item in listed}
    expected = {
        **{name: reason for name, (_, reason) in BAD_IMAGES.items()},
        **{name.replace("txt", "png"): reason for name, (_, reason) in BAD_CAPTIONS.items()},
        "5.png": "is not a plain file", "fifo.png": "not a plain file", "loop": "link to a folder",
        "gone.png": "cannot be read", "itself.png": "cannot be read",
    }  # fmt: skip
    assert set(problems) == set(expected) and left_out == len(listed) == len(expected)
    for name, reason in expected.items():
        assert re.search(reason, problems[name]), (name, problems[name])
    assert number == len(GOOD_IMAGES) + 2  # and the odd name, and the link to a file
    assert len(samples(tmp_path / "data")) == number
    check_inputs(config(pipelines, tmp_path / "data"))


def test_images_are_upright_opaque_and_scaled(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    pixels = np.zeros((20, 40, 3), np.uint8)
    pixels[:, 20:] = 255
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    found = read_square(tmp_path / "turned.png", 20)
    assert found.original_size == (40, 20) and found.crop_top_left == (10, 0)
    assert (found.pixels[:8] == 0).all() and (found.pixels[12:] == 255).all()
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_square(tmp_path / "clear.png", 8).pixels == 255).all()
    Image.fromarray(np.full((8, 8), 0x80FF, np.uint16)).save(tmp_path / "deep.png")
    assert (read_square(tmp_path / "deep.png", 4).pixels == 0x80).all()


def test_metadata_lines(tmp_path):
    write_images(tmp_path, 4, captions="none")
    lines = [
        b'\xef\xbb\xbf{"file_name": "image-000.png", "text": "one"}',
        b'{"file_name": "./image-001.jpg", "caption": "two", "text": null}',
        b'{"file_name": "image-001.jpg", "caption": " two "}',
        b"", b"{", b"[1]", b"[" * 50_000, b'{"file_name": 3}', b'{"file_name": "image-000.png", "text": "again"}',
        b'{"file_name": "../../etc/passwd", "text": "no"}', b'{"file_name": "/etc/passwd", "text": "no"}',
        b'{"file_name": "image-002.png", "text": ["a"]}', b'{"file_name": "image-003.jpg", "text": "\xe9"}',
    ]  # fmt: skip
    (tmp_path / "metadata.jsonl").write_bytes(b"\n".join(lines))
    inputs = {item.name: item for item in list_images(tmp_path)}
    assert inputs["image-000.png"].prompt == "one" and inputs["image-001.jpg"].prompt == "two"
    problems = {name: item.problem for name, item in inputs.items() if item.problem}
    assert set(problems) == {
        *(f"metadata.jsonl, line {number}" for number in (2, 5, 6, 7, 8, 9, 12, 13)),
        "image-002.png", "image-003.jpg", "../../etc/passwd", "/etc/passwd",
    }  # fmt: skip
    assert all(item.path is None for item in inputs.values() if item.problem)


def test_prompts_that_are_none(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"good\n\xff\xfe bad\n" + b"x" * 70_000 + b"\n\n  \nlast")
    found = list_prompts(file)
    assert [(item.name, item.prompt) for item in found if item.problem is None] == [
        ("line 1", "good"),
        ("line 6", "last"),
    ]
    assert [item.problem.split()[0] for item in found if item.problem] == ["not", "70001"]
    file.write_bytes(b"\n\n")
    with pytest.raises(DataError, match="holds no prompt"):
        list_prompts(file)
    with pytest.raises(DataError, match="not a plain file"):
        list_prompts(tmp_path)
    with pytest.raises(DataError, match="cannot be read"):
        list_prompts(tmp_path / "gone.txt")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_refused_before_anything_is_written(pipelines, images, tmp_path, capsys):
    def refused(*arguments: str, source: tuple[str, ...] = ("--images", str(images)), path: str = "data"):
        sets = [f"model.path={pipelines['sdxl']}", f"data.path={tmp_path / path}"]
        before = sorted(tmp_path.rglob("*"))
        flags = [item for value in sets for item in ("--set", value)]
        assert main(["prepare", *source, "--config", CONFIGS["sdxl"], *flags, *arguments]) == 2
        assert sorted(tmp_path.rglob("*")) == before
        return capsys.readouterr().err

    (tmp_path / "none").mkdir()
    (tmp_path / "file").write_text("")
    assert "--set model.sample_size=32" in refused("--resolution", "64")
    assert "is no diffusers pipeline" in refused("--set", "model.path=nowhere/at/all")
    assert "holds no image" in refused(source=("--images", str(tmp_path / "none")))
    assert "does not exist" in refused(source=("--images", str(tmp_path / "gone")))
    assert "cannot be read" in refused(source=("--prompts", str(tmp_path / "gone")))
    assert "--device" in refused("--device", "abacus")
    assert "is a file" in refused(path="file")
    assert "Not a directory" in refused(path="file/data")
    assert "data.kind latents is for --images" in refused(source=("--digits",))
    digits = ["--config", str(ROOT / "ds_digits.json"), "--set", f"data.path={tmp_path / 'data'}"]
    assert main(["prepare", "--images", str(images), *digits]) == 2
    assert 'model.kind is "unet2d"' in capsys.readouterr().err
    assert main(["prepare", "--digits", "--dtype", "float32", *digits]) == 2
    assert "--dtype is for --images and --prompts" in capsys.readouterr().err
    assert not (tmp_path / "data").exists()
    broken = tmp_path / "broken"
    shutil.copytree(pipelines["sdxl"], broken)
    shutil.rmtree(broken / "text_encoder_2")
    assert "has no text_encoder_2/" in refused("--set", f"model.path={broken}")


def test_nothing_usable(pipelines, tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a", "b"):
        (tmp_path / "images" / f"{name}.png").write_bytes(b"no image")
        (tmp_path / "images" / f"{name}.txt").write_text("a caption")
    with pytest.raises(
        DataError, match=r"none of 2 inputs can be used.*left_out\.jsonl.*a\.png: an image that does not"
    ):
        prepare(config(pipelines, tmp_path / "data"), images=tmp_path / "images", options=Options(**QUIET))
    assert not (tmp_path / "data" / "dataset.json").exists()
    assert len((tmp_path / "data" / "left_out.jsonl").read_text().splitlines()) == 2


def test_data_that_do_not_fit_the_model_or_the_losses(pipelines, images, tmp_path):
    data, prompts = tmp_path / "data", tmp_path / "prompts"
    prepare(config(pipelines, data), images=images, options=Options(**QUIET))
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    prepare(config(pipelines, prompts), prompts=tmp_path / "p.txt", options=Options(**QUIET))
    check_inputs(config(pipelines, data))
    with pytest.raises(
        ConfigError, match=r"adversarial\.discriminator_weight is 0\.01, but .* prompts alone.*GAN needs real"
    ):
        check_inputs(config(pipelines, prompts))
    off = ("adversarial.generator_weight=0", "adversarial.discriminator_weight=0")
    check_inputs(config(pipelines, prompts, "sdxl", *off))
    with pytest.raises(
        ConfigError, match=r"\(4, 16, 16\), and the teacher in .* takes \(4, 32, 32\): set model.sample_size to 16"
    ):
        check_inputs(config(pipelines, data, "sdxl", "model.sample_size=32"))
    for folder in (data, prompts):  # large data are judged by dataset.json alone
        path = folder / "dataset.json"
        description = json.loads(path.read_text())
        description["fields"]["pooled_prompt_embeds"]["shape"] = [17]
        path.write_text(json.dumps(description))
        with pytest.raises(
            ConfigError, match=r"pooled_prompt_embeds of shape \(17,\), and the teacher in .* takes \(16\)"
        ):
            check_inputs(config(pipelines, folder, "sdxl", *off))
        del description["fields"]["pooled_prompt_embeds"]
        path.write_text(json.dumps(description))
        with pytest.raises(ConfigError, match="pooled_prompt_embeds of shape none at all"):
            check_inputs(config(pipelines, folder, "sdxl", *off))


def test_guidance_departs_from_the_prepared_empty_prompt(pipelines, tmp_path, monkeypatch):
    """SD1.5: the trainer's teacher takes what `prepare` made of the pipeline's own text encoder."""
    (tmp_path / "p.txt").write_text("a cat\n")
    settings = config(pipelines, tmp_path / "data", "sd15", "adversarial.discriminator_weight=0")
    prepare(settings, prompts=tmp_path / "p.txt", options=Options(**QUIET))
    built = {}
    monkeypatch.setattr(trainer, "build_networks", lambda config, *_: (None, None, load_denoiser(config.model)))
    monkeypatch.setattr(trainer, "Engines", lambda config, generator, fake, teacher: built.update(teacher=teacher))
    run = object.__new__(trainer.Trainer)
    run.config, run.rank, run.algorithm = settings, Rank(0, 1, torch.device("cpu")), Algorithm.from_config(settings)
    with suppress(AttributeError):  # there are no engines to average
        run._build_networks()
    found = built["teacher"].unconditional({"prompt_embeds": torch.randn(2, 77, 32)})["prompt_embeds"]
    expected = TextEncoders.load(pipelines["sd15"], "sd15").encode([""])["prompt_embeds"]
    assert torch.equal(found, expected.expand(2, -1, -1))


def test_values_beyond_the_dtype_are_left_out(pipelines, images, tmp_path, monkeypatch):
    """Latents that f16 cannot hold: listed, not stored as infinity."""
    encode = module._Job._encode

    def large(self, rows):
        tensors = encode(self, rows)
        for (key, _, _), sample in zip(rows, tensors, strict=True):
            if key == 5:
                sample["latents"] = (sample["latents"].float() * 1e9).half()
        return tensors

    monkeypatch.setattr(module._Job, "_encode", large)
    assert prepare(config(pipelines, tmp_path / "data"), images=images, options=Options(**QUIET)) == (9, 1)
    assert "latents are not finite in float16" in (tmp_path / "data" / "left_out.jsonl").read_text()
    assert "00000005" not in samples(tmp_path / "data")


def test_unknown_dtype(pipelines, images, tmp_path):
    with pytest.raises(UserError, match="--dtype"):
        prepare(config(pipelines, tmp_path / "data"), images=images, options=Options(dtype="int8"))
