"""A fork is a snapshot of the REPL: what is in memory."""

from __future__ import annotations

import pytest

# A machine that lies too deep to be forked is copied into a new one, which must make no difference.
pytestmark = [pytest.mark.any_engine, pytest.mark.parametrize("way", ["forked", "carried"])]


def test_globals_and_modules_are_there_and_independent(parent, fork):
    """Children see what the parent had; what each changes afterwards is its own."""
    parent.run("import json, collections\nx = [1]\ndef f(): return x\nclass C: n = 0")
    one, two = fork(parent, 2)
    assert one.run("x.append(2); C.n = 5; print(f(), json.dumps(x))").stdout == "[1, 2] [1, 2]\n"
    assert two.run("x.append(3); print(f(), C.n, collections.Counter('aa'))").stdout == "[1, 3] 0 Counter({'a': 2})\n"
    assert parent.run("print(x, C.n)").stdout == "[1] 0\n"


def test_generators_iterators_and_closures_go_on(parent, fork):
    """A half-run generator, an iterator and a closure go on in each branch by themselves."""
    parent.run(
        "def g():\n    for i in range(9): yield i\na = g(); next(a); it = iter('abc'); next(it)\nadd = (lambda n: lambda m: n + m)(2)"
    )
    (child,) = fork(parent)
    assert child.run("print(next(a), next(it), add(1))").stdout == "1 b 3\n"
    assert parent.run("print(next(a), next(a), next(it))").stdout == "1 2 b\n"


def test_cwd_and_environment_cross_and_stay_apart(parent, fork):
    """Working directory and environment variables are the parent's at the fork, and each branch's own after it."""
    parent.run("import os; os.makedirs('/root/work'); os.chdir('/root/work'); os.environ['A'] = '1'")
    (child,) = fork(parent)
    assert (
        child.run("print(os.getcwd(), os.environ['A']); os.chdir('/tmp'); os.environ['A'] = '2'").stdout
        == "/root/work 1\n"
    )
    assert parent.run("print(os.getcwd(), os.environ['A'])").stdout == "/root/work 1\n"
    assert child.run("print(os.getcwd()); os.system('echo $A')").stdout == "/tmp\n2\n"


def test_children_draw_different_random_numbers(parent, fork):
    """With reseed, the default, no two branches draw the same from the global generator."""
    parent.run("import random; random.seed(1)")
    children = fork(parent, 4)
    draws = {machine.run("print(random.random())").stdout for machine in (parent, *children)}
    assert len(draws) == 5


def test_without_reseed_children_draw_the_same(parent, fork):
    """reseed=False keeps the generator's state exactly, for replay."""
    parent.run("import random; random.seed(1); random.random()")
    children = fork(parent, 3, reseed=False)
    draws = {machine.run("print(random.random())").stdout for machine in (parent, *children)}
    assert len(draws) == 1


def test_tracebacks_show_the_source_of_cells_before_the_fork(parent, fork):
    """An exception in a function that the parent defined shows its source in the child."""
    parent.run("def broken():\n    return 1 / 0  # the culprit")
    (child,) = fork(parent)
    assert "the culprit" in child.run("broken()").stderr


@pytest.mark.both_engines
def test_the_childs_repl_behaves_as_any_other(parent, fork):
    """Errors, results, interrupts, bash, subprocesses, threads and a restart work in a fork."""
    parent.run("kept = 1")
    (child,) = fork(parent)
    assert child.run("1 + 1").results[0].data["text/plain"] == "2"
    assert child.run("1 / 0").error.name == "ZeroDivisionError"
    assert child.run("echo $PWD", "bash").stdout == "/root\n"
    assert (
        child.run("import subprocess; print(subprocess.run(['echo', 'x'], capture_output=True).stdout)").stdout
        == "b'x\\n'\n"
    )
    assert (
        child.run("import threading; t = threading.Thread(target=print, args=('t',)); t.start(); t.join()").stdout
        == "t\n"
    )
    out = child.run("import os; os._exit(5)")
    assert (out.exit.code, out.exit.reason, out.exit.restarted) == (5, "died", True)
    assert child.run("print('kept' in globals())").stdout == "False\n"
    assert parent.run("print(kept)").stdout == "1\n"


@pytest.mark.both_engines
def test_an_event_loops_timers_go_on(parent, fork):
    """Top-level await works in parent and child after the fork, and a task that slept goes on in both."""
    parent.run(
        "import asyncio\nasync def later():\n    await asyncio.sleep(0.2)\n    return 'done'\ntask = asyncio.ensure_future(later())\nawait asyncio.sleep(0)"
    )
    (child,) = fork(parent)
    assert child.run("print(await task); await asyncio.sleep(0); print('x')").stdout == "done\nx\n"
    assert parent.run("print(await task)").stdout == "done\n"


def test_fork_of_a_fork(parent, fork):
    """Each generation can be forked again and sees what its ancestors did before."""
    machine = parent
    parent.run("trail = ['root']")
    for generation in range(6):
        (machine,) = fork(machine)
        machine.run(f"trail.append({generation})")
    assert machine.run("print(trail)").stdout == "['root', 0, 1, 2, 3, 4, 5]\n"


@pytest.mark.timeout(180)
def test_thirty_two_children_at_once(parent, fork):
    """32 children of one call are all ready and all different."""
    parent.run("import os; data = list(range(100000))")
    children = fork(parent, 32)
    for number, child in enumerate(children):
        child.start(f"data[0] = {number}; print(data[0], len(data))")
    assert [child.finish().stdout for child in children] == [f"{number} 100000\n" for number in range(32)]


@pytest.mark.process_engine("virtual machines take all along")
def test_sixteen_threads_in_the_parent(parent, fork):
    """Threads that compute, allocate and print while the fork happens stay with the parent; the child works."""
    parent.run("""
import threading
stop = False
count = [0] * 16
def work(n):
    while not stop:
        count[n] += 1
        [bytearray(100) for _ in range(100)]
workers = [threading.Thread(target=work, args=(n,), name=f"w{n}", daemon=True) for n in range(16)]
for w in workers: w.start()
""")
    (child,) = fork(parent)
    assert len(child.machine.fork_report["threads"]) == 16
    assert child.run("print(threading.active_count(), sum(count) > 0)").stdout == "1 True\n"
    assert parent.run("print(threading.active_count()); stop = True").stdout == "17\n"
