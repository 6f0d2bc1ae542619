"""Watching: any command's terminal in a real browser, a training that is killed, viewers that come back, a log of 100 MB."""
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from socket import create_connection

import psutil
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from browser import CHROMIUM, Browser
from conftest import PROJECT
from pillsnap.disk import read_json, write_json
from pillsnap.index import build_index
from pillsnap.manifest import make_manifest
from pillsnap.monitor import Sources, Watch, make_monitor
from pillsnap.runs import append_event, read_events
from pillsnap.serve import run_beside
from pillsnap.train import launch, prepare_run

needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
BUSY = r"""
import sys, time
for i in range(40):
    print(f"\033[3{i % 7}mline {i} at {time.time():.3f}\033[0m", flush=True)
    sys.stdout.write(f"\r{'#' * i:40}|")
    sys.stdout.flush()
    time.sleep(0.1)
    sys.stdout.write("\r" + " " * 41 + "\r")
sys.exit(4)
"""


@contextmanager
def view(url, source="", offset=0, key="", **more):
    "Open the page's line as the page does."
    with connect(f"{url.rstrip('/').replace('http', 'ws')}/ws", max_size=None, **more) as socket:
        socket.send(json.dumps({"key": key, "source": source, "offset": offset}))
        yield socket


def read_log(socket, until):
    "Read the log from a line until it has so many bytes."
    data = b""
    while len(data) < until:
        message = socket.recv(timeout=30)
        if isinstance(message, bytes):
            data += message[8:]
            socket.send(str(int.from_bytes(message[:8], "big")))
            assert int.from_bytes(message[:8], "big") >= len(message) - 8
    return data


