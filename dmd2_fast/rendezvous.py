"""Before the process group stands: what the launcher says of this rank, and the meeting of all ranks.

The ranks meet at a TCP store on MASTER_ADDR:MASTER_PORT, which rank 0 hosts, and each says there whether it can start.
So what one node alone has found wrong (a model folder on a disk of its own, a missing package) ends all of them at
once with that message, where the process group would wait for the missing rank until its timeout.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import sys
import time
from collections.abc import MutableMapping

import torch.distributed as dist

from .errors import UserError

COLLECTIVE_MINUTES = int(os.environ.get("DEEPSPEED_TIMEOUT", "30"))  # DeepSpeed's own variable and default
POLL_SECONDS = 0.1
TELL_SECONDS = 20.0
"""How long a rank that cannot start tries to tell the others, and rank 0 stays for them to hear it."""
NEWS_SECONDS = 30.0
"""How often rank 0, and the first rank of another node, say that they are still waiting."""
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm numbers its batch script, its interactive shell and the like as steps from here up."""

_met = False


def adopt_slurm(environment: MutableMapping[str, str] = os.environ) -> None:
    """Inside `srun python train.py`: set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT from Slurm's.

    Only in a step of several tasks: SLURM_NTASKS, and in a batch script SLURM_PROCID too, are set in the job's own
    shell, where no second task has been started. What another launcher has set stands, and so do MASTER_ADDR and
    MASTER_PORT. MASTER_ADDR is the step's first node, which task 0 is on unless --distribution says otherwise.
    """
    values = [environment.get(f"SLURM_{name}", "") for name in ("PROCID", "LOCALID", "STEP_NUM_TASKS", "STEP_ID")]
    if "RANK" in environment or not all(value.isdigit() for value in values):
        return
    rank, local_rank, tasks, step = map(int, values)
    if tasks < 2 or step >= _FIRST_SPECIAL_STEP:
        return
    address = environment.get("MASTER_ADDR") or first_host(
        environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    )
    if not address:
        raise UserError("srun started several tasks and names no nodes: export MASTER_ADDR, the address of task 0's.")
    job = environment.get("SLURM_JOB_ID", "0")
    # Jobs, and steps of one job, that share a node must not share a port; Linux hands out 32768 and up by itself.
    port = 15000 + ((int(job) if job.isdigit() else 0) * 8 + step) % 15000
    environment.update(RANK=str(rank), LOCAL_RANK=str(local_rank), WORLD_SIZE=str(tasks), MASTER_ADDR=address)
    environment.setdefault("MASTER_PORT", str(port))
    per_node = environment.get("SLURM_NTASKS_PER_NODE", "")
    if per_node.isdigit():
        environment.setdefault("LOCAL_WORLD_SIZE", per_node)
    if local_rank and _visible_devices(environment) == 1:  # --gpus-per-task: each task sees its own GPU as number 0
        environment["LOCAL_RANK"] = "0"


