import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from enginesmith_client import InvalidInput, ServerError
from enginesmith_client._codec import NUMPY_TYPES, array_from_bytes, bytes_from_array, datatype_from_dtype

SHAPES = npst.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
NUMERIC = st.sampled_from(sorted(NUMPY_TYPES))


@given(st.data(), NUMERIC, SHAPES)
def test_numbers_survive_the_round_trip_bit_for_bit(
    data: st.DataObject, datatype: str, shape: tuple[int, ...]
) -> None:
    array = data.draw(npst.arrays(np.dtype(NUMPY_TYPES[datatype]), shape))
    back = array_from_bytes(bytes_from_array(array, datatype), datatype, shape)
    assert back.dtype == array.dtype
    assert back.shape == shape
    assert back.tobytes() == array.tobytes()


@given(
    st.data(), st.sampled_from([name for name in sorted(NUMPY_TYPES) if name.endswith(("16", "32", "64"))])
)
def test_the_memory_layout_of_an_array_does_not_show_on_the_wire(data: st.DataObject, datatype: str) -> None:
    array = data.draw(npst.arrays(np.dtype(NUMPY_TYPES[datatype]), (3, 4)))
    wire = bytes_from_array(array, datatype)
    assert bytes_from_array(np.asfortranarray(array), datatype) == wire
    assert bytes_from_array(array.astype(array.dtype.newbyteorder(">")), datatype) == wire
    assert bytes_from_array(np.repeat(array, 2, axis=1)[:, ::2], datatype) == wire


@given(st.lists(st.binary(max_size=20), max_size=12))
def test_bytes_survive_the_round_trip(elements: list[bytes]) -> None:
    array = np.empty(len(elements), dtype=np.object_)
    array[:] = elements
    assert array_from_bytes(bytes_from_array(array, "BYTES"), "BYTES", (len(elements),)).tolist() == elements


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), min_size=1, max_size=12))
def test_text_is_sent_as_utf_8(texts: list[str]) -> None:
    encoded = [text.encode("utf-8") for text in texts]
    array = np.array(texts, dtype=np.object_)
    assert array_from_bytes(bytes_from_array(array, "BYTES"), "BYTES", (len(texts),)).tolist() == encoded


@given(st.lists(st.binary(max_size=6), min_size=1, max_size=5), st.data())
def test_a_bytes_tensor_that_was_cut_is_refused(elements: list[bytes], data: st.DataObject) -> None:
    wire = bytes_from_array(np.array([*elements, b"end"], dtype=np.object_)[:-1], "BYTES")
    cut = data.draw(st.integers(0, len(wire) - 1))
    with pytest.raises(ServerError):
        array_from_bytes(wire[:cut], "BYTES", (len(elements),))


def test_every_bfloat16_is_given_back_as_the_equal_float32() -> None:
    patterns = np.arange(2**16, dtype=np.uint16)
    floats = array_from_bytes(patterns.tobytes(), "BF16", (2**16,))
    np.testing.assert_array_equal(floats, patterns.view(ml_dtypes.bfloat16).astype(np.float32))
    assert bytes_from_array(patterns.view(ml_dtypes.bfloat16), "BF16") == patterns.tobytes()


@given(npst.arrays(np.float32, SHAPES))
def test_float32_is_rounded_to_the_nearest_bfloat16(array: np.ndarray) -> None:
    sent = array_from_bytes(bytes_from_array(array, "BF16"), "BF16", array.shape)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(sent, array.astype(ml_dtypes.bfloat16).astype(np.float32))


def test_a_nan_whose_payload_is_in_the_low_bits_stays_nan_as_bfloat16() -> None:
    nan = np.array([0x7F800001, 0xFFFFFFFF], dtype=np.uint32).view(np.float32)
    assert np.isnan(array_from_bytes(bytes_from_array(nan, "BF16"), "BF16", (2,))).all()


@pytest.mark.parametrize(
    ("data", "datatype"), [(b"\0" * 7, "FP32"), (b"\0" * 9, "FP32"), (b"", "BOOL"), (b"\0\0", "FP8")]
)
def test_a_number_tensor_of_the_wrong_size_or_type_is_refused(data: bytes, datatype: str) -> None:
    with pytest.raises(ServerError):
        array_from_bytes(data, datatype, (2,))


def test_text_that_is_not_unicode_is_refused_with_its_position() -> None:
    with pytest.raises(InvalidInput, match=r"element 1 .*character 2 is '\\udcff'"):
        bytes_from_array(np.array(["fine", "ab\udcff"], dtype=np.object_), "BYTES")


def test_an_element_that_is_neither_text_nor_bytes_is_refused() -> None:
    with pytest.raises(InvalidInput, match="element 0 of a BYTES tensor is int"):
        bytes_from_array(np.array([1], dtype=np.object_), "BYTES")


@pytest.mark.parametrize(
    ("dtype", "datatype"),
    [
        ("bool", "BOOL"),
        (">i4", "INT32"),
        ("f2", "FP16"),
        ("U3", "BYTES"),
        ("S3", "BYTES"),
        ("c8", None),
        ("M8[s]", None),
    ],
)
def test_dtypes_have_the_datatype_that_carries_them(dtype: str, datatype: str | None) -> None:
    assert datatype_from_dtype(np.dtype(dtype)) == datatype


def test_a_dtype_that_does_not_fit_is_not_converted_silently() -> None:
    with pytest.raises(InvalidInput, match="float64 cannot be sent as FP32"):
        bytes_from_array(np.zeros(1), "FP32")


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2"])
def test_fp8_goes_into_uint8_tensors_bit_for_bit(name: str) -> None:
    patterns = np.arange(256, dtype=np.uint8)
    array = patterns.view(getattr(ml_dtypes, name))
    assert bytes_from_array(array, "UINT8") == patterns.tobytes()
    assert datatype_from_dtype(array.dtype) is None
    with pytest.raises(InvalidInput, match=f"{name} cannot be sent as INT8"):
        bytes_from_array(array, "INT8")


@given(npst.arrays(np.float16, SHAPES))
def test_float16_with_nan_and_infinity_is_sent_bit_for_bit(array: np.ndarray) -> None:
    back = array_from_bytes(bytes_from_array(array, "FP16"), "FP16", array.shape)
    assert back.tobytes() == array.tobytes()


def test_elements_of_10_mb_with_every_byte_survive_the_round_trip() -> None:
    element = bytes(range(256)) * 40_000
    array = np.array([element, b"", b"\0", element], dtype=np.object_)
    assert array_from_bytes(bytes_from_array(array, "BYTES"), "BYTES", (4,)).tolist() == [
        element,
        b"",
        b"\0",
        element,
    ]
