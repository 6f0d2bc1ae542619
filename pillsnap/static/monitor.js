"use strict";

const at = (id) => document.getElementById(id);
const COLOURS = ["#3b6fb6", "#e08a1e", "#2f9e6e", "#b5489a"];
const state = { source: "", offset: 0, socket: null, run: null, beside: null, machine: null, following: true, wait: 500, heard: 0, toldAt: 0 };

function make(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}

function draw(tag, attributes, parent, text) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  if (text !== undefined) made.textContent = text;
  parent.append(made);
  return made;
}

// ---- the terminal

const terminal = new Terminal({ convertEol: true, scrollback: 50000, fontSize: 13, disableStdin: true, allowProposedApi: true, theme: { background: "#10131a" } });
const fit = new FitAddon.FitAddon(), search = new SearchAddon.SearchAddon();

const COLUMNS = 120; // a narrow window scrolls sideways: bars that were drawn for this width would wrap

function fitTerminal() {
  const size = fit.proposeDimensions();
  if (size) terminal.resize(Math.max(COLUMNS, size.cols), size.rows);
}

function follow(on) {
  state.following = on;
  at("follow").setAttribute("aria-pressed", String(on));
  at("follow").textContent = on ? "Following" : "Paused";
  if (on) terminal.scrollToBottom();
}

function showLog(buffer) {
  const reached = Number(new DataView(buffer).getBigUint64(0)), socket = state.socket;
  terminal.write(new Uint8Array(buffer, 8), () => {
    if (socket !== state.socket) return;
    state.offset = reached; // what is drawn, and no more: from here a lost line goes on
    if (socket.readyState === 1) socket.send(String(reached));
    if (state.following) terminal.scrollToBottom();
    showBytes();
  });
}

const clear = () => terminal.write("\x1bc"); // in its turn, behind what is still to be drawn

function showBytes() {
  at("bytes").textContent = `${(state.offset / 1e6).toFixed(state.offset < 1e6 ? 3 : 1)} MB`;
}

// ---- what the run says

const number = (value, digits = 3) => (value === null || value === undefined ? "not measured" : Math.abs(value) >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits))));

function span(seconds) {
  if (seconds === null || seconds === undefined) return "not known yet";
  const s = Math.round(seconds), parts = [[Math.floor(s / 3600), "h"], [Math.floor(s / 60) % 60, "min"], [s % 60, "s"]].filter(([value]) => value);
  return parts.slice(0, 2).map(([value, unit]) => `${value} ${unit}`).join(" ") || "0 s";
}

function tellModel(name, model) {
  if (!model) return [];
  const now = model.now ? `epoch ${model.now.epoch} of ${model.epochs}, step ${model.now.step} of ${model.now.steps}` : `${model.done} of ${model.epochs} epochs`;
  const last = model.curve[model.curve.length - 1], rate = model.now ? model.now.images_per_s : last && last.images_per_s;
  const facts = [[name, now], [`${name}: images a second`, number(rate)]];
  if (model.done < model.epochs) facts.push([`${name}: time left`, state.run.alive && !model.over ? span(model.left_s) : "–"]);
  if (last && last.size) facts.push([`${name}: size, batch`, `${last.size} px, ${last.batch}`]);
  return facts;
}

function showFacts() {
  const facts = [], run = state.run, machine = state.machine;
  if (run) facts.push(...tellModel("classifier", run.classifier), ...tellModel("detector", run.detector), ["device", run.device || "not known"], ["last word", run.age_s === null ? "none yet" : `${span(run.age_s + (Date.now() - state.toldAt) / 1000)} ago`], ["advice", run.advice ? run.advice.decision : "not evaluated"]);
  if (machine && machine.error) facts.push(["machine", `not measured: ${machine.error}`]);
  if (machine && machine.memory_gb) {
    facts.push(["processor", machine.cpu === null ? "not measured yet" : `${number(machine.cpu)} % of ${machine.cores} cores`], ["memory", `${machine.memory_gb[0]} of ${machine.memory_gb[1]} GB`], ["disk", `${machine.disk_gb[0]} of ${machine.disk_gb[1]} GB`]);
    for (const gpu of machine.gpus || [null]) facts.push(["GPU", gpu ? `${gpu.name}: ${number(gpu.use)} %, ${gpu.memory_gb ? gpu.memory_gb.join(" of ") : "?"} GB, ${number(gpu.celsius)} °C` : "not measured"]);
  }
  at("facts").replaceChildren(...facts.map(([name, value]) => make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value }))));
}

const pick = (rows, names) => names.map((name) => rows.filter((row) => Number.isFinite(row[name])).map((row) => [row.epoch, row[name]]));

