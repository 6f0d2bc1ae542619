"use strict";

const TEXTS = {
  en: {
    notice: "A research tool, not a medical device. Never decide on a medicine by its answer: ask a pharmacist.",
    key: "Key of this service", mode: "What is on the photo?", single: "One pill", combination: "Several pills",
    take: "Take or choose a photo", drop: "or drop one here · JPEG, PNG, WebP or BMP, up to 20 MB", back: "The pill's other side (optional)",
    region: "The middle square is looked at. With a box drawn around the pill the answer gets better.", identify: "Identify", mark: "Draw a box", whole: "Take the middle again", remove: "Remove", working: "Looking…",
    known: "Identified", unsure: "Not sure", whySure: "confidence {p} %", whyNot: "This does not look enough like any drug it knows. ",
    only: "If it were one of these, then most likely", evidence: "Most alike among the pills it learned from", alike: "{p} % alike", nothing: "No pill was found on this photo.", pill: "Pill {n}", reads: "Reads {letters}", found: "{n} pills, {k} identified",
    shape: "shape", colour: "colour", imprint: "imprint", item: "permit number", about: "bundle {bundle} · {classes} drugs", took: "{ms} ms", failed: "That did not work.", offline: "The service does not answer. Is it still running?",
    photoAlt: "The photo that was chosen", cropAlt: "Pill {n} on the photo", evidenceAlt: "A training picture of {code}", noKey: "This service needs a key: type it in above.",
  },
  ko: {
    notice: "연구용 도구이며 의료기기가 아닙니다. 이 결과만으로 약을 판단하지 말고 약사에게 확인하세요.",
    key: "서비스 키", mode: "사진에 무엇이 있나요?", single: "알약 한 개", combination: "알약 여러 개",
    take: "사진을 찍거나 고르세요", drop: "또는 여기에 놓으세요 · JPEG, PNG, WebP, BMP, 최대 20 MB", back: "알약의 뒷면 사진 (선택)",
    region: "사진 가운데의 정사각형을 봅니다. 알약 둘레에 상자를 그리면 더 정확합니다.", identify: "식별하기", mark: "상자 그리기", whole: "다시 가운데로", remove: "지우기", working: "보고 있습니다…",
    known: "식별됨", unsure: "확실하지 않음", whySure: "신뢰도 {p} %", whyNot: "아는 약 가운데 충분히 비슷한 것이 없습니다.",
    only: "만약 아는 약 가운데 하나라면", evidence: "학습한 알약 가운데 가장 비슷한 것", alike: "유사도 {p} %", nothing: "이 사진에서 알약을 찾지 못했습니다.", pill: "알약 {n}", reads: "읽은 각인 {letters}", found: "알약 {n}개, 식별 {k}개",
    shape: "모양", colour: "색", imprint: "각인", item: "품목기준코드", about: "번들 {bundle} · 약 {classes}종", took: "{ms} ms", failed: "처리하지 못했습니다.", offline: "서비스가 응답하지 않습니다. 실행 중인지 확인하세요.",
    photoAlt: "고른 사진", cropAlt: "사진 속 알약 {n}", evidenceAlt: "{code}의 학습 사진", noKey: "키가 필요한 서비스입니다. 위에 키를 입력하세요.",
  },
};

const at = (id) => document.getElementById(id);
const state = { language: "en", photo: null, back: null, region: null, answer: null, error: null, about: null, open: true, turn: 0, marking: false };

function say(name, values = {}) {
  return Object.entries(values).reduce((text, [key, value]) => text.replace(`{${key}}`, value), TEXTS[state.language][name]);
}

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(tag, attributes, parent) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  parent.append(made);
  return made;
}

const mode = () => document.querySelector("input[name=mode]:checked").value;
const percent = (p) => (p > 0.999 && p < 1 ? "> 99.9" : (100 * p).toFixed(p > 0.995 && p < 1 ? 1 : 0));

// ---- what is shown

function speak(language) {
  state.language = language;
  document.documentElement.lang = language;
  localStorage.setItem("language", language);
  for (const element of document.querySelectorAll("[data-text]")) element.textContent = say(element.dataset.text);
  for (const button of document.querySelectorAll("[data-language]")) button.setAttribute("aria-pressed", String(button.dataset.language === language));
  at("shown").alt = say("photoAlt");
  showAnswer();
  showAbout();
}

function showAbout() {
  const parts = state.about ? [say("about", { bundle: state.about.bundle, classes: state.about.classes })] : [];
  if (state.answer) parts.push(say("took", { ms: Math.round(Object.values(state.answer.latency_ms).reduce((a, b) => a + b, 0)) }));
  at("about").textContent = parts.join(" · ");
}

