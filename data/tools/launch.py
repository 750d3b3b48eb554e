"""Starts a training script once per GPU of this machine.

    python -m data.tools.launch --num_processes 8 02_sft.py ARGUMENTS

`accelerate launch` works, too, and is what several machines need. What differs here: the processes
meet on loopback and listen nowhere else; they say themselves why they end, and the exit status is
that of the first one that failed (after a signal 128 and its number); and after SIGTERM they have
all the time they need to save a checkpoint. They end when this process is killed
(`common.end_with_launcher`).
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time

GRACE = 5.0  # seconds that the others have when one process has failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--num_processes", type=int, required=True, help="processes, one per GPU")
    parser.add_argument("script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER)
    a = parser.parse_args()
    store = loopback_store()
    env = environment(a.num_processes, store.port)
    processes = []
    for rank in range(a.num_processes):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        # in a session of its own: a signal comes from here, and only once
        command = [sys.executable, a.script, *a.arguments]
        processes.append(subprocess.Popen(command, env=env | own, start_new_session=True))
    passed_on = pass_on_signals(processes)
    return wait_for(processes, passed_on)


def loopback_store():
    """Where the processes find each other. By itself it would listen on all addresses."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0), backlog=2048)
    port = listener.getsockname()[1]
    return TCPStore(
        "127.0.0.1",
        port,
        is_master=True,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def environment(count: int, port: int) -> dict:
    """The variables that all processes share: as torchrun sets them."""
    import torch
    from accelerate.utils import check_cuda_p2p_ib_support

    env = {
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is here
    }
    if not torch.cuda.is_available():
        env.setdefault("ACCELERATE_USE_CPU", "true")
    if not check_cuda_p2p_ib_support():  # GeForce RTX 4000 with an old driver
        env |= {"NCCL_P2P_DISABLE": "1", "NCCL_IB_DISABLE": "1"}
    return env


def pass_on_signals(processes: list[subprocess.Popen]) -> list[int]:
    """What this process is sent, the others get. A signal that is ignored stays so (nohup). Returns
    the list of the signals that have been passed on so far."""
    passed_on = []

    def pass_on(number: int, _frame) -> None:
        passed_on.append(number)
        for process in processes:
            process.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)
    return passed_on


def wait_for(processes: list[subprocess.Popen], passed_on: list[int]) -> int:
    """Wait for the end of all. Returns the exit status."""
    while True:
        codes = [process.poll() for process in processes]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed or None not in codes:
            break
        time.sleep(0.05)
    if not failed:
        return 0
    # the others wait for it in vain, unless they have failed for the same reason
    end = time.monotonic() + GRACE
    while time.monotonic() < end and any(process.poll() is None for process in processes):
        time.sleep(0.05)
    for process in processes:
        process.kill()
        process.wait()
    code = codes[failed[0]]
    if code > 0:
        return code
    if -code not in passed_on:
        what = f"process {failed[0]} of {len(processes)} was ended by {signal.Signals(-code).name}"
        print(f"error: {what}", file=sys.stderr)
    return 128 - code


if __name__ == "__main__":
    sys.exit(main())