def first_host(nodes: str) -> str:
    """The first host of Slurm's shorthand, as `gpu[003-004,9],login` or `rack[0-1]n[00-15]`; empty for an empty one."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes.strip())
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first[0] if first else "")


def _visible_devices(environment: MutableMapping[str, str]) -> int:
    listed = environment.get("CUDA_VISIBLE_DEVICES") or environment.get("ROCR_VISIBLE_DEVICES") or ""
    return len([device for device in listed.split(",") if device.strip()])


def is_first_on_node() -> bool:
    """Whether this rank is the one that speaks for its node."""
    return os.environ.get("LOCAL_RANK", "0") == "0" and os.environ.get("SLURM_LOCALID", "0") == "0"


def meet(backend: str) -> dist.Store:
    """Wait until every rank has come and can start; the store to build the process group on.

    `UserError` with the message of a rank that cannot, when the port is taken, when MASTER_ADDR is unknown, when gloo
    would offer other nodes a loopback address, and when some ranks have not come in COLLECTIVE_MINUTES.
    """
    global _met
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    start = time.monotonic()
    deadline, news = start + 60 * COLLECTIVE_MINUTES, start + NEWS_SECONDS
    store = _open_store(rank, world_size, deadline)
    store.set(f"here/{rank}", json.dumps([socket.gethostname(), backend == "gloo" and _gloo_takes_loopback()]))
    if store.add("number", 1) == world_size:
        store.set("complete", "")
    while not store.check(["complete"]):
        if store.check(["failed"]):
            raise UserError(_heard(store))
        now = time.monotonic()
        if now > deadline or now > news:
            missing = [str(i) for i in range(world_size) if not store.check([f"here/{i}"])]
            text = f"{world_size - len(missing)} of {world_size} ranks have come to {_meeting_point()}"
            if now > deadline:
                raise UserError(
                    f"{text} in {COLLECTIVE_MINUTES} minutes; missing: {', '.join(missing)}. Is every node started, "
                    "with the same --master_addr, --master_port and hostfile, and --node_rank 0, 1, ...?"
                )
            if rank == 0:
                print(f"waiting: {text}; missing: {', '.join(missing)}", file=sys.stderr, flush=True)
            news = now + NEWS_SECONDS
        time.sleep(POLL_SECONDS)
    _met = True
    places = [json.loads(store.get(f"here/{i}")) for i in range(world_size)]
    unreachable = sorted({host for host, loopback in places if loopback})
    if unreachable and len({host for host, _ in places}) > 1:
        raise UserError(
            f"the host name of {', '.join(unreachable)} stands for a loopback address there (127.0.1.1 in "
            "/etc/hosts?), at which other nodes find nobody. Name the network interface between the nodes on "
            "each, as in `export GLOO_SOCKET_IFNAME=eth0`: see docs/multinode.md."
        )
    return dist.PrefixStore("group", store)


def _gloo_takes_loopback() -> bool:
    """Whether the address by which gloo would have this rank called, its host name's, is good on this node alone."""
    if os.environ.get("GLOO_SOCKET_IFNAME"):
        return False
    try:
        return socket.gethostbyname(socket.gethostname()).startswith("127.")
    except OSError:
        return True  # gloo falls back on loopback


def tell(message: str) -> None:
    """Tell the ranks that this one cannot start; on rank 0, wait until they have heard. Nothing once all have met."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if _met or world_size == 1:
        return
    rank, deadline = int(os.environ.get("RANK", "0")), time.monotonic() + TELL_SECONDS
    with contextlib.suppress(UserError, RuntimeError, KeyError, ValueError):  # nobody there to be told
        store = _open_store(rank, world_size, deadline)
        store.compare_set("failed", "", json.dumps([rank, socket.gethostname(), message]))
        left = store.add("left", 1)
        while rank == 0 and left < world_size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
            left = store.add("left", 0)


def _heard(store: dist.Store) -> str:
    rank, host, message = json.loads(store.get("failed"))
    return f"{message}\n(met by rank {rank}, on {host})"


def _meeting_point() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


_stores: dict[int, dist.Store] = {}


def _open_store(rank: int, world_size: int, deadline: float) -> dist.Store:
    """Host the store, or connect to it; the same one when called again."""
    if rank in _stores:
        return _stores[rank]
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun hosts one
    hosts = rank == 0 and not agent
    if not hosts:
        _wait_for_listener(address, port, deadline)
    try:
        store: dist.Store = dist.TCPStore(address, port, world_size, hosts, wait_for_workers=False)
    except dist.DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        raise UserError(
            f"port {port}, at which the ranks are to meet, is in use, by another run perhaps: "
            "choose one with `deepspeed --master_port PORT train.py ...`"
        ) from None
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    _stores[rank] = dist.PrefixStore(f"dmd2_fast/{attempt}", store)
    return _stores[rank]


def _wait_for_listener(address: str, port: int, deadline: float) -> None:
    news = time.monotonic() + NEWS_SECONDS
    while True:
        try:
            socket.create_connection((address, port), timeout=10).close()
            return
        except socket.gaierror as error:
            raise UserError(
                f"the address of rank 0's node, {address} (--master_addr or MASTER_ADDR), is not known to "
                f"{socket.gethostname()}: {error.strerror}. Give a name that every node resolves, or the number."
            ) from None
        except OSError as error:
            now, reason = time.monotonic(), error.strerror or error
            if now > deadline:
                raise UserError(
                    f"rank 0 was not found at {address}:{port} in {COLLECTIVE_MINUTES} minutes ({reason}): is its node "
                    "started, and does a firewall let this port through?"
                ) from None
            if now > news and is_first_on_node():
                print(f"waiting for rank 0 at {address}:{port} ({reason})", file=sys.stderr, flush=True)
                news = now + NEWS_SECONDS
            time.sleep(POLL_SECONDS)
