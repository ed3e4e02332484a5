"""Payloads of every kind, good and bad, as RGB pictures and as patches; images in rows, prompts, masks and packs."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bregman.data import images
from bregman.data.chat import check_masks, render_prompt, tokenize_conversation, tokenize_conversations
from bregman.data.config import JsonlSource, ParquetSource
from bregman.data.images import StoredImage, content_hash, encode_images, open_image, resolve, storable
from bregman.data.inspect import colour_mask, image_report
from bregman.data.packing import pack
from bregman.data.shards import token_store
from bregman.data.sources import read_conversation, read_conversations, read_problems, read_rows, row_columns
from bregman.errors import DataError
from bregman.models.kimi_vl.image_processing import ImageSettings, KimiVLImageEncoder
from bregman.models.kimi_vl.tokenizer import IMAGE_PLACEHOLDER, tiny_tokenizer
from bregman.types import Conversation

RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer("")


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return KimiVLImageEncoder(ImageSettings(in_token_limit=64), tokenizer.get_vocab()[IMAGE_PLACEHOLDER])


def picture(colour=RED, size=(56, 28), mode: str = "RGB") -> Image.Image:
    return Image.new(mode, size, colour)


def encoded(image: Image.Image, form: str = "PNG", **settings) -> bytes:
    content = io.BytesIO()
    image.save(content, form, **settings)
    return content.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def animation(form: str) -> bytes:
    return encoded(picture(), form, save_all=True, append_images=[picture(BLUE)])


def turned() -> Image.Image:
    """Left half red, right half blue, and the EXIF mark that says: shown turned by 90 degrees clockwise."""
    image = picture(RED, (4, 2))
    image.paste(BLUE, (2, 0, 4, 2))
    return image


def half_transparent() -> Image.Image:
    image = picture((255, 0, 0, 255), (4, 2), "RGBA")
    image.paste((255, 0, 0, 0), (2, 0, 4, 2))
    return image


def sixteen_bit() -> Image.Image:
    return Image.fromarray(np.array([[0, 257 * 128, 65535]], dtype=np.uint16))


EXIF = Image.Exif()
EXIF[0x0112] = 6

# payload -> pixels of the RGB picture at (x, y)
GOOD = {
    "PIL": (picture(), {(0, 0): RED}),
    "PNG bytes": (encoded(picture()), {(55, 27): RED}),
    "CMYK": (picture((0, 255, 255, 0), mode="CMYK"), {(0, 0): RED}),
    "CMYK JPEG": (encoded(picture((255, 255, 0, 0), mode="CMYK"), "JPEG", quality=100), {(0, 0): BLUE}),
    "palette": (encoded(picture().convert("P")), {(0, 0): RED}),
    "palette with a transparent colour": (encoded(picture(0, mode="P"), transparency=0), {(0, 0): (255, 255, 255)}),
    "black and white": (picture(1, mode="1"), {(0, 0): (255, 255, 255)}),
    "grey": (encoded(picture(7, mode="L")), {(0, 0): (7, 7, 7)}),
    "grey and alpha": (encoded(picture((0, 0), mode="LA")), {(0, 0): (255, 255, 255)}),
    "alpha on white": (encoded(half_transparent()), {(0, 0): RED, (3, 0): (255, 255, 255)}),
    "16 bits": (encoded(sixteen_bit()), {(0, 0): (0, 0, 0), (1, 0): (128, 128, 128), (2, 0): (255, 255, 255)}),
    "32 bits that fit 16": (picture(65535, mode="I"), {(0, 0): (255, 255, 255)}),
    "EXIF orientation": (encoded(turned(), "PNG", exif=EXIF), {(0, 0): RED, (1, 1): RED, (0, 3): BLUE}),
    "still GIF": (encoded(picture(), "GIF"), {(0, 0): RED}),
    "still WebP": (encoded(picture(), "WEBP", lossless=True), {(0, 0): RED}),
}


@pytest.mark.parametrize("case", GOOD)
def test_pictures_of_any_kind_become_rgb(case):
    payload, expected = GOOD[case]
    image = open_image(payload, "row 3")
    assert image.mode == "RGB"
    for place, colour in expected.items():
        assert np.abs(np.subtract(image.getpixel(place), colour)).max() <= 3, (place, image.getpixel(place))


TRUNCATED = encoded(Image.effect_noise((64, 64), 50), "PNG")[:2000]

BAD = {
    "no image": (b"hello", "cannot be read as an image"),
    "empty file": (b"", "is empty"),
    "truncated PNG": (TRUNCATED, "cannot be read as an image"),
    "truncated JPEG": (encoded(Image.effect_noise((64, 64), 50), "JPEG")[:900], "cannot be read as an image"),
    "no pixels": (Image.new("RGB", (0, 5)), r"has no pixels \(0 x 5\)"),
    "enormous": (png_header(9000, 9000), "has 9000 x 9000 pixels, more than 67,108,864"),
    "decompression bomb": (png_header(60_000, 60_000), "is larger than 67,108,864 pixels"),
    "pixels missing": (png_header(10, 10), "cannot be read as an image"),
    "animated GIF": (animation("GIF"), r"is an animation or has several pages \(2\)"),
    "animated PNG": (animation("PNG"), r"is an animation or has several pages \(2\)"),
    "animated WebP": (animation("WEBP"), r"is an animation or has several pages \(2\)"),
    "TIFF of two pages": (animation("TIFF"), r"is an animation or has several pages \(2\)"),
    "floating point": (encoded(picture(0.5, mode="F"), "TIFF"), "has floating-point pixels"),
    "32 bits": (encoded(picture(70_000, mode="I"), "TIFF"), "has 32-bit pixels"),
    "a format that runs a program": (encoded(picture(), "EPS"), "cannot be read as an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_pictures_are_one_line_errors_that_name_the_image(case, encoder):
    payload, expected = BAD[case]
    with pytest.raises(DataError, match=rf"^data row 3, image 2 of 2: {expected}") as caught:
        encode_images([picture(), payload], encoder, "data row 3")
    assert "\n" not in str(caught.value)


def test_what_the_encoder_refuses_is_named(encoder):
    with pytest.raises(DataError, match=r"^data row 3, image 1 of 1: 1 x 9000 pixels: "):
        encode_images([picture(size=(1, 9000))], encoder, "data row 3")


REFUSED_PAYLOADS = {
    "URL": ("https://example.com/a.png", "is a URL"),
    "data URL": ("data:image/png;base64,AAAA", "is a URL"),
    "missing file": ("none.png", "no such file"),
    "folder": (".", "no such file"),
    "zero byte in the path": ("a\0.png", "no such file"),
    "empty path": ("", "is an empty path"),
    "nothing": (None, "is a NoneType"),
    "number": (5, "is a int"),
    "empty datasets image": ({"bytes": None, "path": None}, "has neither bytes nor a path"),
}


@pytest.mark.parametrize("case", REFUSED_PAYLOADS)
def test_payloads_that_are_no_images_are_refused(case, tmp_path):
    payload, expected = REFUSED_PAYLOADS[case]
    with pytest.raises(DataError, match=rf"^row 3: {expected}"):
        resolve(payload, tmp_path, "row 3")


def test_every_form_of_a_payload_is_the_same_image(tmp_path, encoder):
    content = encoded(picture())
    (tmp_path / "a.png").write_bytes(content)
    forms = ["a.png", Path("a.png"), str(tmp_path / "a.png"), content, {"bytes": content, "path": "x"}, {"path": "a.png", "bytes": None}]
    resolved = [resolve(form, tmp_path, "row") for form in [*forms, picture()]]
    for payload in resolved:
        again = resolve(storable(payload, "row"), tmp_path, "row")
        for one in encode_images([payload, again], encoder, "row"):
            assert (one.pixels == encoder.encode(picture()).pixels).all() and one.grid == (2, 4) and one.num_tokens == 2


@pytest.mark.parametrize("case", ["palette", "exif"])
def test_pictures_that_differ_beside_their_pixels_are_told_apart(case, encoder):
    shown = [Image.new("P" if case == "palette" else "RGB", (28, 56)) for _ in range(2)]
    if case == "palette":
        for one, colour in zip(shown, ([255, 0, 0], [0, 0, 255]), strict=True):
            one.putpalette(colour * 256)
    else:
        shown[1].getexif()[0x0112] = 6  # to be turned by a quarter
    both = encode_images(shown, encoder, "row")
    for one, payload in zip(both, shown, strict=True):
        wanted = encoder.encode(open_image(payload, "row"))
        assert one.grid == wanted.grid and (one.pixels == wanted.pixels).all()
    assert content_hash(shown[0], "row") != content_hash(shown[1], "row")


def test_patches_beyond_the_cache_are_encoded_again(monkeypatch, encoder):
    first, second = (picture(colour) for colour in (RED, BLUE))
    size = encoder.encode(first).pixels.nbytes
    monkeypatch.setattr(images, "_CACHE", images._PatchCache(size))
    calls = []
    monkeypatch.setattr(images, "open_image", lambda payload, where: calls.append(payload) or open_image(payload, where))
    files = [encoded(one) for one in (first, second)]
    stored = [StoredImage(one, encoder, "row") for one in files]
    assert (stored[1].pixels == encoder.encode(second).pixels).all() and calls == files
    assert (stored[0].pixels == encoder.encode(first).pixels).all() and calls == [*files, files[0]]
    StoredImage(encoded(picture(RED)), encoder, "another row")  # equal content, wherever it comes from
    assert len(calls) == 3


def test_an_image_travels_whole_and_once(encoder):
    (image,) = encode_images([picture()], encoder, "row")
    copies = pickle.loads(pickle.dumps([image, image]))
    assert copies[0] is copies[1] and not isinstance(copies[0], StoredImage)
    assert (copies[0].pixels == image.pixels).all() and (copies[0].grid, copies[0].num_tokens) == (image.grid, image.num_tokens)


# --- rows -------------------------------------------------------------------------------------------------------------------


def jsonl(folder: Path, *rows) -> JsonlSource:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return JsonlSource(path="data.jsonl")


@pytest.fixture()
def folder(tmp_path):
    picture().save(tmp_path / "red.png")
    picture(BLUE, (28, 28)).save(tmp_path / "blue.png")
    return tmp_path


IMAGE, TEXT = {"type": "image"}, {"type": "text", "text": "red?"}


def user(*content):
    return [{"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}]


ROWS = {
    "parts": {"messages": user(IMAGE, TEXT, IMAGE), "images": ["red.png", "blue.png"]},
    "payloads in the parts": {"messages": user(IMAGE | {"image": "red.png"}, TEXT, IMAGE | {"path": "blue.png"})},
    "one in a part": {"messages": user(IMAGE, TEXT, IMAGE | {"image": "blue.png"}), "images": ["red.png"]},
    "one image alone": {"messages": user(IMAGE, TEXT, IMAGE | {"image": "blue.png"}), "images": "red.png"},
    "tags in a prompt": {"prompt": "<image>red?<image>", "images": ["red.png", "blue.png"]},
    "keys of a columnar file": {"messages": user(IMAGE | {"text": None}, TEXT | {"image": None}, IMAGE), "images": ["red.png", "blue.png"]},
}


@pytest.mark.parametrize("case", ROWS)
def test_images_of_a_problem(case, folder, tokenizer, encoder):
    source = jsonl(folder, ROWS[case] | {"id": "a"})
    (problem,) = read_problems(source, folder, tokenizer, seed=0, max_prompt_tokens=100, encoder=encoder)
    assert problem.messages == ({"role": "user", "content": [IMAGE, TEXT, IMAGE]},)
    assert problem.images == (str(folder / "red.png"), str(folder / "blue.png"))
    assert [(patches.grid, patches.num_tokens) for patches in problem.patches] == [((2, 4), 2), ((2, 2), 1)]
    ids = np.asarray(problem.prompt_ids)
    assert problem.image_positions == tuple(np.flatnonzero(ids == encoder.placeholder_id).tolist()) and len(problem.image_positions) == 3
    bare = render_prompt(tokenizer, problem.messages, images=2)
    assert bare.count(encoder.placeholder_id) == 2
    assert [token for token in bare if token != encoder.placeholder_id] == ids[ids != encoder.placeholder_id].tolist()


BAD_ROWS = {
    "more images than places": ({"messages": user(IMAGE), "images": ["red.png", "blue.png"]}, "have 1 places for images and its .* has 2"),
    "fewer images": ({"messages": user(IMAGE, IMAGE), "images": ["red.png"]}, "have 2 places for images and its .* has 1"),
    "image without a place": ({"prompt": "red?", "images": ["red.png"]}, "have 0 places for images and its .* has 1"),
    "tag without an image": ({"prompt": "<image>red?", "images": []}, "have 1 places for images and its .* has 0"),
    "part without an image": ({"messages": user(IMAGE, TEXT)}, "have 1 places for images and its .* has 0"),
    "a video": ({"messages": user({"type": "video", "video": "a.mp4"})}, "part 0 is neither a text nor an image"),
    "a URL": ({"messages": user({"type": "image", "url": "http://a/b.png"})}, "part 0 is neither a text nor an image"),
    "an OpenAI URL": ({"messages": user({"type": "image_url", "image_url": {"url": "http://a"}})}, "part 0 is neither"),
    "two payloads": ({"messages": user({"type": "image", "image": "red.png", "path": "red.png"})}, "part 0 is neither"),
    "missing file": ({"prompt": "<image>", "images": ["green.png"]}, "image 1 of 1: no such file"),
    "broken file": ({"prompt": "<image><image>", "images": ["red.png", "data.jsonl"]}, "image 2 of 2: cannot be read as an image"),
    "the media token as text": (
        {"prompt": f"<image>{IMAGE_PLACEHOLDER}", "images": ["red.png"]},
        "contains the special token `<|media_pad|>`",
    ),
    "the media token without images": ({"prompt": IMAGE_PLACEHOLDER}, r"contains the special token `<\|media_pad\|>`"),
    "another special token": ({"prompt": "<|im_user|>"}, r"contains the special token `<\|im_user\|>`"),
    "too long once expanded": ({"prompt": "<image>" * 5, "images": ["red.png"] * 5}, "tokens, 10 of them for its images, and the limit is"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows_are_named(case, folder, tokenizer, encoder):
    row, expected = BAD_ROWS[case]
    source = jsonl(folder, {"prompt": "1"}, row)
    expected = expected.replace("<|media_pad|>", r"<\|media_pad\|>") if case == "the media token as text" else expected
    with pytest.raises(DataError, match=rf"^data.jsonl row 2\b.*{expected}") as caught:
        read_problems(source, folder, tokenizer, seed=0, max_prompt_tokens=30, encoder=encoder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["<image>red?", "a <image> is an HTML tag"])
def test_tags_are_text_in_rows_without_an_images_column(content, folder, tokenizer, encoder):
    (problem,) = read_problems(jsonl(folder, {"prompt": content}), folder, tokenizer, seed=0, max_prompt_tokens=50, encoder=encoder)
    assert problem.messages[0]["content"] == content and not problem.patches


def test_a_text_model_refuses_images(folder, tokenizer):
    row = {"prompt": "red?", "completion": "1", "images": ["red.png"]}
    with pytest.raises(DataError, match="data.jsonl row 1: has images, and the model is a text model"):
        read_problems(jsonl(folder, row), folder, tokenizer, seed=0, max_prompt_tokens=50)
    conversation = Conversation(id="7", messages=(), images=(picture(),), source="data")
    with pytest.raises(DataError, match="data row 7: has images, and the model is a text model"):
        tokenize_conversations(tokenizer, [conversation])


def test_problems_without_an_id_are_told_apart_by_their_images(folder, tokenizer, encoder):
    rows = [{"prompt": "<image>", "images": [name]} for name in ("red.png", "blue.png")] + [{"prompt": "1"}]
    problems = read_problems(jsonl(folder, *rows), folder, tokenizer, seed=0, max_prompt_tokens=50, encoder=encoder)
    assert len({problem.id for problem in problems}) == 3
    moved = folder / "moved"
    moved.mkdir()
    for name in ("red.png", "blue.png"):
        (folder / name).rename(moved / name)
    again = read_problems(jsonl(moved, *rows), moved, tokenizer, seed=0, max_prompt_tokens=50, encoder=encoder)
    assert [problem.id for problem in again] == [problem.id for problem in problems]
    with pytest.raises(DataError, match="has the id"):
        read_problems(jsonl(moved, rows[0], rows[0]), moved, tokenizer, seed=0, max_prompt_tokens=50, encoder=encoder)


def test_columnar_images_stay_files_until_they_are_used(tmp_path, tokenizer, encoder):
    datasets = pytest.importorskip("datasets")
    text, image = datasets.Value("string"), datasets.Image()
    part = {"type": text, "text": text, "image": image}
    features = {"messages": datasets.List({"role": text, "content": datasets.List(part)}), "images": datasets.List(image)}
    empty = {"type": None, "text": None, "image": None}
    content = [empty | IMAGE, empty | TEXT, empty | IMAGE | {"image": {"bytes": encoded(picture(BLUE, (28, 28))), "path": None}}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": [empty | TEXT]}]
    rows = [{"messages": turns, "images": [{"bytes": payload, "path": None}]} for payload in (encoded(picture()), b"broken")]
    datasets.Dataset.from_list(rows, features=datasets.Features(features)).to_parquet(tmp_path / "a.parquet")
    good, broken = read_conversations(ParquetSource(path="a.parquet"), tmp_path, seed=0)
    (sequence,) = tokenize_conversations(tokenizer, [good], encoder=encoder)
    assert [image.grid for image in sequence.images] == [(2, 4), (2, 2)]
    with pytest.raises(DataError, match="a.parquet row 1, image 1 of 2: cannot be read as an image"):
        tokenize_conversations(tokenizer, [broken], encoder=encoder)


def test_rows_of_text_and_images_share_one_parquet_file(tmp_path, tokenizer, encoder):
    import pyarrow
    import pyarrow.parquet

    answer = {"role": "assistant", "content": "yes"}
    with_images = row_columns([{"role": "user", "content": [IMAGE, TEXT, IMAGE]}, answer], [picture(), encoded(picture(BLUE))], "row")
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([with_images, row_columns([*user("a <image> tag"), answer], [], "row")]), tmp_path / "a.parquet"
    )
    first, second = read_conversations(ParquetSource(path="a.parquet"), tmp_path, seed=0)
    assert first.messages[0]["content"] == [IMAGE, TEXT, IMAGE] and len(encode_images(first.images, encoder, "row")) == 2
    assert second.messages[0]["content"] == "a <image> tag" and second.images == ()


def test_rows_of_text_and_images_may_lie_in_files_of_their_own(tmp_path):
    import datasets

    def rows_of(*files):
        for index, rows in enumerate(files):
            table = datasets.Dataset.from_list(rows)
            if rows[0].get("images"):
                table = table.cast_column("images", datasets.List(datasets.Image()))
            table.to_parquet(tmp_path / f"{index}.parquet")
        source = ParquetSource(path="*.parquet")
        return read_conversations(source, tmp_path, seed=0)

    answer = {"role": "assistant", "content": "1"}
    text = [{"messages": [{"role": "user", "content": "red?"}, answer]}]
    shown = [{"messages": [{"role": "user", "content": "<image>red?"}, answer], "images": [{"bytes": encoded(picture()), "path": None}]}]
    for others in (text, [{**text[0], "images": None}]):
        assert [len(row.images) for row in rows_of(shown, others, others)] == [1, 0, 0]
        assert [len(row.images) for row in rows_of(others, shown, others)] == [0, 1, 0]
    parts = [{"messages": [{"role": "user", "content": [{"type": "text", "text": "red?"}]}]}]
    with pytest.raises(DataError, match=r"^\*.parquet: its column `messages` is .* in 0.parquet and .* in 1.parquet; write them alike"):
        rows_of(text, parts, text)


def test_images_of_tokenised_sources(folder, tokenizer, encoder):
    rows = [
        {"prompt": prompt, "completion": "1", "images": names}
        for prompt, names in [("1", None), ("<image><image>", ["red.png", "blue.png"]), ("<image>", ["red.png"]), ("1", [])]
    ]
    items, calls = read_rows(jsonl(folder, *rows), folder, seed=0), []

    def shown(index):
        calls.append(index)
        return encode_images(read_conversation(items, index, folder).images, encoder, "row")

    def tokenise(index):
        return tokenize_conversations(tokenizer, [read_conversation(items, index, folder)], encoder=encoder)[0]

    store = token_store(items, tokenise, on_bad_row="error", images=shown)
    assert (store.image_sizes(), store.with_images) == ([2, 1, 2], 2)
    assert not calls and [image.grid for image in store[1].images] == [(2, 4), (2, 2)] and calls == [1]
    (batch,) = pack([store[index] for index in range(4)], token_budget=1000, normalizer=1.0)
    assert (batch.token_ids[batch.image_positions] == encoder.placeholder_id).all() and len(batch.image_rows) == 5


# --- masks and packs --------------------------------------------------------------------------------------------------------


def conversation(*turns) -> list[dict]:
    return [{"role": ("user", "assistant")[index % 2], "content": content} for index, content in enumerate(turns)]


def test_the_mask_around_images(tokenizer, encoder):
    turns = conversation([IMAGE, TEXT, IMAGE], "<think>1</think>2", [TEXT, IMAGE], "3")
    shown = encode_images([picture(), picture(BLUE, (28, 28)), picture(size=(84, 84))], encoder, "row")
    sequence = tokenize_conversation(tokenizer, turns, images=shown, encoder=encoder)
    check_masks([sequence], tokenizer)
    runs = np.split(np.arange(len(sequence.loss_mask)), np.flatnonzero(np.diff(sequence.loss_mask)) + 1)
    trained = [tokenizer.decode(sequence.token_ids[run]) for run in runs if sequence.loss_mask[run[0]]]
    assert trained == ["<think>1</think>2<|im_end|>", "3<|im_end|>"]
    assert not sequence.loss_mask[sequence.image_positions].any()
    assert (sequence.token_ids[sequence.image_positions] == encoder.placeholder_id).all()
    assert len(sequence.image_positions) == 2 + 1 + 9 == (sequence.token_ids == encoder.placeholder_id).sum()
    prompt = render_prompt(tokenizer, turns[:1], images=2)
    text = sequence.token_ids[sequence.token_ids != encoder.placeholder_id].tolist()
    assert text[: len(prompt) - 2] == [token for token in prompt if token != encoder.placeholder_id]


@pytest.mark.parametrize("count", [0, 2])
def test_image_parts_and_images_must_agree(count, tokenizer, encoder):
    shown = encode_images([picture()] * count, encoder, "row")
    with pytest.raises(DataError, match=f"row 3: its messages show 1 images and it has {count}"):
        tokenize_conversation(tokenizer, conversation([IMAGE], "1"), "row 3", images=shown, encoder=encoder)


def test_a_template_that_leaves_images_out_is_refused(encoder):
    template = (
        "{% for m in messages %}{{ m['role'] + ':' }}{% if m['content'] is string %}{{ m['content'] }}{% endif %}<|im_end|>{% endfor %}"
    )
    tokenizer = tiny_tokenizer("")
    tokenizer.chat_template = template + "{% if add_generation_prompt %}assistant:{% endif %}"
    with pytest.raises(DataError, match="row 3: the chat template writes 0 image placeholders for 1 images"):
        shown = encode_images([picture()], encoder, "row 3")
        tokenize_conversation(tokenizer, conversation([IMAGE], "1"), "row 3", images=shown, encoder=encoder)


def test_images_are_shown_in_one_place(tokenizer, encoder):
    shown = encode_images([picture(), picture(BLUE, (28, 28))], encoder, "row")
    sequence = tokenize_conversation(tokenizer, conversation([IMAGE, IMAGE, TEXT], "1"), images=shown, encoder=encoder)
    text = colour_mask(tokenizer, sequence).plain
    assert "[image 2 x 4 patches, 2 tokens]" in text and "[image 2 x 2 patches, 1 tokens]" in text and IMAGE_PLACEHOLDER not in text
    report = image_report([9, 3], rows=2, with_images=1, tokens=24)
    assert report == "2 images in 1 of 2 rows: 6 tokens each on average (50% of all tokens), the largest 9"


def features(batch) -> np.ndarray:
    """What stands at each placeholder: the number of its distinct image and its place within that image."""
    sizes = [int(rows * columns) // 4 for rows, columns in batch.image_grid]
    table = np.concatenate([[(image, place) for place in range(size)] for image, size in enumerate(sizes)])
    return table[batch.image_rows.numpy()]


def test_packs_of_text_and_image_examples(tokenizer, encoder):
    red, blue = encode_images([picture(), picture(BLUE, (28, 56))], encoder, "row")
    equal = StoredImage(picture(), encoder, "row")
    examples = [
        tokenize_conversation(tokenizer, conversation(content, "1"), images=shown, encoder=encoder)
        for content, shown in [([IMAGE, TEXT], (red,)), ("1+1", ()), ([IMAGE, IMAGE], (blue, red)), ([IMAGE], (equal,))]
    ]
    (batch,) = pack(examples, token_budget=1000, normalizer=1.0)
    assert batch.image_grid.tolist() == [[2, 4], [4, 2], [2, 4]]  # red once though two examples show it; an equal image is another
    assert torch.equal(batch.pixel_values, torch.from_numpy(np.concatenate([image.pixels for image in (red, blue, equal)])))
    assert (batch.token_ids[batch.image_positions] == encoder.placeholder_id).all()
    assert features(batch).tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 0], [0, 1], [2, 0], [2, 1]]
    assert not batch.loss_mask[batch.image_positions].any()
    split = pack(examples, token_budget=max(len(example.token_ids) for example in examples), normalizer=1.0, num_ranks=5)
    assert len(split) == 5  # four packs and a filler
    for one in split:
        index = int(one.sequence_index[0])
        shown = examples[index].images if index >= 0 else ()
        assert (one.pixel_values is None) == (not shown) and one.num_sequences == 1
        if shown:
            assert one.image_positions.tolist() == examples[index].image_positions.tolist()


def test_placeholders_and_features_must_agree(tokenizer, encoder):
    from dataclasses import replace

    (red,) = encode_images([picture()], encoder, "row")
    example = tokenize_conversation(tokenizer, conversation([IMAGE], "1"), images=(red,), encoder=encoder)
    for wrong in (replace(example, images=()), replace(example, image_positions=example.image_positions[:1])):
        with pytest.raises(ValueError, match="sequence 0 has . image placeholders and . image tokens"):
            pack([wrong], token_budget=100, normalizer=1.0)


def test_a_pack_of_text_and_images_is_what_its_examples_are_alone(tmp_path, tokenizer):
    from bregman.models.config import TinyKimiVLConfig
    from bregman.models.loading import load_policy
    from bregman.models.policy import IMAGE_ARGUMENTS
    from bregman.models.tiny.kimi_vl import make_tiny_kimi_vl
    from bregman.models.vision import load_image_encoder

    make_tiny_kimi_vl(TinyKimiVLConfig(kind="tiny_kimi_vl"), 0, tmp_path / "model")
    policy, encoder = load_policy(tmp_path / "model"), load_image_encoder(tmp_path / "model")
    red, noise = encode_images([picture(), Image.effect_noise((70, 40), 80)], encoder, "row")
    examples = [
        tokenize_conversation(tokenizer, conversation(content, "1+1=2"), images=shown, encoder=encoder)
        for content, shown in [([IMAGE, TEXT], (red,)), ("1+1", ()), ([IMAGE, TEXT, IMAGE], (noise, red)), ([IMAGE], (red,))]
    ]

    def logprobs(*chosen):
        (batch,) = pack(chosen, token_budget=1000, normalizer=1.0)
        shown = {name: value for name in IMAGE_ARGUMENTS if (value := getattr(batch, name)) is not None}
        with torch.no_grad():
            return policy(batch.token_ids, batch.position_ids, batch.boundaries, **shown)

    together, alone = logprobs(*examples), torch.cat([logprobs(example) for example in examples])
    assert torch.allclose(together, alone, atol=1e-5)
    without = policy(
        *(getattr(pack(examples, token_budget=1000, normalizer=1.0)[0], n) for n in ("token_ids", "position_ids", "boundaries"))
    )
    assert (without - together).abs().max() > 1e-3  # the pictures do matter
