"""One arm64 machine in QEMU, reached by SSH and by ADB on 127.0.0.1 alone. Whatever it measures is emulated.

Debian's kernel, an init of our own and no services but sshd and adbd, so that it answers seconds after it was started. The
image is made once and never written to: every machine starts from the same disk, and what it writes is gone when it ends.
"""

from __future__ import annotations

import gzip
import os
import shutil
import subprocess
from pathlib import Path

from device_bench import board_cache, debian
from tests.boards.adbd import DUMPSYS, GETPROP, AdbServer
from tests.boards.board import die_with_the_tests, wait_until
from tests.boards.sshd import CLIENT_CONFIGURATION, free_port

CPU, CORES, MEMORY_MB, DISK_MB = "cortex-a76", 2, 2048, 2000
ADB_PORT = 5655
NOT_RUN = (
    "perl", "perl-base", "perl-modules-5.36", "libperl5.36", "initramfs-tools", "initramfs-tools-core", "klibc-utils", "libklibc", "udev", "cpio",
    "usrmerge", "ucf", "debconf", "adduser", "dpkg", "kmod", "passwd",
)  # fmt: skip
# What a small board has; Python, but nothing of what the project needs there.
BOARD_PACKAGES = (
    "base-files", "bash", "busybox-static", "coreutils", "dash", "findutils", "grep", "gzip", "hostname", "iproute2", "libgomp1", "libstdc++6",
    "linux-image-cloud-arm64", "mawk", "openssh-server", "procps", "python3", "sed", "tar", "util-linux",
)  # fmt: skip
NOT_IN_THE_IMAGE = {"usr/share/doc", "usr/share/man", "usr/share/locale", "usr/share/perl", "usr/lib/modules", "boot"}
# In the order in which they need each other; the rest of the way to the disk and the network is in the kernel itself.
MODULES = (
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk", "failover", "net_failover", "virtio_net",
    "virtio-rng",
)  # fmt: skip
FIND_THE_DISK = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs devtmpfs /dev
for module in {modules}; do /bin/busybox insmod /modules/$module.ko; done
until [ -b /dev/vda ]; do /bin/busybox usleep 20000; done
/bin/busybox mount -t ext4 /dev/vda /board
exec /bin/busybox switch_root /board /sbin/start-board
"""
START_THE_BOARD = """#!/bin/busybox sh
export PATH=/usr/local/bin:/usr/sbin:/usr/bin HOME=/root
for command in mount ip; do eval "$command() {{ /bin/busybox $command \\"\\$@\\"; }}"; done
mount -t proc proc /proc; mount -t sysfs sysfs /sys; mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts; mount -t tmpfs tmpfs /dev/shm; mount -t tmpfs tmpfs /run; mkdir /run/sshd
/bin/busybox hostname board
ip link set lo up; ip address add 10.0.2.15/24 dev eth0; ip link set eth0 up; ip route add default via 10.0.2.2
cd /
LD_LIBRARY_PATH=/opt/adbd/usr/lib/aarch64-linux-gnu:/opt/adbd/usr/lib/aarch64-linux-gnu/android ADBD_PORT={port} \\
    /opt/adbd/usr/lib/android-sdk/platform-tools/adbd > /run/adbd.log 2>&1 &