def start_cli(*words, env=None):
    return subprocess.Popen([sys.executable, "-c", "from pillsnap.cli import main; main()", *map(str, words)], env=os.environ | (env or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=PROJECT)


@pytest.fixture
def browser():
    browser = Browser(390, 844)
    yield browser
    browser.close()


TEXT = "Array.from({length: terminal.buffer.active.length}, (_, i) => terminal.buffer.active.getLine(i).translateToString(true)).join('\\n')"


@pytest.mark.alone
@needs_browser
def test_a_command_is_seen_within_a_second_with_its_colours(environ, browser, tmp_path):
    "`pillsnap watch`: what is printed is in the page within a second; its end is the command's; its log stays."
    process = start_cli("watch", "--port", "0", "--", sys.executable, "-c", BUSY, env=environ)
    url = next(line.split()[1] for line in process.stderr if line.startswith("Monitor: "))
    browser.open(url)
    browser.wait(f"({TEXT}).includes('line 9 at')")
    late = browser.run(f"Date.now() / 1000 - Number(({TEXT}).match(/at ([0-9.]+)(?![^]*at )/)[1])")
    assert -0.2 < late < 1.0 and browser.run("document.getElementById('line').textContent") == "live"
    assert browser.run("Array.from({length: 20}, (_, i) => terminal.buffer.active.getLine(i)?.getCell(0)?.getFgColor()).some((colour) => colour > 0)")
    assert browser.run("document.documentElement.scrollWidth") <= 390 and browser.complaints == []
    assert process.wait(30) == 4
    browser.wait("document.getElementById('line').className.includes('gone')", 10)
    assert "line 39" in (shown := browser.run(TEXT)) and "[ended with status 4]" in shown
    [log] = (tmp_path / "work/terminal").glob("*.log")
    assert log.read_bytes().count(b"line ") == 40 and "line 39" in process.stdout.read()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_command_and_nothing_is_left(environ, number):
    script = "import signal, sys, time\nsignal.signal(%d, lambda *_: sys.exit(7))\nprint('ready', flush=True)\ntime.sleep(60)" % number
    process = start_cli("watch", "--port", "0", "--", sys.executable, "-c", script, env=environ)
    url = next(line.split()[1] for line in process.stderr if line.startswith("Monitor: "))
    assert process.stdout.readline().strip() == "ready"
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    assert process.wait(20) == 7
    gone, alive = psutil.wait_procs(children, 5)
    assert not alive and url


@pytest.mark.alone
@needs_browser
def test_a_killed_training_is_shown_as_gone(plan, tree, browser, tmp_path):
    "A real training: the page says that it runs, with its figures; killed, it says so within seconds; nothing of it is made up."
    index = build_index([tree])
    here = plan("epochs=500")
    run = prepare_run(here, make_manifest(index, here.stage), index)
    launched = launch(run)
    with run_beside(make_monitor(Watch(Sources(here.settings.work)))) as url:
        browser.open(f"{url}/")
        browser.wait("state.run && state.run.classifier.done >= 2", 90)
        assert browser.run("document.getElementById('state').className") == "state running" and " of 500" in browser.run("document.getElementById('facts').textContent")
        shown, true = browser.run("state.run.classifier.curve[0].train_loss"), read_events(run, "epoch")[0]["train_loss"]
        assert shown == true and "not measured" in browser.run("document.getElementById('facts').textContent")  # no GPU here
        assert browser.run("state.run.detector") is None and f"{true:.3f}"[:4] in browser.run(TEXT)
        launched.process.send_signal(signal.SIGKILL)
        launched.process.wait()
        begun = time.monotonic()
        browser.wait("document.getElementById('state').textContent.includes('ended without a word')", 15)
        assert time.monotonic() - begun < 5
        browser.wait("!document.getElementById('failure').hidden")
        told = browser.run("document.getElementById('failure').textContent")
        assert "Likely cause" in told and f"--resume {run}" in told and browser.complaints == []


@needs_browser
def test_search_pause_and_a_run_beside_another(tmp_path, browser):
    "A word far up is found and stays in view while more arrives; another run's curves and gates stand beside this one's."
    log = tmp_path / "long.log"
    log.write_text("".join(f"line {i}\n" + "the needle\n" * (i == 700) for i in range(3000)))
    for name, top1 in (("r1", 0.5), ("r2", 0.75)):
        run = tmp_path / f"runs/stage_0/{name}"
        write_json(run / "run.json", {"key": "stage_0", "created": f"2026-01-0{name[1]}", "device": "cpu", "parameters": {}, "stage": {"strategy": "classifier", "epochs": 1, "detector_epochs": 1}})
        append_event(run, "epoch", epoch=1, train_loss=1.0, val_loss=1.0, val_top1=top1, val_macro_f1=top1, seconds=1.0)
        append_event(run, "end")
        write_json(run / "metrics/evaluate.json", {"gates": [{"name": "test_top1", "value": top1, "target": 0.6, "passed": top1 > 0.6}]})
        write_json(run / "stage_0_evaluation.json", {"recommendations": "PROCEED", "confidence": 0.9, "reasons": ["every gate is passed"], "next_stage_config": {"commands": ["pillsnap run manifest --stage 1"]}})
    with run_beside(make_monitor(Watch(Sources(tmp_path, (log,)), first="long.log"))) as url:
        browser.open(f"{url}/")
        browser.wait(f"({TEXT}).includes('line 2999')")
        browser.run("document.getElementById('search').value = 'needle'; document.getElementById('next').click()")
        assert browser.run("terminal.getSelection()") == "needle" and browser.run("document.getElementById('follow').textContent") == "Paused"
        seen = browser.run("terminal.buffer.active.viewportY")
        with open(log, "a") as file:
            file.write("something new\n" * 50)
        browser.wait(f"({TEXT}).includes('something new')")
        assert browser.run("terminal.buffer.active.viewportY") == seen < 700 < browser.run("terminal.buffer.active.baseY")
        browser.run("document.getElementById('follow').click()")
        browser.wait("terminal.buffer.active.viewportY === terminal.buffer.active.baseY")
        for which, name in (("source", "r2"), ("beside", "r1")):
            browser.run(f"document.getElementById('{which}').value = 'stage_0/{name}'; document.getElementById('{which}').onchange()")
            browser.wait("state.run && state.run.run === 'r2'" if which == "source" else "state.beside && state.beside.run === 'r1'")
        write_json(tmp_path / "runs/stage_0/r3/run.json", read_json(run / "run.json") | {"created": "2026-01-03"})
        browser.wait("Array.from(document.getElementById('source').options, (one) => one.value).includes('stage_0/r3')", 15)
        assert browser.run("[state.source, document.getElementById('source').value, document.getElementById('beside').value].join()") == "stage_0/r2,stage_0/r2,stage_0/r1"
        assert "0.75" in (gates := browser.run("document.getElementById('gates').textContent")) and "beside: r1" in gates and "0.5" in gates
        assert "val_top1 0.75, beside 0.5" in browser.run("document.getElementById('curves').textContent") and "pillsnap run manifest --stage 1" in browser.run("document.getElementById('advice').textContent")
        assert browser.complaints == []


def test_viewers_come_back_without_loss_and_see_a_new_file(tmp_path):
    log = tmp_path / "other.log"
    log.write_bytes(b"".join(b"line %06d\n" % i for i in range(50_000)))
    whole = log.read_bytes()
    with run_beside(make_monitor(Watch(Sources(tmp_path, (log,))))) as url:
        with view(url) as first:
            begin = read_log(first, 300_000)
        with view(url, "other.log", len(begin)) as again, view(url, "other.log") as other:
            rest = read_log(again, len(whole) - len(begin))
            assert begin + rest == whole == read_log(other, len(whole))
            with open(log, "ab") as file:
                file.write(b"more\n")
            assert read_log(again, 5) == read_log(other, 5) == b"more\n"
            log.write_bytes(b"anew\n")
            while json.loads(message) != {"type": "anew"} if isinstance(message := again.recv(timeout=10), str) else True:
                pass
            assert read_log(again, 5) == b"anew\n"


def test_a_log_of_100_mb_takes_no_memory(tmp_path, environ):
    "Two viewers read all of it from a process of its own, whose memory stays where it was."
    log = tmp_path / "long.log"
    with open(log, "wb") as file:
        for i in range(100):
            file.write((b"epoch %06d " % i + b"x" * 86 + b"\n") * 10_000)
    process = start_cli("monitor", "--port", "0", "--log", log, env=environ)
    url = process.stdout.readline().strip().rstrip("/")
    try:
        with view(url, "long.log") as warm:
            read_log(warm, 2_000_000)
        before = psutil.Process(process.pid).memory_info().rss
        threads = [threading.Thread(target=read_and_drop, args=(url, log.stat().st_size)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        grown = psutil.Process(process.pid).memory_info().rss - before
        assert log.stat().st_size > 95_000_000 and grown < 20_000_000, grown
    finally:
        process.terminate()
        process.wait(10)


def read_and_drop(url, until):
    "Read so many bytes of a log, and keep none."
    got = 0
    with view(url, "long.log") as socket:
        while got < until:
            message = socket.recv(timeout=30)
            if isinstance(message, bytes):
                got += len(message) - 8
                socket.send(str(int.from_bytes(message[:8], "big")))


def test_only_the_own_page_and_only_with_the_key(tmp_path, environ):
    (tmp_path / "a.log").write_text("words\n")
    with run_beside(make_monitor(Watch(Sources(tmp_path, (tmp_path / "a.log",)), "secret"))) as url:
        for given, code in (({"key": "wrong"}, 4401), ({"key": "secret", "origin": "https://other.example"}, 4403), ({"key": "secret", "source": "../../etc/passwd"}, 4404)):
            with pytest.raises(ConnectionClosed) as closed, view(url, **given) as socket:
                while True:
                    socket.recv(timeout=5)
            assert closed.value.rcvd.code == code
        with view(url, key="secret", origin=url) as socket:
            assert read_log(socket, 6) == b"words\n"
    with run_beside(make_monitor(Watch(Sources(tmp_path, (tmp_path / "a.log",))))) as url:  # without a key
        here = {"sock": create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])))}
        for at, more in ((url, {"origin": "https://other.example"}), (url, {"origin": "null"}), ("http://evil.example", here)):  # the last: a name that leads to this machine
            with pytest.raises(ConnectionClosed) as closed, view(at, **more) as socket:
                socket.recv(timeout=5)
            assert closed.value.rcvd.code == 4403
        for first in ("[]", "no JSON", '{"offset": Infinity}'):
            with pytest.raises(ConnectionClosed) as closed, connect(f"{url.replace('http', 'ws')}/ws") as socket:
                socket.send(first)
                socket.recv(timeout=5)
            assert closed.value.rcvd.code == 4400
    refused = start_cli("monitor", "--host", "0.0.0.0", env=environ)
    assert refused.wait(30) == 1 and "PILL_API_KEY" in refused.stderr.read()


