"use strict";
const $ = (id) => document.getElementById(id);
const put = (id, text) => { $(id).textContent = text; };
const count = (n) => n.toLocaleString("en");
const mb = (n) => { const v = n / 1e6; return v >= 100 ? v.toFixed(0) : v >= 1 ? v.toFixed(1) : v.toFixed(2); };
const size = (n) => { let i = 0; while (n >= 1000 && i < 4) { n /= 1000; i++; } return n.toFixed(i ? 1 : 0) + " " + ["B", "kB", "MB", "GB", "TB"][i]; };
const time = (us) => us === 0 ? "–" : us < 1000 ? us.toFixed(0) + " µs" : us < 1e6 ? (us / 1000).toFixed(us < 1e4 ? 2 : 1) + " ms" : (us / 1e6).toFixed(2) + " s";
const span = (s) => s < 60 ? s + " s" : s < 3600 ? Math.floor(s / 60) + " min" : Math.floor(s / 3600) + " h " + Math.floor(s % 3600 / 60) + " min";
function spark(id, values) {
  const top = Math.max(1, ...values), n = values.length - 1;
  const points = values.map((v, i) => (i * 118 / n).toFixed(1) + " " + (27 - 25 * v / top).toFixed(1));
  $(id).firstElementChild.setAttribute("d", "M-2 29L-2 27L" + points.join("L") + "L120 29Z");
}
function el(tag, text, cls) {
  const e = document.createElement(tag);
  if (text !== undefined) e.textContent = text;
  if (cls) e.className = cls;
  return e;
}
function device(d) {
  const box = el("article"), head = el("h3"), list = el("dl");
  const ok = d.state === "Connected" && d.backend_state === "Connected";
  head.append(el("span", d.name), el("span", ok ? "Connected" : d.state + " / " + d.backend_state, ok ? "pill" : "pill wait"));
  for (const [name, value] of d.features) list.append(el("dt", name), el("dd", value));
  if (d.reattached) list.append(el("dt", "attached again"), el("dd", d.reattached + "×"));
  box.append(head, list);
  return box;
}
function mark(cls, d, busy) {
  const g = document.querySelector("#way ." + cls);
  g.classList.toggle("down", !!d && (d.state !== "Connected" || d.backend_state !== "Connected"));
  g.classList.toggle("busy", busy);
}
function show(s) {
  const note = $("note");
  note.hidden = !s.fs_error;
  if (s.fs_error) note.textContent = s.fs_error;
  put("fs", s.fs ? "· " + s.fs.kind + (s.fs.label ? " “" + s.fs.label + "”" : "") + ", " + size(s.fs.size) : "");
  put("wayfs", s.fs ? s.fs.kind : "file system");
  put("up", "· up " + span(s.uptime_s));
  put("rps", count(s.http.per_second)); put("req", count(s.http.total));
  put("con", s.connections + " of " + s.connections_max);
  put("mbs", mb(s.http.bytes_per_second)); put("sent", size(s.http.total_bytes));
  put("dmbs", mb(s.disk.bytes_per_second)); put("dreads", count(s.disk.total));
  spark("s-rps", s.http.history); spark("s-mbs", s.http.history_bytes); spark("s-dmbs", s.disk.history_bytes);
  for (const [k, l] of [["h", s.http.latency], ["d", s.disk.latency]])
    for (const q of ["50", "90", "99"]) put(k + q, time(l["p" + q]));
  put("hmax", time(s.http.latency.max)); put("dmax", time(s.disk.latency.max));
  const box = $("devices");
  box.replaceChildren(...(s.devices.length ? s.devices.map(device) : [el("p", "none attached", "off")]));
  mark("disk", s.devices.find((d) => d.kind === "disk"), s.disk.per_second > 0);
  mark("nic", s.devices.find((d) => d.kind === "nic"), s.http.per_second > 0);
}
async function turn() {
  try {
    const r = await fetch("/.pvio/status.json", { cache: "no-store", signal: AbortSignal.timeout(4000) });
    show(await r.json());
  } catch {
    $("note").hidden = false;
    put("note", "The guest does not answer; what stands here is from before.");
  }
  setTimeout(turn, 1000);
}
turn();