function plot(title, rows, names, others = []) {
  const width = 320, height = 130, left = 40, bottom = 18, figure = make("figure", {}, make("figcaption", { textContent: title }));
  const lines = pick(rows, names), dashed = pick(others, names), points = [...lines, ...dashed].flat();
  if (!points.length) return make("figure", {}, make("figcaption", { textContent: title }), make("p", { className: "none", textContent: "not measured yet" }));
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${title}: ${names.join(", ")}` }, figure);
  const xs = points.map(([value]) => value), ys = points.map(([, value]) => value);
  const [x0, x1] = [Math.min(...xs), Math.max(...xs, Math.min(...xs) + 1)], [y0, y1] = [Math.min(...ys, Math.min(...ys) >= 0 ? 0 : Infinity), Math.max(...ys) || 1];
  const px = (value) => left + ((value - x0) / (x1 - x0)) * (width - left - 8), py = (value) => height - bottom - ((value - y0) / (y1 - y0 || 1)) * (height - bottom - 8);
  for (const value of [y0, (y0 + y1) / 2, y1]) {
    draw("line", { x1: left, x2: width - 8, y1: py(value), y2: py(value), class: "axis" }, svg);
    draw("text", { x: left - 4, y: py(value) + 3, "text-anchor": "end", class: "tick" }, svg, number(value, 2));
  }
  for (const value of [x0, x1]) draw("text", { x: px(value), y: height - 4, "text-anchor": "middle", class: "tick" }, svg, String(value));
  dashed.forEach((line, i) => draw("polyline", { points: line.map(([a, b]) => `${px(a)},${py(b)}`).join(" "), fill: "none", stroke: COLOURS[i], "stroke-width": 1.4, "stroke-dasharray": "4 3", opacity: 0.75 }, svg));
  lines.forEach((line, i) => {
    draw("polyline", { points: line.map(([a, b]) => `${px(a)},${py(b)}`).join(" "), fill: "none", stroke: COLOURS[i], "stroke-width": 1.8 }, svg);
    if (line.length === 1) draw("circle", { cx: px(line[0][0]), cy: py(line[0][1]), r: 2.5, fill: COLOURS[i] }, svg);
  });
  const legend = make("div", { className: "legend" });
  names.forEach((name, i) => {
    const mark = make("i");
    mark.style.background = COLOURS[i];
    const last = lines[i][lines[i].length - 1], other = dashed[i][dashed[i].length - 1];
    legend.append(make("span", {}, mark, `${name} ${last ? number(last[1]) : "not measured"}${other ? `, beside ${number(other[1])}` : ""}`));
  });
  figure.append(legend);
  return figure;
}

const CURVES = { classifier: [["Classifier: loss", "train_loss", "val_loss"], ["Classifier: validation", "val_top1", "val_macro_f1"], ["Classifier: size and batch", "size", "batch"], ["Classifier: images a second", "images_per_s"]],
  detector: [["Detector: loss", "train_box_loss", "train_cls_loss", "train_dfl_loss"], ["Detector: validation", "val_map50", "val_map50_95"], ["Detector: images a second", "images_per_s"]] };

function showCurves() {
  const figures = [], curve = (run, model) => (run && run[model] ? run[model].curve : []);
  for (const [model, plots] of Object.entries(CURVES)) {
    if (!state.run[model] && !(state.beside && state.beside[model])) continue;
    for (const [title, ...names] of plots) figures.push(plot(title, curve(state.run, model), names, curve(state.beside, model)));
  }
  at("curves").replaceChildren(...figures);
}

function table(names, rows, empty) {
  if (!rows.length) return make("p", { className: "none", textContent: empty });
  return make("table", {}, make("tr", {}, ...names.map((name) => make("th", { textContent: name }))), ...rows.map((row) => make("tr", {}, ...row.map((value) => make("td", { textContent: value })))));
}

function showRun() {
  const run = state.run, words = at("state");
  words.textContent = run.stalled ? `${run.stage}/${run.run}: running, but silent for ${span(run.age_s)}` : `${run.stage}/${run.run}: ${run.state}`;
  words.className = `state ${run.stalled ? "stalled" : run.alive ? "running" : run.state === "complete" ? "" : "failed"}`;
  showCurves();
  showFailure(run.failure);
  showAdvice(run.advice);
  const other = state.beside, others = Object.fromEntries((other ? other.gates : []).map((gate) => [gate.name, gate.value])), told = (value) => (value === null || value === undefined ? "not measured" : number(value, 5));
  at("gates").replaceChildren(table(["gate", "value", ...(other ? [`beside: ${other.run}`] : []), "target", ""], run.gates.map((gate) => [gate.name, told(gate.value), ...(other ? [told(others[gate.name])] : []), number(gate.target, 5), gate.passed === null ? "not measured" : gate.passed ? "passed" : "FAILED"]), "not evaluated yet"));
  at("events").replaceChildren(table(["after", "event", "what"], run.events.map((event) => [event.at, event.event, event.what]), "nothing yet"));
}

function showFailure(failure) {
  at("failure").hidden = !failure;
  if (!failure) return;
  const line = (name, ...children) => make("p", {}, make("strong", { textContent: `${name}: ` }), ...children);
  at("failure").replaceChildren(line("Likely cause", failure.cause), ...failure.facts.map((fact) => make("p", { className: "soft", textContent: fact })), line("Remedy", failure.remedy), line("To go on", make("code", { textContent: failure.go_on })));
}

function showAdvice(advice) {
  if (!advice) return at("advice").replaceChildren(make("p", { className: "none", textContent: "not evaluated yet" }));
  at("advice").replaceChildren(make("p", {}, make("span", { className: `decision ${advice.decision}`, textContent: advice.decision }), ` (confidence ${number(advice.confidence, 2)}); the person decides`), ...advice.reasons.map((reason) => make("p", { textContent: reason })), ...advice.commands.map((command) => make("p", {}, make("code", { textContent: command }))));
}

// ---- the line

function tellLine(words, kind) {
  at("line").textContent = words;
  at("line").className = `badge ${kind}`;
}

function open(source, offset) {
  if (state.socket) state.socket.onclose = state.socket.onmessage = null, state.socket.close();
  if (source !== state.source || !offset) clear();
  if (source !== state.source) forgetRun();
  Object.assign(state, { source, offset, heard: Date.now() });
  const socket = (state.socket = new WebSocket(`${location.protocol === "https:" ? "wss" : "ws"}://${location.host}/ws`));
  socket.binaryType = "arraybuffer";
  socket.onopen = () => socket.send(JSON.stringify({ key: sessionStorage.getItem("monitor-key") || "", source: state.source, offset: state.offset }));
  socket.onmessage = (message) => { state.heard = Date.now(); tellLine("live", "live"); hear(message.data); };
  socket.onclose = (event) => {
    at("key-row").hidden = event.code !== 4401;
    if (event.code === 4401) return tellLine("a key is needed", "gone");
    tellLine(event.code >= 4400 ? event.reason : "the monitor does not answer; trying again", "gone");
    if (event.code !== 4403) setTimeout(() => state.socket === socket && open(state.source, state.offset), state.wait);
    state.wait = Math.min(5000, 2 * state.wait);
  };
}

