"""Stands in for Slurm's commands in tests: `install` puts `sbatch`, `sacct`, `scancel`, `scontrol` and `srun` into a
folder, each this file under another name.

`sbatch` takes the next line of the file `fates`: a state and exit code in which Slurm ends the job, such as
``NODE_FAIL 1:0``, or ``RUN``, which runs the batch script and ends as it does. What became of jobs is in `jobs/`.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def install(folder: Path, fates: list[str]) -> None:
    (folder / "jobs").mkdir(parents=True)
    (folder / "fates").write_text("".join(f"{fate}\n" for fate in fates))
    for name in ("sbatch", "sacct", "scancel", "scontrol", "srun"):
        command = folder / name
        command.write_text(f"#!{sys.executable}\n" + Path(__file__).read_text())
        command.chmod(0o755)


def write(job: Path, **values: object) -> None:
    known = json.loads(job.read_text()) if job.exists() else {}
    partial = job.with_suffix(".partial")
    partial.write_text(json.dumps(known | values))
    partial.rename(job)


def sbatch(here: Path, arguments: list[str]) -> None:
    fates = (here / "fates").read_text().splitlines()
    if not fates:
        sys.exit("sbatch: error: Batch job submission failed: Invalid partition name specified")
    if fates[0] == "AWAY":
        (here / "fates").write_text("".join(f"{fate}\n" for fate in fates[1:]))
        sys.exit("sbatch: error: Unable to contact slurm controller (connect failure)")
    (here / "fates").write_text("".join(f"{fate}\n" for fate in fates[1:]))
    number = str(41 + len(list((here / "jobs").glob("*.json"))) + 1)
    job = here / "jobs" / f"{number}.json"
    write(job, state="PENDING", code="0:0", script=arguments[-1])
    subprocess.Popen([sys.executable, str(here / "sbatch"), "--job", number, fates[0], arguments[-1]])
    print(f"{number};cluster")


def work(here: Path, number: str, fate: str, script: str) -> None:
    job = here / "jobs" / f"{number}.json"
    write(job, state="RUNNING")
    log = Path(script).with_name(f"train-{number}.log")
    if fate != "RUN":
        log.write_text(f"job {number} works\n")
        time.sleep(0.1)
        state, _, code = fate.partition(" ")
        write(job, state=state, code=code)
        return
    env = {**os.environ, "SLURM_JOB_ID": number, "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2"}
    with log.open("a") as output:
        status = subprocess.run(["bash", script], env=env, stdout=output, stderr=subprocess.STDOUT).returncode
    write(job, state="FAILED" if status else "COMPLETED", code=f"{status}:0")


def main() -> None:
    here, name, arguments = Path(sys.argv[0]).parent, Path(sys.argv[0]).name, sys.argv[1:]
    if arguments[:1] == ["--job"]:
        work(here, *arguments[1:])
    elif name == "sbatch":
        sbatch(here, arguments)
    elif name == "sacct":
        job = here / "jobs" / f"{arguments[arguments.index('--jobs') + 1]}.json"
        if job.exists():
            print("|".join(json.loads(job.read_text())[key] for key in ("state", "code")))
    elif name == "scancel":
        write(here / "jobs" / f"{arguments[0]}.json", state="CANCELLED by 0", code="0:15")
    elif name == "scontrol":
        print("n0\nn1")
    elif name == "srun":
        rest = [argument for argument in arguments if not argument.startswith("--")]
        nodes = [subprocess.Popen(rest, env={**os.environ, "SLURM_NODEID": str(node)}) for node in range(2)]
        sys.exit(max(node.wait() for node in nodes))


if __name__ == "__main__":
    main()
