"""DICOM: our own back end, against the pixels that were stored, OpenSlide and pydicom."""

from __future__ import annotations

import logging
import os
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import openslide
import pytest
from dicom_helpers import (
    JPEG,
    SERIES,
    SYNTAXES,
    TILE,
    Syntax,
    fields,
    frames_of,
    jpeg,
    picture,
    rle,
    write,
)
from pydicom import Dataset, uid
from pydicom.pixels import convert_color_space

from slide2vec.errors import BackendError, SlideOpenError, SlideReadError
from slide2vec.readers import SlideReader, open_slide
from slide2vec.readers.dicom_head import dicom_head
from slide2vec.readers.slide_files import slide_files
from slide2vec.slides import as_slide

#: Of lossless transfer syntaxes, and of lossy ones at the quality used here: the noise of a few levels.
EXACT, LOSSY = 0, 3.0
#: That OpenSlide 4.0 reads, with the same pixels.
OPENSLIDE = ("explicit", "jpeg", "jpeg-rgb", "jpeg2000", "jpeg2000-lossy")


def opened(path: Path, backend: str = "dicom") -> SlideReader:
    return open_slide(as_slide(path), backend)


def level(path: Path, number: int = 0) -> np.ndarray:
    with opened(path) as reader:
        return reader.read_region((0, 0), number, reader.level_dimensions[number])


def by_openslide(path: Path, number: int = 0) -> np.ndarray:
    with openslide.OpenSlide(path) as slide:
        pixels = np.asarray(slide.read_region((0, 0), number, slide.level_dimensions[number]))
    return np.where(pixels[..., 3:] > 0, pixels[..., :3], np.uint8(255))


def far(pixels: np.ndarray, expected: np.ndarray) -> float:
    """Mean difference."""
    assert pixels.shape == expected.shape
    return float(abs(pixels.astype(int) - expected).mean())


@pytest.mark.parametrize("name", SYNTAXES)
def test_every_transfer_syntax(name: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), name)
    pixels = level(path)
    exact = name in (
        "explicit",
        "implicit",
        "jpeg-ls",
        "jpeg2000",
        "htj2k",
        "rle",
        "jpeg-lossless",
        "deflated",
    )
    assert far(pixels, picture()) <= (EXACT if exact else LOSSY)
    if name in OPENSLIDE:
        np.testing.assert_array_equal(pixels, by_openslide(path))
    with opened(path) as reader, opened(path, "auto") as chosen:
        assert (chosen.backend, reader.tile_shapes, reader.spacing_um) == ("dicom", ((TILE, TILE),), 0.5)


@pytest.mark.parametrize("options", [{"offsets": "none"}, {"offsets": "extended"}, {"fragments": 3}])
def test_wherever_frames_are_said_to_be(options: dict[str, object], tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), "jpeg", **options)
    np.testing.assert_array_equal(level(path), by_openslide(path))


def test_frames_in_fragments_without_a_table(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), "jpeg-ls", offsets="none", fragments=2)
    np.testing.assert_array_equal(level(path), picture())


@pytest.mark.parametrize("implicit", [False, True])
def test_sparse_frames_at_their_places_and_white_elsewhere(implicit: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), "implicit" if implicit else "jpeg2000", sparse=[7, 0, 3])
    expected = np.full((256, 320, 3), 255, np.uint8)
    for number in (7, 0, 3):
        y, x = number // 5 * TILE, number % 5 * TILE
        expected[y : y + TILE, x : x + TILE] = frames_of(picture())[number]
    np.testing.assert_array_equal(level(path), expected[:200, :300])


def test_concatenation(tmp_path: Path) -> None:
    frames = len(frames_of(picture()))
    path = write(tmp_path / "b.dcm", picture(), "jpeg-ls", sparse=range(11), part=(1, 0))
    other = write(tmp_path / "a.dcm", picture(), "jpeg-ls", sparse=range(11, frames), part=(2, 11))
    np.testing.assert_array_equal(level(path), picture())
    other.unlink()
    with pytest.raises(SlideOpenError, match=r"11 frames where its size needs 20 .*part .* is missing"):
        opened(path)


