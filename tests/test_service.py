"""The service as the network sees it: a real server, real sockets. Keys, limits, slow and endless bodies, broken photos, another bundle under load, signals, and the page in a real browser."""
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection

import httpx
import numpy as np
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings as hypothesis_settings
from hypothesis.errors import Unsatisfiable
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from schemathesis.checks import CHECKS
from schemathesis.generation import GenerationMode

from browser import CHROMIUM, Browser
from conftest import PROJECT
from pillsnap.bundle import write_sums
from pillsnap.core import Parameters, get_stage, load_settings
from pillsnap.door import Rules
from pillsnap.export import ensure_bundle
from pillsnap.keys import KeyRing, add_key, remove_key
from pillsnap.preprocess import MOST_BYTES
from pillsnap.serve import BODIES, PatientProtocol, Service, Serving, make_app, open_port, run_beside

SLOW = os.environ.get("SLOW_REQUESTS", "")  # how many broken requests the long test sends


@pytest.fixture(scope="module")
def own():
    "The work folder of this run of the tests, where stage 0 may be trained already."
    return load_settings()


@pytest.fixture(scope="module")
def bundles(own, tmp_path_factory):
    "Two bundles that differ in the names of their drugs."
    made = ensure_bundle(Parameters(get_stage(0), [], own, {"level": "smoke", "run": "", "overrides": ""}))
    folder = tmp_path_factory.mktemp("served")
    for name in ("a", "b"):
        shutil.copytree(made, folder / name)
        registry = (folder / name / "registry.csv").read_text("utf-8")
        (folder / name / "registry.csv").write_text(registry.replace("(가상)", f"({name})"), "utf-8")
        write_sums(folder / name)
    (folder / "latest").symlink_to("a")
    return folder


@pytest.fixture(scope="module")
def tray(own):
    "A drawn photo of three or four pills."
    return sorted((own.work / "synthetic").rglob("K-*_2_0_2_90_000_200.png"))[0]


class Served:
    def __init__(self, url, key, admin, lines, keys):
        self.url, self.key, self.admin, self.lines, self.keys = url, key, admin, lines, keys
        self.port = int(url.rsplit(":", 1)[1])
        self.client = httpx.Client(base_url=self.url, headers={"X-API-Key": key}, timeout=60)


@pytest.fixture(scope="module")
def served(bundles, tmp_path_factory):
    "A service with two keys, patient for a second only."
    keys, lines = tmp_path_factory.mktemp("keys") / "keys.json", []
    key, admin = add_key(keys, "app", rate=10**9), add_key(keys, "ops", admin=True, rate=10**9)
    service = Service(Serving(bundles / "latest", waiting=1000))
    ring = KeyRing(keys)
    with run_beside(make_app(service, ring, log=lines.append, rules=Rules(ring, bodies=BODIES, slow=1.0))) as url:
        yield Served(url, key, admin, lines, keys)