def test_what_a_run_says_is_what_its_files_say(tmp_path):
    "A run without a detector, a silent process, a file in writing: nothing is filled in."
    from pillsnap.monitor import STALLED, tell_run

    run = tmp_path / "runs/stage_0/r1"
    write_json(run / "run.json", {"key": "stage_0", "created": "2026-01-01", "device": "cpu", "stage": {"strategy": "classifier", "epochs": 3, "detector_epochs": 2}})
    told = tell_run(run)
    assert told["state"] == "never started" and told["age_s"] is None and told["detector"] is None and told["classifier"]["curve"] == [] and told["classifier"]["left_s"] is None
    sleeper = subprocess.Popen([sys.executable, "-c", "import time; print('ready', flush=True); time.sleep(60)", str(run)], stdout=subprocess.PIPE, text=True)
    try:
        assert sleeper.stdout.readline() == "ready\n"  # for a moment after its start a process has no command line
        append_event(run, "launched", pid=sleeper.pid)
        lines = (run / "events.jsonl").read_text().replace(read_events(run)[0]["time"], "2026-01-01T00:00:00.000+00:00")
        (run / "events.jsonl").write_text(lines + '{"time": "half a li')
        told = tell_run(run)
        assert told["alive"] and told["stalled"] and told["age_s"] > STALLED
    finally:
        sleeper.kill()
        sleeper.wait()
    assert not tell_run(run)["alive"]