@pytest.mark.parametrize(
    ("photometric", "encode"),
    [
        ("YBR_FULL", lambda frame: jpeg(frame)),
        ("RGB", lambda frame: jpeg(frame)),  # a JFIF marker goes before what DICOM says
        ("YBR_FULL_422", SYNTAXES["jpeg-rgb"].encode),  # and so does Adobe's
    ],
)
def test_colours_of_jpeg_frames(
    photometric: str, encode: Callable[[np.ndarray], bytes], tmp_path: Path
) -> None:
    path = write(tmp_path / "a.dcm", picture(), Syntax(JPEG, photometric, encode))
    assert far(level(path), picture()) < LOSSY


@pytest.mark.parametrize("syntax", [uid.ExplicitVRLittleEndian, uid.JPEGLSLossless, uid.RLELossless])
def test_ybr_full_without_jpeg(syntax: str, tmp_path: Path) -> None:
    encode = {
        uid.JPEGLSLossless: lambda frame: bytes(imagecodecs.jpegls_encode(frame)),
        uid.RLELossless: rle,
    }.get(syntax)
    path = write(tmp_path / "a.dcm", picture(), Syntax(syntax, "YBR_FULL", encode))
    expected = convert_color_space(picture(), "YBR_FULL", "RGB").astype(int)
    assert abs(level(path) - expected).max() <= 1  # rounding


def test_planar_and_grey_frames(tmp_path: Path) -> None:
    def stored(frames: list[bytes], photometric: str, **values: object) -> Callable[[Dataset], None]:
        def change(ds: Dataset) -> None:
            ds.PhotometricInterpretation, ds.PixelData = photometric, b"".join(frames)
            fields(**values)(ds)

        return change

    frames = frames_of(picture())
    planar = [np.moveaxis(frame, -1, 0).tobytes() for frame in frames]
    path = write(
        tmp_path / "planar.dcm",
        picture(),
        series="1.2.1",
        change=stored(planar, "RGB", PlanarConfiguration=1),
    )
    np.testing.assert_array_equal(level(path), picture())
    grey = [frame[..., 0].tobytes() for frame in frames]
    change = stored(grey, "MONOCHROME2", SamplesPerPixel=1)
    path = write(tmp_path / "grey.dcm", picture(), series="1.2.3", change=change)
    np.testing.assert_array_equal(level(path), np.repeat(picture()[..., :1], 3, axis=-1))


# which image is the slide ----------------------------------------------------------------------


@pytest.fixture
def series(tmp_path: Path) -> Path:
    """A folder of a slide: two levels, and a label."""
    write(tmp_path / "b.dcm", picture(), "jpeg")
    write(tmp_path / "c.dcm", picture()[::4, ::4], "jpeg", spacing_um=(2.0, 2.0))
    write(tmp_path / "a.dcm", picture(90, 80), "jpeg", flavour="LABEL")
    return tmp_path


@pytest.mark.parametrize("named", ["a.dcm", "b.dcm", "c.dcm"])
def test_the_series_is_the_slide_whichever_file_is_named(named: str, series: Path) -> None:
    with opened(series / named) as reader:
        assert reader.level_dimensions == ((300, 200), (75, 50))
        assert (reader.spacing_um, reader.spacing_source) == (0.5, "PixelSpacing")
    for number in range(2):
        np.testing.assert_array_equal(level(series / named, number), by_openslide(series / named, number))


def test_a_label_alone_is_no_slide(series: Path) -> None:
    (series / "b.dcm").unlink()
    (series / "c.dcm").unlink()
    for backend in ("auto", "openslide"):
        with pytest.raises(SlideOpenError, match="label picture of a DICOM slide"):
            opened(series / "a.dcm", backend)