function forgetRun() {
  state.run = null;
  at("state").textContent = "–";
  at("state").className = "state";
  at("failure").hidden = true;
  for (const id of ["curves", "gates", "events", "advice"]) at(id).replaceChildren();
}

function showSources(sources) {
  const beside = at("beside").value === state.source ? "" : at("beside").value, runs = sources.filter((one) => one.run && one.name !== state.source);
  const option = (one, chosen) => make("option", { value: one.name, textContent: `${one.name} · ${one.state}`, selected: one.name === chosen });
  const listed = (ones, chosen) => (!chosen || ones.some((one) => one.name === chosen) ? ones : [...ones, { name: chosen, state: "no longer listed" }]).map((one) => option(one, chosen));
  at("source").replaceChildren(...listed(sources, state.source));
  at("beside").replaceChildren(make("option", { value: "", textContent: "nothing" }), ...listed(runs, beside));
}

function compare() {
  if (state.socket && state.socket.readyState === 1) state.socket.send(`beside ${at("beside").value}`);
}

function hear(data) {
  if (data instanceof ArrayBuffer) return showLog(data);
  const told = JSON.parse(data);
  if (told.type === "anew") { clear(); state.offset = 0; }
  if (told.type === "sources") {
    state.wait = 500;
    state.source = told.source;
    showSources(told.sources);
    compare();
    const run = told.sources.some((one) => one.name === told.source && one.run);
    if (!run) { forgetRun(); at("state").textContent = told.source || "nothing to watch yet"; }
  }
  if (told.type === "list") showSources(told.sources);
  if (told.type === "run") { state.run = told; state.toldAt = Date.now(); showRun(); }
  if (told.type === "beside") { state.beside = told.run ? told : null; if (state.run) showRun(); }
  if (told.type === "error") { forgetRun(); at("state").textContent = told.message; at("state").className = "state failed"; }
  if (told.type === "machine") state.machine = told;
  showFacts();
}

function start() {
  terminal.loadAddon(fit);
  terminal.loadAddon(search);
  terminal.open(at("terminal"));
  fitTerminal();
  window.addEventListener("resize", fitTerminal);
  at("follow").onclick = () => follow(!state.following);
  at("terminal").addEventListener("wheel", (event) => event.deltaY < 0 && follow(false), { passive: true });
  for (const name of ["touchmove", "pointerdown"]) at("terminal").addEventListener(name, () => follow(false), { passive: true });
  at("terminal").addEventListener("keydown", (event) => ["PageUp", "Home", "ArrowUp"].includes(event.key) && follow(false), true);
  const find = (back) => { const words = at("search").value; if (words) { follow(false); search[back ? "findPrevious" : "findNext"](words); } };
  at("search").onkeydown = (event) => { if (event.key === "Enter") { event.preventDefault(); find(event.shiftKey); } };
  at("next").onclick = () => find(false);
  at("previous").onclick = () => find(true);
  at("beside").onchange = compare;
  at("source").onchange = () => open(at("source").value, 0);
  at("key-row").onsubmit = (event) => { event.preventDefault(); sessionStorage.setItem("monitor-key", at("key").value.trim()); open(state.source, state.offset); };
  setInterval(() => { if (state.socket && state.socket.readyState === 1 && Date.now() - state.heard > 5000) tellLine("silent", "gone"); if (state.socket && state.socket.readyState === 1 && Date.now() - state.heard > 12000) open(state.source, state.offset); showFacts(); }, 1000);
  open("", 0);
}

start();
