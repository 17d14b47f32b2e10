"""ICC profiles for tests."""

import struct

D50 = (0.9642, 1.0, 0.8249)
P3 = ((0.51512, 0.2412, -0.00105), (0.29198, 0.69225, 0.04189), (0.1571, 0.06657, 0.78407))


def fixed(values) -> bytes:
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def icc(primaries=P3, gamma: float = 2.2, space: bytes = b"RGB ") -> bytes:
    """Return a profile with these primaries and one gamma, by ICC.1:2001."""
    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    name = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"test\0" + bytes(78)
    tags = [(b"desc", name + bytes(-len(name) % 4)), (b"wtpt", b"XYZ \0\0\0\0" + fixed(D50))]
    if space == b"GRAY":
        tags += [(b"kTRC", curve)]
    else:
        tags += [
            (key, b"XYZ \0\0\0\0" + fixed(xyz)) for key, xyz in zip((b"rXYZ", b"gXYZ", b"bXYZ"), primaries, strict=True)
        ]
        tags += [(key, curve) for key in (b"rTRC", b"gTRC", b"bTRC")]
    start, table, body = 132 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for key, data in tags:
        table += key + struct.pack(">II", start + len(body), len(data))
        body += data
    head = (
        struct.pack(">I4xI", start + len(body), 0x02100000)
        + b"mntr"
        + space
        + b"XYZ "
        + bytes(12)
        + b"acsp"
        + bytes(28)
        + fixed(D50)
    )
    return head.ljust(128, b"\0") + table + body
