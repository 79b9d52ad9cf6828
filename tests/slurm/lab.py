"""A real Slurm on this machine for the length of a test: several virtual nodes, no services.

Everything (configuration, keys, state, logs) lies in one folder; all daemons are children of this
process, in the foreground, on free ports, and are ended by their process handles. Where it is
allowed, every node has a host name, a process table and an /etc/hosts of its own.

By hand: ``python -m tests.slurm.lab FOLDER`` keeps one running until Ctrl-C.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

BINARIES = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "scontrol", "sinfo", "shellcheck")

CONFIGURATION = """\
ClusterName=lab
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A job that is requeued starts again after cred_expire seconds (120 by default).
AuthInfo=socket={folder}/munge/socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
# No control groups: what jobs use is scheduled and not enforced.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
# Nodes may claim more processors than there are.
SlurmdParameters=config_overrides
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0,sched_min_interval=0
ReturnToService=2
SlurmdTimeout=5
MessageTimeout=5
SlurmctldTimeout=10
KillWait=3
# Finished jobs stay visible to scontrol: there is no accounting database.
MinJobAge=3600
{nodes}
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE DefaultTime=10 State=UP
"""

NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port}"
    " CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus} State=UNKNOWN"
)


def missing_binaries() -> list[str]:
    """What ``install.sh`` has to bring first."""
    return [name for name in BINARIES if shutil.which(name, path=_path()) is None]


@dataclass(frozen=True)
class Job:
    """A job as ``scontrol show job`` tells it.

    Attributes:
        state: ``PENDING``, ``RUNNING``, ``COMPLETED``, ``FAILED`` ...
        exit_code: of the batch script.
        reason: why it waits or ended.
        nodes: where it runs or ran.
    """

    state: str
    exit_code: int
    reason: str
    nodes: str

    @property
    def ended(self) -> bool:
        """Whether the job will not change any more."""
        return self.state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED")


class SlurmLab:
    """A cluster of ``nodes`` virtual nodes in ``folder``; use it in a ``with`` statement.

    Args:
        folder: made if it is not there; must be new to Slurm.
        nodes: number of nodes, ``node1`` and so on.
        gpus: pretended GPUs per node: scheduled, and listed in ``CUDA_VISIBLE_DEVICES``.
        cpus: pretended processors per node.
    """

    def __init__(self, folder: Path, nodes: int = 2, gpus: int = 4, cpus: int = 8) -> None:
        self.folder = folder.resolve()
        self.names = [f"node{number}" for number in range(1, nodes + 1)]
        self._gpus, self._cpus = gpus, cpus
        self._daemons: list[subprocess.Popen[bytes]] = []
        # Nothing of a Slurm job that the tests may themselves run in.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH"))}
        self.environment = inherited | {
            "PATH": _path(),
            "SLURM_CONF": str(self.folder / "slurm.conf"),
        }

    def __enter__(self) -> SlurmLab:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every job, then every daemon; what they leave in the folder is of no more use."""
        if self._daemons:
            with contextlib.suppress(subprocess.SubprocessError):
                self.run("scancel", "--full", "--signal=KILL", "--user", getpass.getuser())
                self.run("scancel", "--user", getpass.getuser())
                self._wait_for(lambda: not self.run("squeue", "--noheader").stdout, 5)
        for daemon in reversed(self._daemons):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(daemon.pid, signal.SIGKILL)
            daemon.wait()
        self._daemons.clear()

    def run(self, *command: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run a Slurm command against this cluster; its output is text, failure is not raised."""
        settings: dict[str, object] = {"timeout": 30, "env": self.environment, **options}
        return subprocess.run(command, capture_output=True, text=True, **settings)  # type: ignore[call-overload, no-any-return]

    def submit(self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None) -> str:
        """``sbatch`` with ``arguments`` from ``cwd``; returns the job's number.

        Args:
            arguments: options, the script, and what follows it.
            cwd: the folder to submit from.
            env: added to the environment that the job inherits.
        """
        environment = self.environment | dict(env or {})
        answer = self.run("sbatch", "--parsable", *arguments, cwd=cwd, env=environment)
        assert answer.returncode == 0, answer.stderr
        return answer.stdout.strip()

    def job(self, number: str) -> Job:
        """What Slurm says of a job (of an array: ``12_0``)."""
        answer = self.run("scontrol", "--oneliner", "show", "job", number)
        assert answer.returncode == 0, answer.stderr
        fields = dict(part.split("=", 1) for part in answer.stdout.split() if "=" in part)
        code = int(fields["ExitCode"].split(":")[0])
        return Job(fields["JobState"], code, fields["Reason"], fields.get("NodeList", ""))

    def wait(self, number: str, timeout: float = 60.0) -> Job:
        """Wait for a job to end; fails with its last state after ``timeout`` seconds."""
        done = self._wait_for(lambda: self.job(number).ended, timeout)
        job = self.job(number)
        assert done, f"job {number} has not ended after {timeout:.0f} s: {job}"
        return job

    def _start(self) -> None:
        for name in ("munge", "log", "state", "dev", *(f"spool.{name}" for name in self.names)):
            (self.folder / name).mkdir(parents=True)
        for folder in (self.folder, self.folder / "munge"):
            folder.chmod(0o755)  # munged refuses a folder that others may write to
        self._configure()
        munge = self.folder / "munge"
        self._daemon(
            "munged", "--foreground", "--force", f"--key-file={munge}/key",
            f"--socket={munge}/socket", f"--pid-file={munge}/pid",
            f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        answers = ("munge", "-S", f"{munge}/socket", "-n")
        assert self._wait_for(lambda: self.run(*answers).returncode == 0, 10), self._logs()
        self._daemon("slurmctld", "-D", "-c")
        isolated = self._may_isolate()
        for name in self.names:
            self._daemon(*self._node(name, isolated))
        idle = ("sinfo", "--noheader", "--Node", "--states=idle", "--format=%N")
        everyone = set(self.names)
        up = self._wait_for(lambda: set(self.run(*idle).stdout.split()) == everyone, 20)
        assert up, self._logs()

    def _configure(self) -> None:
        host, (port, *ports) = socket.gethostname().split(".")[0], _free_ports(len(self.names) + 1)
        nodes = [
            NODE.format(name=name, host=host, port=port, cpus=self._cpus, gpus=self._gpus)
            for name, port in zip(self.names, ports, strict=True)
        ]
        text = CONFIGURATION.format(
            host=host, port=port, user=getpass.getuser(), folder=self.folder, nodes="\n".join(nodes)
        )
        (self.folder / "slurm.conf").write_text(text)
        devices = f"{self.folder}/dev/gpu[0-{self._gpus - 1}]"
        gres = "".join(f"NodeName={name} Name=gpu File={devices}\n" for name in self.names)
        (self.folder / "gres.conf").write_text(gres)
        for number in range(self._gpus):
            device = self.folder / "dev" / f"gpu{number}"
            try:  # jobs get CUDA_VISIBLE_DEVICES for character devices only; any will do
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            except PermissionError:
                device.touch()
        key = self.folder / "munge" / "key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o600)
        hosts = Path("/etc/hosts").read_text() + "".join(f"127.0.0.1 {n}\n" for n in self.names)
        (self.folder / "hosts").write_text(hosts)

    def _node(self, name: str, isolated: bool) -> list[str]:
        if not isolated:
            return ["slurmd", "-D", "-N", name]
        inside = 'hostname "$0"; mount --bind "$1" /etc/hosts; slurmd -D -N "$0" & wait'
        return [
            "unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child",
            "bash", "-c", inside, name, f"{self.folder}/hosts",
        ]  # fmt: skip

    def _may_isolate(self) -> bool:
        command = ("unshare", "--uts", "--pid", "--mount", "--mount-proc", "--fork", "true")
        return self.run(*command).returncode == 0

    def _daemon(self, *command: str) -> None:
        log = self.folder / "log" / f"{len(self._daemons)}.{Path(command[0]).name}.out"
        with log.open("wb") as output:
            self._daemons.append(
                subprocess.Popen(
                    command,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            )

    def _logs(self) -> str:
        logs = [*(self.folder / "log").iterdir(), self.folder / "munge" / "log"]
        texts = [f"--- {log}\n{log.read_text()[-2000:]}" for log in logs if log.is_file()]
        return "Slurm did not come up\n" + "\n".join(texts)

    @staticmethod
    def _wait_for(condition: Callable[[], bool], timeout: float) -> bool:
        limit = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > limit:
                return False
            time.sleep(0.1)
        return True


def _path() -> str:
    """Debian keeps the daemons out of an ordinary user's path."""
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]


if __name__ == "__main__":
    with SlurmLab(Path(sys.argv[1])) as lab:
        print(f"export SLURM_CONF={lab.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
