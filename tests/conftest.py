"""What several tests need: paths, a small model with random weights, its inputs. And a loop that
runs the files of tests in two processes."""

import itertools
import multiprocessing.connection
import os
import signal
import sys
import traceback
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from unix import Config, UniX  # noqa: E402

torch.backends.mps.is_available = lambda: False     # what is compared bit for bit needs the CPU
unix_only = pytest.mark.skipif(sys.platform == "win32", reason="signals that Windows lacks")
signal.signal(signal.SIGINT, signal.default_int_handler)    # `pytest &` ignores it, as children do


def small_config(**changes) -> Config:
    """Grouped-query attention, three layers, sizes that are all different."""
    return Config(**{**dict(
        vit_image=32, vit_patch=8, vit_width=24, vit_mlp=40, vit_heads=2, vit_layers=2, vocab=97,
        layers=3, width=32, heads=4, kv_heads=2, head_dim=10, mlp=44, max_tokens=64, latent_side=8,
        latent_channels=16, bos=90, eos=91, boi=92, eoi=93, resolution=32), **changes})


@pytest.fixture
def model() -> UniX:
    """A small UniX whose every weight is random: nothing is zero, no two experts are equal."""
    torch.manual_seed(0)
    model = UniX(small_config())
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, std=0.3 if p.dim() > 1 else 0.2)
        if "norm" in name and name.endswith("weight"):
            p.data += 1
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- two processes

PROCESSES = 2


def pytest_runtestloop(session):
    """Each process takes the next file of tests and sends its reports here. In one process, as
    pytest does it, where a fork is not safe, and for a single file."""
    files = [[*items] for _, items in itertools.groupby(session.items, lambda item: item.path)]
    option = session.config.option
    if (len(files) < 2 or sys.platform != "linux" or torch.cuda.is_available()
            or option.collectonly or option.usepdb or option.capture == "no"):
        return None
    waiting, numbers = os.pipe()
    os.write(numbers, bytes(range(len(files))))
    os.close(numbers)
    pipes, children, hook = [], [], session.config.hook
    for _ in range(PROCESSES):
        ours, its = multiprocessing.connection.Pipe()
        children.append(os.fork())
        if not children[-1]:
            run_files(session, files, waiting, its)
        its.close()
        pipes.append(ours)
    try:
        while pipes and not (session.shouldfail or session.shouldstop):
            for pipe in multiprocessing.connection.wait(pipes):
                try:
                    data = pipe.recv()
                except EOFError:
                    pipes.remove(pipe)
                    continue
                report = hook.pytest_report_from_serializable(config=session.config, data=data)
                hook.pytest_runtest_logreport(report=report)
                if report.when == "teardown":
                    hook.pytest_runtest_logfinish(nodeid=report.nodeid, location=report.location)
    finally:
        for child in children if pipes else ():
            os.kill(child, signal.SIGKILL)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if session.shouldfail or session.shouldstop:
        raise session.Failed(session.shouldfail or session.shouldstop)
    if any(codes):
        raise session.Failed(f"a process of the tests ended early, with code {max(codes, key=abs)}")
    return True


def run_files(session, files: list, waiting: int, pipe):
    """A process: takes the number of a file, runs its tests, until none is left."""
    code, hook, plugins = 1, session.config.hook, session.config.pluginmanager

    class Reporter:
        @staticmethod
        def pytest_runtest_logreport(report):
            data = hook.pytest_report_to_serializable(config=session.config, report=report)
            pipe.send(data)
    try:
        plugins.unregister(name="terminalreporter")
        plugins.register(Reporter)
        capture = plugins.getplugin("capturemanager")
        capture.stop_global_capturing()                 # its file is shared with the others
        capture.start_global_capturing()
        capture.suspend_global_capture()
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"
        while number := os.read(waiting, 1):
            items = files[number[0]]
            for item, after in zip(items, [*items[1:], None]):
                hook.pytest_runtest_protocol(item=item, nextitem=after)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
