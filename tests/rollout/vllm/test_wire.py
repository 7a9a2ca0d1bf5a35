"""The stream of tensors: what is sent arrives to the bit, and a stream that is not whole is refused as a whole."""

import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from grpo.rollout.vllm.wire import DTYPES, BadStream, frames, index_of, packed, read_frames, unpacked
from grpo.runtime.checksums import checksum

IN_A_FOLDER = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture], database=None
)


@st.composite
def tensors(draw):
    """A named tensor of any bits, contiguous or not."""
    dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
    shape = draw(st.lists(st.integers(0, 5), max_size=3))
    bits = draw(st.binary(min_size=4, max_size=4))
    tensor = torch.frombuffer(bytearray(bits) * (int(np.prod(shape)) + 1), dtype=dtype)[: int(np.prod(shape))]
    tensor = tensor.view(shape)
    return draw(st.text(max_size=20)), tensor.T if len(shape) == 2 and draw(st.booleans()) else tensor


def stream_of(named):
    return b"".join(bytes(piece) for piece in frames(named))


@IN_A_FOLDER
@given(st.lists(tensors(), max_size=5))
def test_tensors_arrive_to_the_bit(tmp_path, named):
    """Any dtype, shape, name and layout; NaN with its bits."""
    file = tmp_path / "stream"
    file.write_bytes(stream_of(named))
    changed = []
    arrived = list(read_frames(file, index_of(file), changed))
    assert [name for name, _ in arrived] == [name for name, _ in named]
    for (_, sent), (_, got) in zip(named, arrived, strict=True):
        assert got.dtype == sent.dtype and got.shape == sent.shape
        assert int(checksum(got)) == int(checksum(sent))
        kind = torch.int32 if sent.dtype == torch.float32 else torch.int16
        assert torch.equal(got.contiguous().view(-1).view(kind), sent.contiguous().view(-1).view(kind))


def test_every_cut_is_refused(tmp_path):
    """Each of the stream's prefixes, and a stream with a byte too many; the whole one (the control) is read."""
    whole = stream_of([("a", torch.randn(3)), ("b", torch.randn(2, 2).bfloat16()), ("none", torch.zeros(0))])
    file = tmp_path / "stream"
    for end in range(len(whole)):
        file.write_bytes(whole[:end])
        with pytest.raises(BadStream):
            index_of(file)
    file.write_bytes(whole + b"\0")
    with pytest.raises(BadStream):
        index_of(file)
    file.write_bytes(whole)
    assert len(index_of(file)) == 3


@IN_A_FOLDER
@given(st.data())
def test_a_changed_stream_is_refused_or_other_tensors(tmp_path, data):
    """Any bytes in place of any others: BadStream, never another exception."""
    whole = bytearray(stream_of([("a", torch.ones(3)), ("b", torch.ones(2, 2))]))
    start = data.draw(st.integers(0, len(whole) - 1))
    other = data.draw(st.binary(min_size=1, max_size=8))
    whole[start : start + len(other)] = other
    file = tmp_path / "stream"
    file.write_bytes(whole)
    try:
        found = index_of(file)
    except BadStream:
        return
    assert sum(frame.length for frame in found) <= len(whole)
    shapes = [tensor.shape for _, tensor in read_frames(file, found, [])]
    assert shapes == [frame.shape for frame in found]


HEADERS = {
    "no object": b"[]",
    "nested": b"[" * 60000,
    "no dtype": {"name": "a", "shape": [1]},
    "a dtype that is a list": {"name": "a", "dtype": [], "shape": [1]},
    "an unknown dtype": {"name": "a", "dtype": "object", "shape": [1]},
    "no shape": {"name": "a", "dtype": "float32"},
    "a negative size": {"name": "a", "dtype": "float32", "shape": [-1]},
    "a size that is true": {"name": "a", "dtype": "float32", "shape": [True]},
    "a size beyond any disk": {"name": "a", "dtype": "float32", "shape": [2**62, 2**62]},
    "a name that is a number": {"name": 3, "dtype": "float32", "shape": [1]},
    "no text": b"\xff\xfe",
    "another count": {"count": 7},
    "longer than a header may be": b" " * (1 << 17) + b"{}",
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_malformed_headers_are_refused(tmp_path, header):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    end = json.dumps({"count": 1}).encode()
    file = tmp_path / "stream"
    file.write_bytes(b"".join(len(t).to_bytes(8, "little") + t + bytes(4) * (t == text) for t in (text, end)))
    with pytest.raises(BadStream):
        index_of(file)


@given(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=9))
def test_arrays_in_json_arrive_whole(values):
    assert unpacked(packed(values, "<i4"), "<i4").tolist() == values


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_a_checksum_depends_on_bits_alone(offset):
    """Parameters may lie at any place of a larger buffer; a server has them in one of their own."""
    buffer = torch.randn(40)
    part = buffer[offset : offset + 17]
    assert int(checksum(part)) == int(checksum(part.clone()))