function showForm() {
  const single = mode() === "single";
  at("back-row").hidden = !single;
  at("region-hint").hidden = !single || Boolean(state.answer);
  at("photo-frame").classList.toggle("region", single && state.marking);
  at("mark").hidden = !single;
  at("mark").setAttribute("aria-pressed", String(state.marking));
  at("clear").hidden = !single || !state.region;
  at("drop-back").hidden = !state.back;
  at("back-name").textContent = state.back ? state.back.name : "";
  at("send").disabled = state.busy === state.turn;
  at("key-row").hidden = state.open;
}

function showBoxes() {
  const image = at("shown"), boxes = at("boxes");
  boxes.replaceChildren();
  if (!image.naturalWidth) return;
  const width = image.naturalWidth, height = image.naturalHeight, scale = width / Math.max(1, image.clientWidth);
  boxes.setAttribute("viewBox", `0 0 ${width} ${height}`);
  const outline = ([x, y, w, h], kind, label) => {
    for (const cls of ["shade", `box ${kind}`]) draw("rect", { x, y, width: w, height: h, rx: 4 * scale, class: cls }, boxes);
    if (label) {
      const tag = draw("text", { x: x + 5 * scale, y: Math.max(18 * scale, y + 19 * scale), class: "tag" }, boxes);
      tag.textContent = label;
      tag.style.fontSize = `${16 * scale}px`;
      tag.style.strokeWidth = `${4 * scale}px`;
    }
  };
  if (state.answer) state.answer.pills.forEach((pill, i) => outline(pill.bbox, pill.known ? "known" : "unsure", String(i + 1)));
  else if (mode() === "single") {
    const side = Math.min(width, height);
    outline(state.region || [(width - side) / 2, (height - side) / 2, side, side], "asked", "");
  }
}

function showAnswer() {
  const answer = at("answer");
  answer.replaceChildren();
  if (state.error) answer.append(make("div", { className: "error" }, make("strong", { textContent: `${say("failed")} ` }), state.error));
  else if (state.answer) {
    const pills = state.answer.pills;
    if (!pills.length) answer.append(make("p", { textContent: say("nothing") }));
    else if (pills.length > 1) answer.append(make("p", { textContent: say("found", { n: pills.length, k: pills.filter((pill) => pill.known).length }) }));
    pills.forEach((pill, i) => answer.append(showPill(pill, i + 1)));
  }
  showBoxes();
  showForm();
}

function showPill(pill, n) {
  const kind = pill.known ? "known" : "unsure";
  const words = make("div", {}, make("h2", { textContent: say("pill", { n }) }), make("span", { className: `badge ${kind}`, textContent: `${pill.known ? "✓" : "?"} ${say(kind)}` }),
    make("p", { className: "why", textContent: pill.known ? say("whySure", { p: percent(pill.top[0].confidence) }) : say("whyNot") }),
    ...(pill.imprint ? [make("p", { className: "why", textContent: say("reads", { letters: pill.imprint }) })] : []));
  const card = make("article", { className: `pill ${kind}` }, make("div", { className: "head" }, cutPill(pill.bbox, n), words));
  if (!pill.known) card.append(make("p", { className: "subtitle", textContent: say("only") }));
  card.append(make("ol", {}, ...pill.top.slice(0, 3).map((drug, i) => showDrug(drug, i === 0))));
  const pictures = pill.evidence.filter((one) => one.thumbnail);
  if (pictures.length) {
    card.append(make("p", { className: "subtitle", textContent: say("evidence") }), make("div", { className: "evidence" }, ...pictures.map((one) => make("figure", {},
      make("img", { src: one.thumbnail, alt: say("evidenceAlt", { code: one.k_code }) }), make("figcaption", { textContent: `${one.k_code} · ${say("alike", { p: percent(Math.max(0, one.cosine)) })}` })))));
  }
  return card;
}

function showDrug(drug, first) {
  const imprint = [drug.print_front, drug.print_back].filter(Boolean).join(" / ");
  const facts = [["shape", drug.shape], ["colour", [drug.colour1, drug.colour2].filter(Boolean).join(", ")], ["imprint", imprint], ["item", drug.item_seq]].filter(([, value]) => value).map(([name, value]) => `${say(name)} ${value}`);
  const bar = make("i");
  bar.style.width = `${100 * drug.confidence}%`;
  return make("li", { className: `drug${first ? " first" : ""}` }, make("div", { className: "name", textContent: [drug.name, drug.k_code].filter(Boolean).join(" · ") }),
    make("div", { className: "sure" }, make("span", { className: "bar" }, bar), make("span", { textContent: `${percent(drug.confidence)} %` })), make("div", { className: "facts", textContent: facts.join(" · ") }));
}

function cutPill([x, y, w, h], n) {
  const canvas = make("canvas", { width: 144, height: 144 }), side = Math.max(w, h) * 1.15;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", say("cropAlt", { n }));
  canvas.getContext("2d").drawImage(at("shown"), x + w / 2 - side / 2, y + h / 2 - side / 2, side, side, 0, 0, 144, 144);
  return canvas;
}

