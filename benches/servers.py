"""NBD servers as processes: how each is started, what it costs, how it is stopped. Used by peers and growth."""

import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
TARGET = pathlib.Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
TICKS = os.sysconf("SC_CLK_TCK")
SECRET = "secret,id=key,data=bench"


class Failure(Exception):
    """A sentence for the person who started the script."""


def binary(name):
    """A binary of the release build: in FARSHORE_BIN_DIR, else in the target folder."""
    places = [pathlib.Path(os.environ.get("FARSHORE_BIN_DIR", TARGET / "release")), TARGET / "release"]
    for place in places:
        if (place / name).exists():
            return place / name
    raise Failure(f"there is no {name} in {places[0]}: build with cargo build --release")


@contextlib.contextmanager
def work_folder(script):
    """A folder for volumes and images, on the disk of FARSHORE_BENCH_DIR or of the build; removed at the end."""
    TARGET.mkdir(parents=True, exist_ok=True)
    base = os.environ.get("FARSHORE_BENCH_DIR", TARGET)
    folder = pathlib.Path(tempfile.mkdtemp(prefix=f"{script}-", dir=base))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def run(*command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode:
        raise Failure(f"{pathlib.Path(command[0]).name} failed: {done.stderr.strip() or done.returncode}")
    return done.stdout


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def stat_fields(pid):
    """The fields of /proc/PID/stat from the third (state) on, or none if there is no such process."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


class Server:
    """A running server with a folder of its own for its files."""

    def __init__(self, name, folder, uri, command, ready, pid_file=None):
        self.name, self.folder, self.uri = name, folder, uri
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=log)
        self.pid = self.process.pid
        deadline = time.monotonic() + 60
        while not ready():
            gone = self.process.poll() is not None and not (pid_file and self.process.returncode == 0)
            if gone or time.monotonic() > deadline:
                self.stop()
                raise Failure(f"{name} did not start: {self.log.read_text(errors='replace').strip()}")
            time.sleep(0.05)
        if pid_file:
            self.pid = int(pid_file.read_text())

    def cpu_seconds(self):
        """User and system time of the process with all its threads, and of its children, those that ended too."""
        fields = stat_fields(self.pid)
        if fields is None:
            raise Failure(f"{self.name} has ended: {self.log.read_text(errors='replace')[-2000:].strip()}")
        ticks = sum(int(field) for field in fields[11:15])
        for entry in pathlib.Path("/proc").iterdir():
            child = stat_fields(entry.name) if entry.name.isdigit() else None
            if child and int(child[1]) == self.pid:
                ticks += sum(int(field) for field in child[11:15])
        return ticks / TICKS

    def busy_percent(self, seconds):
        """How much of a core the process uses over some time, to the nanosecond: for servers that do next to nothing.

        A thread that ends meanwhile counts as idle.
        """
        before, start = self.thread_times(), time.monotonic()
        time.sleep(seconds)
        used = sum(now - before.get(thread, 0) for thread, now in self.thread_times().items())
        return used / 1e7 / (time.monotonic() - start)

    def thread_times(self):
        times = {}
        for folder in pathlib.Path(f"/proc/{self.pid}/task").iterdir():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):
                times[folder.name] = int((folder / "schedstat").read_text().split()[0])
        return times

    def memory_mib(self, field="VmRSS"):
        """Resident memory; with VmHWM its peak since reset_peak."""
        for line in pathlib.Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) / 1024
        raise Failure(f"{self.name} has no {field}")

    def reset_peak(self):
        pathlib.Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def settle(self):
        """Writes back what the page cache holds of this server's files, so that no measurement pays for an earlier one."""
        for path in self.folder.rglob("*"):
            if path.is_file():
                descriptor = os.open(path, os.O_RDONLY)
                os.fsync(descriptor)
                os.close(descriptor)

    def alive(self):
        if self.pid == self.process.pid:
            return self.process.poll() is None
        return stat_fields(self.pid) is not None

    def stop(self):
        for sign in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, sign)
            deadline = time.monotonic() + 20
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)
            if not self.alive():
                return


class Farshore(Server):
    """farshored in a folder of its own; its URI names the volume `bench`."""

    def __init__(self, folder, name="farshore", flags=(), replication="127.0.0.1:0"):
        self.data, self.socket = folder / "site", folder / "nbd.sock"
        self.cli = [binary("farshore"), "--socket", self.data / "control.sock"]
        self.command = [binary("farshored"), "--dev", self.data, "--nbd", f"unix:{self.socket}"]
        self.command += ["--replication", replication, "--console", "off", *flags]
        super().__init__(name, folder, self.volume_uri("bench"), self.command, self.serves)

    def serves(self):
        return subprocess.run([*self.cli, "status"], capture_output=True).returncode == 0

    def volume_uri(self, volume):
        return f"nbd+unix:///{volume}?socket={self.socket}"

    def create(self, volume, mib, iops="unlimited", cache="none"):
        run(*self.cli, "volume", "create", volume, "--size", f"{mib}MiB", "--iops", iops, "--cache", cache)

    def delete(self, volume):
        run(*self.cli, "volume", "delete", volume)


def qemu_raw(folder, mib):
    image, path = folder / "raw.img", folder / "nbd.sock"
    run("fallocate", "-l", f"{mib}M", image)
    command = ["qemu-nbd", "-t", "-f", "raw", "-x", "bench", "-k", path, "-e", "8", "--cache=none", "--aio=native"]
    return Server("qemu-nbd raw", folder, f"nbd+unix:///bench?socket={path}", [*command, image], path.exists)


def qemu_luks(folder, mib):
    image, path = folder / "luks.img", folder / "nbd.sock"
    options = "key-secret=key,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,iter-time=10,preallocation=falloc"
    run("qemu-img", "create", "-f", "luks", "--object", SECRET, "-o", options, image, f"{mib}M")
    image_options = f"driver=luks,key-secret=key,file.driver=file,file.filename={image}"
    image_options += ",file.cache.direct=on,file.aio=native,cache.direct=on"
    command = ["qemu-nbd", "-t", "--object", SECRET, "--image-opts", "-x", "bench", "-k", path, "-e", "8"]
    uri = f"nbd+unix:///bench?socket={path}"
    return Server("qemu-nbd LUKS", folder, uri, [*command, image_options], path.exists)


def nbdkit(folder, mib):
    image, path = folder / "nbdkit.img", folder / "nbd.sock"
    run("fallocate", "-l", f"{mib}M", image)
    command = ["nbdkit", "-f", "-U", path, "file", image]
    return Server("nbdkit file", folder, f"nbd+unix:///?socket={path}", command, path.exists)


def nbd_server(folder, mib):
    """Not with -d, which serves one connection only, nor with port 0, which means its standard input.

    It becomes a daemon and forks for each connection.
    """
    image, path, config, pid_file = (folder / name for name in ("server.img", "nbd.sock", "config", "pid"))
    run("fallocate", "-l", f"{mib}M", image)
    lines = ["[generic]", f"unixsock = {path}", f"port = {free_port()}", "listenaddr = 127.0.0.1"]
    config.write_text("\n".join([*lines, "[bench]", f"exportname = {image}", ""]))
    command = ["nbd-server", "-C", config, "-p", pid_file]
    ready = lambda: path.exists() and pid_file.exists() and pid_file.read_text().strip()
    return Server("nbd-server", folder, f"nbd+unix:///bench?socket={path}", command, ready, pid_file)
