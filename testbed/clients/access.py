"""libnbd, not strict: what a host may do with an export, by its URI.

usage: access.py URI rw|ro|refused
"""

import errno
import sys

import nbd


def refused(wanted, action):
    try:
        action()
    except nbd.Error as error:
        assert error.errnum == wanted, error
    else:
        raise AssertionError("accepted")


def main():
    uri, wanted = sys.argv[1:]
    client = nbd.NBD()
    client.set_strict_mode(0)
    client.set_uri_allow_local_file(True)
    try:
        client.connect_uri(uri)
    except nbd.Error as error:
        assert wanted == "refused", error
        return
    assert wanted != "refused", "the export was opened"
    assert client.get_tls_negotiated() == uri.startswith("nbds")
    client.pread(4096, 0)
    client.cache(4096, 0)
    assert client.is_read_only() == (wanted == "ro")
    if wanted == "ro":
        assert not client.can_trim() and not client.can_zero()
        for action in (
            lambda: client.pwrite(bytes(4096), 0),
            lambda: client.pwrite(bytes(4096), 0, nbd.CMD_FLAG_FUA),
            lambda: client.pwrite(bytes(8 << 20), 0),
            lambda: client.zero(4096, 0),
            lambda: client.trim(4096, 0),
            lambda: client.trim(1 << 20, 0, nbd.CMD_FLAG_FUA),
        ):
            refused(errno.EPERM, action)
            client.pread(4096, 0)
    else:
        client.pwrite(b"w" * 4096, 8192, nbd.CMD_FLAG_FUA)
        assert client.pread(4096, 8192) == b"w" * 4096
    client.flush()
    client.shutdown()


main()