def photo_bytes(kind="PNG", side=(96, 80), mode="RGB", **how):
    pixels = np.random.default_rng(0).integers(0, 256, (*side, 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(file := io.BytesIO(), kind, **how)
    return file.getvalue()


# ---- as a process


def start(bundles, *words, **env):
    "Start `pillsnap serve` and read its address from its log."
    process = subprocess.Popen([sys.executable, "-c", "from pillsnap.cli import main; main()", "serve", "--port", "0", "--bundle", str(bundles / "latest"), *map(str, words)],
                               env=os.environ | env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=PROJECT)
    lines = []
    for line in process.stdout:
        lines.append(json.loads(line))
        if lines[-1].get("event") == "started":
            break
    threading.Thread(target=lambda: lines.extend(map(json.loads, process.stdout)), daemon=True).start()
    return process, next(line["url"] for line in lines if line.get("event") == "serving"), lines


def test_the_command_serves_finishes_what_is_in_work_and_stops(bundles, tray, tmp_path):
    "A signal comes while four batches are in work: all are answered, then the process ends with 0, and its log never had the key."
    keys = tmp_path / "keys.json"
    made = subprocess.run([sys.executable, "-c", "from pillsnap.cli import main; main()", "keys", "add", "app", "--keys", str(keys)], capture_output=True, text=True, cwd=PROJECT)
    key = made.stdout.strip()
    process, url, lines = start(bundles, "--keys", keys, "--keep", tmp_path / "kept")
    assert httpx.get(f"{url}health").json()["status"] == "ok" and httpx.get(f"{url}version").status_code == 401
    with ThreadPoolExecutor(4) as pool:
        photos, headers = [("images", tray.read_bytes())] * 16, {"X-API-Key": key}
        asked = [pool.submit(httpx.post, f"{url}batch?mode=combination", files=photos, headers=headers | {"X-Request-ID": f"r{i}"}, timeout=60) for i in range(4)]
        while "pillsnap_requests_open 5.0" not in httpx.get(f"{url}metrics", headers=headers).text:  # the four, and this one
            assert not any(one.done() for one in asked), "answered before the signal"
        process.send_signal(signal.SIGTERM)
        answers = [one.result() for one in asked]
    assert process.wait(30) == 0
    assert [answer.status_code for answer in answers] == [200] * 4 and len({json.dumps(one["pills"]) for answer in answers for one in answer.json()["answers"]}) == 1
    assert lines[-1]["event"] == "stopped" and key not in json.dumps(lines) and {line.get("key") for line in lines if line.get("path") == "/batch"} == {"app"}
    kept = sorted(path.name.split("-", 2)[2] for path in (tmp_path / "kept").iterdir())
    assert all(path.stat().st_mode & 0o077 == 0 for path in (tmp_path / "kept").iterdir())
    assert kept == sorted([f"r{i}-images{place or ''}.png" for i in range(4) for place in range(16)] + [f"r{i}.json" for i in range(4)])


def test_the_command_line_and_the_service_say_the_same(served, bundles, tray, pillsnap):
    told = json.loads(pillsnap("identify", tray, "--mode", "combination", "--json", "--bundle", bundles / "latest").stdout)[0]
    answer = served.client.post("/predict?mode=combination", files={"image": tray.read_bytes()}).json()
    assert len(told["pills"]) == len(answer["pills"]) >= 3 and told["bundle"] == answer["bundle"]
    for one, other in zip(told["pills"], answer["pills"]):
        assert [drug["k_code"] for drug in one["top"]] == [drug["k_code"] for drug in other["top"]] and np.allclose(one["bbox"], other["bbox"], atol=0.2)
        assert np.allclose([drug["confidence"] for drug in one["top"]], [drug["confidence"] for drug in other["top"]], atol=2e-3)


def test_what_stands_against_a_start_is_said(bundles, pillsnap, tmp_path):
    assert "pillsnap keys add NAME" in pillsnap("serve", "--bundle", bundles / "a").stderr
    assert "only this machine" in pillsnap("serve", "--bundle", bundles / "a", "--insecure-localhost", "--host", "0.0.0.0").stderr
    assert "pillsnap run export" in pillsnap("serve", "--insecure-localhost").stderr
    with open_port("127.0.0.1", 0) as taken:
        refused = pillsnap("serve", "--bundle", bundles / "a", "--insecure-localhost", "--port", taken.getsockname()[1])
    assert refused.returncode == 1 and "cannot be taken" in refused.stderr and "Traceback" not in refused.stderr


def test_a_service_loads_neither_torch_nor_a_trainer(bundles):
    script = ("import sys\nfrom pathlib import Path\nfrom pillsnap.serve import Service, Serving, make_app\n"
              f"make_app(Service(Serving(Path({str(bundles / 'a')!r}))), None)\n"
              "loaded = {'torch', 'timm', 'ultralytics', 'sklearn', 'matplotlib', 'albumentations', 'IPython'} & set(sys.modules)\nassert not loaded, loaded")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=PROJECT)
    assert done.returncode == 0, done.stderr


# ---- keys and limits


def test_a_key_counts_from_the_next_request_on(served):
    new = add_key(served.keys, "new", rate=3)
    said = [httpx.get(f"{served.url}/version", headers={"X-API-Key": new}) for _ in range(4)]
    assert [answer.status_code for answer in said] == [200, 200, 200, 429] and int(said[-1].headers["retry-after"]) <= 20
    remove_key(served.keys, "new")
    assert httpx.get(f"{served.url}/version", headers={"X-API-Key": new}).status_code == 401


def test_a_body_without_end_is_cut_off_where_it_is_too_long(served):
    "Chunked, no length promised: the server says 413 after 20 MB, long before the sender would have stopped."
    sent = 0
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {served.key}\r\nTransfer-Encoding: chunked\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n".encode())
        head = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n'
        line.sendall(b"%x\r\n%s\r\n" % (len(head), head))
        answer = b""
        line.settimeout(0.001)
        while sent < 200_000_000 and not answer:
            try:
                line.settimeout(20)
                line.sendall(b"10000\r\n" + bytes(65536) + b"\r\n")
                sent += 65536
                line.settimeout(0.0005)
                answer = line.recv(4096)
            except (TimeoutError, BlockingIOError):
                pass
            except (ConnectionResetError, BrokenPipeError):
                break
    assert sent < 200_000_000 and (not answer or b" 413 " in answer.split(b"\r\n")[0])
    assert served.lines[-1]["status"] == 413 and served.lines[-1]["bytes"] < MOST_BYTES + 200_000


def test_a_slow_body_and_a_silent_connection_are_let_go(served, monkeypatch):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(f"POST /predict HTTP/1.1\r\nHost: localhost\r\nX-API-Key: {served.key}\r\nContent-Length: 1000\r\nContent-Type: multipart/form-data; boundary=b\r\n\r\n--b".encode())
        begun = time.monotonic()
        assert b" 408 " in line.recv(4096).split(b"\r\n")[0] and time.monotonic() - begun < 5
    monkeypatch.setattr(PatientProtocol, "patience", 0.5)
    asked = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    for words in (b"", b"GET /health HT", asked + b"GET /heal", asked + b"\r\n", b"POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\na"):
        with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
            line.sendall(words)
            begun, got = time.monotonic(), b""
            while part := line.recv(65536):
                got += part
            assert time.monotonic() - begun < 4 and (b" 200 " in got) == words.startswith(asked) and (b" 401 " in got) == words.startswith(b"POST")


def test_headers_without_end_are_cut_off(served):
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n")
        sent = 0
        with pytest.raises((ConnectionResetError, BrokenPipeError)):
            while sent < 100_000_000:
                sent += line.send(b"X-More: " + b"x" * 8000 + b"\r\n")
    assert sent < 20_000_000
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as line:
        line.sendall(b"no HTTP at all\r\n\r\n")
        answer = line.recv(4096)
    assert b" 400 " in answer and set(json.loads(answer.split(b"\r\n\r\n")[1])) == {"code", "message", "request_id"}


def test_too_many_at_once_are_told_to_come_again(bundles, tray):
    service = Service(Serving(bundles / "a", workers=1, waiting=2))
    photo = tray.read_bytes()
    with run_beside(make_app(service, None, log=lambda line: None)) as url, ThreadPoolExecutor(12) as pool:
        found = list(pool.map(lambda _: httpx.post(f"{url}/predict?mode=combination", files={"image": photo}, timeout=30), range(12)))
    assert {answer.status_code for answer in found} == {200, 503} and all("retry-after" in answer.headers and answer.json()["code"] == "busy" for answer in found if answer.status_code == 503)


def test_a_page_elsewhere_may_ask_only_where_it_is_allowed(bundles):
    service = Service(Serving(bundles / "a"))
    with run_beside(make_app(service, None, ["https://app.example"], log=lambda line: None)) as url:
        allowed, other = (httpx.options(f"{url}/predict", headers={"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "X-API-Key"}) for origin in ("https://app.example", "https://other.example"))
        assert allowed.headers["access-control-allow-origin"] == "https://app.example" and "access-control-allow-origin" not in other.headers
        assert httpx.get(f"{url}/health", headers={"Host": "pills.example.org"}).status_code == 400  # without keys only this machine, whatever a name server says


def test_a_full_disk_costs_the_copy_and_not_the_answer(bundles, tray, tmp_path):
    (tmp_path / "file").write_text("")
    lines = []
    with run_beside(make_app(Service(Serving(bundles / "a", keep=tmp_path / "file/kept")), None, log=lines.append)) as url:
        assert httpx.post(f"{url}/predict", files={"image": tray.read_bytes()}).status_code == 200
    assert "file" in next(line for line in lines if line.get("path") == "/predict")["not_kept"]


# ---- another bundle under way


def test_reloads_under_load_lose_and_mix_no_answer(served, bundles, tray):
    "Two callers ask all the time while the bundles take turns: every answer is whole, and has the names of the bundle that it says it is from."
    photo, stop, wrong, count = tray.read_bytes(), threading.Event(), [], [0]
    names = {}
    for name in ("a", "b"):
        names[httpx.post(f"{served.url}/reload", json={"bundle": name}, headers={"X-API-Key": served.admin}, timeout=60).json()["bundle"]] = f"({name})"
    assert len(names) == 2

    def ask():
        with httpx.Client(base_url=served.url, headers={"X-API-Key": served.key}, timeout=60) as client:
            while not stop.is_set():
                answer = client.post("/predict?mode=combination", files={"image": photo})
                count[0] += 1
                told = answer.json()
                if answer.status_code != 200 or not all(names[told["bundle"]] in drug["name"] for pill in told["pills"] for drug in pill["top"]):
                    wrong.append(answer.text)

    with ThreadPoolExecutor(2) as pool:
        callers = [pool.submit(ask) for _ in range(2)]
        try:
            for i in range(200 if SLOW else 12):
                taken = httpx.post(f"{served.url}/reload", json={"bundle": "ab"[i % 2]}, headers={"X-API-Key": served.admin}, timeout=60)
                assert taken.status_code == 200, taken.text
        finally:
            stop.set()
        for caller in callers:
            caller.result()  # an answer that was lost raises here
    assert not wrong and count[0] > 10


def test_a_bad_bundle_leaves_the_old_one(served, bundles, tmp_path, pillsnap):
    before = served.client.get("/version").json()["bundle"]
    shutil.copytree(bundles / "a", bundles / "bad", dirs_exist_ok=True)
    network = bytearray((bundles / "bad/classifier.onnx").read_bytes())
    network[-3000:] = bytes(3000)
    (bundles / "bad/classifier.onnx").write_bytes(network)
    write_sums(bundles / "bad")  # sums are right, the network is not
    (bundles / "away").symlink_to(tmp_path)
    refused = {name: httpx.post(f"{served.url}/reload", json={"bundle": name}, headers={"X-API-Key": served.admin}, timeout=60) for name in ("bad", "away", "../a", "/etc", "none")}
    assert {answer.status_code for answer in refused.values()} == {422} and before in refused["bad"].json()["message"]
    assert served.client.get("/version").json()["bundle"] == before
    for words, said in ((["none"], "there is no bundle"), (["a"], "answers with")):
        done = pillsnap("reload", *words, "--url", served.url, PILL_API_KEY=served.admin)
        assert said in done.stderr + done.stdout, done.stderr
    assert "may not do this" in pillsnap("reload", "a", "--url", served.url, PILL_API_KEY=served.key).stderr


# ---- anything at all


def mutate(photo, random):
    "Break a photo: cut it, turn bits, write over a stretch, repeat one, change its header."
    data, how = bytearray(photo), random.integers(6)
    at = int(random.integers(len(data)))
    if how == 0:
        del data[at:]
    elif how == 1:
        for place in random.integers(0, len(data), random.integers(1, 20)):
            data[place] ^= 1 << int(random.integers(8))
    elif how == 2:
        data[at : at + 64] = random.bytes(64)
    elif how == 3:
        data[at:at] = data[at : at + 512]
    elif how == 4:
        data[8 : 8 + int(random.integers(1, 60))] = random.bytes(int(random.integers(1, 60)))
    else:
        data[16:24] = random.bytes(8)  # width and height of a PNG
    return bytes(data)


def noted(name, mode="RGB"):
    "Make a PNG with a text where a decoder looks for bytes."
    (notes := PngInfo()).add_text(name, "text")
    return photo_bytes("PNG", mode=mode, pnginfo=notes)


def scanned(scans):
    "Make a progressive JPEG whose last scan comes again and again: few bytes, much work."
    photo = photo_bytes("JPEG", (500, 500), progressive=True)
    last = photo[photo.rindex(b"\xff\xda") : -2]
    return photo[:-2] + last * scans + photo[-2:]


ODD = [noted(name, mode) for name in ("xmp", "exif", "transparency") for mode in ("RGB", "L")]
PHOTOS = [photo_bytes("PNG"), photo_bytes("JPEG"), photo_bytes("JPEG", progressive=True), photo_bytes("WEBP"), photo_bytes("BMP"), photo_bytes("PNG", (700, 500))]


def ask_broken(port, key, requests, seed):
    "Send broken photos in whole and broken forms; status → how often."
    random, found, connection = np.random.default_rng(seed), {}, HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(requests):
        body = b'--bb\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + mutate(PHOTOS[random.integers(len(PHOTOS))], random) + b"\r\n--bb--\r\n"
        if random.random() < 0.1:
            body = mutate(body, random)
        path = ["/predict", "/predict?mode=combination", "/v1/analyze"][random.integers(3)]
        connection.request("POST", path, body, {"X-API-Key": key, "Content-Type": "multipart/form-data; boundary=bb"})
        answer = connection.getresponse()
        said = json.loads(answer.read())
        assert answer.status == 200 or set(said) == {"code", "message", "request_id"}
        found[answer.status] = found.get(answer.status, 0) + 1
    return found


def test_broken_photos_are_refused_and_never_an_error_of_ours(served):
    found = ask_broken(served.port, served.key, 400, 1)
    assert set(found) <= {200, 400, 413, 415, 422} and found[200] and found[415] and found[422], found
    assert served.client.post("/predict", files={"image": scanned(200)}).status_code == 422
    told = served.client.post("/batch", files=[("images", photo) for photo in [PHOTOS[0], *ODD, PHOTOS[0]]]).json()["answers"]
    assert len(told) == len(ODD) + 2 and told[0]["status"] == told[-1]["status"] == "ok"  # an odd one costs its own place at most
    assert httpx.post(f"{served.url}/reload", json={"bundle": "한" * 100}, headers={"X-API-Key": served.admin}).status_code == 422
    large = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(large, "PNG")
    assert served.client.post("/predict", files={"image": large.getvalue()}).status_code == 413  # would unpack to 1.2 GB


def check_api(served, examples):
    "Let schemathesis make requests of every operation, good and bad; gives how many."
    schema, count = schemathesis.openapi.from_url(f"{served.url}/openapi.json"), [0]
    checks = CHECKS.get_by_names(["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"])
    for operation in (result.ok() for result in schema.get_all_operations()):
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            @given(case=operation.as_strategy(generation_mode=mode))
            @hypothesis_settings(max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck), phases=[Phase.generate])
            def check(case):
                count[0] += 1
                answer = case.call(headers={"X-API-Key": served.admin})
                case.validate_response(answer, checks=checks)

            try:
                check()
            except Unsatisfiable:
                assert mode == GenerationMode.NEGATIVE and operation.method == "get"  # without parameters there is nothing to get wrong
    return count[0]


def test_the_api_keeps_what_its_description_promises(served):
    assert check_api(served, 15) > 100


@pytest.mark.slow
def test_twenty_thousand_broken_requests(bundles, tmp_path):
    "As a process: no answer of 5xx, and its memory does not grow: in the second half of the requests, after the first has filled the heaps, by less than 5 %."
    keys = tmp_path / "keys.json"
    key, admin = add_key(keys, "app", rate=10**9), add_key(keys, "ops", admin=True, rate=10**9)
    process, url, lines = start(bundles, "--keys", keys)
    served = Served(url.rstrip("/"), key, admin, lines, keys)
    total, sent, memory = int(SLOW or 20_000), 0, []
    try:
        for turn in range(10):
            with ThreadPoolExecutor(4) as pool:
                found = list(pool.map(lambda seed: ask_broken(served.port, key, total // 50, seed), range(4 * turn, 4 * turn + 4)))
            sent += sum(sum(one.values()) for one in found) + check_api(served, total // 300)
            assert not any(status >= 500 for one in found for status in one), found
            memory.append(psutil.Process(process.pid).memory_info().rss / 1e6)
        assert sent >= total * 0.9 and not [line for line in lines if line.get("status", 0) >= 500]
        print(f"\n{sent} requests, MB after each tenth: {[round(mb) for mb in memory]}")
        assert memory[-1] < 1.05 * memory[4], memory
    finally:
        process.terminate()
        process.wait(30)


# ---- the page


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine")
class TestPage:
    @pytest.fixture
    def browser(self):
        browser = Browser(390, 844)
        yield browser
        browser.close()

    def test_a_photo_is_identified_in_both_languages_on_a_phone(self, bundles, tray, browser):
        "Boxes and cards for every pill, nothing asked from elsewhere, no complaint of the browser, nothing wider than the phone."
        with run_beside(make_app(Service(Serving(bundles / "a")), None, log=lambda line: None)) as url:
            browser.open(f"{url}/")
            browser.wait("document.getElementById('about').textContent.includes('12 drugs')")
            browser.choose("#photo", tray)
            browser.wait("!document.getElementById('work').hidden")
            browser.run("document.querySelector('input[value=combination]').click(); document.getElementById('send').click()")
            browser.wait("document.querySelectorAll('.pill').length >= 3")
            assert browser.run("document.querySelectorAll('#boxes .box').length") == browser.run("document.querySelectorAll('.pill').length")
            assert browser.run("document.querySelectorAll('.pill .evidence img').length") > 2 and "K-9000" in browser.run("document.getElementById('answer').textContent")
            browser.run("document.querySelector('[data-language=ko]').click()")
            assert browser.run("document.documentElement.lang") == "ko" and "알약" in browser.run("document.querySelector('.pill h2').textContent")
            assert browser.run("document.documentElement.scrollWidth") <= 390 and browser.complaints == []

    def test_a_drawn_region_is_what_is_looked_at(self, bundles, tray, browser):
        lines = []
        with run_beside(make_app(Service(Serving(bundles / "a")), None, log=lines.append)) as url:
            browser.open(f"{url}/")
            browser.choose("#photo", tray)
            browser.wait("!document.getElementById('work').hidden")
            browser.run("document.getElementById('mark').click(); document.getElementById('photo-frame').scrollIntoView()")
            frame = browser.run("(() => { const r = document.getElementById('photo-frame').getBoundingClientRect(); return [r.left, r.top] })()")
            browser.drag((frame[0] + 60, frame[1] + 90), (frame[0] + 180, frame[1] + 200))
            browser.run("document.getElementById('send').click()")
            browser.wait("document.querySelectorAll('.pill').length == 1")
            x, y, w, h = browser.run("state.answer.pills[0].bbox")
            scale = browser.run("document.getElementById('shown').naturalWidth / document.getElementById('shown').clientWidth")
            assert np.allclose([x, y, w, h], np.array([60, 90, 120, 110]) * scale, atol=2) and not browser.complaints

    def test_an_answer_never_appears_over_another_photo(self, bundles, tray, own, browser):
        "The first photo's answer is held back until the second is chosen: it is thrown away, and the back of another pill is not kept."
        other = next(path for path in sorted((own.work / "synthetic").rglob("*single*/**/*.png")))
        with run_beside(make_app(Service(Serving(bundles / "a")), None, log=lambda line: None)) as url:
            browser.open(f"{url}/")
            browser.run("const ask = window.fetch; window.fetch = (...words) => ask(...words).then((answer) => new Promise((go) => setTimeout(() => go(answer), String(words[0]).startsWith('/predict') ? 1500 : 0)))")
            browser.choose("#photo", tray)
            browser.choose("#back", other)
            browser.wait("state.back && !document.getElementById('work').hidden")
            browser.run("document.getElementById('send').click()")
            browser.choose("#photo", other)
            browser.wait("state.photo.name != " + json.dumps(tray.name))
            time.sleep(2.5)
            assert browser.run("state.answer") is None and browser.run("state.back") is None and browser.run("document.querySelectorAll('.pill').length") == 0
            browser.run("document.getElementById('send').click(); document.getElementById('ask').requestSubmit()")
            browser.wait("document.querySelectorAll('.pill').length == 1")

    def test_a_key_is_asked_for_and_what_goes_wrong_is_said(self, served, browser, tmp_path):
        (tmp_path / "text.png").write_text("no photo")
        browser.open(served.url)
        browser.wait("!document.getElementById('key-row').hidden")
        browser.choose("#photo", tmp_path / "text.png")
        browser.wait("!document.getElementById('work').hidden")
        browser.run("document.getElementById('send').click()")
        browser.wait("document.querySelector('.error') && document.querySelector('.error').textContent.includes('needs a key')")
        browser.run(f"document.getElementById('key').value = {served.key!r}; document.getElementById('send').click()")
        browser.wait("document.querySelector('.error') && document.querySelector('.error').textContent.includes('no picture')")
