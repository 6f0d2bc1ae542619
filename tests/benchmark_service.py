"""The service beside a naive one (FastAPI, Pillow, numpy, session.run) and beside the bare pipeline: same bundle, same photos, same client, one run, by turns.

    .venv/bin/python tests/benchmark_service.py [--bundle FOLDER] [--rounds 3] [--requests 200]
"""
import argparse
import http.client
import io
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pillsnap.core  # noqa: F401  before torch and the like
import cv2
import numpy as np
import pandas as pd
from PIL import Image

from pillsnap.bundle import open_bundle
from pillsnap.core import load_settings, read_json

HERE = Path(__file__).resolve()
SHAPE = (976, 1280)  # px, of a studio photo
CLIENTS = 16


def naive_app(bundle: Path, blocking: bool):
    "What a tutorial writes: one photo in, one session.run for each pill; `blocking` works inside the event loop, as `async def` endpoints do."
    import onnxruntime as ort
    from fastapi import FastAPI, UploadFile

    answer = read_json(bundle / "answer.json")
    classes, size, square = answer["classes"], answer["preprocess"]["size"], answer["detector"]["size"]
    classifier, detector = (ort.InferenceSession(str(bundle / f"{name}.onnx"), providers=["CPUExecutionProvider"]) for name in ("classifier", "detector"))
    app = FastAPI()

    def name_pill(picture: Image.Image) -> dict:
        crop = np.asarray(picture.resize((size, size)))[None]
        logits = classifier.run(["logits"], {"crops": crop})[0][0]
        p = np.exp(logits - logits.max())
        p /= p.sum()
        return {"top": [[classes[i], float(p[i])] for i in np.argsort(-p)[:5]]}

    def find(picture: Image.Image) -> list:
        k = square / max(picture.size)
        small = picture.resize((round(picture.width * k), round(picture.height * k)))
        canvas = Image.new("RGB", (square, square), (114, 114, 114))
        canvas.paste(small, (0, 0))
        raw = detector.run(["boxes"], {"squares": np.asarray(canvas)[None]})[0][0].T
        kept = []
        for cx, cy, w, h, score in sorted((row for row in raw if row[4] > answer["detector"]["threshold"]), key=lambda row: -row[4]):
            box = cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2
            if all(overlap(box, other) < 0.5 for other in kept):
                kept.append(box)
        return [[float(v / k) for v in box] for box in kept]

    def overlap(a, b) -> float:
        w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
        shared = max(0, w) * max(0, h)
        return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)

    def look(data: bytes, mode: str) -> dict:
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        if mode == "single":
            side, (w, h) = min(picture.size), picture.size
            return {"pills": [name_pill(picture.crop(((w - side) // 2, (h - side) // 2, (w + side) // 2, (h + side) // 2)))]}
        return {"pills": [{"bbox": box, **name_pill(picture.crop(tuple(map(int, box))))} for box in find(picture)]}

    if blocking:
        @app.post("/predict")
        async def predict(image: UploadFile, mode: str = "single"):
            return look(await image.read(), mode)
    else:
        @app.post("/predict")
        def predict(image: UploadFile, mode: str = "single"):
            return look(image.file.read(), mode)

    return app


def start(words: list[str]) -> tuple[subprocess.Popen, int]:
    "Start a server and read its port."
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=HERE.parent.parent)
    for line in process.stdout:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            ThreadPoolExecutor(1).submit(process.stdout.read)  # its log is thrown away
            return process, int(found[1])
    raise SystemExit(f"{words} did not start")


BOUNDARY = b"----WebKitFormBoundary7MA4YWxkTrZu0gW"  # as long as a browser's


def make_body(photo: bytes) -> tuple[bytes, dict]:
    head = b'Content-Disposition: form-data; name="image"; filename="photo"\r\n\r\n'
    return b"--" + BOUNDARY + b"\r\n" + head + photo + b"\r\n--" + BOUNDARY + b"--\r\n", {"Content-Type": f"multipart/form-data; boundary={BOUNDARY.decode()}"}


def ask(port: int, photo: bytes, mode: str, requests: int, clients: int) -> tuple[float, list[float], dict]:  # requests/s, ms of each, the last answer
    "Ask as so many clients do, each on a connection of its own."
    body, headers = make_body(photo)

    def client(count: int) -> tuple[list[float], dict]:
        connection, times = http.client.HTTPConnection("127.0.0.1", port), []
        for _ in range(count):
            begun = time.perf_counter()
            connection.request("POST", f"/predict?mode={mode}", body, headers)
            answer = connection.getresponse()
            said = answer.read()
            assert answer.status == 200, said
            times.append(1000 * (time.perf_counter() - begun))
        return times, json.loads(said)

    begun = time.perf_counter()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(client, [requests // clients] * clients))
    return requests // clients * clients / (time.perf_counter() - begun), [t for times, _ in found for t in times], found[0][1]


def enlarge(path: Path, kind: str) -> bytes:
    "Make a studio photo of a drawn one, with the noise of a sensor, so that it packs like one."
    photo = cv2.resize(np.asarray(Image.open(path).convert("RGB")), SHAPE, interpolation=cv2.INTER_CUBIC)
    noisy = np.clip(photo + np.random.default_rng(0).normal(0, 3, photo.shape), 0, 255).astype(np.uint8)
    Image.fromarray(noisy).save(file := io.BytesIO(), kind, **({"quality": 90} if kind == "JPEG" else {}))
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--bundle", default=str(load_settings().work / "bundles/latest"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--naive", choices=("threads", "blocking"))
    given = parser.parse_args()
    if given.naive:
        import uvicorn
        return uvicorn.run(naive_app(Path(given.bundle), given.naive == "blocking"), port=int(os.environ.get("PORT", 0)), access_log=False)

    drawn = load_settings().work / "synthetic"
    tray = next(path for path in sorted(drawn.rglob("*_2_0_2_90_000_200.png")) if len(path.name.split("_")[0].split("-")) == 5)
    photos = {"one pill, PNG": (enlarge(next(drawn.rglob("*single*/**/*.png")), "PNG"), "single"), "one pill, JPEG": (enlarge(next(drawn.rglob("*single*/**/*.png")), "JPEG"), "single"),
              "four pills, PNG": (enlarge(tray, "PNG"), "combination"), "four pills, JPEG": (enlarge(tray, "JPEG"), "combination")}
    servers = {"ours": start(["-c", "from pillsnap.cli import main; main()", "serve", "--insecure-localhost", "--port", "0", "--bundle", given.bundle]),
               **{f"naive, {kind}": start([str(HERE), "--naive", kind, "--bundle", given.bundle]) for kind in ("threads", "blocking")}}
    bundle, rows = open_bundle(Path(given.bundle), threads=1), []
    try:
        for server, (_, port) in servers.items():
            for photo, mode in photos.values():
                _, _, said = ask(port, photo, mode, 2 * CLIENTS, CLIENTS)
            print(server, "finds", len(said["pills"]), "pills on the tray", file=sys.stderr)
        for turn in range(given.rounds):
            for what, (photo, mode) in photos.items():
                begun = time.perf_counter()
                for _ in range(given.requests // 4):
                    bundle([photo], mode)
                rows.append({"photo": what, "server": "bare pipeline", "clients": 1, "turn": turn, "rate": given.requests // 4 / (time.perf_counter() - begun)})
                for server, (_, port) in servers.items():
                    for clients in (1, CLIENTS):
                        rate, times, _ = ask(port, photo, mode, given.requests // (4 if clients == 1 else 1), clients)
                        rows.append({"photo": what, "server": server, "clients": clients, "turn": turn, "rate": rate, "p50_ms": np.quantile(times, 0.5), "p95_ms": np.quantile(times, 0.95)})
    finally:
        for process, _ in servers.values():
            process.terminate()
    table = pd.DataFrame(rows)
    print(table.groupby(["photo", "clients", "server"], sort=False)[["rate", "p50_ms", "p95_ms"]].median().round(1).to_string())
    rates = table.pivot_table(index=["photo", "clients", "turn"], columns="server", values="rate", sort=False)
    for name in [name for name in rates if name != "ours"]:
        ratio = (rates["ours"] / rates[name]).dropna().groupby(["photo", "clients"], sort=False)
        print(f"\nours, times as many a second as {name}: median, least and most of {given.rounds} rounds")
        print(ratio.agg(["median", "min", "max"]).round(2).to_string())


if __name__ == "__main__":
    main()
