"""Images into tensors, and the files that mean harm."""

from __future__ import annotations

import base64
import io
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from models.errors import ModelError, RequestError
from models.image_steps import parse_steps
from models.images import MAX_PIXELS, decode_base64, encode_mask, load_picture
from tests.fakes.pictures import png

PLAIN = parse_steps({"do_resize": False, "do_rescale": False, "do_normalize": False}, 3)


def claimed_png(width: int, height: int) -> bytes:
    """Return a PNG that claims a size and has almost no data."""

    def block(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + block(b"IHDR", head) + block(b"IDAT", zlib.compress(b"")) + block(b"IEND", b"")


def test_an_image_is_scaled_and_normalised_by_channel() -> None:
    steps = parse_steps(
        {"size": {"height": 2, "width": 3}, "image_mean": [0.5, 0.5, 0.0], "image_std": [0.5, 0.5, 1.0]}, 3
    )
    values = load_picture(png(Image.new("RGB", (9, 9), (255, 0, 51))), steps, "body").values
    assert values.shape == (3, 2, 3)
    assert values.dtype == np.float32
    assert values[:, 0, 0] == pytest.approx([1.0, -1.0, 0.2], abs=1e-6)


def test_the_shorter_side_is_scaled_and_the_middle_cut_out() -> None:
    steps = parse_steps(
        {"size": {"shortest_edge": 4}, "do_center_crop": True, "crop_size": 4, "do_normalize": False}, 1
    )
    image = Image.new("L", (32, 16))
    image.paste(255, (8, 0, 24, 16))
    assert load_picture(png(image), steps, "body").values.shape == (1, 4, 4)
    assert load_picture(png(image), steps, "body").values[0].min() > 0.8


def test_a_phone_image_is_turned_as_its_exif_says() -> None:
    image = Image.new("RGB", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", exif=exif)
    assert load_picture(out.getvalue(), PLAIN, "body").values.shape == (3, 4, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_every_kind_of_png_becomes_what_the_model_takes(mode: str) -> None:
    assert load_picture(png(Image.new(mode, (3, 3))), PLAIN, "body").values.shape == (3, 3, 3)


def test_e13_an_image_that_claims_too_many_pixels_is_refused_before_they_are_made() -> None:
    with pytest.raises(RequestError) as caught:
        load_picture(claimed_png(60_000, 60_000), PLAIN, "inputs[1]")
    assert caught.value.code == "too_large"
    assert caught.value.message.startswith("inputs[1]: 60000 x 60000 pixels")
    assert MAX_PIXELS < 60_000 * 60_000


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\xff\xd8\xff",
        claimed_png(100, 100),
        png(Image.new("RGB", (64, 64)))[:-20],
        png(Image.new("RGB", (4, 4)), "GIF"),
        png(Image.new("RGB", (4, 4)), "BMP"),
        b"not an image",
    ],
)
def test_e13_a_damaged_or_foreign_image_is_the_askers_fault(data: bytes) -> None:
    with pytest.raises(RequestError) as caught:
        load_picture(data, PLAIN, "body")
    assert caught.value.code == "bad_request"


@settings(max_examples=40)
@given(st.data())
def test_any_change_to_an_image_is_read_or_refused(data: st.DataObject) -> None:
    raw = bytearray(png(Image.new("RGB", (8, 8), (10, 200, 30)), data.draw(st.sampled_from(["PNG", "JPEG"]))))
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        load_picture(bytes(raw), PLAIN, "body")
    except RequestError as error:
        assert error.code in {"bad_request", "too_large"}  # noqa: PT017 - either outcome is right


def test_base64_is_read_with_and_without_its_head() -> None:
    text = base64.b64encode(b"data").decode()
    assert decode_base64(text, "inputs") == decode_base64(f"data:image/png;base64,{text}", "inputs") == b"data"


@pytest.mark.parametrize("text", ["not base64!", "a", "ü", "http://example.org/cat.png"])
def test_what_is_no_base64_is_refused_by_its_field(text: str) -> None:
    with pytest.raises(RequestError, match=r"^inputs\[3\]: "):
        decode_base64(text, "inputs[3]")


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 1 << 20, "width": 8}},
        {"size": {"height": 0, "width": 8}},
        {"size": "large"},
        {"resample": 99},
        {"image_mean": [0.1, 0.2]},
        {"do_resize": "yes"},
    ],
)
def test_a_configuration_that_cannot_be_honoured_is_the_models_fault(config: dict[str, object]) -> None:
    with pytest.raises(ModelError, match="preprocessor_config"):
        parse_steps(config, 3)