def test_a_folder_is_no_slide_file(series: Path) -> None:
    with pytest.raises(
        SlideOpenError, match=r"is a directory; give .* of a DICOM slide any file of its series"
    ):
        opened(series)


def test_neighbours_of_any_kind(series: Path) -> None:
    os.mkfifo(series / "pipe")
    (series / "secret").write_bytes(bytes(200))
    (series / "secret").chmod(0)
    (series / "cut.dcm").write_bytes((series / "b.dcm").read_bytes()[:300])
    (series / "broken-link.dcm").symlink_to("nowhere")
    write(series / "other.dcm", picture(), series="1.2.3")
    with opened(series / "b.dcm") as reader:
        assert len(reader.level_dimensions) == 2
    files = slide_files(series / "c.dcm")
    assert files is not None
    assert [str(name) for _, name in files] == ["c.dcm", "a.dcm", "b.dcm"]


def test_heads_of_implicit_files(tmp_path: Path) -> None:
    head = dicom_head(write(tmp_path / "noname", picture(), "implicit"))
    assert head is not None and (head.series, head.flavour, head.is_level) == (SERIES, "VOLUME", True)
    (tmp_path / "text").write_text("DICOM" * 100)
    assert dicom_head(tmp_path / "text") is None


def test_a_tiff_in_the_preamble_is_still_dicom(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), preamble=b"II*\0\x08\0\0\0" + bytes(120))
    np.testing.assert_array_equal(level(path), picture())
    with pytest.raises(BackendError, match="dicom files"):
        opened(path, "cucim")


@pytest.mark.parametrize("named", ["01130795.dcm", "05214944.dcm", "45731873.dcm"])
def test_dual_personality_files(named: str, dialects_dir: Path) -> None:
    path = dialects_dir / "dicom-tiff-dual-personality" / named
    with opened(path, "auto") as reader:
        assert (reader.backend, reader.spacing_um) == ("dicom", 0.499)
        assert reader.level_dimensions == ((2220, 2967), (555, 742))
    np.testing.assert_array_equal(level(path, 1), by_openslide(path, 1))


def test_rgb_frames_that_dicom_calls_ybr(dialects_dir: Path, reference_slide: Path) -> None:
    path = dialects_dir / "wsidicomizer-ybr-full.dcm"
    np.testing.assert_array_equal(level(path), by_openslide(reference_slide))


# refused ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (fields(BitsAllocated=16, BitsStored=12, HighBit=11), "RGB of 3 channels with 12 bits in 16"),
        (fields(PixelRepresentation=1), "8 signed bits"),
        (fields(PhotometricInterpretation="PALETTE COLOR", SamplesPerPixel=1), "PALETTE COLOR of 1 channel"),
        (fields(TotalPixelMatrixFocalPlanes=3), "3 focal planes or optical paths"),
        (fields(NumberOfOpticalPaths=2), "2 focal planes or optical paths"),
        (fields(NumberOfFrames=19), "pixels have 245760"),
        (fields(NumberOfFrames=2**31 - 1), "claims 2147483647 frames"),
        (fields(TotalPixelMatrixColumns=2**31), "claims 2147483648x200 px, and has only 20 frames"),
        (fields(TotalPixelMatrixRows=None), "claims 300x0 px"),
        (fields(Rows=65535, Columns=65535), "claims 300x200 px in frames of 65535x65535"),
        (fields(DimensionOrganizationType="TILED_SPARSE"), "does not say where its frames are"),
        (fields(SOPClassUID=uid.CTImageStorage), "no whole-slide image .CT Image Storage"),
        (fields(PixelData=None), "truncated"),
    ],
)
def test_what_cannot_be_is_refused(change: Callable[[Dataset], None], message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), change=change)
    with pytest.raises(SlideOpenError, match=f"slide a: .*a.dcm .*{message}"):
        opened(path)


