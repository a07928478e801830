"""libnbd, not strict: what a client must not send is answered with the specification's errno, and the connection stays.

usage: refusals.py URI
"""

import errno
import sys

import nbd

MIB = 1 << 20
PAYLOAD_MAX = 64 * MIB
UNKNOWN_FLAG = 1 << 9


def connect(uri, structured):
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.set_request_structured_replies(structured)
    if structured:
        client.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    client.connect_uri(uri)
    assert client.get_structured_replies_negotiated() == structured
    return client


def status(client, length, offset, flags=0):
    client.block_status(length, offset, lambda *_: 0, flags)


def refused(name, wanted, action):
    """The action fails with this errno, which came from the server."""
    try:
        action()
    except nbd.Error as error:
        assert error.errnum == wanted, f"{name}: {error}"
    else:
        raise AssertionError(f"{name} was accepted")


def beyond_the_end(client, size):
    for offset in (size, size - 512, size + MIB, 1 << 62, (1 << 63) - 4096):
        refused(f"read at {offset}", errno.EINVAL, lambda: client.pread(4096, offset))
        refused(f"write at {offset}", errno.ENOSPC, lambda: client.pwrite(bytes(4096), offset))
        refused(f"zeroes at {offset}", errno.ENOSPC, lambda: client.zero(4096, offset))
        refused(f"trim at {offset}", errno.EINVAL, lambda: client.trim(4096, offset))
        refused(f"cache at {offset}", errno.EINVAL, lambda: client.cache(4096, offset))
    # The range ends beyond the end, and beyond 64 bits.
    refused("read past 2^64", errno.EINVAL, lambda: client.pread(4096, (1 << 64) - 2048))
    refused("write past 2^64", errno.ENOSPC, lambda: client.pwrite(bytes(4096), (1 << 64) - 2048))
    client.pread(4096, size - 4096)


def empty(client, size):
    """A request for nothing within the export succeeds, at its end too."""
    for offset in (0, 1, size):
        assert client.pread(0, offset) == b""
        client.pwrite(b"", offset)
        client.zero(0, offset)
        client.trim(0, offset)
        client.cache(0, offset)
    refused("nothing beyond the end", errno.EINVAL, lambda: client.pread(0, size + 1))


def misaligned(client):
    """Odd ranges are served, byte for byte, beside their neighbours."""
    client.pwrite(b"a" * 12288, 40960)
    client.pwrite(b"b" * 4097, 43007)
    client.zero(3, 45000)
    client.cache(1001, 43)
    wanted = b"a" * 2047 + b"b" * 1993 + bytes(3) + b"b" * 2101 + b"a" * 6144
    assert client.pread(12288, 40960) == wanted
    assert client.pread(5, 44998) == b"bb" + bytes(3)
    client.trim(1, 44998)
    assert client.pread(1, 44997) == b"b" and client.pread(1, 45003) == b"b"


def with_fua(client, structured):
    """FUA is accepted on every command."""
    fua = nbd.CMD_FLAG_FUA
    client.pwrite(b"f" * 8192, MIB, fua)
    assert client.pread(8192, MIB, fua) == b"f" * 8192
    client.zero(4096, MIB, fua)
    client.zero(4096, MIB, fua | nbd.CMD_FLAG_NO_HOLE)
    client.trim(4096, MIB + 4096, fua)
    client.cache(4096, MIB, fua)
    client.flush(fua)
    if structured:
        status(client, MIB, 0, fua)
        status(client, MIB, 0, fua | nbd.CMD_FLAG_REQ_ONE)


def flags(client, structured):
    for name, action in [
        ("read", lambda: client.pread(4096, 0, UNKNOWN_FLAG)),
        ("write", lambda: client.pwrite(bytes(4096), 0, UNKNOWN_FLAG)),
        ("zeroes", lambda: client.zero(4096, 0, UNKNOWN_FLAG)),
        ("trim", lambda: client.trim(4096, 0, UNKNOWN_FLAG)),
        ("cache", lambda: client.cache(4096, 0, UNKNOWN_FLAG)),
        ("flush", lambda: client.flush(UNKNOWN_FLAG)),
        ("write with DF", lambda: client.pwrite(bytes(4096), 0, nbd.CMD_FLAG_DF)),
        ("trim with NO_HOLE", lambda: client.trim(4096, 0, nbd.CMD_FLAG_NO_HOLE)),
        ("read with FAST_ZERO", lambda: client.pread(4096, 0, nbd.CMD_FLAG_FAST_ZERO)),
    ]:
        refused(f"{name} with a flag that it does not have", errno.EINVAL, action)
    if not structured:
        refused("DF without structured replies", errno.EINVAL, lambda: client.pread(4096, 0, nbd.CMD_FLAG_DF))


def unfragmented(client):
    """With DF a read comes in one chunk, over zeros and data alike; without, zeros come as a hole."""
    client.zero(MIB, 2 * MIB)
    client.pwrite(b"d" * 65536, 2 * MIB + 65536)
    for command_flags, holes_wanted in [(nbd.CMD_FLAG_DF, False), (0, True)]:
        chunks = []
        buffer = client.pread_structured(
            MIB, 2 * MIB, lambda data, offset, kind, _: chunks.append((offset, len(data), kind)), command_flags
        )
        assert buffer == bytes(65536) + b"d" * 65536 + bytes(MIB - 131072)
        holes = [chunk for chunk in chunks if chunk[2] == nbd.READ_HOLE]
        assert bool(holes) == holes_wanted, chunks
        assert holes_wanted or len(chunks) == 1, chunks
        assert sum(chunk[1] for chunk in chunks) == MIB, chunks


def statuses(client, size):
    refused("status of nothing", errno.EINVAL, lambda: status(client, 0, 0))
    refused("status beyond the end", errno.EINVAL, lambda: status(client, 4096, size))
    refused("status with DF", errno.EINVAL, lambda: status(client, 4096, 0, nbd.CMD_FLAG_DF))
    extents = []
    client.block_status(size, 0, lambda _, offset, entries, __: extents.append((offset, entries)))
    assert extents and extents[0][0] == 0
    lengths, kinds = extents[0][1][::2], extents[0][1][1::2]
    assert all(lengths) and sum(lengths) <= size, extents
    assert all(kind in (0, 2) for kind in kinds), extents
    one = []
    client.block_status(size, 0, lambda _, __, entries, ___: one.append(entries), nbd.CMD_FLAG_REQ_ONE)
    assert len(one[0]) == 2 and one[0][0] <= size, one


def largest(client):
    """The largest payload that clients send, at odd places too."""
    for length, offset in [(49_865_728, 0), (49_865_728, 4095), (PAYLOAD_MAX, MIB), (PAYLOAD_MAX, 511)]:
        data = (b"%016d" % offset) * (length // 16)
        client.pwrite(data, offset, nbd.CMD_FLAG_FUA)
        assert client.pread(length, offset) == data, f"{length} bytes at {offset}"


def main():
    for structured in (True, False):
        client = connect(sys.argv[1], structured)
        size = client.get_size()
        beyond_the_end(client, size)
        empty(client, size)
        misaligned(client)
        with_fua(client, structured)
        flags(client, structured)
        if structured:
            unfragmented(client)
            statuses(client, size)
        largest(client)
        client.pwrite(b"end", 0, nbd.CMD_FLAG_FUA)
        assert client.pread(3, 0) == b"end"
        client.shutdown()


main()