exec /usr/sbin/sshd -D -e
"""
FILES = {
    "etc/passwd": "root:x:0:0:root:/root:/bin/bash\nsshd:x:110:65534::/run/sshd:/usr/sbin/nologin\n",
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hosts": "127.0.0.1 localhost board\n",
    "etc/ssh/sshd_config": "UsePAM no\nUseDNS no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nSubsystem sftp internal-sftp\n",
    "board/properties": "ro.product.model=QEMU virtual machine\nro.product.cpu.abi=arm64-v8a\nro.product.cpu.abilist=arm64-v8a\n",
    "usr/local/bin/getprop": GETPROP,
    "usr/local/bin/dumpsys": DUMPSYS,
    "sbin/start-board": START_THE_BOARD.format(port=ADB_PORT),
}
PROGRAMS = ("usr/local/bin/getprop", "usr/local/bin/dumpsys", "sbin/start-board")


def board_packages() -> debian.PackageSet:
    return debian.PackageSet(BOARD_PACKAGES, "arm64", without=NOT_RUN)


def adbd_packages() -> debian.PackageSet:
    return debian.PackageSet(("adbd",), "arm64", ("bookworm", "bookworm-backports"), ("libc6", "libgcc-s1", "libstdc++6"))


def qemu_packages() -> debian.PackageSet:
    return debian.PackageSet(("qemu-system-arm",), debian.host_architecture())


def build_image(say) -> Path:
    """Folder with kernel, initrd, disk, and the key that logs in; made once."""
    board, adbd = board_packages().unpack(say), adbd_packages().unpack(say)
    recipe = {"board": board.name, "adbd": adbd.name, "files": FILES, "find": FIND_THE_DISK, "modules": MODULES, "disk_mb": DISK_MB, "version": 1}

    def build(folder: Path) -> None:
        say("making the disk of the virtual machine")
        root = folder / "root"
        _link_tree(board, root, leave_out=NOT_IN_THE_IMAGE)
        _link_tree(adbd, root / "opt" / "adbd", leave_out=NOT_IN_THE_IMAGE)
        for name in ("proc", "sys", "dev", "run", "tmp", "root/.ssh", "data/local/tmp", "board", "usr/local/bin"):
            (root / name).mkdir(parents=True, exist_ok=True)
        for name, text in FILES.items():
            (root / name).unlink(missing_ok=True)  # a link to the unpacked package, which must stay what it is
            (root / name).write_text(text)
        for name in PROGRAMS:
            (root / name).chmod(0o755)
        for key in (root / "etc/ssh/ssh_host_ed25519_key", folder / "client_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "board", "-f", str(key)], check=True)
        shutil.copy(folder / "client_key.pub", root / "root/.ssh/authorized_keys")
        shutil.copy(root / "etc/ssh/ssh_host_ed25519_key.pub", folder / "host_key.pub")
        (kernel,) = (board / "boot").glob("vmlinuz-*")
        shutil.copy(kernel, folder / "kernel")
        (folder / "initrd").write_bytes(gzip.compress(_initrd(board), 1))
        with (folder / "disk").open("wb") as disk:
            disk.truncate(DISK_MB << 20)
        command = ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", str(root), str(folder / "disk")]
        subprocess.run(command, check=True, capture_output=True)
        shutil.rmtree(root)

    return board_cache.build_once(board_cache.place("vm", recipe), build)


class VirtualMachine:
    """A running machine.

    Attributes:
        config: OpenSSH client configuration with a host ``board``.
        port: of its sshd on 127.0.0.1.
        serial: what ADB calls it; :meth:`connect_adb` makes the server see it.
        adb: a server of its own on a port of its own.

    Args:
        folder: an empty folder for the console's log and the client's files.
        image: of :func:`build_image`.
        qemu: root folder of :func:`qemu_packages`.
        android_tools: root folder with adb for this machine.
    """

    def __init__(self, folder: Path, image: Path, qemu: Path, android_tools: Path) -> None:
        self.port, adb_port = free_port(), free_port()
        self.serial = f"127.0.0.1:{adb_port}"
        self.config = folder / "ssh_config"
        self.console = folder / "console.log"
        shutil.copy(image / "client_key", folder / "client_key")
        (folder / "client_key").chmod(0o600)
        kind, key = (image / "host_key.pub").read_text().split()[:2]
        (folder / "known_hosts").write_text(f"[127.0.0.1]:{self.port} {kind} {key}\n")
        self.config.write_text(CLIENT_CONFIGURATION.format(port=self.port, folder=folder))
        loader = next((qemu / "usr").glob("lib*/ld-linux*.so*"))
        libraries = debian.host_libraries(qemu)
        forwards = f"hostfwd=tcp:127.0.0.1:{self.port}-:22,hostfwd=tcp:127.0.0.1:{adb_port}-:{ADB_PORT}"
        command = [
            str(loader), "--library-path", str(libraries), str(qemu / "usr/bin/qemu-system-aarch64"),
            "-machine", "virt,gic-version=3", "-cpu", CPU, "-smp", str(CORES), "-m", str(MEMORY_MB), "-accel", "tcg,thread=multi",
            "-nodefaults", "-nographic", "-no-reboot", "-serial", f"file:{self.console}",
            "-kernel", str(image / "kernel"), "-initrd", str(image / "initrd"), "-append", "console=ttyAMA0 quiet panic=-1",
            "-drive", f"file={image / 'disk'},if=none,id=disk,format=raw,cache=unsafe", "-snapshot", "-device", "virtio-blk-pci,drive=disk",
            # restrict: the board reaches nothing but who came to it
            "-netdev", f"user,id=net,restrict=on,{forwards}", "-device", "virtio-net-pci,netdev=net,romfile=", "-device", "virtio-rng-pci",
        ]  # fmt: skip
        self._log = folder / "qemu.log"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env={"PATH": os.environ["PATH"], "TMPDIR": str(folder)}, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                preexec_fn=die_with_the_tests,
            )  # fmt: skip
        self.adb = AdbServer(folder, android_tools, free_port())
        try:
            wait_until(self._answers, "the virtual machine answers", 300)
        except BaseException:
            self.stop()
            raise

    def _answers(self) -> bool:
        assert self._process.poll() is None, self._log.read_text() + self.console.read_text()
        return self.ssh("true").returncode == 0

    def ssh(self, command: str, **options) -> subprocess.CompletedProcess:
        arguments = ["ssh", "-F", str(self.config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "board", command]
        return subprocess.run(arguments, capture_output=True, **options)

    def connect_adb(self) -> None:
        wait_until(lambda: self.adb.connect(self.serial), "adbd of the virtual machine answers")

    def stop(self) -> None:
        self.adb.stop()
        self._process.kill()
        self._process.wait()


def _link_tree(source: Path, target: Path, leave_out: set[str]) -> None:
    def ignored(folder: str, names: list[str]) -> set[str]:
        return {name for name in names if (Path(folder) / name).relative_to(source).as_posix() in leave_out}

    shutil.copytree(source, target, symlinks=True, ignore=ignored, copy_function=os.link)


def _initrd(board: Path) -> bytes:
    """A cpio archive ("newc") with busybox, the modules and the script that finds the disk."""
    found = {path.name.removesuffix(".ko"): path for path in (board / "usr/lib/modules").rglob("*.ko")}
    modules = [name for name in MODULES if name in found]  # the others are in the kernel
    entries: list[tuple[str, int, bytes]] = [(name, 0o40755, b"") for name in ("bin", "dev", "board", "modules")]
    entries += [(f"modules/{name}.ko", 0o100644, found[name].read_bytes()) for name in modules]
    entries.append(("bin/busybox", 0o100755, (board / "usr/bin/busybox").read_bytes()))
    entries.append(("init", 0o100755, FIND_THE_DISK.format(modules=" ".join(modules)).encode()))
    entries.append(("TRAILER!!!", 0, b""))
    archive = bytearray()
    for number, (name, mode, data) in enumerate(entries, start=1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4) + data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)
