"""A real Slurm of two nodes on this machine, from Debian's packages: munge, MariaDB, slurmdbd, slurmctld, two slurmd.

All that they write is in one folder; the daemons run in the foreground as children of the test. Needs root, for slurmd
starts jobs as their users.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from scratch_project import free_port, wait_for

DAEMONS = ("munged", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")
PACKAGES = "slurm-wlm slurmdbd mariadb-server munge"
NODES = ("n1", "n2")


def missing() -> str:
    """What is not here, in words; empty where all is."""
    if os.geteuid():
        return "root"
    return ", ".join(name for name in DAEMONS if which(name) is None)


def which(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class SlurmCluster:
    """The daemons, by name; `environment` is what Slurm's commands need to find them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {"SLURM_CONF": str(folder / "slurm.conf")}
        self._running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: str, *arguments: str) -> None:
        program = which(command)
        assert program is not None
        with (self.folder / f"{name}.log").open("ab") as log:
            self._running[name] = subprocess.Popen(
                [program, *arguments], env={**os.environ, **self.environment}, stdout=log, stderr=subprocess.STDOUT
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def kill(self, name: str, how: int = signal.SIGKILL) -> None:
        process = self._running.pop(name)
        process.send_signal(how)
        process.wait()

    def silence_node(self, name: str) -> None:
        """The node answers nobody any more, as one whose network or power went."""
        for process in self._of_node(name):
            os.kill(process, signal.SIGSTOP)

    def kill_node(self, name: str) -> None:
        """The node's daemon, and all of jobs on it."""
        processes = self._of_node(name)
        self.kill(name)
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)

    def _of_node(self, name: str) -> list[int]:
        """The daemon, the processes of jobs, and those of Slurm that started them."""
        found = {self._running[name].pid}
        marks = (f"SLURMD_NODENAME={name}".encode(), f"SLURM_CONF={self.environment['SLURM_CONF']}".encode())
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if set(marks) <= set((path / "environ").read_bytes().split(b"\0")):
                    found.add(int(path.name))
                    parent = (path / "stat").read_text().rpartition(")")[2].split()[1]
                    if Path("/proc", parent, "cmdline").read_bytes().startswith(b"slurmstepd"):
                        found.add(int(parent))
        return sorted(found)

    def start_controller(self) -> None:
        self.start("slurmctld", "slurmctld", "-D")

    def run(self, *command: str) -> str:
        """What a command of Slurm's prints; nothing where it fails."""
        done = subprocess.run(command, env={**os.environ, **self.environment}, capture_output=True, text=True)
        return done.stdout if done.returncode == 0 else ""

    def stop(self) -> None:
        for name in reversed(list(self._running)):
            process = self._running.pop(name)
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[SlurmCluster]:
    """Two nodes of one processor and two "GPUs" each (character devices that hold nothing), all in partition `gpu`."""
    for name in ("db", "state", "run"):
        (folder / name).mkdir()
    database, accounts, controller, *nodes = (free_port() for _ in range(5))
    host = socket.gethostname()
    munge = folder / "run" / "munge.socket"
    (folder / "my.cnf").write_text(
        f"[mysqld]\ndatadir={folder}/db\nsocket={folder}/run/mysql.sock\nport={database}\nbind-address=127.0.0.1\n"
        f"pid-file={folder}/run/mysql.pid\nuser=root\n"
    )
    (folder / "slurmdbd.conf").write_text(
        f"AuthType=auth/munge\nAuthInfo=socket={munge}\nDbdHost=localhost\nDbdPort={accounts}\nSlurmUser=root\n"
        f"StorageType=accounting_storage/mysql\nStorageHost=127.0.0.1\nStoragePort={database}\nStorageUser=slurm\n"
        f"StoragePass=slurm\nStorageLoc=accounts\nPidFile={folder}/run/dbd.pid\n"
    )
    (folder / "slurmdbd.conf").chmod(0o600)
    lines = [
        "ClusterName=pocket",
        f"SlurmctldHost={host}(127.0.0.1)",
        f"SlurmctldPort={controller}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        f"AuthInfo=socket={munge}",
        f"StateSaveLocation={folder}/state",
        f"SlurmdSpoolDir={folder}/spool-%n",
        f"SlurmctldPidFile={folder}/run/ctld.pid",
        f"SlurmdPidFile={folder}/run/slurmd-%n.pid",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "SelectType=select/cons_tres",
        "GresTypes=gpu",
        "ReturnToService=2",
        "SlurmdTimeout=10",
        "KillWait=5",
        "MpiDefault=none",
        "AccountingStorageType=accounting_storage/slurmdbd",
        "AccountingStorageHost=localhost",
        f"AccountingStoragePort={accounts}",
        f"AccountingStoragePass={munge}",
        "JobAcctGatherType=jobacct_gather/none",
        "SlurmdParameters=config_overrides",
        *(
            f"NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=1 RealMemory=2000 Gres=gpu:2"
            for name, port in zip(NODES, nodes, strict=True)
        ),
        "PartitionName=gpu Nodes=ALL Default=YES State=UP",
    ]
    (folder / "slurm.conf").write_text("\n".join(lines) + "\n")
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    (folder / "gres.conf").write_text(
        f"AutoDetect=off\nNodeName=n1 Name=gpu File={folder}/gpu[0-1]\nNodeName=n2 Name=gpu File={folder}/gpu[2-3]\n"
    )
    for number in range(4):
        os.mknod(folder / f"gpu{number}", 0o600 | 0o020000, os.makedev(1, 3))
    key = folder / "run" / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    cluster = SlurmCluster(folder)
    try:
        munged = ("--foreground", "--force", f"--socket={munge}", f"--key-file={key}")
        files = (f"--pid-file={folder}/run/munge.pid", f"--seed-file={folder}/run/munge.seed")
        cluster.start("munged", "munged", *munged, *files, f"--log-file={folder}/munge.log")
        wait_for(munge.exists, 30, "munge")
        install = ["mysql_install_db", f"--defaults-file={folder}/my.cnf", "--user=root"]
        subprocess.run([*install, "--auth-root-authentication-method=normal"], check=True, capture_output=True)
        cluster.start("mariadbd", "mariadbd", f"--defaults-file={folder}/my.cnf")
        client = ["mariadb", "-uroot", f"--socket={folder}/run/mysql.sock", "-e"]
        granted = "create database accounts; " + "".join(
            f"create user slurm@'{place}' identified by 'slurm'; grant all on accounts.* to slurm@'{place}'; "
            for place in ("127.0.0.1", "localhost")
        )
        wait_for(lambda: not subprocess.run([*client, "select 1"], capture_output=True).returncode, 60, "MariaDB")
        subprocess.run([*client, granted], check=True)
        cluster.start("slurmdbd", "slurmdbd", "-D")
        wait_for(lambda: cluster.run("sacctmgr", "-i", "add", "cluster", "pocket"), 60, "slurmdbd")
        cluster.start_controller()
        for name in NODES:
            cluster.start_node(name)
        wait_for(lambda: cluster.run("sinfo", "-h", "-o", "%D %t").split() == ["2", "idle"], 60, "the nodes")
        yield cluster
    finally:
        cluster.stop()