// ---- what is asked

// what was asked before no longer counts: its answer must not appear over another photo
function change(values) {
  state.turn += 1;
  Object.assign(state, { answer: null, error: null }, values);
}

function chooseBack(file) {
  if (!file) at("back").value = "";
  change({ back: file || null });
  showAnswer();
}

function choosePhoto(file) {
  if (!file) return;
  at("back").value = "";
  change({ photo: file, back: null, region: null, marking: false });
  const image = at("shown"), old = image.src;
  image.onload = () => { at("work").hidden = false; showAnswer(); };
  image.onerror = () => { at("work").hidden = false; showAnswer(); };
  image.src = URL.createObjectURL(file);
  if (old.startsWith("blob:")) URL.revokeObjectURL(old);
}

const headers = () => (state.open ? {} : { "X-API-Key": at("key").value.trim() });

async function identify() {
  if (!state.photo || state.busy === state.turn) return;
  change({});
  const turn = (state.busy = state.turn);
  const form = new FormData(), single = mode() === "single";
  form.append("image", state.photo, state.photo.name || "photo");
  if (single && state.back) form.append("image_back", state.back, state.back.name || "back");
  if (single && state.region) form.append("roi", state.region.map((value) => value.toFixed(1)).join(","));
  showAnswer();
  at("answer").setAttribute("aria-busy", "true");
  at("answer").replaceChildren(make("p", { textContent: say("working") }));
  const found = {};
  try {
    const answer = await fetch(`/predict?mode=${mode()}&thumbnails=true`, { method: "POST", body: form, headers: headers() });
    const told = await answer.json();
    if (answer.ok) found.answer = told;
    else found.error = answer.status === 401 ? say("noKey") : `${told.message} (${told.request_id})`;
    if (answer.ok && !state.open) sessionStorage.setItem("key", at("key").value.trim());
  } catch (error) {
    found.error = say("offline");
  }
  if (turn !== state.turn) return;
  Object.assign(state, found, { busy: 0 });
  at("answer").setAttribute("aria-busy", "false");
  showAnswer();
  showAbout();
  if (!state.about || (state.answer && state.answer.bundle !== state.about.bundle)) learn();
}

async function learn() {
  try {
    const answer = await fetch("/version", { headers: headers() });
    if (answer.status === 401) state.open = false;
    else if (answer.ok) {
      state.about = await answer.json();
      at("combination").hidden = !state.about.modes.includes("combination");
    }
  } catch (error) { /* the next question says so */ }
  showForm();
  showAbout();
}

// ---- a region, drawn with a finger or a mouse

function place(event) {
  const image = at("shown"), frame = image.getBoundingClientRect(), scale = image.naturalWidth / frame.width;
  return [Math.min(Math.max(0, event.clientX - frame.left), frame.width) * scale, Math.min(Math.max(0, event.clientY - frame.top), frame.height) * scale];
}

function drawRegion(event) {
  if (mode() !== "single" || !state.photo || !state.marking) return;
  event.preventDefault();
  const frame = at("photo-frame"), [x0, y0] = place(event);
  frame.setPointerCapture(event.pointerId);
  frame.onpointermove = (move) => {
    const [x, y] = place(move), box = [Math.min(x, x0), Math.min(y, y0), Math.abs(x - x0), Math.abs(y - y0)];
    if (Math.min(box[2], box[3]) < 8) return;
    change({ region: box });
    showAnswer();
  };
  frame.onpointerup = frame.onpointercancel = () => { frame.onpointermove = null; };
}

function start() {
  at("key").value = sessionStorage.getItem("key") || "";
  for (const button of document.querySelectorAll("[data-language]")) button.onclick = () => speak(button.dataset.language);
  at("photo").onchange = (event) => choosePhoto(event.target.files[0]);
  at("back").onchange = (event) => chooseBack(event.target.files[0]);
  at("drop-back").onclick = () => chooseBack(null);
  at("mark").onclick = () => { state.marking = !state.marking; showForm(); };
  at("key").onchange = learn;
  at("ask").onsubmit = (event) => { event.preventDefault(); identify(); };
  at("send").onclick = identify;
  at("clear").onclick = () => { change({ region: null }); showAnswer(); };
  for (const radio of document.querySelectorAll("input[name=mode]")) radio.onchange = () => { change({}); showAnswer(); };
  const drop = at("drop");
  for (const name of ["dragenter", "dragover"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add("over"); });
  for (const name of ["dragleave", "drop"]) drop.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove("over"); });
  drop.addEventListener("drop", (event) => choosePhoto(event.dataTransfer.files[0]));
  at("photo-frame").addEventListener("pointerdown", drawRegion);
  window.addEventListener("resize", showBoxes);
  speak(localStorage.getItem("language") || (navigator.language.startsWith("ko") ? "ko" : "en"));
  learn();
}

start();