def test_pixels_that_are_not_square(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), spacing_um=(0.998, 0.499))
    with pytest.raises(SlideOpenError, match=r"0.499 µm wide and 0.998 µm high"):
        opened(path)
    with opened(write(path, picture(), spacing_um=(0.501, 0.5))) as reader:
        assert reader.spacing_um == 0.5


def test_spacing_without_and_against_the_imaged_volume(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "a.dcm", picture(), change=fields(SharedFunctionalGroupsSequence=None))
    with opened(path) as reader:
        assert (reader.spacing_um, reader.spacing_source) == (pytest.approx(0.5), "ImagedVolumeWidth")
    with (
        caplog.at_level(logging.WARNING),
        opened(write(path, picture(), change=fields(ImagedVolumeWidth=0.3))),
    ):
        assert "0.5 µm/px by PixelSpacing, which is used, and 1 by ImagedVolumeWidth" in caplog.text


def test_two_images_of_one_size(tmp_path: Path) -> None:
    write(tmp_path / "a.dcm", picture())
    path = write(tmp_path / "b.dcm", picture())
    with pytest.raises(SlideOpenError, match=r"two images of 300x200 px, a.dcm and b.dcm"):
        opened(path)
    write(tmp_path / "a.dcm", picture(400, 80), tile=16)
    with pytest.raises(SlideOpenError, match="different pictures"):
        opened(path)


@pytest.mark.parametrize("places", [[0, 0, 3], [0, 1]])
def test_sparse_frames_that_overlap(places: list[int], tmp_path: Path) -> None:
    def shift(ds: Dataset) -> None:
        place = ds.PerFrameFunctionalGroupsSequence[-1].PlanePositionSlideSequence[0]
        place.ColumnPositionInTotalImagePixelMatrix += 0 if len(places) == 3 else 7

    path = write(tmp_path / "a.dcm", picture(), sparse=places, change=shift)
    with pytest.raises(SlideOpenError, match=r"several frames at one place|do not lie side by side"):
        opened(path)


@pytest.mark.parametrize(
    ("syntax", "message"),
    [(uid.ExplicitVRBigEndian, "big endian"), (uid.DeflatedExplicitVRLittleEndian, "deflated as a whole")],
)
def test_data_sets_that_cannot_be_read_in_place(syntax: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), Syntax(syntax, "RGB", None))
    with pytest.raises(SlideOpenError, match=message):
        opened(path)


def test_colours_that_do_not_go_with_their_frames(tmp_path: Path) -> None:
    path = write(
        tmp_path / "a.dcm", picture(), Syntax(uid.JPEGLSLossless, "YBR_ICT", SYNTAXES["jpeg-ls"].encode)
    )
    with pytest.raises(BackendError, match="colours YBR_ICT are not read of JPEG-LS"):
        opened(path)

    def untransformed(frame: np.ndarray) -> bytes:
        return bytes(imagecodecs.jpeg2k_encode(frame, codecformat="j2k", reversible=True, mct=False))

    path = write(path, picture(), Syntax(uid.JPEG2000Lossless, "YBR_RCT", untransformed))
    with opened(path) as reader, pytest.raises(SlideReadError, match="YBR_RCT, and it has no such transform"):
        reader.read_region((0, 0), 0, (9, 9))


def test_video_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), Syntax(uid.MPEG2MPML, "YBR_FULL", lambda frame: b"abcd"))
    with pytest.raises(BackendError, match=r"MPEG2 .*are not read; convert"):
        opened(path)


