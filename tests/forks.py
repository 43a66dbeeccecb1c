"""One process that has imported everything and forks a child for each fault, so that a kill costs no start of Python.

Reads one JSON object per line: "argv" of the program, "log" for its output, "place" whose changes are counted, and a fault:
"kill" or the name of an errno at the "nth" change, or "signal" after "seconds". Writes {"code", "changes", "seconds", "kinds"}."""
import ctypes
import errno
import json
import os
import resource
import shutil
import signal
import sys
import time
from dataclasses import replace

changing = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod", "os.truncate", "tensors", "tensors written")
frees = ("os.remove", "os.rmdir", "os.rename", "os.chmod")      # a full disk does not mind


class Watch:
    "Counts what changes files below a place; at the nth change it kills, or begins to refuse as a full or read-only disk does."
    def __init__(self, place, fault, nth):
        self.place, self.fault, self.nth, self.count, self.kinds = os.path.realpath(place), fault, nth, 0, []

    def __call__(self, event, args):
        if event == "open":
            if not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT): return
        elif event not in changing: return
        path = self.path(event, args)
        if not path.startswith(self.place): return
        self.count += 1
        self.kinds.append(f"{event} {os.path.basename(path)}")
        if not self.fault or self.count < self.nth: return
        if event == "tensors written": os.truncate(path, os.path.getsize(path) // 2)
        if self.fault == "kill": os.kill(os.getpid(), signal.SIGKILL)
        if self.fault == "ENOSPC" and event in frees: return
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number), path)

    def path(self, event, args):
        "The path that is changed; rmtree names files within a directory that it holds open."
        name = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes, os.PathLike)) else ""
        folder = {"os.remove": 1, "os.rmdir": 1, "os.mkdir": 2, "os.chmod": 2}.get(event)
        if folder and len(args) > folder and isinstance(args[folder], int) and args[folder] >= 0:
            name = os.path.join(os.readlink(f"/proc/self/fd/{args[folder]}"), name)
        return os.path.join(os.path.realpath(os.path.dirname(name) or "."), os.path.basename(name))


def announce(module):
    "Make the Rust code that writes tensors seen: before it writes, and when it has written."
    save = module.save_file
    def seen(tensors, path, *args, **more):
        sys.audit("tensors", str(path))
        save(tensors, path, *args, **more)
        sys.audit("tensors written", str(path))
    module.save_file = seen


def on_a_full_disk(ask):
    "In a file system of so many bytes, which nobody else sees, then in a larger one; 77 where that is not allowed."
    libc, place = ctypes.CDLL(None, use_errno=True), os.fsencode(ask["place"])
    def mount(what, where, kind, flags, options): return libc.mount(what, where, kind, ctypes.c_ulong(flags), options)
    own, private, again = 0x20000 | (0x10000000 if os.geteuid() else 0), 0x44000, 32
    if libc.unshare(own) or mount(None, b"/", None, private, None): return 77
    if mount(b"tmpfs", place, b"tmpfs", 0, b"size=%d" % ask["full"]): return 77
    os.chdir(place)
    first = main(ask["argv"])
    print(f"first: {first}", flush=True)
    if mount(None, place, None, again, b"size=100m"): return 77
    second = main(ask["argv"])
    shutil.copytree(ask["place"], ask["copy"])
    return second


def child(ask, report):
    "The program itself, in a session of its own."
    os.setsid()
    log = os.open(ask["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for old, new in ((os.open(os.devnull, os.O_RDONLY), 0), (log, 1), (log, 2)): os.dup2(old, new)
    os.chdir(ask.get("cwd", "/"))
    for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if ask.get("memory"): resource.setrlimit(resource.RLIMIT_AS, (ask["memory"], ask["memory"]))
    if ask.get("clock"):                            # the clock of the machine jumps back by a day, again and again
        now, calls = time.time, [0]
        def back(): calls[0] += 1; return now() - 86_400 * calls[0]
        time.time = back
    if ask.get("lazy"): minbert.runs._Session.__init__ = start
    watch = Watch(ask.get("place", "/nowhere"), ask.get("fault"), ask.get("nth", 0))
    sys.addaudithook(watch)
    code = 1
    try:
        code = on_a_full_disk(ask) if ask.get("full") else main(ask["argv"])
    except BaseException:
        import traceback
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(report, json.dumps([watch.count, watch.kinds[:2000]]).encode())
        os._exit(code)


def serve(ask):
    "Fork, wait, strike."
    readable, writable = os.pipe()
    begun, pid = time.monotonic(), os.fork()
    if not pid: child(ask, writable)
    os.close(writable)
    if ask.get("signal"):
        end = begun + ask["seconds"]
        while time.monotonic() < end and not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): time.sleep(.001)
        if not os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT): os.kill(pid, ask["signal"])
    with os.fdopen(readable, "rb") as f: said = f.read()
    _, status, used = os.wait4(pid, 0)
    count, kinds = json.loads(said) if said else (0, [])
    return {"code": os.waitstatus_to_exitcode(status), "changes": count, "kinds": kinds, "seconds": time.monotonic() - begun,
            "cpu": used.ru_utime + used.ru_stime}


if __name__ == "__main__":
    import torch
    import torch._dynamo                            # which torch imports when it first takes a step
    torch.set_num_threads(1)
    import minbert.checkpoints, minbert.conflicts, minbert.electra, minbert.heads, minbert.recipes, minbert.runs
    from minbert.cli import main
    from minbert.data import load_tasks
    for module in (minbert.checkpoints, minbert.heads, minbert.runs): announce(module)
    load_tasks("pocket")                            # what every run reads
    minbert.runs._commit = str                      # asking git takes longer than these runs
    start = minbert.runs._Session.__init__
    def often(self, run, model, data, config, plugs): start(self, run, model, data, replace(config, save_seconds=0), plugs)
    minbert.runs._Session.__init__ = often          # a state after every step
    print("ready", flush=True)
    for line in sys.stdin: print(json.dumps(serve(json.loads(line))), flush=True)