def test_a_cmyk_jpeg_and_the_first_of_moving_images_are_read() -> None:
    assert load_picture(png(Image.new("CMYK", (3, 2)), "JPEG"), PLAIN, "body").values.shape == (3, 2, 3)
    first, second = Image.new("RGB", (4, 4), (9, 9, 9)), Image.new("RGB", (4, 4), (200, 0, 0))
    moving = png(first, save_all=True, append_images=[second])
    assert set(load_picture(moving, PLAIN, "body").values.ravel()) == {9.0}


def test_one_pixel_is_an_image() -> None:
    steps = parse_steps({"size": {"height": 4, "width": 4}, "do_normalize": False}, 3)
    values = load_picture(png(Image.new("RGB", (1, 1), (51, 102, 255))), steps, "body").values
    assert values[:, 3, 3] == pytest.approx([0.2, 0.4, 1.0])


def test_an_image_that_scaling_would_blow_up_is_refused_before_it_is_made() -> None:
    steps = parse_steps({"size": {"shortest_edge": 256}}, 3)
    with pytest.raises(RequestError, match=r"^body: 20000 x 1 pixels would be scaled to 5120000 x 256") as caught:
        load_picture(png(Image.new("RGB", (20_000, 1))), steps, "body")
    assert caught.value.code == "too_large"


def test_channels_last_holds_the_same_values_as_channels_first() -> None:
    steps = parse_steps({"image_processor_type": "MobileViTImageProcessor", "size": 8, "crop_size": 6}, 3)
    data = png(Image.effect_noise((9, 7), 90).convert("RGB"))
    first = load_picture(data, steps, "body").values
    assert load_picture(data, steps, "body", channels_last=True).values == pytest.approx(first.transpose(1, 2, 0))


def test_padding_lies_at_the_right_and_below_and_is_zero() -> None:
    steps = parse_steps({"do_resize": False, "pad_size": {"height": 5, "width": 6}, "image_mean": 0.5}, 3)
    picture = load_picture(png(Image.new("RGB", (4, 3), (255, 255, 255))), steps, "body")
    assert (picture.size, picture.scaled, picture.values.shape) == ((3, 4), (3, 4), (3, 5, 6))
    assert picture.values[0, :3, :4].min() == pytest.approx(0.5)
    assert not picture.values[:, 3:].any()


def test_a_mask_is_an_image_of_0_and_255() -> None:
    mask = np.array([[True, False, True], [False, False, True]])
    image = Image.open(io.BytesIO(base64.b64decode(encode_mask(mask))))
    assert (image.mode, image.size) == ("L", (3, 2))
    assert np.asarray(image).tolist() == [[255, 0, 255], [0, 0, 255]]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_e13_a_bomb_beside_the_pixels_is_refused_or_left_alone(kind: bytes) -> None:
    def block(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", 4, 4, 8, 2, 0, 0, 0)
    bomb = {b"iTXt": b"a\0\1\0\0\0"}.get(kind, b"a\0\0") + zlib.compress(bytes(16 << 20), 9)
    blocks = block(b"IHDR", head), block(kind, bomb), block(b"IDAT", zlib.compress(bytes(52))), block(b"IEND", b"")
    with pytest.raises(RequestError) as caught:
        load_picture(b"\x89PNG\r\n\x1a\n" + b"".join(blocks), PLAIN, "body")
    assert caught.value.code == "bad_request"


def test_a_palette_with_transparency_is_read_without_it() -> None:
    image = Image.new("RGBA", (9, 9), (10, 20, 30, 0)).quantize(8)
    values = load_picture(png(image, transparency=bytes([0, 5, 9])), PLAIN, "body").values
    assert values[:, 0, 0].tolist() == [10.0, 20.0, 30.0]
