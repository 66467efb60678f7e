"""Damage of files, drawn at random."""

from collections.abc import Callable

from hypothesis import strategies as st

Damage = Callable[[bytes], bytes]


@st.composite
def damages(draw) -> Damage:
    """Draw what happens to a file: it is cut off, bytes are changed, lost, added or repeated."""
    kind = draw(st.sampled_from(["cut", "flip", "flip", "lose", "add", "repeat"]))
    # Half of the places are near the ends, where files have their headers and their own lists of contents.
    place = draw(st.floats(0, 1) | st.sampled_from([0.0, 0.002, 0.01, 0.99, 0.998, 1.0]))
    length, mask = draw(st.integers(1, 40)), draw(st.integers(1, 255))
    added = draw(st.binary(min_size=1, max_size=40) | st.sampled_from([b"\x00", b"\n", b'"', b"}", b",", b"\xff\xfe"]))

    def damage(data: bytes) -> bytes:
        at = min(int(place * len(data)), max(len(data) - 1, 0))
        if kind == "cut":
            return data[:at]
        if kind == "flip":
            return data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :] if data else data
        if kind == "lose":
            return data[:at] + data[at + length :]
        return data[:at] + (added if kind == "add" else data[at : at + length]) + data[at:]

    return damage