# damage ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jpeg", "jpeg-ls", "jpeg2000", "rle"])
@pytest.mark.parametrize("offsets", ["basic", "none"])
def test_a_cut_frame_is_an_error_and_the_others_are_read(name: str, offsets: str, tmp_path: Path) -> None:
    def cut(frames: list[bytes]) -> None:
        frames[6] = frames[6][: len(frames[6]) // 2]

    path = write(tmp_path / "a.dcm", picture(), name, damage=cut, offsets=offsets)
    with opened(path) as reader:
        with pytest.raises(SlideReadError, match=r"slide a: dicom .* level 0 at \(64, 64\).*damaged"):
            reader.read_region((60, 60), 0, (50, 50))
        assert far(reader.read_region((0, 0), 0, (300, 60)), picture()[:60]) <= LOSSY


def test_damage_inside_the_entropy_data(real_slide: Callable[[str], Path], tmp_path: Path) -> None:
    """Where libjpeg only warns, which others (OpenSlide, imagecodecs) keep to themselves."""
    data = bytearray(real_slide("camelyon-jpeg.dcm").read_bytes())
    data[8859:8865] = bytes.fromhex("ba3b0ae03eaf")  # of the first frame
    path = tmp_path / "a.dcm"
    path.write_bytes(data)
    assert by_openslide(path).shape == (700, 1152, 3)
    with opened(path) as reader, pytest.raises(SlideReadError, match=r"level 0 at \(0, 0\)"):
        reader.read_region((0, 0), 0, (256, 256))


def test_tables_of_offsets_that_are_wrong(tmp_path: Path) -> None:
    good = write(tmp_path / "a.dcm", picture(), "jpeg-ls")
    data = good.read_bytes()
    table = data.index(b"\xfe\xff\x00\xe0\x50\0\0\0") + 8
    unordered = data[:table] + data[table : table + 4] + data[table + 8 : table + 12] * 2 + data[table + 12 :]
    good.write_bytes(unordered)  # no table at all: frames are found without it
    np.testing.assert_array_equal(level(good), picture())
    moved = int.from_bytes(data[table + 4 : table + 8], "little") + 2
    good.write_bytes(data[: table + 4] + moved.to_bytes(4, "little") + data[table + 8 :])
    with opened(good) as reader, pytest.raises(SlideReadError, match="not where the file says"):
        reader.read_region((0, 0), 0, (64, 64))


@pytest.mark.parametrize("name", ["explicit", "jpeg"])
@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_truncated(name: str, share: float, tmp_path: Path) -> None:
    path = write(tmp_path / "a.dcm", picture(), name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(SlideOpenError, match=r"truncated|damaged|cannot hold"):
        opened(path)


def test_headers_damaged_anywhere_end_in_one_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    good = write(tmp_path / "good.dcm", picture(), "jpeg", sparse=range(20)).read_bytes()
    pixels = good.index(b"\xe0\x7f\x10\x00")
    path = tmp_path / "a.dcm"
    for _ in range(300):
        data = bytearray(good)
        for at in rng.integers(132, pixels + 100, rng.integers(1, 4)):
            data[at] = rng.integers(256)
        path.write_bytes(data)
        try:
            with opened(path) as reader:
                reader.read_region((0, 0), 0, (64, 64))
        except (SlideOpenError, SlideReadError, BackendError) as error:
            assert "slide a:" in str(error)


def test_elements_that_pydicom_does_not_know(tmp_path: Path) -> None:
    """It raises NotImplementedError, of which users must not hear."""
    path = write(tmp_path / "a.dcm", picture())
    data = path.read_bytes()
    at = data.index(b"\x48\0\x07\0") + 4  # rows of the total pixel matrix
    path.write_bytes(data[:at] + b"U`\0\0" + data[at + 8 :])
    with pytest.raises(SlideOpenError, match=r"slide a: .* claims 300x0 px"):
        opened(path)


def test_pydicom_does_not_warn(series: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(series / "b.dcm", picture(), change=fields(PatientID="x" * 90, FrameOfReferenceUID="no UID"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        level(series / "b.dcm")


def test_series_are_copied_whole(series: Path, tmp_path: Path) -> None:
    files = slide_files(series / "a.dcm")
    assert files is not None
    copies = tmp_path / "copies"
    copies.mkdir()
    for source, name in files:
        shutil.copy(source, copies / name)
    with open_slide(as_slide(series / "a.dcm"), "auto", copies / "a.dcm") as reader:
        assert reader.level_dimensions == ((300, 200), (75, 50))
